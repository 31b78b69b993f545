"""What a step costs, counted from the program: no clock, so it holds on every machine."""

from collections.abc import Callable
from typing import Any

import jax
import optax
import pytest

import fisher_optax as fo
from benchmarks import harness
from benchmarks.steps import refreshing
from benchmarks.trees import TREES, make_params
from experiments.flops import FlopCount, count_matmul_flops

SHAPES = ((48, 144), (48, 48), (48, 192), (192, 48))
PARAMS = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct(shape, "float32")} for i, shape in enumerate(SHAPES * 2)}


def counted(tx: Any) -> FlopCount:
    return count_matmul_flops(tx.update, PARAMS, jax.eval_shape(tx.init, PARAMS), PARAMS)


def total(flops: Callable[[int, int], int]) -> int:
    return 2 * sum(flops(m, n) for m, n in SHAPES)


@pytest.mark.parametrize("refresh", ["every", "staggered"])
def test_soap_off_a_refresh_is_six_products(refresh: str) -> None:
    """Rotate in, rotate out, two outer products: 6mn(m + n), where the authors' code rotates the momentum as well."""
    wanted = total(lambda m, n: 6 * m * n * (m + n))
    assert counted(fo.soap(3e-3, refresh=refresh)).most_without_factorisations == wanted


def test_a_refresh_shares_its_product_and_carries_the_momentum() -> None:
    """2d³ a side for A Q, which the eigenvalue estimates share with the QR, and 4mn(m + n) for the momentum."""
    wanted = total(lambda m, n: 6 * m * n * (m + n) + 2 * (m**3 + n**3) + 4 * m * n * (m + n))
    assert refreshing(counted(fo.soap(3e-3))).products == wanted


@pytest.mark.parametrize("options", [{}, {"polynomial": fo.jordan(5)}, {"method": "direct"}])
def test_muon_takes_the_cheaper_iteration_of_each_shape(options: dict[str, Any]) -> None:
    def flops(m: int, n: int) -> int:
        short, long = sorted((m, n))
        direct = 20 * short**2 * long + 10 * short**3
        gram = 4 * short**2 * long + 34 * short**3
        return direct if options.get("method") == "direct" else min(direct, gram)

    assert counted(fo.muon(1e-2, **options)).most == total(flops)


def test_muon_holds_one_stack_of_directions_at_a_time() -> None:
    """A step that overwrites parameters and state takes less than the parameters' bytes besides: the directions of all
    layers and the gradients that they are made of would be twice as much.
    """
    params = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct(shape, "float32")} for i, shape in enumerate(SHAPES * 6)}
    assert temporaries(fo.muon(1e-2), params) < 0.8 * harness.nbytes(params)


def test_an_embeddings_moments_are_overwritten() -> None:
    """Beside its update, a step takes nothing for what Adam keeps of it: copies of both moments would be twice more."""
    params = {"layer": {"kernel": jax.ShapeDtypeStruct((48, 48), "float32")}}
    params["embed"] = {"embedding": jax.ShapeDtypeStruct((16_384, 48), "float32")}
    assert temporaries(fo.muon(1e-2), params) < 1.5 * harness.nbytes(params)


def temporaries(tx: optax.GradientTransformation, params: Any) -> int:
    """Bytes that a compiled step takes besides its arguments, of which it overwrites state and parameters."""

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    state = jax.eval_shape(tx.init, params)
    used: Any = jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params).compile().memory_analysis()
    assert used.output_size_in_bytes - used.alias_size_in_bytes < 1e4
    return used.temp_size_in_bytes


def test_the_program_does_not_grow_with_the_number_of_layers() -> None:
    """Layers of one shape share one loop; what a layer adds is moving it in and out of its stack."""

    def lines(layers: int) -> int:
        params = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((16, 16), "float32")} for i in range(layers)}
        tx = fo.soap(3e-3)
        return len(jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).as_text().splitlines())

    assert lines(40) - lines(20) < 20 * 40


def test_shampoo_in_blocks_is_a_short_program() -> None:
    """Blocks of one shape, of all leaves, share one loop: at most 6,000 lines for the 10.7M-parameter GPT's 1,300
    factors of 128, where blocks that are written out one by one take 134,000.
    """
    params = make_params(TREES["small"])
    tx = fo.shampoo(1e-3, storage=fo.Storage(block_size=128))
    text = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).as_text()
    assert len(text.splitlines()) <= 6000
