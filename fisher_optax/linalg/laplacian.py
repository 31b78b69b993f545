"""Grounded Laplacians, factored and solved without a subtraction that could cancel.

Conductances ``K_ij >= 0`` between nodes, and ``λ m_i >= 0`` from each node to the ground, make the M-matrix

    M = diag(Σ_j K_ij + λ m_i) - K,    row sums λ m.

Elimination on off-diagonals and row sums, never on the diagonal, only adds, multiplies and divides numbers >= 0:

    δ_k = Σ_{i>k} K_ki + λ m_k,   N_ki = K_ki / δ_k,   K_ij += N_ki K_kj,   m_i += N_ki m_k,    M = (I - N)ᵀ Δ (I - N)

so that every entry of N, δ and M⁻¹ is right to rounding, however close M is to singular (Grassmann, Taksar and Heyman
1985 for Markov chains; Alfa, Xue and Ye 2002 for M-matrices). The last pivot is λ times what m has grown to. A right
side with a known sum ``1ᵀb = -λη`` has a last entry that is known likewise, because what elimination takes out of the
sum is what leaks to the ground: λ cancels out of their quotient, and does not have to be resolved.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int

from .lapack import one_by_one


class Grounded(NamedTuple):
    """What `factor` finds; nodes in ``order``, which is its own inverse."""

    root: Float[Array, "n n"]  # I - N, unit upper triangular
    pivots: Float[Array, " n"]
    m: Float[Array, " n"]
    order: Int[Array, " n"]


@jax.jit
def factor(K: Float[Array, "n n"], m: Float[Array, " n"], λ: Float[Array, ""]) -> Grounded:
    """Elimination of the nodes of ``M``, that with the most ground last. The diagonal of K is not read.

    Work: n steps of n² operations. A node without any conductance stays out.

    >>> M = factor(jnp.ones((2, 2)), jnp.ones(2), jnp.asarray(1e-9))
    >>> print(M.pivots)
    [1.e+00 2.e-09]
    """
    n, i = len(m), jnp.arange(len(m))
    heaviest = jnp.argmax(m)
    order = i.at[heaviest].set(n - 1).at[n - 1].set(heaviest)

    def step(k: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        K, m, δ = carry
        row = jnp.where(i > k, K[k], 0)
        δ_k = jnp.sum(row) + λ * m[k]
        N_k = row / jnp.where(δ_k > 0, δ_k, 1)
        K = K + N_k[:, None] * row
        return K.at[k].set(N_k), m + N_k * m[k], δ.at[k].set(δ_k)

    N, m, δ = jax.lax.fori_loop(0, n, step, (K[order][:, order], m[order], jnp.zeros_like(m)))
    return Grounded(jnp.eye(n, dtype=N.dtype) - jnp.triu(N, 1), δ, m, order)


@jax.jit
def solve(M: Grounded, b: Float[Array, "n k"], η: Float[Array, " k"]) -> Float[Array, "n k"]:
    """``M⁻¹ b`` for right sides of sum ``-λ η``; as exact for ``λ`` next to nothing as for any other.

    >>> M = factor(jnp.ones((2, 2)), jnp.ones(2), jnp.asarray(1e-9))
    >>> print(solve(M, jnp.array([[1.0], [-1.0]]), jnp.zeros(1)))
    [[ 0.5]
     [-0.5]]
    """
    v = _triangular_solve(M.root.T, b[M.order], lower=True) / jnp.where(M.pivots > 0, M.pivots, 1)[:, None]
    leaked = jnp.matmul(M.m[:-1], v[:-1], precision=Precision.HIGHEST)
    last = -(η + leaked) / jnp.where(M.m[-1] > 0, M.m[-1], 1)
    return _triangular_solve(M.root, v.at[-1].set(last), lower=False)[M.order]


def _triangular_solve(A: Array, B: Array, lower: bool) -> Array:
    return one_by_one(
        lambda A, B: jax.lax.linalg.triangular_solve(A, B, left_side=True, lower=lower, unit_diagonal=True)
    )(A, B)
