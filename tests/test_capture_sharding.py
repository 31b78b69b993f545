"""Data-parallel statistics: a batch over eight devices gives one device's sums, by nothing but all-reduce."""

import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fisher_optax import capture
from tests.capture_models import assert_factors, assert_near, captured, normal, params_of, plain_loss, watched

pytestmark = pytest.mark.usefixtures("x64")
F64 = {"param_dtype": jnp.float64, "dtype": jnp.float64}
MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dense on sequences": (nn.Sequential([nn.Dense(4, **F64), nn.relu, nn.Dense(2, **F64)]), (8, 3, 5)),
    "convolution": (nn.Sequential([nn.Conv(3, (3,), **F64), nn.relu, nn.Conv(2, (2,), **F64)]), (8, 4, 2)),
    "attention": (nn.MultiHeadDotProductAttention(2, **F64), (8, 3, 4)),
}
COLLECTIVES = r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["expand", "reduce"])
def test_eight_devices_agree_with_one_and_only_sums_travel(name: str, mode: str) -> None:
    model, shape = MODELS[name]
    x = normal(0, *shape)
    params = params_of(model, x)
    grad_fn = capture.value_and_grad(plain_loss(model), capture.KroneckerFactors(mode=mode))
    wanted = jax.jit(grad_fn)(params, x)

    mesh = Mesh(jax.devices(), ("data",))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    args = jax.device_put(params, everywhere), jax.device_put(x, split)
    compiled = jax.jit(grad_fn, out_shardings=everywhere).lower(*args).compile()
    assert set(re.findall(COLLECTIVES, compiled.as_text())) == {"all-reduce"}
    compare(compiled(*args), wanted)


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
