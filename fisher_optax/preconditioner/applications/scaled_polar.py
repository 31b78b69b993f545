"""SOAP-Muon's application: momentum, scaled entry by entry in the eigenbasis, then orthogonalised outside of it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from ... import linalg
from ..._arguments import in_range, one_of, value_at
from ...transforms.per_matrix import polar
from ..contracts import PRECISIONS, Application, Eigenbasis, Eigenpairs, Moments
from .eigenbasis import counts, ratio

Matrix = Float[Array, "m n"]


class ScaledPolarState(NamedTuple):
    """State of `scaled_polar`."""

    count: Int[Array, ""]  # gradients so far that were not zero
    mean: Matrix  # of gradients, outside any basis
    nu: Matrix  # of squares of what is scaled, in the basis


def scaled_polar(
    b1: optax.ScalarOrSchedule = 0.95,
    b2: optax.ScalarOrSchedule = 0.9,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    scale: str | float = 1.0,
    polynomial: Sequence[Sequence[float]] | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: str = "highest",
) -> Application:
    """The polar factor of momentum whose entries are of like size in the eigenbasis.

        m ← b1 m + (1-b1) G;   u = b1 m + (1-b1) G;   H = Q_Lᵀ u Q_R;   v ← b2 v + (1-b2) H²
        U = scale(m, n) · polar(Q_L [H / max(sqrt(v), eps)] Q_Rᵀ)

    The first gradient has no bases of others yet: ``U = scale · polar(u)``, and v waits. Entries that are rounding get
    no step, as in `in_eigenbasis`. A polar factor knows no scale, so v needs no bias correction.

    Args:
      b1, b2, eps: numbers or schedules; eps in units of the gradient.
      scale, polynomial: as in `fo.applications.orthogonal`.
      momentum_dtype: storage of m; the gradient's by default.
      precision: of the rotations, as in `fo.Products`.

    Raises:
      ValueError: for an argument out of range, or an unknown word.

    Source: the optimizer track of modded-nanogpt, records 44 to 46.

    Example:
      >>> import fisher_optax as fo
      >>> application = fo.applications.scaled_polar(scale="shape")
      >>> tx = fo.precondition(fo.factors.outer_product(0.9), fo.decompositions.orthogonal_iteration(), application,
      ...                      precondition_frequency=1, refresh=fo.Refresh(first_step="adam"))
    """
    for name, value in (("b1", b1), ("b2", b2)):
        in_range(name, value, 0, 1)
    in_range("eps", eps, 0)
    one_of("precision", precision, PRECISIONS)
    orthogonalized = polar(polynomial, scale)

    def init(G: Matrix) -> ScaledPolarState:
        mean = jnp.zeros_like(G, dtype=momentum_dtype)
        return ScaledPolarState(jnp.zeros([], jnp.int32), mean, jnp.zeros_like(G))

    def update(
        G: Matrix, state: ScaledPolarState, basis: Eigenbasis | Eigenpairs, **extra: PyTree
    ) -> tuple[Matrix, ScaledPolarState]:
        del extra
        β1, β2, ε = (value_at(value, state.count) for value in (b1, b2, eps))
        first = state.count == 0
        mean = (β1 * state.mean.astype(G.dtype) + (1 - β1) * G).astype(G.dtype)
        u = (β1 * mean + (1 - β1) * G).astype(G.dtype)
        H = linalg.into_basis(basis.left, u, basis.right, precision)
        nu = jnp.where(first, state.nu, β2 * state.nu + (1 - β2) * jnp.square(H)).astype(state.nu.dtype)
        values = (basis.left_values, basis.right_values) if isinstance(basis, Eigenpairs) else (None, None)
        X = jnp.where(counts(nu, values=values), ratio(H, jnp.maximum(jnp.sqrt(nu), ε)), 0)
        X = linalg.out_of_basis(basis.left, X, basis.right, precision)
        stepped: tuple[PyTree, PyTree] = orthogonalized.update(jnp.where(first, u, X), optax.EmptyState())
        count = state.count + jnp.any(G != 0)
        return stepped[0], ScaledPolarState(count, mean.astype(state.mean.dtype), nu)

    def moments(state: ScaledPolarState) -> Moments:
        return Moments((), (state.nu,))

    def with_moments(state: ScaledPolarState, moments: Moments) -> ScaledPolarState:
        return state._replace(nu=moments.quadratic[0])

    accepts = (Eigenbasis, Eigenpairs)
    # Zeros that near shapes share would change the scale, which is of m and n.
    return Application("polar of scaled", accepts, init, update, moments, with_moments, precision=precision)
