"""Routers go to the fallback, as the program shows or by their names; what is like them stays a matrix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fisher_optax as fo
from fisher_optax.matrices.rules import resolve_axes
from tests.matrices.axes_models import leaf

E, D, H, T = 4, 6, 8, 12
X = leaf(T, D)
Loss = Callable[[Any, jax.Array], jax.Array]
PARAMS = {"chooses": leaf(D, E), "up": leaf(E, D, H), "down": leaf(E, H, D)}


def of_sorted_rows(p: Any, x: jax.Array) -> jax.Array:
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["chooses"]), 2)
    order, sizes = jnp.argsort(chosen.reshape(-1)), jnp.bincount(chosen.reshape(-1), length=E)
    rows = jax.nn.silu(jax.lax.ragged_dot(x[order // 2], p["up"], sizes))
    return jnp.sum(jax.lax.ragged_dot(rows, p["down"], sizes) * gates.reshape(-1, 1)[order])


def of_sorted_rows_by_biased_sigmoids(p: Any, x: jax.Array) -> jax.Array:
    """As in models whose load is balanced by biases, which choose and do not weigh."""
    scores = jax.nn.sigmoid(x @ p["chooses"])
    chosen = jax.lax.top_k(scores + jnp.arange(E), 2)[1].reshape(-1)
    order = jnp.argsort(chosen)
    rows = jax.lax.ragged_dot(x[order // 2], p["up"], jnp.bincount(chosen, length=E))
    y = jax.lax.ragged_dot(jax.nn.silu(rows), p["down"], jnp.bincount(chosen, length=E))
    return jnp.sum(y * jnp.take_along_axis(scores, chosen.reshape(-1, 2), 1).reshape(-1, 1)[order])


def through(h: jax.Array, p: Any) -> jax.Array:
    return jnp.einsum("ecd,edh,ehf->ecf", h, p["up"], p["down"], optimize=[(0, 1), (0, 1)])


def dispatched(p: Any, x: jax.Array) -> jax.Array:
    """By products with ones and zeros, with room for 5 rows an expert."""
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["chooses"]), 1)
    hot = jax.nn.one_hot(chosen[:, 0], E)
    places = hot[..., None] * jax.nn.one_hot((jnp.cumsum(hot, 0) * hot - 1).astype(int), 5)
    y = through(jnp.einsum("tec,td->ecd", places, x), p)
    return jnp.einsum("tec,ecd,t->td", places, y, gates[:, 0]).sum()


def best_alone(p: Any, x: jax.Array) -> jax.Array:
    """All experts on all rows, of which the best counts."""
    hot = jax.nn.one_hot(jnp.argmax(x @ p["chooses"], -1), E)
    h = jax.nn.silu(jnp.einsum("td,edh->teh", x, p["up"]))
    return jnp.einsum("ted,te->td", jnp.einsum("teh,ehd->ted", h, p["down"]), hot).sum()


def scattered(p: Any, x: jax.Array) -> jax.Array:
    """Weights of the best in the places of all."""
    gates, chosen = jax.lax.top_k(x @ p["chooses"], 2)
    weights = jnp.zeros((T, E)).at[jnp.arange(T)[:, None], chosen].set(jax.nn.softmax(gates))
    h = jax.nn.silu(jnp.einsum("td,edh->teh", x, p["up"]))
    return jnp.einsum("ted,te->td", jnp.einsum("teh,ehd->ted", h, p["down"]), weights).sum()


def weighed_before(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.einsum("td,edh->teh", x, p["up"]) * jax.nn.softmax(x @ p["chooses"])[..., None]
    return jnp.einsum("teh,ehd->ted", h, p["down"]).sum()


def weighed_after(p: Any, x: jax.Array) -> jax.Array:
    h = jax.nn.silu(jnp.einsum("td,edh->teh", x, p["up"]))
    y = jnp.einsum("teh,ehd->ted", h, p["down"])
    return jnp.einsum("ted,te->td", y, jax.nn.softmax(x @ p["chooses"])).sum()


def in_a_loop(p: Any, x: jax.Array) -> jax.Array:
    def body(x: jax.Array, p: Any) -> Any:
        return x + of_sorted_rows_by_biased_sigmoids(p, x), None

    return jax.lax.scan(jax.checkpoint(body), x, p)[0].sum()


ROUTED: dict[str, Loss] = {
    "sorted rows": of_sorted_rows,
    "biased sigmoids": of_sorted_rows_by_biased_sigmoids,
    "dispatched": dispatched,
    "the best alone": best_alone,
    "scattered": scattered,
    "weighed before the second layer": weighed_before,
    "weighed after it": weighed_after,
    "in a loop": in_a_loop,
}


@pytest.mark.parametrize("statistics", [None, fo.KroneckerFactors()], ids=["no statistics", "factors"])
@pytest.mark.parametrize("name", ROUTED)
def test_a_router_is_what_chooses_or_weighs_experts(name: str, statistics: Any) -> None:
    params = {key: leaf(2, *w.shape) if name == "in a loop" else w for key, w in PARAMS.items()}
    axes = fo.infer_axes(ROUTED[name], params, X, statistics=statistics)
    assert axes["chooses"] is None
    assert axes["down"] is not None
    assert axes["up"] is not None
    rows = {row.path: row for row in fo.report(ROUTED[name], params, X).rows}
    assert rows["chooses"].reason == "it chooses or weighs experts: fo.infer_axes leaves it to the fallback"
    assert not any("experts" in rows[name].reason for name in ("up", "down"))


def apart(p: Any, x: jax.Array) -> jax.Array:
    """Experts that are leaves of their own, which no stack shows."""
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    each = (jnp.sum(jnp.where(chosen == e, gates, 0), -1)[:, None] * (x @ p[f"up{e}"]) for e in range(E))
    return sum(each, jnp.zeros((T, H))).sum()


def test_a_name_tells_where_the_program_does_not() -> None:
    params = {f"up{e}": leaf(D, H) for e in range(E)} | {"router": leaf(D, E)}
    axes = fo.infer_axes(apart, params, X)
    assert axes["router"] is None
    assert axes["up0"].same_matrix(fo.MatrixAxes(0, 1), (D, H))
    (row,) = (row for row in fo.report(apart, params, X).rows if row.path == "router")
    assert "experts" in row.reason
    (router,) = (x for x in resolve_axes(params) if x.path == "router")
    assert (router.kind, router.reason) == ("other", "router: 2-D leaf")


def attention(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("td,dhf->thf", x, p[name]) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("thf,shf->hts", q, k))
    return jnp.einsum("hts,shf,hfd->td", weights, v, p["o"]).sum()


def pooled(p: Any, x: jax.Array) -> jax.Array:
    """The best rows by a score, and a gated layer."""
    best = jax.lax.top_k((x @ p["q"][:, 0, :1])[:, 0], 4)[1]
    return (jax.nn.sigmoid(x[best] @ p["q"][:, 0]) * (x[best] @ p["k"][:, 0])).sum()


def classified(p: Any, x: jax.Array) -> jax.Array:
    """A head whose best class is counted."""
    logits = jnp.tanh(x @ p["q"][:, 0]) @ p["o"][0]
    hit = jnp.argmax(logits, -1) == 1
    return jax.nn.logsumexp(logits, -1).sum() + hit.sum()


def quantized(p: Any, x: jax.Array) -> jax.Array:
    """The nearest row of a table."""
    return (p["table"][jnp.argmax(x @ p["table"].T, -1)] @ p["o"].reshape(-1, D)[:D]).sum()


LIKE: dict[str, Loss] = {"attention": attention, "pooled": pooled, "classified": classified, "quantized": quantized}


@pytest.mark.parametrize("name", LIKE)
def test_what_is_like_a_router_is_none(name: str) -> None:
    params = {"q": leaf(D, 2, H), "k": leaf(D, 2, H), "v": leaf(D, 2, H), "o": leaf(2, H, D), "table": leaf(5, D)}
    assert not any("experts" in row.reason for row in fo.report(LIKE[name], params, X).rows)
