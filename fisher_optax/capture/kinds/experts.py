"""Sums over the rows of each expert of a ragged product: rows are sorted by expert, and sizes say how many each has.

    left_e = Σ a aᵀ / P_e,   right_e = N Σ δ δᵀ   over the P_e rows of expert e

An example that expert e does not see adds nothing to its Fisher, which is P_e / N of the mean over its own rows: that
is in `right`. Rows after the last expert's belong to none.
"""

import math

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int

from ..program.leaves import LeafPlan
from ..program.sites import Site
from .protocol import Bases, Sums, Tapped
from .rows import spread, unsorted_side

# Of each group, the products of its rows: lhs (P, m) and rhs (P, n), of which rows are the contracted axis.
_BY_GROUP = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def expert_sums(
    plan: LeafPlan,
    site: Site,
    tapped: Tapped,
    sides: tuple[str, ...],
    bases: Bases | None,
    max_examples: int | None,
    dtype: jnp.dtype,
) -> Sums:
    """The sums over one ragged product: ``count`` (N,), and of ``left``, ``right`` and ``squares`` those of ``sides``,
    for all N matrices in the order of the product.
    """
    X, sizes = _rows(site, tapped.x, site.x_axes, site.m), _sizes(site, tapped.groups)
    D = _rows(site, tapped.delta, site.y_axes, site.n)
    X, D, sizes, scale = _some(X, D, sizes, max_examples)
    if plan.bias is not None:
        X = jnp.concatenate([X, jnp.ones((*X.shape[:-1], 1), X.dtype)], -1)
    out = {"count": scale * sizes.astype(dtype)}
    for side, rows in (("left", X), ("right", D)):
        if side in sides:
            out[side] = scale * _products(rows, rows, sizes).astype(dtype)
    if "squares" in sides:
        Q_A, Q_B = bases or (None, None)
        Q_A = Q_A if Q_A is None else unsorted_side(Q_A, -2, site.inputs, int(plan.bias is not None))
        Q_B = Q_B if Q_B is None else unsorted_side(Q_B, -2, site.outputs)
        X, D = (jnp.square(_turned(rows.astype(dtype), Q, sizes)) for rows, Q in ((X, Q_A), (D, Q_B)))
        out["squares"] = scale * _products(X, D, sizes).astype(dtype)
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in out.items()}


def total_rows(site: Site, count: Float[Array, "*stack N"]) -> Float[Array, "*stack N"]:
    """For each matrix, the rows of all experts that share its product."""
    assert site.groups is not None
    together = count.reshape(*count.shape[:-1], -1, site.groups.number)
    return jnp.broadcast_to(jnp.sum(together, -1, keepdims=True), together.shape).reshape(count.shape)


def _rows(site: Site, x: Array, axes: tuple[tuple[int, ...], ...], width: int) -> Float[Array, "b P d"]:
    """An operand or result as rows, those of a ragged axis first among its positions, for each product of a batch."""
    batch = math.prod(x.shape[a] for a in axes[0])
    return jnp.transpose(x, sum(axes, ())).reshape(batch, math.prod(site.positions), width)


def _sizes(site: Site, groups: Array | None) -> Int[Array, "b E"]:
    """How many rows each expert has."""
    assert site.groups is not None
    assert groups is not None
    batch = math.prod(a.size for a in site.batch) // site.groups.number
    each = math.prod(site.positions[1:])
    return each * jnp.broadcast_to(groups.reshape(-1, site.groups.number), (batch, site.groups.number))


def _some(X: Array, D: Array, sizes: Array, most: int | None) -> tuple[Array, Array, Array, float]:
    """At most so many rows, spread over all of them, with the sizes of what is left, and what each stands for."""
    total = X.shape[1]
    if most is None or total <= most:
        return X, D, sizes, 1.0
    chosen = spread(total, most)
    before = jax.vmap(lambda ends: jnp.searchsorted(jnp.asarray(chosen), ends))(jnp.cumsum(sizes, -1))
    return X[:, chosen], D[:, chosen], jnp.diff(before, axis=-1, prepend=0), total / len(chosen)


def _products(X: Float[Array, "b P d"], Y: Float[Array, "b P k"], sizes: Int[Array, "b E"]) -> Float[Array, "b E d k"]:
    """``Xᵀ Y`` over the rows of each expert, in float32 at least."""
    dtype = jnp.promote_types(jnp.promote_types(X.dtype, Y.dtype), jnp.float32)

    def of_product(X: Array, Y: Array, sizes: Array) -> Array:
        return jax.lax.ragged_dot_general(
            X, Y, sizes, _BY_GROUP, precision=Precision.HIGHEST, preferred_element_type=dtype
        )

    return jnp.stack([of_product(*operands) for operands in zip(X, Y, sizes, strict=True)])


def _turned(X: Float[Array, "b P d"], Q: Array | None, sizes: Int[Array, "b E"]) -> Float[Array, "b P d"]:
    """Each row in the basis of its expert."""
    if Q is None:
        return X
    Q = Q.reshape(*sizes.shape, *Q.shape[-2:]).astype(X.dtype)
    turn = lambda X, Q, sizes: jax.lax.ragged_dot(X, Q, sizes, precision=Precision.HIGHEST)  # noqa: E731
    return jnp.stack([turn(*operands) for operands in zip(X, Q, sizes, strict=True)])
