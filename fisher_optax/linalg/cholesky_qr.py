"""The Q of a QR by matrix products and small Cholesky factors, in one short program for any size.

A compiler for a TPU unrolls a large factorisation, or makes a solver of its own for each shape, and a GPU's library
takes one matrix after another. Here one loop takes the columns block by block, and one factorisation, of a block's Gram
matrix, stands in it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int

from .lapack import one_by_one
from .products import times

# Columns in a block, at most: a TPU factorises and inverts triangles of 128 by programs of its own.
BLOCK = 128
# In units of ``d ε``, what is added to a block's Gram matrix of unit diagonal in each pass: rounding in its Cholesky
# factor comes to a quarter of it. The last pass adds nothing.
SHIFTS = (2, 2, 2, 0)


def cholesky_qr(
    M: Float[Array, "d d"], precision: Precision | str = Precision.HIGHEST, count: Int[Array, ""] | None = None
) -> Float[Array, "d d"]:
    """An orthonormal basis of M's columns, of which the first k span what M's first k do.

        V ← V - Q Qᵀ V;   V ← V / |V|, column by column;   L Lᵀ = Vᵀ V + s I;   V ← V L⁻ᵀ

    of each block V of columns, in four passes, Q the blocks before. A column at a distance δ, as a part of its length,
    from the span of those before it in its block has about ``min(1, δ / 2 d ε)`` after a pass with ``s = 2 d ε``. Two
    such passes do where δ is a few ε; a third for M of an indefinite matrix (by rounding to bfloat16, say), which may
    have an eigenvalue that cancels its shift. Rows that share no columns with others share none afterwards, to the bit.

    Args:
      M: no column is zero; each has more than rounding outside the span of those before it.
      precision: of the products.
      count: of the blocks that are taken, a number that the program finds out: none where M is not needed. None: all.

    Source: shifted CholeskyQR: Fukaya et al. 2020 (arXiv 1809.11085), whose shift, ``11 d (2d + 1) ε/2``, is a bound
    for the worst rounding, and would take more passes.

    >>> print(cholesky_qr(jnp.array([[3.0, 1.0], [4.0, 0.0]])).round(3))
    [[ 0.6  0.8]
     [ 0.8 -0.6]]
    """
    d, dtype = M.shape[-1], M.dtype
    blocks = -(-d // BLOCK)
    b = -(-d // blocks)
    padded = jnp.pad(M, ((0, 0), (0, blocks * b - d)))
    shifts = jnp.asarray(SHIFTS, dtype) * (d * float(jnp.finfo(dtype).eps))

    def block(i: Array, Q: Array) -> Array:
        def one_pass(V: Array, shift: Array) -> tuple[Array, None]:
            return _one_pass(Q, V, shift, precision), None

        V = jax.lax.dynamic_slice_in_dim(padded, i * b, b, 1)
        V, _ = jax.lax.scan(one_pass, V, shifts)
        return jax.lax.dynamic_update_slice_in_dim(Q, V, i * b, 1)

    last = blocks if count is None else jnp.minimum(count, blocks)
    return jax.lax.fori_loop(0, last, block, jnp.zeros_like(padded))[:, :d]


def _one_pass(Q: Array, V: Array, shift: Any, precision: Any) -> Array:
    V = V - times(Q, times(Q.mT, V, precision), precision)
    lengths = jnp.sqrt(jnp.sum(V * V, axis=0, keepdims=True))
    filled = jnp.where(lengths == 0, 1, 0).astype(V.dtype)  # columns beyond the last
    V = V / (lengths + filled)
    gram = times(V.mT, V, precision) + (shift + filled) * jnp.eye(V.shape[-1], dtype=V.dtype)
    L = one_by_one(lambda A: jax.lax.linalg.cholesky(A, symmetrize_input=False))(gram)
    return one_by_one(lambda L, V: jax.lax.linalg.triangular_solve(L, V, lower=True, transpose_a=True))(L, V)
