"""Per-example tools on ragged experts, which JAX does not batch: what they are of the same experts as masked products.

Each example routes its tokens for itself, so that group sizes differ between examples.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax._xla import of_each

E, M, H, C, TOKENS, EXAMPLES = 3, 4, 5, 6, 7, 5


@pytest.fixture(autouse=True)
def _double(x64: None) -> None:
    """Of ``x64``: nothing here is about rounding."""


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def made() -> tuple[Any, Any, Any]:
    params = {"router": drawn(0, M, E), "up": drawn(1, E, M, H), "head": drawn(2, H, C)}
    labels = jnp.asarray(np.random.default_rng(4).integers(0, C, (EXAMPLES, TOKENS)))
    return params, drawn(3, EXAMPLES, TOKENS, M), labels


def ragged(p: Any, x: Any) -> Any:
    expert = jnp.argmax(x @ p["router"], -1)
    order = jnp.argsort(expert)
    h = jax.lax.ragged_dot(x[order], p["up"], jnp.bincount(expert, length=E))
    return jnp.tanh(h[jnp.argsort(order)]) @ p["head"]


def masked(p: Any, x: Any) -> Any:
    gates = jax.nn.one_hot(jnp.argmax(x @ p["router"], -1), E, dtype=x.dtype)
    return jnp.tanh(jnp.einsum("te,tm,emh->th", gates, x, p["up"])) @ p["head"]


def example_loss(model: Any) -> Any:
    return lambda p, example: fo.losses.softmax_cross_entropy(model(p, example[0]), example[1])


def loss(model: Any) -> Any:
    def of_batch(p: Any, x: Any, y: Any) -> Any:
        return fo.losses.softmax_cross_entropy(model(p, x.reshape(-1, M)), y.reshape(-1))

    return of_batch


def diagonal(unit: str, fisher: str, **options: Any) -> Callable[[Any], Any]:
    def of(model: Any) -> Any:
        params, x, y = made()
        key = jax.random.key(1) if fisher == "mc" else None
        options_ = dict(unit=unit, fisher=fisher, key=key, microbatch=2, **options)
        return fo.fisher.diagonal(example_loss(model), params, [(x, y)], **options_)[:2]

    return of


def operator(model: Any) -> Any:
    params, x, y = made()
    return fo.fisher.operator(loss(model), params, x, y)


def approximate(method: str, batch_size: int | None) -> Callable[[Any], Any]:
    def of(model: Any) -> Any:
        params, x, y = made()
        return fo.fisher.approximate(method, loss(model), params, x, y, batch_size=batch_size).dense()

    return of


def obert(model: Any) -> Any:
    params, x, _ = made()
    whole = lambda p, x: model(p, x.reshape(-1, M))  # noqa: E731
    example = lambda p, x: jnp.sum(jnp.square(model(p, x)))  # noqa: E731
    found = fo.compression.prune(
        whole, params, [x], "obert", 0.5, loss_fn=example, layers="head", sequential=False, progress=False
    )
    return found.params["head"]


def log_density(model: Any) -> Callable[[Any, Any], Any]:
    return lambda p, x: -jnp.sum(jnp.square(model(p, x)))


TOOLS: dict[str, Callable[[Any], Any]] = {
    **{f"diagonal {u}, {f}": diagonal(u, f) for u in ("sequence", "token") for f in ("empirical", "true", "mc")},
    "diagonal by rows": diagonal("sequence", "empirical", groups="tensor"),
    "rows": lambda model: operator(model).rows(),
    "ggn": lambda model: fo.fisher.operator(loss(model), *made(), fisher="ggn").dense(),
    **{f"approximate, {b}": approximate("diagonal", b) for b in (None, 2)},
    "dense, 2 at a time": lambda model: fo.fisher.dense(loss(model), *made(), batch_size=2),
    "obert": obert,
    "information": lambda model: fo.fisher.geometry.information(log_density(model), *made()[:2]),
    "information by Hessians": lambda model: fo.fisher.geometry.information(
        log_density(model), *made()[:2], form="hessian"
    ),
}


@pytest.mark.filterwarnings("ignore:diagonal. no gradient reaches 1 leaf")
@pytest.mark.parametrize("name", TOOLS)
def test_ragged_experts_are_what_masked_ones_are(name: str) -> None:
    one, other = (jax.tree.leaves(TOOLS[name](model)) for model in (ragged, masked))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.filterwarnings("ignore:diagonal. no gradient|unit='position'")
def test_squares_of_positions_add_up_over_experts(fisher: str) -> None:
    """Masked experts are one product of all of them; token by token each expert's rows are the same ones."""
    (mean, _), (tokens, _) = (diagonal(unit, fisher)(ragged) for unit in ("position", "token"))
    for name in ("up", "head"):
        np.testing.assert_allclose(mean[name], tokens[name], rtol=1e-10, atol=1e-14)


def test_only_what_cannot_be_batched_goes_one_after_another() -> None:
    calls = []

    def counted(x: Any) -> Any:
        calls.append(x.shape)
        return 2 * x

    np.testing.assert_array_equal(of_each(counted, jnp.arange(3.0)), 2 * np.arange(3.0))
    assert calls == [()]
    with pytest.raises(ValueError, match="mine"):
        of_each(lambda x: (_ for _ in ()).throw(ValueError("mine")), jnp.arange(3.0))
