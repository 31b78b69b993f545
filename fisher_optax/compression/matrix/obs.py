"""Optimal brain surgery: remove one weight after the other, each time the one that costs least, all others making up.

For one output with weights w and the loss ``½ (w - w₀)ᵀ H_d (w - w₀)``, let A be the inverse of the part of H_d that
belongs to the weights still there. In each step

    j = argmin w_j² / A_jj,   w ← w - A_:j w_j / A_jj,   A ← A - A_:j A_j: / A_jj      at a cost of ½ w_j² / A_jj

and what stays is always the exact minimiser under the mask so far. With ``v_s = A_:j / sqrt(A_jj)`` in step s the
current A is ``H_d⁻¹ - Σ_s v_s v_sᵀ``, a pivoted Cholesky factorisation of ``H_d⁻¹``. So outputs share ``H_d⁻¹``, and
each keeps its v and the diagonal alone: k² m operations and k m numbers for k of m weights, instead of k m² and m².

Source: Hassibi and Stork 1993 (Second order derivatives for network pruning: optimal brain surgeon); greedy and by
output as in Frantar and Alistarh 2022 (Optimal Brain Compression, arXiv 2208.11580), Algorithm 1.
"""

import functools

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.lax import Precision
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ..._xla import Platform, by_platform
from ...linalg import inverse_cholesky
from .masks import Pattern, Sparsity, as_sparsity, check_pattern, count
from .pruned import Pruned
from .sparsegpt import Solution, inputs, tell_damping, without_dead


def obs(
    W: ArrayLike,
    H: ArrayLike,
    sparsity: Sparsity,
    damping: object = 0.01,
    *,
    scope: str = "output",
    rows: int | None = None,
) -> Pruned:
    """Prune W by optimal brain surgery, greedy and exact for each output: of all methods the dearest.

    What `sparsegpt` approximates. Time grows with the outputs, and with the cube of the inputs
    (``benchmarks/speed/compression_speed.py``).

    Args:
      W, H, damping: as in `sparsegpt`, inputs that were always 0 too.
      sparsity: the share of each output's weights to remove, or "N:M": an M that is down to N weights loses no more.
      scope: "output" alone.
      rows: outputs that are pruned together. None: as many as fit 2 MiB on a CPU, and 256 MiB elsewhere.

    Returns:
      Weights, in W's dtype, and mask. Of equal scores the lower index goes.

    Raises:
      TypeError, ValueError: as `sparsegpt`, and for a traced share, since it shapes the program.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> H = jnp.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the first two inputs go together
      >>> W = jnp.array([[1.0], [2.0], [1.0]])
      >>> pruned, mask = fo.compression.obs(W, H, 1 / 3, damping=0.0)
      >>> print(pruned.T.round(3), mask.T)
      [[0.  2.9 1. ]] [[False  True  True]]
    """
    W, H = inputs("obs", W, H, damping)
    solution = solve(W, H, sparsity, damping, scope=scope, rows=rows)
    tell_damping("obs", damping, solution.damping)
    return Pruned(solution.weights.astype(W.dtype), solution.mask)


def solve(
    W: Float[Array, "*batch inputs outputs"],
    H: Float[Array, "*batch inputs inputs"],
    sparsity: Sparsity,
    damping: object = 0.01,
    *,
    scope: str = "output",
    rows: int | None = None,
) -> Solution:
    """`obs` without a look at the values of arrays; H in float32 at least."""
    share, (*batch, m, n) = as_sparsity(sparsity), W.shape
    if scope != "output":
        raise ValueError(f"obs prunes output by output, so its scope is 'output'; got {scope!r}. See sparsegpt.")
    if isinstance(share, Tracer):
        raise TypeError("obs needs a share that is known when it is compiled; make sparsity static, or use sparsegpt.")
    if isinstance(rows, bool) or not (rows is None or (isinstance(rows, int) and rows > 0)):
        raise ValueError(f"rows must be a whole number of outputs, at least 1, or None; got {rows!r}.")
    pattern = share if isinstance(share, Pattern) else None
    if pattern:
        check_pattern(pattern, m)
    k = m // share.of * (share.of - share.keep) if isinstance(share, Pattern) else count(share, m)
    found = _solve(W.astype(H.dtype).reshape(-1, m, n), H.reshape(-1, m, m), damping, k, pattern, rows)
    return Solution(*(x.reshape(*batch, *x.shape[1:]) for x in found))


@functools.partial(jax.jit, static_argnames=("k", "pattern", "rows"))
def _solve(W: Array, H: Array, damping: Array, k: int, pattern: Pattern | None, rows: int | None) -> Solution:
    *_, m, n = W.shape

    def together(platform: Platform) -> int:
        """Of about equally many outputs, whose v's fit."""
        most = rows or max(1, platform.working_memory // (max(k, 1) * m * H.dtype.itemsize))
        return -(-n // -(-n // most))

    def of_matrix(operands: tuple[Array, Array]) -> Solution:
        W, H = without_dead(*operands)
        U, used = inverse_cholesky(H, damping)
        A = jnp.matmul(U.T, U, precision=Precision.HIGHEST)
        H_d = jnp.diagonal(H) + used * jnp.trace(H) / len(H)

        def of_outputs(size: int, *operands: Array) -> tuple[Array, Array, Array]:
            W, A, H_d = operands
            return jax.lax.map(lambda w: _greedy(w, A, H_d, k, pattern), W.T, batch_size=size)

        w, stays, loss = by_platform(of_outputs, together, W, A, H_d)
        return Solution(w.T, stays.T, used, jnp.sum(loss))

    return jax.lax.map(of_matrix, (W, H))


def _greedy(
    w: Float[Array, " m"], A: Float[Array, "m m"], H_d: Float[Array, " m"], k: int, pattern: Pattern | None
) -> tuple[Array, Array, Array]:
    """The weights of one output after k steps, what stays, and ``½ Σ w_j² / A_jj``; ``H_d`` is the diagonal."""

    def step(s: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        w, d, V, stays, loss = carry
        j = jnp.argmin(jnp.where(_may_go(stays, pattern), jnp.abs(w) / jnp.sqrt(d), jnp.inf))
        a = A[j] - jnp.matmul(V[:, j], V, precision=Precision.HIGHEST)
        root = jnp.sqrt(jnp.maximum(a[j], 1 / H_d[j]))
        v, e = a / root, w[j] / root
        stays = stays.at[j].set(False)
        # What is left of an inverse's diagonal is never below the inverse of the diagonal.
        d = jnp.maximum(d - v * v, 1 / H_d)
        return jnp.where(stays, w - v * e, 0), d, V.at[s].set(v), stays, loss + e * e / 2

    V = jnp.zeros((max(k, 1), len(w)), w.dtype)
    start = w, jnp.diagonal(A), V, jnp.ones(w.shape, bool), jnp.zeros([], w.dtype)
    w, _, _, stays, loss = jax.lax.fori_loop(0, k, step, start)
    return w, stays, loss


def _may_go(stays: Array, pattern: Pattern | None) -> Array:
    if pattern is None:
        return stays
    groups = stays.reshape(-1, pattern.of)
    return (groups & (jnp.sum(groups, 1, keepdims=True) > pattern.keep)).ravel()
