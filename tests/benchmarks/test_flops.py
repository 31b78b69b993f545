"""The flop counter of the benchmarks agrees with pencil and paper on programs small enough for both."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.harness import nbytes
from benchmarks.speed.contenders import CONTENDERS
from benchmarks.trees import TREES, hidden, make_params
from experiments.flops import count_matmul_flops

X = jax.ShapeDtypeStruct((8, 8), jnp.float32)
PRODUCT = 2 * 8**3


def powers(times: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda x: lax.fori_loop(0, times, lambda _, y: y @ x, x)


def counted_by_twos(x: jax.Array) -> jax.Array:
    """Counter and bound are both carried; 1, 3, 5, 7, 9 are below 10."""
    return lax.while_loop(lambda s: s[0] < s[2], lambda s: (s[0] + 2, s[1] @ x, s[2]), (1, x, 10))[1]


@jax.custom_jvp
def with_jvp(x: jax.Array) -> jax.Array:
    return x @ x


@jax.custom_vjp
def with_vjp(x: jax.Array) -> jax.Array:
    return x @ x


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), primals[0] @ tangents[0] @ primals[0]))
with_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x @ x,))


PROGRAMS = {
    "one product": (lambda x: x @ x, 1),
    "none": (lambda x: x + x.T, 0),
    "two": (lambda x: x @ x @ x, 2),
    "batched": (lambda x: jax.vmap(jnp.matmul)(jnp.stack([x, x]), jnp.stack([x, x])), 2),
    "nested jit": (jax.jit(lambda x: jax.jit(lambda y: y @ y)(x) @ x), 2),
    "scan": (lambda x: lax.scan(lambda y, _: (y @ x, None), x, length=7)[0], 7),
    "scan in scan": (lambda x: lax.scan(lambda y, _: (powers(3)(y), None), x, length=2)[0], 6),
    "map": (lambda x: lax.map(lambda s: s * x @ x, jnp.arange(5.0)), 5),
    "fori_loop": (powers(4), 4),
    "fori_loop of none": (powers(0), 0),
    "while counted by twos": (counted_by_twos, 5),
    "remat": (jax.checkpoint(lambda x: x @ x), 1),
    "custom_jvp": (with_jvp, 1),
    "custom_vjp": (with_vjp, 1),
    "gradient": (jax.grad(lambda x: (x @ x).sum()), 3),
}


@pytest.mark.parametrize(("program", "products"), PROGRAMS.values(), ids=PROGRAMS.keys())
def test_products_of_eight_by_eight_matrices(program: Callable[..., Any], products: int) -> None:
    count = count_matmul_flops(program, X)
    assert (count.most, count.least, count.unread_loops) == (products * PRODUCT, products * PRODUCT, ())


def test_a_rectangular_product_and_a_contraction_over_two_axes() -> None:
    a, b = jax.ShapeDtypeStruct((3, 5, 7), jnp.float32), jax.ShapeDtypeStruct((5, 7, 2), jnp.float32)
    assert count_matmul_flops(lambda a, b: jnp.tensordot(a, b, 2), a, b).most == 2 * 3 * 5 * 7 * 2
    assert count_matmul_flops(lambda a, b: jnp.einsum("bij,ijk->bk", a, b), a, b).most == 2 * 3 * 5 * 7 * 2


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (2, 1)])
def test_a_convolution_counts_its_kernel_at_every_output(groups: int, stride: int) -> None:
    images = jax.ShapeDtypeStruct((4, 10, 10, 6), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 6 // groups, 8), jnp.float32)

    def convolve(x: jax.Array, k: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return lax.conv_general_dilated(x, k, strides, "SAME", dimension_numbers=layout, feature_group_count=groups)

    outputs = 4 * (10 // stride) ** 2 * 8
    assert count_matmul_flops(convolve, images, kernel).most == 2 * outputs * 3 * 3 * 6 // groups


def test_branches_are_counted_apart() -> None:
    count = count_matmul_flops(lambda i, x: lax.switch(i, [lambda x: x, powers(1), powers(3)], x) @ x, 0, X)
    (switch,) = count.branches
    assert [branch.most // PRODUCT for branch in switch.alternatives] == [0, 1, 3]
    assert (count.products, count.least, count.most) == (PRODUCT, PRODUCT, 4 * PRODUCT)


def test_a_branch_in_a_loop_is_decided_each_time() -> None:
    def body(y: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return lax.cond(i % 2 == 0, powers(2), powers(1), y), None

    count = count_matmul_flops(lambda x: lax.scan(body, x, jnp.arange(6))[0], X)
    assert (count.least, count.most) == (6 * PRODUCT, 12 * PRODUCT)


def test_a_loop_of_unknown_length_counts_once_and_says_so() -> None:
    count = count_matmul_flops(lambda n, x: powers(n)(x), 3, X)
    assert count.most == PRODUCT
    assert len(count.unread_loops) == 1
    growing = count_matmul_flops(lambda x: lax.while_loop(lambda y: y.sum() < 1e3, lambda y: y @ x, x), X)
    assert (growing.most, len(growing.unread_loops)) == (PRODUCT, 1)


def test_factorisations_are_listed_by_name_and_shape() -> None:
    count = count_matmul_flops(lambda x: lax.scan(lambda y, _: (jnp.linalg.qr(y)[0] @ x, None), x, length=3), X)
    assert (count.factorisations, count.most) == ({"qr (8, 8)": 3}, 3 * PRODUCT)
    cholesky = count_matmul_flops(lambda x: jnp.linalg.cholesky(jnp.stack([x, x])), X)
    assert cholesky.factorisations == {"cholesky (2, 8, 8)": 1}


def test_the_step_between_refreshes_is_the_costliest_that_factorises_nothing() -> None:
    """The shape of an optimizer's step: skip it, or take it and perhaps refresh, with two products more."""

    def refresh(x: jax.Array) -> jax.Array:
        return jnp.linalg.qr(powers(2)(x))[0]

    def step(x: jax.Array) -> jax.Array:
        return lax.cond(x[0, 0] > 1, refresh, lambda x: x, powers(3)(x))

    count = count_matmul_flops(lambda x: lax.cond(jnp.isfinite(x).all(), step, lambda x: x, x), X)
    assert (count.least, count.most_without_factorisations, count.most) == (0, 3 * PRODUCT, 5 * PRODUCT)
    assert count_matmul_flops(jnp.linalg.qr, X).most_without_factorisations is None


def test_shard_map_counts_every_devices_share() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert count_matmul_flops(rows, X, X).most == PRODUCT


def test_the_benchmarks_trees_have_the_sizes_of_the_models_they_stand_for() -> None:
    """Twelve square blocks of the width a layer, the embeddings, the normalisation scales."""
    sizes = {name: nbytes(make_params(tree)) // 4 for name, tree in TREES.items()}
    assert sizes == {
        name: d * (12 * d * layers + symbols + 2 * layers + 1)
        for name, layers, d, symbols in (
            ("small", 6, 384, 65 + 256),
            ("deep", 12, 256, 65 + 256),
            ("gpt2", 12, 768, 50_304 + 1024),
        )
    }


def test_optax_muons_step_costs_five_newton_schulz_iterations() -> None:
    """Of ``(m, n)``, ``m ≤ n``, an iteration takes ``4 m² n + 2 m³``; in units of the width cubed a layer has 56."""
    shapes = make_params(TREES["small"])
    tx = CONTENDERS["optax_muon"].build(jnp.float32)
    count = count_matmul_flops(tx.update, shapes, jax.eval_shape(tx.init, shapes), shapes)
    assert count.most == 5 * 6 * 56 * 384**3


def test_soaps_state_is_two_moments_and_four_square_matrices_of_each_kernel() -> None:
    params = make_params(TREES["small"])
    kernels = [x for x, is_hidden in zip(*map(jax.tree.leaves, (params, hidden(params))), strict=True) if is_hidden]
    rest = nbytes(params) - nbytes(kernels)
    squares = 4 * sum(2 * d**2 for kernel in kernels for d in kernel.shape)
    counters = 200  # bytes
    state = nbytes(jax.eval_shape(CONTENDERS["fo_soap"].build(jnp.float32).init, params))
    assert squares + 2 * nbytes(kernels) == pytest.approx(9.67 * nbytes(kernels), rel=1e-3)
    assert 0 <= state - (squares + 2 * nbytes(kernels) + 2 * rest) <= counters
