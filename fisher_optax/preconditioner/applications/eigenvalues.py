"""KL-Shampoo's application: momentum divided by the square roots of the factors' eigenvalues."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from ... import linalg
from ..._arguments import value_at
from ..contracts import Application, Eigenpairs, Moments
from .eigenbasis import counts, ratio


class EigenvaluesState(NamedTuple):
    """State of `inverse_root_of_eigenvalues`, in the basis."""

    count: Int[Array, ""]
    mu: Array


def inverse_root_of_eigenvalues(
    b1: optax.ScalarOrSchedule = 0.9,
    eps: optax.ScalarOrSchedule = 1e-8,
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
) -> Application:
    """``U = Q_L [m / (sqrt(λ_L λ_Rᵀ) + eps)] Q_Rᵀ`` with ``m ← b1 m + (1-b1) Q_Lᵀ G Q_R``.

    Args:
      b1: decay of m, number or schedule.
      eps: number or schedule, against division by zero, in units of the gradient. Entries whose ``λ_L λ_Rᵀ`` is
        rounding relative to its row and column get no step.
      bias_correction: divide m by ``1 - b1ᵗ``.
      mu_dtype: storage of m, default the gradient's.

    Source: Lin et al. 2025 (arXiv 2509.03378), KL-Shampoo.
    """

    def init(G: Float[Array, "m n"]) -> EigenvaluesState:
        return EigenvaluesState(jnp.zeros([], jnp.int32), jnp.zeros_like(G, dtype=mu_dtype))

    def update(
        G: Float[Array, "m n"], state: EigenvaluesState, basis: Eigenpairs, **extra: PyTree
    ) -> tuple[Array, EigenvaluesState]:
        del extra
        β, t = value_at(b1, state.count), state.count + 1
        m = β * state.mu.astype(G.dtype) + (1 - β) * linalg.into_basis(basis.left, G, basis.right)
        λ_L = 1.0 if basis.left_values is None else basis.left_values[:, None]
        λ_R = 1.0 if basis.right_values is None else basis.right_values[None, :]
        # Two roots, since the product of two eigenvalues has the scale of a fourth power.
        root = jnp.sqrt(λ_L) * jnp.sqrt(λ_R) + value_at(eps, state.count)
        # The root is zero before the first gradient that is not.
        u = ratio(m, root) / ((1 - β**t) if bias_correction else 1.0)
        u = jnp.where(counts(jnp.broadcast_to(_in_units(λ_L) * _in_units(λ_R), m.shape)), u, 0)
        return linalg.out_of_basis(basis.left, u.astype(G.dtype), basis.right), EigenvaluesState(
            t, m.astype(state.mu.dtype)
        )

    return Application(
        "inverse root of eigenvalues",
        (Eigenpairs,),
        init,
        update,
        lambda state: Moments((state.mu,), ()),
        lambda state, moments: state._replace(mu=moments.linear[0]),
    )


def _in_units(λ: Array | float) -> Array:
    """Relative to the largest: a product of two has the scale of a fourth power."""
    largest = jnp.max(jnp.asarray(λ))
    return λ / jnp.where(largest > 0, largest, 1)
