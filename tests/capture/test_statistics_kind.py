"""`fo.StatisticsKind`: what somebody else plugs into capture."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo


class InputMoments(fo.StatisticsKind):
    """Sum, sum of squares and count of each layer's inputs."""

    def collect(self, plan: Any, site: Any, tapped: Any) -> dict[str, jax.Array]:
        rows = tapped.x.reshape(-1, site.m)
        return {"count": jnp.asarray(1.0 * len(rows)), "sum": rows.sum(0), "squares": jnp.square(rows).sum(0)}

    def finish(self, plan: Any, slots: list[dict[str, jax.Array]], normalizer: Any) -> dict[str, jax.Array]:
        (sums,) = slots
        return {"mean": sums["sum"] / sums["count"], "square": sums["squares"] / sums["count"]}

    def of_gradients(self) -> bool:
        return False


class Twice(nn.Module):
    """One layer used twice, in a loop that is rematerialised, and one more."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shared = nn.Dense(3, name="shared")
        return nn.Dense(2, name="last")(jnp.tanh(shared(jnp.tanh(shared(x)))))


def test_a_kind_of_ones_own_is_summed_over_all_uses_of_a_layer() -> None:
    model, x = Twice(), jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    params = model.init(jax.random.key(0), x)
    loss = lambda p, x: jnp.mean(jnp.square(model.apply(p, x)))  # noqa: E731
    value, grads, stats = jax.jit(fo.value_and_grad(loss, InputMoments()))(params, x)
    plain = jax.value_and_grad(loss)(params, x)
    np.testing.assert_allclose(value, plain[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads, plain[1])
    W, b = params["params"]["shared"]["kernel"], params["params"]["shared"]["bias"]
    inputs = np.concatenate([x, np.tanh(x @ W + b)])
    moments = stats["params"]["shared"]["kernel"]
    np.testing.assert_allclose(moments["mean"], inputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments["square"], (inputs**2).mean(0), rtol=1e-5)
    assert stats["params"]["shared"]["bias"] is None


def test_what_is_no_kind_is_refused_by_name() -> None:
    class NoFinish:
        def collect(self, plan: Any, site: Any, tapped: Any) -> dict[str, jax.Array]:
            return {}

    for kind in (NoFinish(), InputMoments, "kronecker"):
        with pytest.raises(TypeError, match=r"statistics must be fo.KroneckerFactors\(\), .* fo.StatisticsKind; got"):
            fo.value_and_grad(lambda p: p, kind)


def test_the_kinds_of_the_package_are_kinds() -> None:
    for kind in (fo.KroneckerFactors(), fo.InputGram(), fo.LayerSamples()):
        assert isinstance(kind, fo.StatisticsKind)
    assert fo.KroneckerFactors(squares=True).needs_bases()
    assert not fo.KroneckerFactors(squares=True).without_bases().needs_bases()
    assert not fo.InputGram().of_gradients()
