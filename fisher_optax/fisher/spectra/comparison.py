"""How near one symmetric matrix is to another, as numbers: entries, direction, largest error, and as Gaussians.

    relative_error      |A - B|_F / |B|_F
    cosine              <A, B>_F / (|A|_F |B|_F)                        ignores the scale of A
    spectral_distance   |A - B|_2 / |B|_2
    kl                  KL(N(0, A + λI) | N(0, B + λI))                 in nats; small eigenvalues count too
                        = ½ [tr((B + λI)⁻¹ (A + λI)) - D + log det(B + λI) - log det(A + λI)]

In float64 NumPy, outside of jit.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jax.typing import ArrayLike

from ..operators.operator import Operator

# A Fisher is singular, and the divergence of singular Gaussians infinite.
DAMPING = 1e-3
# From here on, norms by Lanczos' iteration.
LARGE = 400


class Comparison(NamedTuple):
    """What `compare` measures; 0, 1, 0 and 0 for equal matrices."""

    relative_error: float
    cosine: float
    spectral_distance: float
    kl: float  # nats


def compare(a: Operator | ArrayLike, b: Operator | ArrayLike, damping: float | None = None) -> Comparison:
    """How near ``a`` is to the truth ``b`` (see the top of this file), by all their D² entries.

    Args:
      a, b: operators, made dense, or symmetric matrices. The cosine with a matrix of zeros is 0.
      damping: λ, by default .001 of the mean diagonal of b: the same for all that is compared with it, and of b's
        units. Directions in which both are far below it count as equal.

    Returns:
      Numbers. The divergence is NaN where an eigenvalue is below -λ, which no Gaussian's is.

    Raises:
      ValueError: for matrices that are not square, of one size, symmetric to four digits and finite; a truth of zeros;
        damping that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{compare(jnp.diag(jnp.array([1.0, 0.0])), jnp.eye(2)).relative_error:.4f}")
      0.7071
    """
    return Against(b, damping)(a)


class Against:
    """`compare` of many matrices with one truth, which is factorised once: ``Against(b)(a)`` is ``compare(a, b)``.

    Example:
      >>> import jax.numpy as jnp
      >>> against = Against(jnp.eye(2))
      >>> print([against(scale * jnp.eye(2)).relative_error for scale in (1.0, 3.0)])
      [0.0, 2.0]
    """

    def __init__(self, b: Operator | ArrayLike, damping: float | None = None) -> None:
        B = self.B = _entries("b", b)
        if not B.any():
            raise ValueError("compare: b, the truth, is 0 everywhere, so that nothing is large or small against it.")
        λ = self.λ = float(DAMPING * np.trace(B) / len(B) if damping is None else damping)
        if not 0 < λ < np.inf:
            what = "b's mean diagonal" if damping is None else "damping"
            raise ValueError(f"compare: {what} gives λ = {λ}; wanted a positive number. Pass damping=.")
        self.norm, self.spectral_norm = np.linalg.norm(B), _spectral_norm(B)
        self.log_det = _log_det(B, λ)
        # Times λ; of no Gaussian, anything.
        self.inverse = np.linalg.inv(B / λ + np.eye(len(B))) if np.isfinite(self.log_det) else B

    def __call__(self, a: Operator | ArrayLike) -> Comparison:
        A, B = _entries("a", a), self.B
        if A.shape != B.shape:
            raise ValueError(f"compare: a is {A.shape}, b {B.shape}; wanted matrices of one size.")
        norm, E = np.linalg.norm(A), A - B
        # tr((B + λI)⁻¹ (A + λI)) - D = tr((B + λI)⁻¹ (A - B)).
        divergence = np.vdot(self.inverse, E) / self.λ + self.log_det - _log_det(A, self.λ)
        return Comparison(
            float(np.linalg.norm(E) / self.norm),
            float(np.vdot(A, B) / norm / self.norm) if norm else 0.0,
            _spectral_norm(E) / self.spectral_norm,
            max(float(divergence) / 2, 0.0) if np.isfinite(divergence) else float("nan"),
        )


def _entries(name: str, matrix: Operator | ArrayLike) -> np.ndarray:
    A = np.asarray(matrix.dense() if isinstance(matrix, Operator) else matrix)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not len(A):
        raise ValueError(f"compare: {name} has shape {A.shape}; wanted a square matrix or an operator.")
    A = A.astype(np.float64)
    if not np.isfinite(A).all():
        raise ValueError(f"compare: {name} has entries that are not finite. Look for NaN in the parameters.")
    if (off := np.abs(A - A.T).max()) > 1e-4 * np.abs(A).max():
        raise ValueError(f"compare: {name} is not symmetric, off by {off:.3g}; wanted a Fisher, or (A + A.T) / 2.")
    return A


def _spectral_norm(A: np.ndarray) -> float:
    if len(A) < LARGE:
        return float(np.abs(np.linalg.eigvalsh(A)).max())
    if not (largest := np.abs(A).max()):
        return 0.0
    # A start of its own: a Fisher knows some vectors too well, such as that of equal shifts.
    options: dict[str, Any] = {"v0": np.random.default_rng(0).normal(size=len(A)), "tol": 1e-8}
    found = scipy.sparse.linalg.eigsh(A / largest, 1, return_eigenvectors=False, **options)
    return float(largest * abs(found[0]))


def _log_det(A: np.ndarray, λ: float) -> float:
    """Of ``A / λ + I``; NaN where that is not positive definite."""
    try:
        K = scipy.linalg.cholesky(A / λ + np.eye(len(A)), overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        return float("nan")
    return float(2 * np.sum(np.log(np.diag(K))))
