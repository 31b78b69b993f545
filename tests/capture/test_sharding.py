"""Data-parallel statistics: a batch over eight devices gives one device's sums, by nothing but all-reduce."""

import contextlib
import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fisher_optax import capture, losses
from tests.capture.capture_models import assert_factors, assert_near, captured, normal, params_of, plain_loss, watched

pytestmark = pytest.mark.usefixtures("x64")
F64 = {"param_dtype": jnp.float64, "dtype": jnp.float64}
MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dense on sequences": (nn.Sequential([nn.Dense(4, **F64), nn.relu, nn.Dense(2, **F64)]), (8, 3, 5)),
    "convolution": (nn.Sequential([nn.Conv(3, (3,), **F64), nn.relu, nn.Conv(2, (2,), **F64)]), (8, 4, 2)),
    "attention": (nn.MultiHeadDotProductAttention(2, **F64), (8, 3, 4)),
}
COLLECTIVES = r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("mode", "types"), [("expand", AxisType.Auto), ("reduce", AxisType.Auto), ("expand", AxisType.Explicit)]
)
def test_eight_devices_agree_with_one_and_only_sums_travel(name: str, mode: str, types: AxisType) -> None:
    model, shape = MODELS[name]
    x = normal(0, *shape)
    params = params_of(model, x)
    grad_fn = capture.value_and_grad(plain_loss(model), capture.KroneckerFactors(mode=mode))
    wanted = jax.jit(grad_fn)(params, x)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(types,))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    args = jax.device_put(params, everywhere), jax.device_put(x, split)
    compiled = jax.jit(grad_fn, out_shardings=everywhere).lower(*args).compile()
    assert set(re.findall(COLLECTIVES, compiled.as_text())) == {"all-reduce"}
    compare(compiled(*args), wanted)


def spec_of(x: Any, *rest: Any) -> PartitionSpec | None:
    """Spread along the first axis as ``x`` is; None on one device, where ``out_sharding=`` is to do nothing."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else PartitionSpec(sharding.spec[0], *rest)


def mlp(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["W"] + p["b"]) @ p["V"]


def with_gathered_weights(p: Any, x: Any) -> Any:
    if spec_of(x) is None:
        return mlp(p, x)
    return mlp(jax.tree.map(lambda W: jax.sharding.reshard(W, PartitionSpec()), p), x)


def with_split_classes(p: Any, x: Any) -> Any:
    h = jnp.tanh(jnp.einsum("btd,dk->btk", x, p["W"], out_sharding=spec_of(x)))
    return jnp.einsum("btk,kc->btc", h, p["V"], out_sharding=spec_of(x, None, "model"))


def embedded(p: Any, x: Any) -> Any:
    tokens = jnp.argmax(x, -1)
    return jnp.tanh(p["W"][tokens] if spec_of(x) is None else p["W"].at[tokens].get(out_sharding=spec_of(x))) @ p["V"]


def looped(p: Any, x: Any) -> Any:
    block = jax.checkpoint(lambda x, S: (x + jnp.tanh(x @ S), None))
    return jax.lax.scan(block, x, p["S"])[0] @ p["V"]


def convolved(p: Any, x: Any) -> Any:
    return jax.lax.conv_general_dilated(x, p["K"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")) @ p["V"]


WV: dict[str, tuple[int, ...]] = {"W": (4, 8), "V": (8, 4)}
WBV = WV | {"b": (8,)}
CROSS_ENTROPY, GAUSSIAN = losses.softmax_cross_entropy, losses.gaussian
# The model, its parameters, the loss, labels drawn; how the batch and how matrices are spread; the mesh's other axis.
ON_EXPLICIT_MESHES: dict[str, tuple[Any, ...]] = {
    "batch": (mlp, WBV, CROSS_ENTROPY, "true", ("data",), ()),
    "on every device": (mlp, WBV, GAUSSIAN, "mc", (), ()),
    "batch over both axes": (mlp, WBV, CROSS_ENTROPY, "mc", (("data", "model"),), ()),
    "positions too": (mlp, WBV, losses.sigmoid_cross_entropy, "true", ("data", "model"), ()),
    "beside an Auto axis": (mlp, WBV, CROSS_ENTROPY, "true", ("data",), (), AxisType.Auto),
    "rows of weights": (with_gathered_weights, WBV, CROSS_ENTROPY, "true", ("data",), ("data",)),
    "classes": (with_split_classes, WV, CROSS_ENTROPY, "true", ("data",), (None, "model")),
    "embedding": (embedded, WV, CROSS_ENTROPY, "true", ("data",), ()),
    "loop": (looped, {"S": (3, 4, 4), "V": (4, 4)}, CROSS_ENTROPY, "mc", ("data",), ()),
    "convolution": (convolved, {"K": (3, 4, 8), "V": (8, 4)}, CROSS_ENTROPY, "true", ("data",), ()),
}


@pytest.mark.parametrize("name", ON_EXPLICIT_MESHES)
def test_explicit_meshes_give_what_one_device_gives(name: str) -> None:
    """Of all kinds; gradients are laid out as parameters are, and every device has all of the statistics."""
    model, shapes, loss, fisher, batch, matrices, *other = ON_EXPLICIT_MESHES[name]
    params = {k: normal(i, *shape) for i, (k, shape) in enumerate(shapes.items())}
    data = normal(5, 8, 2, 4), jnp.arange(16).reshape(8, 2) % 4, jnp.arange(8) % 3 * 1.0

    def statistics(params: Any, x: Any, y: Any, w: Any) -> Any:
        labels = (lambda y: y) if loss is CROSS_ENTROPY else partial(jax.nn.one_hot, num_classes=4)
        mean = lambda p, x, y, w: loss(model(p, x), labels(y), w)  # noqa: E731
        kinds = [
            capture.KroneckerFactors(max_examples=7),
            capture.KroneckerFactors(mode="reduce", max_dim=6, rank=3),
            capture.InputGram(),
            *([capture.LayerSamples(5)] if model is not looped else []),
            *([capture.KroneckerFactors(head_rows=5)] if loss is CROSS_ENTROPY else []),
        ]
        made = [capture.value_and_grad(mean, kind)(params, x, y, w) for kind in kinds]
        key = {"fisher_key": jax.random.key(6)} if fisher == "mc" else {}
        return [*made, capture.value_and_grad(mean, fisher=fisher)(params, x, y, w, **key)]

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, *(other or [AxisType.Explicit])))

    def put(x: Array, spec: tuple[Any, ...]) -> Array:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec[: x.ndim])))

    there = {k: put(x, matrices if x.ndim == 2 else ()) for k, x in params.items()}
    with jax.set_mesh(mesh):
        made = jax.jit(statistics)(there, *(put(x, batch) for x in data))
    compare(made, jax.jit(statistics)(params, *data))
    for _, grads, stats in made:
        assert all(grads[k].sharding.is_equivalent_to(x.sharding, x.ndim) for k, x in there.items())
        assert all(x.is_fully_replicated for x in jax.tree.leaves(stats))


@pytest.mark.parametrize("jitted", [True, False])
def test_explicit_meshes_need_no_jit_and_data_no_argument(jitted: bool) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    x, y = normal(0, 8, 3), jnp.arange(8) % 4
    grad_fn = lambda W, x, y: capture.value_and_grad(  # noqa: E731
        lambda W: losses.softmax_cross_entropy(x @ W, y), fisher="true"
    )(W)
    W = normal(1, 3, 4)
    there = [jax.device_put(a, NamedSharding(mesh, PartitionSpec("data"))) for a in (x, y)]
    with contextlib.nullcontext() if jitted else jax.set_mesh(mesh):
        call = (lambda W: grad_fn(W, *there)) if not jitted else jax.jit(lambda W: grad_fn(W, *there))
        made = call(jax.device_put(W, NamedSharding(mesh, PartitionSpec())))
    compare(made, grad_fn(W, x, y))


def compare(actual: Any, wanted: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for mine, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        if jnp.linalg.norm(theirs) < 1e-12:  # a bias of keys has no gradient
            assert jnp.linalg.norm(mine) < 1e-12
        else:
            assert_near(mine, theirs)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", [capture.KroneckerFactors(), capture.KroneckerFactors(mode="reduce")])
def test_shard_map_over_data_sums_over_devices(check_vma: bool, kind: Any) -> None:
    """A loss that averages over devices by itself: the statistics are those of the whole batch, normaliser included."""
    params, x = {"W": normal(0, 3, 4), "b": normal(2, 4)}, normal(1, 8, 2, 3)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    def local(p: Any, x: Any, see: Any) -> Any:
        y = jnp.tanh(see("W", x, x @ p["W"]) + p["b"])
        return jnp.mean(y**2)

    def loss(p: Any, x: Any, see: Any) -> Any:
        @partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )
        def mean(p: Any, x: Any) -> Any:
            return jax.lax.pmean(local(p, x, see), "data")

        return mean(p, x)

    with jax.set_mesh(mesh):
        stats = captured(loss, params, x, kind=kind)["W"]
    wanted = captured(local, params, x, kind=kind)["W"]
    assert_near(stats.left, wanted.left)
    assert_near(stats.right, wanted.right)
    assert stats.weight == wanted.weight


def test_mask_is_split_over_devices_like_the_data() -> None:
    W, x, kept = normal(0, 3, 4), normal(1, 8, 3), jnp.arange(8) % 3 > 0
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    def loss(W: Any, x: Any, kept: Any, see: Any) -> Any:
        @partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )
        def mean(W: Any, x: Any, kept: Any) -> Any:
            y = jnp.sum(jnp.tanh(see("W", x, x @ W)) ** 2, -1)
            return jax.lax.psum(jnp.sum(y * kept), "data") / jax.lax.psum(jnp.sum(kept), "data")

        return mean(W, x, kept)

    def plain(W: Any, x: Any, see: Any) -> Any:
        return jnp.mean(jnp.sum(jnp.tanh(see("W", x, x @ W)) ** 2, -1))

    stats = captured(loss, W, x, kept, mask=lambda x, kept: kept)
    a, delta = watched(plain, W, x[np.asarray(kept)])
    assert_factors(stats, a["W"], delta["W"], int(kept.sum()))
    with pytest.raises(ValueError, match="no operand of the shard_map"):
        captured(loss, W, x, kept, mask=lambda x, kept: jnp.ones(5))
