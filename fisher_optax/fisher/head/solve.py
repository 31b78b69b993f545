"""``(G + λ)⁻¹ Y`` for the Fisher G of a softmax head and Y with columns that sum to 0, in two ways.

Woodbury's identity as it stands inverts a matrix of condition number 1/λ, because ``G 1 = 0``: float32 has no digit
left where λ is 1e-8 of the mean of p̄.

From probabilities: row t of B is s_t p_t, ``G = diag(p̄) - Bᵀ diag(1/s) B``, and ``(G + λ) x = y`` is a network of words
and tokens with conductances B, each word grounded by λ. Elimination of the words, of ``d = p̄ + λ``, leaves for the
potentials ``u_t = p_tᵀ x`` of the tokens

    (diag(s) - B diag(1/d) Bᵀ) u = B (y / d),    x = (y + Bᵀ u) / d:

a Laplacian with the ground ``λ B (1/d)``, which `solve_grounded` solves to rounding whatever its condition, as
``1ᵀ B (y / d) = -λ 1ᵀ (y / d)``.

From signed rows C, ``G = diag(p̄) - p̄ p̄ᵀ - Cᵀ C`` and ``C 1 = 0``: Woodbury's identity on what is orthogonal to 1, where
``diag(d) - p̄ p̄ᵀ`` has the inverse ``y/d - v Σ(y/d) / κ`` with ``v = p̄ / d`` and ``κ = Σ v``:

    z = C (1/d),   Z = Cᵀ/d - v zᵀ/κ,   S = I - C diag(1/d) Cᵀ - (λ/κ) z zᵀ,   x = y/d - v Σ(y/d)/κ + Z S⁻¹ Zᵀ y.

S is well conditioned for tokens that differ moderately, not for tokens each certain of its word or with words apart.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.lax import Precision
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from ...linalg.blocks import eigenpairs, exact_sum, one_by_one


def matmul(A: Array, B: Array) -> Array:
    """In full precision."""
    return jnp.matmul(A, B, precision=Precision.HIGHEST)


def by_elimination(
    mean: Float[Array, " V"], B: Float[Array, "r V"], Y: Float[Array, "V k"], λ: Float[Array, ""]
) -> Float[Array, "V k"]:
    """From probabilities."""
    d = mean + λ
    y_d = Y / d[:, None]
    M = eliminate(matmul(B / d, B.T), exact_sum(B / d, 1), λ)
    return y_d + matmul(B.T, solve_grounded(M, matmul(B, y_d), exact_sum(y_d, 0))) / d[:, None]


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


# What the Fishers of a head take, checked: tokens and their weights, right sides, damping, numbers of rows.


SKETCHES = ("subsample", "frequent_directions")


def tokens_and_weights(
    name: str, what: str, x: ArrayLike, weights: ArrayLike | None
) -> tuple[Float[Array, "T V"], Float[Array, " T"]]:
    """One row a token, in float32 at least, and weights >= 0."""
    shape = jnp.shape(x)
    counts = shape[:-1] if weights is None else jnp.shape(weights)
    if not shape or counts != shape[:-1]:
        raise ValueError(
            f"{name}: got {what} {shape}, weights {counts}; wanted (*positions, vocabulary) and (*positions,)."
        )
    if weights is None:
        weights = jnp.ones(counts)
    elif not isinstance(weights, Tracer) and len(wrong := np.asarray(weights)[~_usable(np.asarray(weights))]):
        raise ValueError(f"{name}: weights must be finite and at least 0; got {wrong[0]}. Leave tokens out by 0.")
    return _flat(jnp.asarray(x), jnp.asarray(weights))


@jax.jit
def _flat(x: Array, w: Array) -> tuple[Array, Array]:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return x.reshape(-1, x.shape[-1]).astype(dtype), jnp.where(_usable(w), w, 0).reshape(-1).astype(dtype)


def _usable(w: Any) -> Any:
    return (w >= 0) & (w < np.inf)


@jax.jit
def finite_rows(x: Float[Array, "T V"], w: Float[Array, " T"]) -> tuple[Float[Array, "T V"], Float[Array, " T"]]:
    """Rows of weight 0, or that are not finite, as zeros of weight 0."""
    there = (w > 0) & jnp.all(jnp.isfinite(x), -1)
    return jnp.where(there[:, None], x, 0), jnp.where(there, w, 0)


@jax.jit
def probabilities(z: Float[Array, "T V"], w: Float[Array, " T"]) -> tuple[Float[Array, "T V"], Float[Array, " T"]]:
    """`finite_rows` of the softmax of logits."""
    return finite_rows(jax.nn.softmax(z), w)


@jax.jit
def shares(w: Float[Array, " T"]) -> Float[Array, " T"]:
    """``w / Σ w``; zeros where all are 0."""
    W = jnp.sum(w)
    return w / jnp.where(W > 0, W, 1)


def check_counted(name: str, total: Array) -> None:
    """A ValueError for a total weight known to be 0."""
    if not isinstance(total, Tracer) and float(total) == 0:
        raise ValueError(f"{name}: no token counts; wanted one of weight above 0 whose numbers are finite.")


@jax.jit
def complement(p: Float[Array, "T V"]) -> Float[Array, "T V"]:
    """``1 - p`` to rounding: of a word all but certain, the sum of the others."""
    likely = p > 0.5
    others = exact_sum(jnp.where(likely, 0, p), -1)
    return jnp.where(likely, others[:, None], 1 - p)


def columns(name: str, Y: ArrayLike, rows: Float[Array, "r V"], f: Callable[[Array], Array]) -> Array:
    """``f`` of Y as a matrix; Y of ``(V, features)`` or ``(V,)``."""
    Y, V = jnp.asarray(Y), rows.shape[-1]
    if Y.ndim not in (1, 2) or len(Y) != V:
        raise ValueError(f"{name}: got Y of shape {Y.shape}; wanted ({V}, features) or ({V},).")
    return f(Y.reshape(V, -1).astype(jnp.promote_types(Y.dtype, rows.dtype))).reshape(Y.shape)


def damping_of(name: str, damping: ArrayLike, dtype: DTypeLike) -> Float[Array, ""]:
    """λ > 0 as an array."""
    λ = jnp.asarray(damping, dtype)
    if λ.ndim or (not isinstance(λ, Tracer) and not 0 < float(λ) < np.inf):
        raise ValueError(f"{name}: damping must be one finite number above 0; got {damping!r}.")
    return jnp.maximum(λ, jnp.finfo(dtype).tiny)


def check_sketch(name: str, max_rows: object, sketch: str) -> None:
    """A ValueError for what `compress` does not know."""
    if sketch not in SKETCHES:
        raise ValueError(f"{name}: sketch must be one of {', '.join(map(repr, SKETCHES))}; got {sketch!r}.")
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1):
        raise ValueError(f"{name}: max_rows must be None or an integer of at least 1; got {max_rows!r}.")


def check_vocabularies(name: str, ours: int, theirs: int) -> None:
    """A ValueError unless they are the same."""
    if ours != theirs:
        raise ValueError(f"{name}.merge: got vocabularies of {ours} and {theirs} words; wanted the same.")


# Grounded Laplacians, factored and solved without a subtraction that could cancel.
#
# Conductances ``K_ij >= 0`` between nodes, and ``λ m_i >= 0`` from each node to the ground, make the M-matrix
#
#     M = diag(Σ_j K_ij + λ m_i) - K,    row sums λ m.
#
# Elimination on off-diagonals and row sums, never on the diagonal, only adds, multiplies and divides numbers >= 0:
#
#     δ_k = Σ_{i>k} K_ki + λ m_k,   N_ki = K_ki / δ_k,   K_ij += N_ki K_kj,   m_i += N_ki m_k,    M = (I - N)ᵀ Δ (I - N)
#
# so that every entry of N, δ and M⁻¹ is right to rounding, however close M is to singular (Grassmann, Taksar and Heyman
# 1985 for Markov chains; Alfa, Xue and Ye 2002 for M-matrices). The last pivot is λ times what m has grown to. A right
# side with a known sum ``1ᵀb = -λη`` has a last entry that is known likewise, because what elimination takes out of the
# sum is what leaks to the ground: λ cancels out of their quotient, and does not have to be resolved.


class Grounded(NamedTuple):
    """What `eliminate` finds; nodes in ``order``, which is its own inverse."""

    root: Float[Array, "n n"]  # I - N, unit upper triangular
    pivots: Float[Array, " n"]
    m: Float[Array, " n"]
    order: Int[Array, " n"]


@jax.jit
def eliminate(K: Float[Array, "n n"], m: Float[Array, " n"], λ: Float[Array, ""]) -> Grounded:
    """Elimination of the nodes of ``M``, that with the most ground last. The diagonal of K is not read.

    Work: n steps of n² operations. A node without any conductance stays out.

    >>> M = eliminate(jnp.ones((2, 2)), jnp.ones(2), jnp.asarray(1e-9))
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
def solve_grounded(M: Grounded, b: Float[Array, "n k"], η: Float[Array, " k"]) -> Float[Array, "n k"]:
    """``M⁻¹ b`` for right sides of sum ``-λ η``; as exact for ``λ`` next to nothing as for any other.

    >>> M = eliminate(jnp.ones((2, 2)), jnp.ones(2), jnp.asarray(1e-9))
    >>> print(solve_grounded(M, jnp.array([[1.0], [-1.0]]), jnp.zeros(1)))
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
