"""``(G + λ)⁻¹ Y`` for the Fisher G of a softmax head and Y with columns that sum to 0, in two ways.

Woodbury's identity as it stands inverts a matrix of condition number 1/λ, because ``G 1 = 0``: float32 has no digit
left where λ is 1e-8 of the mean of p̄.

From probabilities: row t of B is s_t p_t, ``G = diag(p̄) - Bᵀ diag(1/s) B``, and ``(G + λ) x = y`` is a network of words
and tokens with conductances B, each word grounded by λ. Elimination of the words, of ``d = p̄ + λ``, leaves for the
potentials ``u_t = p_tᵀ x`` of the tokens

    (diag(s) - B diag(1/d) Bᵀ) u = B (y / d),    x = (y + Bᵀ u) / d:

a Laplacian with the ground ``λ B (1/d)``, which `linalg.laplacian` solves to rounding whatever its condition, as
``1ᵀ B (y / d) = -λ 1ᵀ (y / d)``.

From signed rows C, ``G = diag(p̄) - p̄ p̄ᵀ - Cᵀ C`` and ``C 1 = 0``: Woodbury's identity on what is orthogonal to 1, where
``diag(d) - p̄ p̄ᵀ`` has the inverse ``y/d - v Σ(y/d) / κ`` with ``v = p̄ / d`` and ``κ = Σ v``:

    z = C (1/d),   Z = Cᵀ/d - v zᵀ/κ,   S = I - C diag(1/d) Cᵀ - (λ/κ) z zᵀ,   x = y/d - v Σ(y/d)/κ + Z S⁻¹ Zᵀ y.

S is well conditioned for tokens that differ moderately, not for tokens each certain of its word or with words apart.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from ...linalg import laplacian
from ...linalg.sketching import eigenpairs, exact_sum


def matmul(A: Array, B: Array) -> Array:
    """In full precision."""
    return jnp.matmul(A, B, precision=Precision.HIGHEST)


def by_elimination(
    mean: Float[Array, " V"], B: Float[Array, "r V"], Y: Float[Array, "V k"], λ: Float[Array, ""]
) -> Float[Array, "V k"]:
    """From probabilities."""
    d = mean + λ
    y_d = Y / d[:, None]
    M = laplacian.factor(matmul(B / d, B.T), exact_sum(B / d, 1), λ)
    return y_d + matmul(B.T, laplacian.solve(M, matmul(B, y_d), exact_sum(y_d, 0))) / d[:, None]


def by_woodbury(
    mean: Float[Array, " V"], C: Float[Array, "r V"], Y: Float[Array, "V k"], λ: Float[Array, ""]
) -> Float[Array, "V k"]:
    """From signed rows."""
    d, v, κ, Z, S = _deflated(mean, C, λ)
    σ, Q = eigenpairs(S)
    ZQ, y_d = matmul(Z, Q), Y / d[:, None]
    low_rank = matmul(ZQ / jnp.maximum(σ, _least(S)), matmul(ZQ.T, Y))
    return y_d - v[:, None] * exact_sum(y_d, 0) / κ + low_rank


def condition(mean: Float[Array, " V"], C: Float[Array, "r V"], λ: Float[Array, ""]) -> Float[Array, ""]:
    """Of S, as far as it is told from singular."""
    S = _deflated(mean, C, λ).S
    σ, _ = eigenpairs(S)
    return σ[-1] / jnp.maximum(σ[0], _least(S))


class _Deflated(NamedTuple):
    d: Array
    v: Array
    κ: Array
    Z: Array
    S: Array


def _deflated(mean: Array, C: Array, λ: Array) -> _Deflated:
    d = mean + λ
    v = mean / d
    κ, z = exact_sum(v, 0), exact_sum(C / d, 1)
    κ = jnp.where(κ > 0, κ, 1)
    S = jnp.eye(len(C), dtype=C.dtype) - matmul(C / d, C.T) - λ / κ * z[:, None] * z
    return _Deflated(d, v, κ, (C / d).T - v[:, None] * z / κ, S)


def _least(S: Array) -> float:
    """The least eigenvalue of ``S <= I`` that rounding of its entries leaves visible."""
    return len(S) ** 0.5 * float(jnp.finfo(S.dtype).eps)
