"""Shampoo's application: a negative power of each factor, on momentum."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from ... import linalg
from ..._arguments import value_at
from ..contracts import Application, InverseRoot, Moments


class PowerState(NamedTuple):
    """State of `power`."""

    count: Int[Array, ""]
    mu: Array


def power(
    b1: optax.ScalarOrSchedule = 0.0, *, twice_alone: bool = False, mu_dtype: DTypeLike | None = None
) -> Application:
    """``U = L^p m R^p`` with ``m ← b1 m + G``, where the roots hold G already: it acts on itself.

    Args:
      b1: momentum, number or schedule; not normalised, as in `optax.sgd`.
      twice_alone: a root without a partner is applied twice, since it has the power of both to give.
      mu_dtype: storage of m, default the gradient's.

    Source: Gupta et al. 2018 (arXiv 1802.09568), Algorithm 1.
    """

    def init(G: Float[Array, "m n"]) -> PowerState:
        return PowerState(jnp.zeros([], jnp.int32), jnp.zeros_like(G, dtype=mu_dtype))

    def update(
        G: Float[Array, "m n"], state: PowerState, roots: InverseRoot, **extra: PyTree
    ) -> tuple[Array, PowerState]:
        del extra
        m = value_at(b1, state.count) * state.mu.astype(G.dtype) + G
        U, (L, R) = m, roots
        for _ in range(2 if twice_alone and (L is None or R is None) else 1):
            U = U if L is None else linalg.times(L.astype(G.dtype), U)
            U = U if R is None else linalg.times(U, R.astype(G.dtype))
        return U.astype(G.dtype), PowerState(state.count + 1, m.astype(state.mu.dtype))

    nothing = Moments((), ())
    return Application(
        "power",
        (InverseRoot,),
        init,
        update,
        lambda state: nothing,
        lambda state, _: state,
        sees_itself=True,
        ignores_zeros=True,
    )
