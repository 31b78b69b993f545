"""What turns a stack of Kronecker factors into eigenbases, always keeping the last good one."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import linalg
from .types import Decomposition, Eigenbasis, Refreshed

Stack = Float[Array, "N d d"]


def orthogonal_iteration(method: str = "qr") -> Decomposition:
    """One step of orthogonal iteration a refresh: ``Q ← basis of A Q``, columns ordered by ``diag(Qᵀ A Q)``; the first basis is exact.

    A basis drifts slowly, so one step tracks it at a fraction of an eigendecomposition's cost.

    Args:
      method: "qr" (Householder; the SOAP authors') or "cholesky" (shifted CholeskyQR2: matrix products and Cholesky factors alone, for hardware on which QR is slow).

    Raises:
      ValueError: for any other method.

    Source: Vyas et al. 2024 (arXiv 2409.11321), Algorithm 4.
    """
    if method not in ("qr", "cholesky"):
        raise ValueError(f"orthogonal_iteration: method must be 'qr' or 'cholesky', got {method!r}.")

    def refresh(A: Stack, Q: Stack) -> Refreshed:
        P = linalg.project(A, Q)
        return _keep(linalg.orthogonal_iteration(A, Q, P=P, method=method), linalg.descending(Q, P), Q)

    return Decomposition(method, Eigenbasis, _eigh, refresh, functools.partial(_where_off_diagonal, refresh))


def eigh() -> Decomposition:
    """A full eigendecomposition at every refresh: exact, about twice the cost of a QR step on a CPU and far more on an accelerator."""
    return Decomposition("eigh", Eigenbasis, _eigh, _eigh, functools.partial(_where_off_diagonal, _eigh))


def _eigh(A: Stack, Q: Stack) -> Refreshed:
    # A new eigenbasis is sorted by itself, so column j descends from no column in particular.
    return _keep(linalg.eigenbasis(A), jnp.broadcast_to(jnp.arange(A.shape[-1]), A.shape[:-1]), Q)


def _keep(new: Stack, order: Array, old: Stack) -> Refreshed:
    value, failed = linalg.keep_last_good(new, old)
    return Refreshed(value, jnp.where(failed[..., None], jnp.arange(old.shape[-1]), order), failed)


def _where_off_diagonal(refresh: Callable[[Stack, Stack], Refreshed], A: Stack, Q: Stack, tolerance: float) -> Refreshed:
    """``refresh`` the matrices with ``|B - diag B| > tolerance |B|``, ``B = Qᵀ A Q`` (Eschenhagen et al. 2025, arXiv 2506.03595)."""

    def one(pair: tuple[Array, Array]) -> Refreshed:
        A, Q = pair
        # A factor that is not finite has no measure; refreshing it keeps the old basis and counts the failure.
        needed = ~(linalg.off_diagonality(A, Q) <= tolerance)
        kept = Refreshed(Q, jnp.arange(Q.shape[-1]), jnp.zeros([], bool))
        return jax.lax.cond(needed, refresh, lambda A, Q: kept, A, Q)

    return jax.lax.map(one, (A, Q))
