"""What is not done to a matrix, or a batch, at once: symmetric ones block by block, factorisations one by one.

`blockwise`, `overwritten` and `diagonal` read and write a symmetric matrix in the blocks in which `second_moment`
computes it. XLA takes a slice of a concatenation from its parts, so a matrix that was put together from blocks, and is
read through these functions alone, is never put together at all: the statistics of a K-FAC step, which all have to be
there before any is used, then take five eighths of the memory. Where a matrix is not computed in blocks, these are
plain functions.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.lax import Precision, PrecisionLike
from jaxtyping import Array, Float, Int, PyTree

from .._xla import by_platform
from .products import from_upper, row_sizes, times, whole


def blockwise(f: Callable[[Array], Array], S: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """``f(S)`` for an f of each entry alone."""

    def by_blocks(rows: tuple[int, ...], S: Array) -> Array:
        if len(rows) == 1:
            return f(S)
        cuts = _cuts(rows)
        return whole(from_upper(len(cuts), lambda i, j: f(S[slice(*cuts[i]), slice(*cuts[j])])))

    return _by_platform(by_blocks, S)


def overwritten(
    f: Callable[[Array, Array], Array], A: Float[Array, "d d"], S: Float[Array, "d d"]
) -> Float[Array, "d d"]:
    """``f(A, S)`` for an f of each pair of entries alone, written over A block by block."""

    def by_blocks(rows: tuple[int, ...], S: Array, A: Array) -> Array:
        if len(rows) == 1:
            return f(A, S)
        cuts = _cuts(rows)
        for a, b in cuts:
            for c, d in cuts:
                A = jax.lax.dynamic_update_slice(A, f(A[a:b, c:d], S[a:b, c:d]), (a, c))
        return A

    return _by_platform(by_blocks, S, A)


def diagonal(S: Float[Array, "*batch d d"]) -> Float[Array, "*batch d"]:
    """The diagonal, by strided slices.

    >>> print(diagonal(jnp.array([[1.0, 2.0], [2.0, 4.0]])))
    [1. 4.]
    """

    def by_blocks(rows: tuple[int, ...], S: Array) -> Array:
        parts = [S[..., a:b, a:b] for a, b in _cuts(rows)]
        flat = (x.reshape(*x.shape[:-2], x.shape[-1] ** 2)[..., :: x.shape[-1] + 1] for x in parts)
        return jnp.concatenate(list(flat), -1)

    return _by_platform(by_blocks, S)


def _by_platform(f: Callable[..., Array], S: Array, *others: Array) -> Array:
    """``f(rows, S, *others)``, in blocks of one matrix under `jit`; elsewhere a copy would be made for each."""
    d, single = S.shape[-1], S.ndim == 2 and isinstance(S, Tracer)
    return by_platform(f, lambda platform: row_sizes(d, platform.symmetric_blocks if single else None), S, *others)


def _cuts(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where each row of blocks begins and ends."""
    ends = np.cumsum(rows).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


# Factorisations: of batches, on a CPU one matrix at a time; of large matrices, by products; and with fewer rows.


def one_by_one(f: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``f``, of single matrices, over leading axes and under `jax.vmap`: on a CPU as a loop.

    jaxlib (0.10 to 0.12) runs a batched factorisation in blocks on XLA's thread pool and waits for them on a thread of
    that pool. Two such calls in one program can each hold
    a thread the other waits for, and then the program hangs for ever. A single matrix is factorised where it is
    called, with whatever threads the BLAS has.

    >>> one_by_one(jnp.linalg.cholesky)(4 * jnp.ones((2, 1, 1))).ravel()
    Array([2., 2.], dtype=float32)
    """

    def of_batch(alone: bool, *arrays: Array) -> PyTree:
        batch = arrays[0].shape[:-2]
        flat = tuple(x.reshape(-1, *x.shape[-2:]) for x in arrays)
        if len(flat[0]) == 1:
            results = jax.tree.map(lambda x: x[None], f(*(x[0] for x in flat)))
        else:
            results = jax.lax.map(lambda xs: f(*xs), flat) if alone else jax.vmap(f)(*flat)
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)

    @jax.custom_batching.custom_vmap
    def call(*arrays: Array) -> PyTree:
        if math.prod(arrays[0].shape[:-2]) == 1:
            return of_batch(False, *arrays)
        return by_platform(of_batch, lambda platform: platform.one_factorisation, *arrays)

    @call.def_vmap
    def batched(size: int, which: list[bool], *arrays: Array) -> tuple[PyTree, PyTree]:
        every = (x if there else jnp.broadcast_to(x, (size, *x.shape)) for x, there in zip(arrays, which, strict=True))
        result = call(*every)
        return result, jax.tree.map(lambda _: True, result)

    return call


def sequential(f: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``f`` of single matrices and whatever else; under `jax.vmap` a loop, so that its conditionals stay what they are.

    >>> jax.vmap(sequential(jnp.linalg.cholesky))(4 * jnp.ones((2, 1, 1))).ravel()
    Array([2., 2.], dtype=float32)
    """
    return jax.custom_batching.sequential_vmap(f)


# The Q of a QR by matrix products and small Cholesky factors, in one short program for any size.
#
# A compiler for a TPU unrolls a large factorisation, or makes a solver of its own for each shape, and a GPU's library
# takes one matrix after another. Here one loop takes the columns block by block, and one factorisation, of a block's
# Gram matrix, stands in it.

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


def _one_pass(Q: Array, V: Array, shift: Float[Array, ""], precision: PrecisionLike) -> Array:
    V = V - times(Q, times(Q.mT, V, precision), precision)
    lengths = jnp.sqrt(jnp.sum(V * V, axis=0, keepdims=True))
    filled = jnp.where(lengths == 0, 1, 0).astype(V.dtype)  # columns beyond the last
    V = V / (lengths + filled)
    gram = times(V.mT, V, precision) + (shift + filled) * jnp.eye(V.shape[-1], dtype=V.dtype)
    L = one_by_one(lambda A: jax.lax.linalg.cholesky(A, symmetrize_input=False))(gram)
    return one_by_one(lambda L, V: jax.lax.linalg.triangular_solve(L, V, lower=True, transpose_a=True))(L, V)


# Sums that do not lose digits with their length, and matrices ``Rᵀ R`` kept with fewer rows.


def exact_sum(x: Array, axis: int) -> Array:
    """The sum with what each addition rounds off carried along (Knuth's TwoSum), for terms that are all alike:
    a plain sum of 1,000 equal float32 numbers may err by 1e-5.

    >>> print(exact_sum(jnp.array([1e8, 1.0, -1e8]), 0))
    1.0
    """
    zero = jnp.zeros([], x.dtype)
    total, rest = jax.lax.reduce((x, jnp.zeros_like(x)), (zero, zero), _two_sum, (axis % x.ndim,))
    return total + rest


def _two_sum(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    total = a[0] + b[0]
    of_b = total - a[0]
    return total, a[1] + b[1] + ((a[0] - (total - of_b)) + (b[0] - of_b))


def eigenpairs(A: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues in ascending order, and eigenvectors as columns."""

    def stacked(A: Array) -> Array:
        λ, Q = jnp.linalg.eigh(A, symmetrize_input=False)
        return jnp.concatenate([λ[None], Q])

    both = one_by_one(stacked)(A)
    return both[0], both[1:]


@functools.partial(jax.jit, static_argnums=1)
def frequent_directions(R: Float[Array, "n d"], r: int) -> Float[Array, "r d"]:
    """``r < n`` rows with ``0 <= RᵀR - R'ᵀR' <= σ²``, σ the singular value r + 1 of R, by which all are shrunk.

    Source: Liberty 2013 (arXiv 1206.0594), Algorithm 2, shrinking by the first singular value that is left out.

    >>> R = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> print(abs(frequent_directions(R, 1)).round(3))
    [[2.828 0.   ]]
    """
    μ, Q = eigenpairs(jnp.matmul(R, R.T, precision=Precision.HIGHEST))
    largest, left_out = μ[-r:], jnp.maximum(μ[-r - 1], 0)
    shrunk = jnp.sqrt(jnp.maximum(1 - left_out / jnp.where(largest > 0, largest, 1), 0))
    return shrunk[:, None] * jnp.matmul(Q[:, -r:].T, R, precision=Precision.HIGHEST)
