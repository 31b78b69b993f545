"""SparseGPT: prune a matrix in one pass over its inputs, each error made up for by the inputs still to come.

With ``H_d = H + damping mean(diag H) I`` and ``H_d⁻¹ = Uᵀ U``, U upper triangular (`linalg.inverse_cholesky`), input
i of every output in turn:

    e_i = (w_i - q_i) / U_ii,   q_i = 0 or w_i;      W_j ← W_j - U_ij e_i  for all inputs j ≥ i

which is the exact correction where inputs before i must not move any more, at a cost of ``½ e_i²``. These are summed
over blocks of inputs as matrix products, which changes nothing. What goes is chosen at the start of each block by
``w_i² / U_ii²``.

Source: Frantar and Alistarh 2023 (arXiv 2301.00774), Algorithm 1. There W is outputs x inputs.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.lax import Precision
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from ..._arguments import in_range
from ...linalg import inverse_cholesky
from .checking import Number, gram, kernel
from .masks import Pattern, Sparsity, as_sparsity, check_pattern, count, keep_largest
from .pruned import Pruned

SCOPES = ("output", "block")
# Rows that are corrected one by one, before matrix products take over.
ROWS = 8


class Solution(NamedTuple):
    """What pruning a matrix gives, and what it took."""

    weights: Float[Array, "*batch inputs outputs"]  # in the dtype of H
    mask: Bool[Array, "*batch inputs outputs"]
    damping: Float[Array, "*batch"]  # used; NaN where none made H invertible
    loss: Float[Array, "*batch"]  # ½ tr(Δᵀ H_d Δ)


class Plan(NamedTuple):
    """What the program depends on."""

    block: int
    rows: int  # of a block at a time; divides it
    scope: str
    pattern: Pattern | None


def sparsegpt(
    W: ArrayLike,
    H: ArrayLike,
    sparsity: Sparsity | None = None,
    block_size: int = 128,
    damping: Number = 0.01,
    *,
    mask: ArrayLike | None = None,
    scope: str = "output",
) -> Pruned:
    """Prune W, and correct what stays for what goes, by SparseGPT: one pass over the inputs, at any size.

    Args:
      W: ``(*batch, inputs, outputs)``, as Flax stores kernels, of any float dtype; computed in float32 at least.
      H: ``(*batch, inputs, inputs)``, the mean of x xᵀ over the layer's inputs x. An input that was always 0, H_jj = 0,
        gets weights 0 and counts as H_jj = 1, as in the authors' code. Its mask is chosen like any other: it is among
        the first to go.
      sparsity: the share to remove, exactly ``⌈s n⌉`` in each whole scope, or "N:M", chosen every M inputs. A share may
        be traced. None with ``mask=``.
      block_size: inputs whose mask is chosen at once, 128 in the paper; "N:M" and ``mask=`` do not depend on it but for
        rounding.
      damping: of the mean of H's diagonal, 0.01 in the paper. Raised tenfold, with a warning, until H can be inverted.
      mask: True where a weight stays: only correct the rest, choose nothing.
      scope: what is counted in a block: "output" (each output's weights) or "block" (all of them: the authors' code).

    Returns:
      Weights, in W's dtype, and mask.

    Raises:
      TypeError, ValueError: for arguments out of range, shapes that do not fit, entries that are not finite, and an H
        that no damping makes invertible; the last two only outside of `jit`, inside of which weights become NaN.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> H = jnp.array([[1.0, 0.9], [0.9, 1.0]])  # two inputs that go together
      >>> pruned, mask = fo.compression.sparsegpt(jnp.array([[1.0], [2.0]]), H, 0.5, damping=0.0)
      >>> print(pruned.T.round(3), mask.T)
      [[0.  2.9]] [[False  True]]
    """
    W, H = inputs("sparsegpt", W, H, damping)
    solution = solve(W, H, sparsity, block_size, damping, mask=mask, scope=scope)
    tell_damping("sparsegpt", damping, solution.damping)
    return Pruned(solution.weights.astype(W.dtype), solution.mask)


def solve(
    W: Float[Array, "*batch inputs outputs"],
    H: Float[Array, "*batch inputs inputs"],
    sparsity: Sparsity | None,
    block_size: int = 128,
    damping: Number = 0.01,
    *,
    mask: ArrayLike | None = None,
    scope: str = "output",
) -> Solution:
    """`sparsegpt` without a look at the values of arrays; H in float32 at least."""
    *batch, m, n = W.shape
    if (sparsity is None) == (mask is None):
        raise ValueError("sparsegpt takes either a sparsity or, to keep a choice already made, a mask=.")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a whole number of inputs, at least 1; got {block_size!r}.")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}; got {scope!r}.")
    block, pattern, counts, fixed = min(block_size, m), None, None, None
    if sparsity is None:
        fixed = jnp.asarray(mask)
        if fixed.dtype != bool or fixed.shape != W.shape:
            raise ValueError(f"mask must be bool, of the shape {W.shape} of W; got {fixed.dtype}, {fixed.shape}.")
        fixed = fixed.reshape(-1, m, n)
    elif isinstance(share := as_sparsity(sparsity), Pattern):
        check_pattern(share, m)
        pattern, block = share, -(-block // share.of) * share.of
    else:
        ends = np.minimum(np.arange(0, m + block, block), m) * (n if scope == "block" else 1)
        counts = jnp.diff(jnp.asarray([count(share, int(end)) for end in ends]))
    rows = pattern.of if pattern else max(d for d in range(1, ROWS + 1) if block % d == 0)
    plan = Plan(block, rows, scope, pattern)
    found = _solve(W.astype(H.dtype).reshape(-1, m, n), H.reshape(-1, m, m), fixed, counts, damping, plan)
    return Solution(*(x.reshape(*batch, *x.shape[1:]) for x in found))


@functools.partial(jax.jit, static_argnames="plan")
def _solve(W: Array, H: Array, fixed: Array | None, counts: Array | None, damping: Array, plan: Plan) -> Solution:
    def of_matrix(W: Array, H: Array, fixed: Array | None) -> Solution:
        W, H = without_dead(W, H)
        U, used = inverse_cholesky(H, damping)
        q, E, stays = _sweep(W, U, fixed, counts, plan)
        return Solution(jnp.where(stays, q, 0), stays, used, jnp.sum(E * E) / 2)

    return jax.vmap(of_matrix)(W, H, fixed)


def _sweep(W: Array, U: Array, fixed: Array | None, counts: Array | None, plan: Plan) -> tuple[Array, Array, Array]:
    """Every input's weights as they were in its turn, errors ``e``, and what stays."""
    (m, n), B = W.shape, plan.block
    blocks = -(-m // B)
    extra = blocks * B - m
    W = jnp.pad(W, ((0, extra), (0, 0))).reshape(blocks, B, n)
    U = jax.scipy.linalg.block_diag(U, jnp.eye(extra, dtype=U.dtype)).reshape(blocks, B, blocks, B)
    chosen = jnp.ones(W.shape, bool)
    if fixed is not None:
        chosen = jnp.pad(fixed, ((0, extra), (0, 0)), constant_values=True).reshape(W.shape)

    def block(b: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        _, E, stays = carry
        w = jax.lax.fori_loop(0, b, lambda a, w: w - _matmul(U[a, :, b].T, E[a]), W[b])
        chosen = stays[b]
        if counts is not None:
            scores = jnp.abs(w) / jnp.diagonal(U[b, :, b])[:, None]
            scores = jnp.where((b * B + jnp.arange(B) < m)[:, None], scores, jnp.inf)
            chosen = keep_largest(scores, counts[b], 0 if plan.scope == "output" else None)
        found = _block(w, U[b, :, b], chosen, plan)
        return tuple(x.at[b].set(y) for x, y in zip(carry, found, strict=True))

    found = jax.lax.fori_loop(0, blocks, block, (W, jnp.zeros_like(W), chosen))
    q, E, stays = (x.reshape(-1, n)[:m] for x in found)
    return q, E, stays


def _block(W: Array, U: Array, stays: Array, plan: Plan) -> tuple[Array, Array, Array]:
    """`_sweep` over one block, a few rows at a time."""

    def some_rows(s: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=s * plan.rows, slice_size=plan.rows)
        _, E, stays = carry
        columns = rows(U, axis=1)
        w, u, stay = rows(W) - _matmul(columns.T, E), rows(columns), rows(stays)
        if plan.pattern:
            removed = plan.pattern.of - plan.pattern.keep
            stay = keep_largest(jnp.abs(w) / jnp.diagonal(u)[:, None], removed, 0)

        def row(w: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            i, u, stay = at
            e = jnp.where(stay, 0, w[i] / u[i])
            return w - u[:, None] * e, e

        w, e = jax.lax.scan(row, w, (jnp.arange(plan.rows), u, stay))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=s * plan.rows, axis=0)
        return tuple(put(x, y) for x, y in zip(carry, (w, e, stay), strict=True))

    return jax.lax.fori_loop(0, len(W) // plan.rows, some_rows, (W, jnp.zeros_like(W), stays))


def inputs(name: str, W: ArrayLike, H: ArrayLike, damping: object) -> tuple[Array, Array]:
    """A kernel and the second moment of its inputs, checked."""
    W = kernel(name, W)
    if not W.size:
        raise ValueError(f"{name}: there is nothing to prune in a kernel of shape {W.shape}.")
    in_range("damping", damping, 0)
    return W, gram(name, H, W)


def without_dead(W: Array, H: Array) -> tuple[Array, Array]:
    """Weights 0 and H_jj = 1 for inputs that were always 0."""
    dead = jnp.diagonal(H) == 0
    return jnp.where(dead[:, None], 0, W), H + jnp.diag(dead.astype(H.dtype))


def tell_damping(name: str, damping: object, used: Array) -> None:
    """Warns where more was used than was asked for; a ValueError where nothing helped."""
    if isinstance(used, Tracer):
        return
    if bool(jnp.any(jnp.isnan(used))):
        raise ValueError(
            f"{name}: H is not positive definite, with damping={damping} or any that was tried above it. "
            "Pass the mean of x xᵀ, symmetric, of inputs whose squares do not overflow."
        )
    if bool(jnp.any(used > jnp.asarray(damping, used.dtype))):
        warnings.warn(
            f"{name}: with damping={damping} H is singular to rounding, so {float(jnp.max(used)):.3g} was used. "
            "Take more calibration data, or say damping= yourself.",
            UserWarning,
            stacklevel=3,
        )


def _matmul(A: Array, B: Array) -> Array:
    return jnp.matmul(A, B, precision=Precision.HIGHEST)
