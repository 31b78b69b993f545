"""What is carried along when bases turn: moments that were kept in them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import linalg
from ..matrices.blocks import member_of, put, repeat
from .contracts import Due, Moments


def out_of_bases(
    linear: tuple[Float[Array, "N m n"], ...], bases: Any, due: Due, precision: str
) -> tuple[Float[Array, "N m n"], ...]:
    """``Q_L m Q_Rᵀ`` of the matrices that are due, in float32 at least."""

    def body(r: Array, stacks: Any) -> Any:
        j = due.places[r]
        Q_L, Q_R = member_of(tuple(bases[:2]), j)
        return put(stacks, j, [_times(Q_L, x, Q_R, precision, transpose=False) for x in member_of(stacks, j)])

    wide = [m.astype(jnp.promote_types(m.dtype, jnp.float32)) for m in linear]
    return tuple(repeat(due.count, len(due.places), body, wide)) if linear else ()


def into_bases(
    moments: Moments, orders: list[Callable[[Array], Array] | None], bases: Any, old: Any, due: Due, precision: str
) -> Moments:
    """The moments of the matrices that are due, in new bases.

    Args:
      moments: linear ones outside any basis, the others in the old bases.
      orders: of the r-th matrix that is due, which column of the old basis each new one continues. Squares follow
        these, and ignore that the columns turn besides (the SOAP authors' way).
      bases: the new ones.
      old: the old ones, with which squares become ``(C∘C) v (C∘C)ᵀ``, ``C = Q_newᵀ Q_old``: exact if the entries of the
        gradient in the old basis are uncorrelated. None: they follow the orders.
      due: which matrices.
      precision: of the products.
    """

    def body(r: Array, stacks: Moments) -> Moments:
        j = due.places[r]
        now = member_of(stacks, j)
        Q_L, Q_R = member_of(tuple(bases[:2]), j)
        linear = tuple(_times(Q_L, x, Q_R, precision, transpose=True) for x in now.linear)
        if not any(now[1:]):
            return put(stacks, j, now._replace(linear=linear))
        if old is None:
            left, right = (None if order is None else order(r) for order in orders)
            return put(stacks, j, _permuted(now, left, right)._replace(linear=linear))
        P_L, P_R = member_of(tuple(old[:2]), j)
        C_L, C_R = _squares(Q_L, P_L, precision), _squares(Q_R, P_R, precision)
        return put(stacks, j, _squared(now, C_L, C_R, precision)._replace(linear=linear))

    return repeat(due.count, len(due.places), body, moments) if any(moments) else moments


def _permuted(now: Moments, left: Any, right: Any) -> Moments:
    def entries(v: Array, *orders: Any) -> Array:
        index = [slice(None) if order is None else order for order in orders]
        if len(index) == 2 and left is not None and right is not None:
            index[0] = left[:, None]
        return v.at[tuple(index)].get(mode="promise_in_bounds")

    return Moments(
        now.linear,
        tuple(entries(v, left, right) for v in now.quadratic),
        tuple(entries(v, left) for v in now.left),
        tuple(entries(v, right) for v in now.right),
    )


def _squared(now: Moments, left: Any, right: Any, precision: str) -> Moments:
    """With the squares of ``Q_newᵀ Q_old``."""
    return Moments(
        now.linear,
        tuple(_times(left, v, right, precision, transpose=False) for v in now.quadratic),
        *(
            tuple(v if C is None else linalg.times(C, v, precision) for v in vs)
            for C, vs in ((left, now.left), (right, now.right))
        ),
    )


def _squares(Q: Any, P: Any, precision: str) -> Any:
    if Q is None:
        return None
    dtype = jnp.promote_types(Q.dtype, jnp.float32)
    return jnp.square(linalg.times(Q.mT.astype(dtype), P.astype(dtype), precision))


def _times(L: Any, x: Float[Array, "m n"], R: Any, precision: str, *, transpose: bool) -> Float[Array, "m n"]:
    """``L x Rᵀ``, or ``Lᵀ x R``, in float32 at least; a side that is None leaves x as it is."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if L is not None:
        x = linalg.times((L.mT if transpose else L).astype(x.dtype), x, precision)
    return x if R is None else linalg.times(x, (R if transpose else R.mT).astype(x.dtype), precision)
