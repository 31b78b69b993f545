"""What turns a Kronecker factor into an eigenbasis or a root."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from .. import linalg
from .._arguments import one_of
from .._xla import Platform, branch, by_platform
from .contracts import PRECISIONS, Decomposition, Eigenbasis, Eigenpairs, InverseRoot, Refreshed

# Of orthogonal iteration in the place of an eigendecomposition.
ROUNDS = 4

Matrix = Float[Array, "d d"]
First = Bool[Array, ""]


def orthogonal_iteration(method: str = "auto", *, precision: str = "highest") -> Decomposition:
    """One step of orthogonal iteration a refresh: ``Q ← basis of A Q``, columns ordered by ``diag(Qᵀ A Q)``.

    A basis drifts slowly, so one step tracks it at a fraction of an eigendecomposition's cost.

    Args:
      method: "qr" (Householder, the SOAP authors', on a CPU the fastest; the first basis is exact), "cholesky" (shifted
        CholeskyQR block by block: follows as well by matrix products and Cholesky factors of side 128, in one short
        program a length of side, and the first basis is 20 rounds of the same), or "auto": "qr" in a program for a CPU,
        and "cholesky" for a TPU, whose compiler takes minutes for a QR or an eigh of side 3072, and for a GPU, whose
        libraries take one matrix after another.
      precision: of the products, as in `fo.Products`.

    Raises:
      ValueError: for any other method or precision.

    Source: Vyas et al. 2024 (arXiv 2409.11321), Algorithm 4.
    """
    one_of("precision", precision, PRECISIONS)
    if method not in ("auto", "qr", "cholesky"):
        raise ValueError(f"orthogonal_iteration: method must be 'auto', 'qr' or 'cholesky', got {method!r}.")

    def way(platform: Platform) -> str:
        return ("qr" if platform.factorises else "cholesky") if method == "auto" else method

    def renew(A: Matrix, Q: Matrix, first: First, tolerance: float | None) -> Refreshed:
        def by(method: str, A: Matrix, Q: Matrix, first: First) -> Refreshed:
            f = linalg.followed if method == "qr" else linalg.followed_by_products
            return Refreshed(
                *linalg.sequential(functools.partial(f, tolerance=tolerance, precision=precision))(A, Q, first)
            )

        return by_platform(by, way, A, Q, first)

    return Decomposition(method, Eigenbasis, renew)


def eigh(method: str = "exact") -> Decomposition:
    """A full eigendecomposition at every refresh: on a CPU about twice the cost of a QR step.

    Args:
      method: "exact" everywhere, or "auto": exact in a program for a CPU; for a TPU or a GPU, whose compilers and
        libraries are slow at it, four rounds of `orthogonal_iteration` by products from the basis so far (20 for the
        first), which leave columns of close eigenvalues mixed.

    Raises:
      ValueError: for any other method.
    """
    if method not in ("auto", "exact"):
        raise ValueError(f"eigh: method must be 'auto' or 'exact', got {method!r}.")

    def exact(A: Matrix, Q: Matrix, first: First, tolerance: float | None) -> Refreshed:
        P = linalg.project(A, Q)

        def solve() -> Refreshed:
            V = linalg.eigenbasis(A)
            return Refreshed(V, jnp.where(first, linalg.nearest_axes(V), linalg.descending(Q, P)))

        return solve() if tolerance is None else _unless_diagonal(A, Q, P, jnp.where(first, -1, tolerance), solve)

    def renew(A: Matrix, Q: Matrix, first: First, tolerance: float | None) -> Refreshed:
        def by(products: bool, A: Matrix, Q: Matrix, first: First) -> Refreshed:
            if not products:
                return exact(A, Q, first, tolerance)
            return Refreshed(*linalg.followed_by_products(A, Q, first, tolerance, rounds=ROUNDS))

        return by_platform(by, lambda platform: method == "auto" and not platform.factorises, A, Q, first)

    return Decomposition("eigh", Eigenbasis, renew)


def inverse_root(exponent: float = -0.25, *, method: str = "auto", ridge: ArrayLike = 1e-6) -> Decomposition:
    """``(A + ridge |A| I)^exponent``, the same at every refresh.

    Args:
      exponent: from -1 to 0.
      method: "eigh", or matrix products alone: "newton" (exponents -1/p), "polynomial" (-1/2, -1/4, ...). "auto":
        "eigh" in a program for a CPU, and for a TPU or a GPU, whose compilers and libraries are slow at that, "newton"
        where it has the exponent.
      ridge: relative to the largest eigenvalue, or a bound on it.

    Raises:
      ValueError: for an unknown method, or an exponent it does not have.

    Source: Gupta et al. 2018 (arXiv 1802.09568); `fo.linalg.matrix_power` has the iterations'.
    """
    linalg.check_exponent(exponent, "eigh" if method == "auto" else method)
    elsewhere = "newton" if linalg.has_exponent(exponent, "newton") else "eigh"

    def way(platform: Platform) -> str:
        if method != "auto":
            return method
        return "eigh" if platform.factorises else elsewhere

    def root(A: Matrix, old: Matrix, first: First, tolerance: float | None) -> Refreshed:
        del first, tolerance
        power = by_platform(lambda way, A: linalg.matrix_power(A, exponent, method=way, ridge=ridge), way, A)
        return Refreshed(power, jnp.arange(len(old)))

    return Decomposition(f"{method} root", InverseRoot, root)


def cholesky_inverse() -> Decomposition:
    """The inverse, for factors that are damped when they are read (`fo.factors.tikhonov`)."""

    def inverse(A: Matrix, old: Matrix, first: First, tolerance: float | None) -> Refreshed:
        del first, tolerance
        return Refreshed(linalg.cholesky_inverse(A), jnp.arange(len(old)))

    return Decomposition("Cholesky inverse", InverseRoot, inverse)


def with_eigenvalues(decomposition: Decomposition) -> Decomposition:
    """The same, with the eigenvalues ``diag(Qᵀ A Q)`` of its basis: for factors that are followed through them.

    >>> with_eigenvalues(eigh()).returns.__name__
    'Eigenpairs'
    """
    return decomposition._replace(returns=Eigenpairs)


def _unless_diagonal(
    A: Matrix, Q: Matrix, P: Matrix, tolerance: ArrayLike, renewed: Callable[[], Refreshed]
) -> Refreshed:
    """Keep Q where ``|B - diag B| <= tolerance |B|``, ``B = Qᵀ A Q`` (Eschenhagen et al. 2025, arXiv 2506.03595)."""
    # A factor that is not finite has no measure; renewing it keeps the old basis and counts the failure.
    settled = linalg.off_diagonality(A, Q, P=P) <= tolerance
    return branch(settled, lambda: Refreshed(Q, jnp.arange(len(Q))), renewed)
