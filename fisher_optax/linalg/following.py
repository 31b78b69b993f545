"""A basis that follows a matrix, from the first on, in one program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Int

from ..branching import branch
from .completion import apart, known, without_dust
from .scaling import unit_scale

# Of a column of the old basis, the part outside the new ones from which on it is kept.
LEFT = 0.5
# How much closer than the last the first of axes counts that are equally close: rounding would choose among those of
# duplicated inputs.
TIE = 0.01


def followed(
    A: Float[Array, "d d"],
    Q: Float[Array, "d d"],
    first: Bool[Array, ""] | bool,
    tolerance: float | None = None,
    P: Float[Array, "d d"] | None = None,
) -> tuple[Float[Array, "d d"], Int[Array, " d"]]:
    """A basis of ``A Q`` by Householder QR, its columns by their `rayleigh` values; the first is of eigenvectors.

    Columns that the others reach, or that A makes nothing of, are what is left of Q's. So the first basis holds axes in
    the place of eigenvectors of the smallest eigenvalue, and of coordinates that go with no other: those that A's own
    columns, largest diagonal entry first, leave out. The axes of the latter are in front later on.

    Args:
      A: symmetric, of any scale.
      Q: the basis so far; the identity at the first call.
      first: whether this is it.
      tolerance: a later Q that is off by no more stays; None: never.
      P: `project(A, Q)`, where the caller has it and this is not the first.

    Returns:
      The new basis, in float32 at least, NaN where A is not finite; and which column of Q each of its own continues.

    >>> V, order = followed(jnp.array([[1.0, 1.0], [1.0, 2.0]]), jnp.eye(2), False)
    >>> print(jnp.abs(V).round(2), order)
    [[0.45 0.89]
     [0.89 0.45]] [1 0]
    """
    A, Q = unit_scale(at_least_float32(A)), at_least_float32(Q)
    P = project(A, Q) if P is None else unit_scale(at_least_float32(P))
    alone, same = apart(A), jnp.arange(len(A))

    def renewed() -> tuple[Array, Array]:
        basis, order, found, rest = _by_qr(P, Q, alone)
        settled = jnp.all(found) & jnp.logical_not(first)
        basis, order = branch(
            settled, lambda: (basis, order), lambda: branch(first, lambda: (first_basis(A, alone)[0], same), rest)
        )
        return without_dust(basis, alone), order

    if tolerance is None:
        basis, order = renewed()
    else:
        # A factor that is not finite has no measure; renewing it shows that.
        keep = (off_diagonal_part(Q, P) <= tolerance) & jnp.logical_not(first)
        basis, order = branch(keep, lambda: (Q, same), renewed)
    return jnp.where(jnp.isfinite(jnp.sum(P)), basis, jnp.nan), order


def _by_qr(P: Array, Q: Array, alone: Array) -> tuple[Array, Array, Array, Callable[[], tuple[Array, Array]]]:
    """The Q of P's QR, the order of its columns, which of them are more than rounding, and what the basis and its order
    are where some are not.
    """
    lengths, at = column_lengths(P), jnp.arange(len(P))
    top = jnp.max(lengths)
    # Exact axes come first, where nothing that rounding leaves in other columns takes part of them away.
    axes = jnp.sum(alone[:, None].astype(P.dtype) * Q * Q, axis=0) > 0.5
    null = ~known(lengths, top) & ~axes
    order = in_order(jnp.where(axes, jnp.inf, rayleigh(Q, P)), null, top)
    M = jnp.where((null | axes)[None], Q, P)
    basis, R = jnp.linalg.qr(_columns(M, order))
    left = jnp.abs(jnp.diagonal(R))
    reached = known(left, top) | (at < jnp.sum(axes))
    found = jnp.where(at >= len(P) - jnp.sum(null), left > LEFT, reached)

    def rest() -> tuple[Array, Array]:
        found_first = jax.lax.sort((~found, order), num_keys=1)[1]
        filled = jnp.where((at < jnp.sum(found))[None], _columns(M, found_first), _columns(Q, found_first))
        return jnp.linalg.qr(filled).Q, found_first

    return basis, order, found, rest


def first_basis(A: Float[Array, "d d"], alone: Bool[Array, " d"]) -> tuple[Float[Array, "d d"], Bool[Array, ""]]:
    """Eigenvectors by descending eigenvalue, but axes in the place of those of the smallest eigenvalue, if there are
    several, and of coordinates that go with no other; and whether there was no such place.

    Args:
      A: symmetric, of entries around one.
      alone: which coordinates go with no other, `apart(A)`.

    >>> V, plain = first_basis(jnp.array([[1.0, 1.0], [1.0, 1.0]]), jnp.array([False, False]))
    >>> print(jnp.abs(V).round(2), plain)
    [[0.71 0.71]
     [0.71 0.71]] True
    """
    d = len(A)
    at, eye = jnp.arange(d), jnp.eye(d, dtype=bool)
    mean = jnp.trace(A) / d
    deviation = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(A)) / d - mean * mean, 0))
    lowest = jnp.minimum(mean - deviation * (d - 1) ** 0.5, 0) - 1  # below all (Wolkowicz and Styan 1980)
    values, V = jnp.linalg.eigh(jnp.where(eye & alone[None], -lowest, -A))
    counted = values < -lowest - 0.5
    least = jnp.min(-values, where=counted, initial=jnp.finfo(A.dtype).max)
    largest = jnp.max(jnp.abs(values), where=counted, initial=0)
    rank = jnp.sum(counted & known(-values, largest, least))
    rank = jnp.where(rank == d - 1, d, rank)  # a single one is what the others leave

    def with_axes() -> Array:
        # The axes that are left are those that the columns of A without its smallest eigenvalue leave out.
        rest = jnp.where(alone[None], 0, A - least * eye.astype(A.dtype))
        order = jnp.argsort(-jnp.diagonal(rest) * (1 - TIE / d * at))
        left = jnp.abs(jnp.diagonal(jnp.linalg.qr(_columns(rest, order)).R))
        # Rounding in columns before, which may be close to dependent, leaves more than rounding of A.
        found = (left >= jnp.sort(left)[::-1].at[rank - 1].get(mode="clip")) & (rank > 0)
        found_first = jax.lax.sort((~found, order), num_keys=1)[1]
        axes = (at[:, None] == found_first[None]).astype(A.dtype)
        return jnp.linalg.qr(jnp.where((at < rank)[None], V, axes)).Q

    return branch(rank == d, lambda: V, with_axes), rank == d


def project(
    A: Float[Array, "*batch d d"], Q: Float[Array, "*batch d d"], *, precision: Precision | str = Precision.HIGHEST
) -> Float[Array, "*batch d d"]:
    """``P = A Q``, the one product that everything below shares, in float32 at least.

    Args:
      A: symmetric.
      Q: an orthonormal basis as columns.
      precision: of the product; the default, because faster ones lose the small eigenvalues.

    >>> print(project(2 * jnp.eye(2), jnp.eye(2)))
    [[2. 0.]
     [0. 2.]]
    """
    return jnp.matmul(at_least_float32(A), at_least_float32(Q), precision=precision)


def rayleigh(Q: Float[Array, "*batch d d"], P: Float[Array, "*batch d d"]) -> Float[Array, "*batch d"]:
    """``diag(Qᵀ P)``.

    >>> print(rayleigh(jnp.eye(2), jnp.diag(jnp.array([1.0, 3.0]))))
    [1. 3.]
    """
    return jnp.sum(Q * P, axis=-2)


def column_lengths(P: Float[Array, "*batch d d"]) -> Float[Array, "*batch d"]:
    """Euclidean norms of the columns, whose squares may not overflow.

    >>> print(column_lengths(jnp.array([[3.0, 0.0], [4.0, 1.0]])))
    [5. 1.]
    """
    return jnp.sqrt(jnp.sum(jnp.square(P), axis=-2))


def in_order(
    values: Float[Array, "*batch d"], null: Bool[Array, "*batch d"], largest: Float[Array, "*batch"]
) -> Int[Array, "*batch d"]:
    """Columns by their `rayleigh` values, largest first; those that are rounding of the largest eigenvalue stay as they
    were, and null ones come last.

    >>> print(in_order(jnp.array([0.0, 1.0, 3.0]), jnp.array([True, False, False]), jnp.array(3.0)))
    [2 1 0]
    """
    counted = jnp.where(known(values, largest[..., None]), values, 0)
    return jnp.argsort(jnp.where(null, 1, -counted), axis=-1)


def off_diagonal_part(Q: Float[Array, "*batch d d"], P: Float[Array, "*batch d d"]) -> Float[Array, "*batch"]:
    """``|B - diag B| / |B|`` with ``B = Qᵀ P``, where the squares do not overflow; 0 for zero.

    >>> print(off_diagonal_part(jnp.eye(2), jnp.array([[3.0, 4.0], [0.0, 0.0]])))
    0.8
    """
    total = jnp.sum(P * P, axis=(-2, -1))
    diagonal = jnp.sum(rayleigh(Q, P) ** 2, axis=-1)
    return jnp.sqrt(jnp.maximum(total - diagonal, 0) / jnp.where(total == 0, 1, total))


def at_least_float32(A: Array) -> Array:
    """A, or where it is of a half type, its float32.

    >>> print(at_least_float32(jnp.zeros(1, jnp.bfloat16)).dtype)
    float32
    """
    return A.astype(jnp.promote_types(A.dtype, jnp.float32))


def _columns(M: Array, places: Array) -> Array:
    return M.at[:, places].get(mode="promise_in_bounds")
