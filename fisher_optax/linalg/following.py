"""A basis that follows a matrix, from the first on, in one program."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Int

from .._xla import branch
from .products import times, unit_scale

# Of a column of the old basis, the part outside the new ones from which on it is kept.
LEFT = 0.5
# How much closer than the last the first of axes counts that are equally close: rounding would choose among those of
# duplicated inputs.
TIE = 0.01
# Of a column of a projector, the part outside those before from which on it is more than rounding.
INDEPENDENT = 1e-4


def followed(
    A: Float[Array, "d d"],
    Q: Float[Array, "d d"],
    first: Bool[Array, ""] | bool,
    tolerance: float | None = None,
    P: Float[Array, "d d"] | None = None,
    precision: Precision | str = Precision.HIGHEST,
) -> tuple[Float[Array, "d d"], Int[Array, " d"]]:
    """A basis of ``A Q`` by Householder QR, its columns by their `rayleigh` values; the first is of eigenvectors.

    Columns that the others reach, or that A makes nothing of, are what is left of Q's. So the first basis holds axes in
    the place of eigenvectors of the smallest eigenvalue, where there are several: those that the other eigenvectors,
    by A's largest diagonal entries first, leave out. Axes of coordinates that go with no other are in front.

    Args:
      A: symmetric, of any scale.
      Q: the basis so far; the identity at the first call.
      first: whether this is it.
      tolerance: a later Q that is off by no more stays; None: never.
      P: `project(A, Q)`, where the caller has it and this is not the first.
      precision: of that product.

    Returns:
      The new basis, in float32 at least, NaN where A is not finite; and which column of Q each of its own continues,
      at the first call which axis.

    >>> V, order = followed(jnp.array([[1.0, 1.0], [1.0, 2.0]]), jnp.eye(2), False)
    >>> print(jnp.abs(V).round(2), order)
    [[0.45 0.89]
     [0.89 0.45]] [1 0]
    """
    A, Q = unit_scale(at_least_float32(A)), at_least_float32(Q)
    P = project(A, Q, precision=precision) if P is None else unit_scale(at_least_float32(P))
    # As Q is orthonormal, A's norm too.
    size, alone, same = jnp.sqrt(jnp.sum(jnp.square(P))), apart(A), jnp.arange(len(A))
    start = branch(first, lambda: _first(A, alone, size), lambda: _later(P, Q, alone, size))
    settled = start.settled
    if tolerance is not None:
        # A factor that is not finite has no measure; renewing it shows that.
        settled = settled | ((off_diagonal_part(Q, P) <= tolerance) & jnp.logical_not(first))

    def renewed() -> tuple[Array, Array]:
        return _orthonormal(start, Q, size, first)

    if tolerance is None and first is not True:
        # Only a first basis may be settled: one QR beside its eigenvectors is less than a conditional at every refresh.
        basis, order = renewed()
        basis = jnp.where(settled, start.basis, basis)
    else:
        basis, order = branch(settled, lambda: (start.basis, same), renewed)
    basis = jnp.where(jnp.isfinite(size), without_dust(basis, alone), jnp.nan)
    return basis, jnp.where(first, nearest_axes(basis), order)


def nearest_axes(V: Float[Array, "d d"]) -> Int[Array, " d"]:
    """Of each column the coordinate that has most of it: what a first basis continues of the identity.

    >>> print(nearest_axes(jnp.array([[0.0, 0.8], [1.0, 0.6]])))
    [1 0]
    """
    return jnp.argmax(jnp.abs(V), axis=0)


class _Start(NamedTuple):
    """What a basis is made of."""

    basis: Float[Array, "d d"]  # eigenvectors at the first call, and the old basis later on
    settled: Bool[Array, ""]  # whether that is all
    M: Float[Array, "d d"]  # columns that span the range of A, and others
    key: Float[Array, " d"]  # their order; later on, exact axes are at minus infinity, and columns of Q at 1
    found: Bool[Array, " d"]  # of which eigenvectors there is no doubt, at the first call


def _first(A: Array, alone: Array, size: Array) -> _Start:
    """Eigenvectors, and the projector onto those that stand out from the smallest eigenvalue."""
    d, eye = len(A), jnp.eye(len(A), dtype=bool)
    # Coordinates that are alone come first: an eigensolver would mix them with others of a small eigenvalue.
    V, values = jax.lax.linalg.eigh(jnp.where(eye & alone[None], -2 * size - 1, -A), symmetrize_input=False)
    least = jnp.where(-values[-1] > size, 0, -values[-1])  # there may be no others
    found = known(-values, size, least)
    found = found | found[max(d - 2, 0)]  # a single one is what the others leave
    projector = jnp.matmul(jnp.where(found[None], V, 0), V.mT, precision=Precision.HIGHEST)
    key = (least - diagonal(A)) * (1 - TIE / d * jnp.arange(d))
    return _Start(V, found[-1], projector, key, found)


def _later(P: Array, Q: Array, alone: Array, size: Array) -> _Start:
    """Columns of ``A Q``, but Q's where A makes nothing of them."""
    # Exact axes come first, where nothing that rounding leaves in other columns takes part of them away.
    axes = jnp.sum(jnp.where(alone[:, None], Q * Q, 0), axis=0) > 0.5
    null = ~axes & ~known(column_lengths(P), size, units=FAINT)
    key = sort_key(jnp.where(axes, jnp.inf, rayleigh(Q, P)), null, size)
    return _Start(Q, jnp.zeros([], bool), jnp.where((null | axes)[None], Q, P), key, ~null)


def _orthonormal(start: _Start, Q: Array, size: Array, first: Array | bool) -> tuple[Array, Array]:
    """A QR of ``M``; where columns are lost, another, with what is left of Q's in their place.

    At the first call, the latter are axes: as many as there are eigenvectors in doubt.
    """
    key, order = jax.lax.sort((start.key, jnp.arange(len(Q))), num_keys=1)
    reflections = _reflections(_columns(start.M, order))
    left = jnp.abs(diagonal(reflections[0].mT))
    least = jnp.where(key == 1, LEFT, jnp.where(jnp.isinf(key), 0, UNKNOWN * jnp.finfo(Q.dtype).eps * size))
    rank = jnp.where(first, jnp.where(left > INDEPENDENT, -left, 0), jnp.where(left < least, 1, 0))
    rank, found_first = jax.lax.sort((rank, order), num_keys=1)
    lost = jnp.where(first, ~start.found, rank > 0)

    def again() -> tuple[tuple[Array, Array], Array]:
        others = jnp.where(first, start.basis, _columns(start.M, found_first))
        return _reflections(jnp.where(lost[None], _columns(Q, found_first), others)), found_first

    reflections, order = branch(lost[-1], again, lambda: (reflections, order))
    return jax.lax.linalg.householder_product(*reflections), order


def _reflections(M: Array) -> tuple[Array, Array]:
    """M's QR as LAPACK leaves it: R with reflections below, and their scales."""
    H, τ = jnp.linalg.qr(M, mode="raw")
    return H.mT, τ


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
    return times(at_least_float32(A), at_least_float32(Q), precision)


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


def sort_key(
    values: Float[Array, "*batch d"], null: Bool[Array, "*batch d"], size: Float[Array, "*batch"]
) -> Float[Array, "*batch d"]:
    """What sorts columns by their `rayleigh` values, largest first; those that are rounding of a matrix of that size
    stay as they were, and null ones come last.

    >>> print(jnp.argsort(sort_key(jnp.array([0.0, 1.0, 3.0]), jnp.array([True, False, False]), jnp.array(3.0))))
    [2 1 0]
    """
    counted = jnp.where(known(values, size[..., None]), values, 0)
    return jnp.where(null, 1, -counted)


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


# Bases of what a matrix is blind to: without an arbitrary part, and without rounding where there is nothing.
#
# A symmetric matrix of floating-point numbers knows its eigenvalues to some units of rounding ``ε`` times its norm.
# The eigenvectors of those below are whatever rounding makes of them, and differ from one compilation, batch or number
# of devices to the next. Here they are what is left of given directions (the axes, or the basis so far) when those that
# are known have been taken out, which is as well determined as the known ones are.


# In units of ``finfo.eps``, two roundings: of a matrix's norm, below which an eigenvalue is unknown; a null space that
# was computed from a product of side 3072 has some 2 of the largest.
UNKNOWN = 16
# Likewise, of a column of A Q: rounding is a hundredth of one that is as faint, so it stays as it was. The others then
# leave more than UNKNOWN of all that are kept, and one QR does.
FAINT = 256
# Of a column of length one: entries below are the rounding of a factorisation, which leaves 2 and less.
DUST = 8


def known(
    values: Float[Array, "*batch d"],
    size: Float[Array, "..."],
    least: Float[Array, ""] | float = 0.0,
    *,
    units: int = UNKNOWN,
) -> Bool[Array, "*batch d"]:
    """Which eigenvalues of a matrix of that norm stand out from ``least`` by ``units`` of rounding; NaN does.

    >>> print(known(jnp.array([2.0, 1e-3, 1e-9]), jnp.array(2.0)))
    [ True  True False]
    """
    return ~(values <= least + units * jnp.finfo(values.dtype).eps * size)


def diagonal(A: Float[Array, "d d"]) -> Float[Array, " d"]:
    """A's diagonal, as the slice that it is: `jnp.diagonal` gathers it, in three kernels of a CPU.

    >>> print(diagonal(jnp.array([[1.0, 2.0], [3.0, 4.0]])))
    [1. 4.]
    """
    return A.reshape(-1)[:: len(A) + 1]


def apart(A: Float[Array, "d d"]) -> Bool[Array, " d"]:
    """Which of A's coordinates go with no other, and so are eigenvectors.

    Exact zeros alone tell: a large coordinate may go with one of a ten-thousandth, and is most of what that one is.

    >>> print(apart(jnp.array([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])))
    [ True False False]
    """
    entries = jnp.sum(jnp.where(A == 0, 0.0, 1.0), axis=0)
    return entries == jnp.where(diagonal(A) == 0, 0.0, 1.0)


def apart_last(A: Float[Array, "d d"]) -> Int[Array, " d"]:
    """An order of A's coordinates in which those that go with no other, and so are eigenvectors, come last.

    From there Householder's reflections of other columns leave them alone, to the bit.

    >>> print(apart_last(jnp.array([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])))
    [1 2 0]
    """
    return jnp.argsort(apart(A))


def without_dust(V: Float[Array, "d d"], apart: Bool[Array, " d"]) -> Float[Array, "d d"]:
    """An orthonormal basis with zeros for what factorisations leave of them: a weight that never had a gradient has
    its own axis in the basis, and would move with all others by what it has of their columns.

    Coordinates that are `apart` are exact axes, where they are columns but for rounding.

    >>> print(without_dust(jnp.array([[1.0, 2e-7], [-3e-8, 1.0]]), jnp.array([False, False])))
    [[1. 0.]
     [0. 1.]]
    """
    ε, size, rows = float(jnp.finfo(V.dtype).eps), jnp.abs(V), apart[:, None]
    V = jnp.where(rows & (size > 1 - ε**0.5), jnp.sign(V), V)
    return jnp.where(size < jnp.where(rows, ε**0.5, DUST * ε), 0, V)
