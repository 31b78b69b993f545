"""Orthonormal eigenbases of symmetric matrices: exact, or followed one orthogonal iteration at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Int

from .blocks import cholesky_qr, one_by_one
from .following import (
    at_least_float32,
    column_lengths,
    diagonal,
    followed,
    known,
    nearest_axes,
    off_diagonal_part,
    project,
    rayleigh,
    sort_key,
)
from .products import times, unit_frobenius, unit_scale

# In epsilons of the type: FLOOR |A| is added to A, just above the rounding of A Q.
FLOOR = 8
# How often the first basis by products is renewed, at most.
FIRST_ROUNDS = 20


def eigenbasis(A: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Eigenvectors of symmetric ``A`` as columns, largest eigenvalue first.

    Args:
      A: symmetric, of any scale; half types are computed in float32.

    Returns:
      Orthonormal in float32 at least, for a zero matrix too; NaN where A is not finite. Eigenvectors of the smallest
        eigenvalue and those within 16 units of rounding (2e-6 of A's norm in float32), which could be any, are what
        is left of the axes.

    >>> print(jnp.abs(eigenbasis(jnp.diag(jnp.array([1.0, 3.0, 2.0])))))
    [[0. 0. 1.]
     [1. 0. 0.]
     [0. 1. 0.]]
    """
    return one_by_one(_exact)(at_least_float32(A))


def descending(Q: Float[Array, "*batch d d"], P: Float[Array, "*batch d d"]) -> Int[Array, "*batch d"]:
    """The order of Q's columns by ``diag(Qᵀ A Q)``, their estimates of eigenvalues, largest first (stable).

    Those that are rounding of A's norm count as zero, and keep the order they had; columns of which A makes nothing
    come last.

    Args:
      Q: an orthonormal basis as columns.
      P: `project(A, Q)`.

    >>> print(descending(jnp.eye(3), jnp.diag(jnp.array([1.0, 3.0, 2.0]))))
    [1 2 0]
    """
    P = unit_scale(P)
    size = jnp.linalg.norm(P, axis=(-2, -1))
    null = ~known(column_lengths(P), size[..., None])
    return jnp.argsort(sort_key(rayleigh(Q, P), null, size), axis=-1)


def orthogonal_iteration(
    A: Float[Array, "*batch d d"],
    Q: Float[Array, "*batch d d"],
    *,
    P: Float[Array, "*batch d d"] | None = None,
    method: str = "qr",
    precision: Precision | str = Precision.HIGHEST,
) -> Float[Array, "*batch d d"]:
    """One step of orthogonal iteration: an orthonormal basis of ``A Q``, its columns in `descending` order.

    Args:
      A: symmetric, of any scale.
      Q: the basis so far.
      P: `project(A, Q)`, where the caller has it.
      method: "qr": Householder QR (the SOAP authors'; signs are whatever it gives), with what is left of the old basis
        in columns that ``A Q`` does not reach, and the axes of coordinates that go with no other in front. "cholesky":
        shifted CholeskyQR, as below: products and small Cholesky factors alone, about 9 d³ multiplications, for
        accelerators; on a CPU QR is faster. Both follow A equally well.
      precision: of the products.

    "cholesky" takes the QR of ``M = (A + 8 ε |A| I) Q``, ε the type's epsilon, block by block (`cholesky_qr`). The
    shift of A, of the size of the product's rounding, puts each column at least ε away from the span of the others
    where A is singular: there Q's own columns stay, made orthogonal to the others, as do those of which A makes nothing
    but rounding. Exact zeros stay: rows of A and Q
    that share no columns with others share none afterwards.

    Returns:
      The new basis, orthonormal to a few d ε, in float32 at least; NaN where A is not finite.

    Raises:
      ValueError: for any other method.

    Source: Vyas et al. 2024 (arXiv 2409.11321), Algorithm 4.

    >>> A = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    >>> Q = jnp.eye(2)
    >>> for _ in range(20):
    ...     Q = orthogonal_iteration(A, Q)
    >>> print(jnp.abs(Q).round(3))
    [[0.707 0.707]
     [0.707 0.707]]
    """
    if method not in ("qr", "cholesky"):
        raise ValueError(f"orthogonal_iteration: method must be 'qr' or 'cholesky'; got {method!r}.")
    A, Q = at_least_float32(A), at_least_float32(Q)
    if method == "qr":
        return one_by_one(_next)(A, Q, project(A, Q, precision=precision) if P is None else at_least_float32(P))
    P = unit_scale(project(A, Q, precision=precision) if P is None else at_least_float32(P))
    M = _spanning(Q, P, descending(Q, P), FLOOR * float(jnp.finfo(P.dtype).eps))
    return jnp.vectorize(lambda M: cholesky_qr(M, precision), signature="(d,d)->(d,d)")(M)


def followed_by_products(
    A: Float[Array, "d d"],
    Q: Float[Array, "d d"],
    first: Bool[Array, ""] | bool,
    tolerance: float | None = None,
    *,
    rounds: int = 1,
    precision: Precision | str = Precision.HIGHEST,
) -> tuple[Float[Array, "d d"], Int[Array, " d"]]:
    """What `followed` is for, by products and small Cholesky factors alone: one loop of ``rounds`` of "cholesky".

    The first basis is Q after 20 rounds with ``A - λ_min I``, λ_min the least of live columns' `rayleigh` values,
    whatever ``rounds`` is. A round brings the columns of two eigenvalues apart by their ratio, so that those within a
    tenth of each other still share directions then; later refreshes go on from there. In the first ten of the 20, A is
    shifted by ``√ε |A|`` instead of ``8 ε |A|``: what the rounding of A Q turns in a null space is then that small. A
    ``tolerance`` ends the rounds where Q is off by no more. ``precision`` is that of ``A Q``; what makes columns
    orthogonal is always as exact as can be.

    >>> V, order = followed_by_products(jnp.array([[1.0, 1.0], [1.0, 2.0]]), jnp.eye(2), False)
    >>> print(jnp.abs(V).round(2), order)
    [[0.45 0.89]
     [0.89 0.45]] [1 0]
    """
    A, Q = unit_scale(at_least_float32(A)), at_least_float32(Q)
    same, ε = jnp.arange(len(A)), float(jnp.finfo(A.dtype).eps)
    limit = jnp.where(first, -1, -1 if tolerance is None else tolerance)
    live = jnp.any(A != 0, axis=0)

    def one_round(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        i, most, Q, order = carry
        P = project(A, Q, precision=precision)
        # A factor that is not finite has no measure; renewing it shows that.
        settled, places = off_diagonal_part(Q, P) <= limit, descending(Q, P)
        # Less the smallest eigenvalue, a first basis tells the others from it in a few rounds; dead inputs, whose axes
        # are exact in any case, do not count.
        counted = jnp.logical_and(first, jnp.sum(jnp.where(live[:, None], Q * Q, 0), axis=0) > 0.5)
        least = jnp.where(counted, jnp.min(jnp.where(counted, rayleigh(Q, P), jnp.inf)), 0)
        # In the first of these rounds a larger shift leaves directions that A makes nothing of where they are.
        floor = jnp.where(jnp.logical_and(first, i < FIRST_ROUNDS // 2), ε**0.5, FLOOR * ε)
        new = cholesky_qr(_spanning(Q, P, places, floor, least[None]), count=jnp.where(settled, 0, len(A)))
        change = jnp.where(settled, same, places)
        return i + 1, jnp.where(settled, 0, most), jnp.where(settled, Q, new), order[change]

    start = jnp.zeros([], jnp.int32), jnp.where(first, FIRST_ROUNDS, rounds), Q, same
    _, _, Q, order = jax.lax.while_loop(lambda c: (c[0] < c[1]) & (c[0] < FIRST_ROUNDS), one_round, start)
    return Q, jnp.where(first, nearest_axes(Q), order)


def _spanning(
    Q: Float[Array, "*batch d d"],
    P: Float[Array, "*batch d d"],
    order: Int[Array, "*batch d"],
    floor: Float[Array, ""] | float,
    least: Float[Array, "1 d"] | float = 0,
) -> Float[Array, "*batch d d"]:
    """``(A - least I + floor |A| I) Q`` in that order, from ``P = A Q``; Q's own columns where that is rounding."""
    norm = jnp.linalg.norm(P, axis=(-2, -1), keepdims=True)
    P = P - least * Q
    null = ~known(column_lengths(P), norm[..., 0])
    M = jnp.where(null[..., None, :], Q, P + floor * norm * Q)
    return jnp.take_along_axis(M, order[..., None, :], axis=-1, mode="promise_in_bounds")


def off_diagonality(
    A: Float[Array, "*batch d d"],
    Q: Float[Array, "*batch d d"],
    *,
    P: Float[Array, "*batch d d"] | None = None,
    precision: Precision | str = Precision.HIGHEST,
) -> Float[Array, "*batch"]:
    """How far Q is from an eigenbasis: ``|B - diag B| / |B|`` with ``B = Qᵀ A Q``, between 0 and 1.

    B is never formed: ``|B| = |A Q|`` as Q is orthonormal, and its diagonal is the column sums of ``Q ∘ A Q``. In
    float32, values below about 1e-3 are rounding.

    Args:
      A: symmetric, of any scale.
      Q: an orthonormal basis as columns.
      P: `project(A, Q)`, where the caller has it.
      precision: of the product.

    Returns:
      One number a matrix; 0 for a zero matrix, NaN for one that is not finite.

    Source: Eschenhagen et al. 2025 (arXiv 2506.03595).

    >>> print(off_diagonality(jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.eye(2)).round(4))
    0.4472
    """
    P = unit_scale(project(A, Q, precision=precision) if P is None else at_least_float32(P))
    return off_diagonal_part(Q.astype(P.dtype), P)


def keep_last_good(
    new: Float[Array, "*batch m n"], old: Float[Array, "*batch m n"]
) -> tuple[Float[Array, "*batch m n"], Bool[Array, "*batch"]]:
    """``new``, but ``old`` for each matrix of ``new`` that is not finite, and which those are.

    >>> chosen, failed = keep_last_good(jnp.array([[jnp.nan, 1.0]]), jnp.array([[2.0, 3.0]]))
    >>> print(chosen, failed)
    [[2. 3.]] True
    """
    failed = ~jnp.isfinite(jnp.sum(new - new, axis=(-2, -1)))
    return jnp.where(failed[..., None, None], old, new), failed


@functools.partial(jnp.vectorize, signature="(d,d)->(d,d)")
def _exact(A: Array) -> Array:
    A = unit_scale(A)
    V = followed(A, jnp.eye(len(A), dtype=A.dtype), True)[0]
    return V[:, descending(V, project(A, V))]


@functools.partial(jnp.vectorize, signature="(d,d),(d,d),(d,d)->(d,d)")
def _next(A: Array, Q: Array, P: Array) -> Array:
    return followed(A, Q, False, P=P)[0]


# Second moments of low rank, kept as rows: ``A = Rᵀ R`` with R of r x d, r < d.

# Eigenvalues below this share of the largest are rounding: their eigenvectors are dropped.
NOISE = 1e-6
# Of a matrix whose dominant eigenvector is wanted.
SQUARINGS = 16


class LowRank(NamedTuple):
    """A second moment of low rank, ``Σ rowsᵀ rows``: for a side too long for a ``d x d`` array."""

    rows: Float[Array, "*batch r d"]


def strongest_rows(S: Float[Array, "*batch k d"], r: int) -> Float[Array, "*batch r d"]:
    """``r`` rows whose second moment is the best approximation of that rank to ``Sᵀ S``.

    >>> S = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> print(abs(strongest_rows(S, 1)))
    [[3. 0.]]
    """
    V = eigenbasis(jnp.matmul(S, S.mT, precision=Precision.HIGHEST))[..., :r]
    return jnp.matmul(V.mT.astype(S.dtype), S, precision=Precision.HIGHEST)


def range_of_rows(R: Float[Array, "*batch r d"]) -> Float[Array, "*batch d r"]:
    """Eigenvectors of ``Rᵀ R`` as columns, by descending eigenvalue; zero columns where that is 0.

    From the eigenvectors of the small ``R Rᵀ``: ``2 d r²`` operations and an r x r eigendecomposition.

    >>> print(abs(range_of_rows(jnp.array([[0.0, 2.0]]))))
    [[0.]
     [1.]]
    """
    scaled = R / jnp.maximum(jnp.max(jnp.abs(R), (-2, -1), keepdims=True), jnp.finfo(R.dtype).tiny)
    P = jnp.matmul(
        scaled.mT, eigenbasis(jnp.matmul(scaled, scaled.mT, precision=Precision.HIGHEST)), precision=Precision.HIGHEST
    )
    λ = jnp.sum(jnp.square(P), -2, keepdims=True)
    known = λ > NOISE * jnp.max(λ, -1, keepdims=True)
    return jnp.where(known, P / jnp.sqrt(jnp.where(known, λ, 1)), 0)


def dominant_eigenvector(A: Float[Array, "d d"]) -> Float[Array, "d 1"]:
    """A unit eigenvector of the largest eigenvalue of a positive semi-definite A, by products alone; zero for zero.

    A is squared 16 times, to its 65,536th power, in which another eigenvalue is rounding unless it is within 5e-4 of
    the largest. With those that are, the vector is one of their common space.

    >>> print(dominant_eigenvector(jnp.diag(jnp.array([1.0, 3.0, 2.0]))).ravel())
    [0. 1. 0.]
    """
    W, _ = jax.lax.scan(lambda W, _: (unit_frobenius(times(W, W)), None), unit_frobenius(A), length=SQUARINGS)
    largest = jnp.argmax(diagonal(W))
    return unit_frobenius(jax.lax.dynamic_slice_in_dim(W, largest, 1, 1))
