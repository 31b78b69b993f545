"""A basis that follows a matrix, from the first on, in one program."""

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
    A, Q, at = unit_scale(at_least_float32(A)), at_least_float32(Q), jnp.arange(len(A))
    alone, later = apart(A), jnp.logical_not(first)
    V, least, largest, rank = branch(
        first, lambda: _eigenvectors(A, alone), lambda: (Q, *jnp.zeros(2, A.dtype), jnp.zeros([], jnp.int32))
    )
    if P is None:
        P = project(jnp.where(alone[None] & first, 0, A - least * jnp.eye(len(A), dtype=A.dtype)), Q)
    else:
        P = unit_scale(at_least_float32(P))

    def renewed() -> tuple[Array, Array]:
        lengths, values = column_lengths(P), rayleigh(Q, P)
        top = jnp.maximum(jnp.max(lengths), largest)
        # Exact axes come first, where nothing that rounding leaves in other columns takes part of them away.
        axes = later & (jnp.sum(alone[:, None].astype(A.dtype) * Q * Q, axis=0) > 0.5)
        null = ~known(lengths, top) & ~axes
        values = jnp.where(axes, jnp.inf, jnp.where(first, values * (1 - TIE / len(A) * at), values))
        order = in_order(values, null, top)
        M = jnp.where(((null | axes) & later)[None], Q, P)
        new, R = jnp.linalg.qr(_columns(M, order))
        left, kept = jnp.abs(jnp.diagonal(R)), at >= len(A) - jnp.sum(null)
        # Rounding in columns before, which may be close to dependent, leaves more than rounding of A.
        nth = jnp.sort(left)[::-1].at[rank - 1].get(mode="clip")
        reached = known(left, top) | (at < jnp.sum(axes))
        found = jnp.where(first, (left >= nth) & (rank > 0), jnp.where(kept, left > LEFT, reached))

        def with_rest() -> tuple[Array, Array]:
            found_first = jax.lax.sort((~found, order), num_keys=1)[1]
            those = jnp.where(first, V, _columns(M, found_first))
            rest = jnp.where((at < jnp.sum(found))[None], those, _columns(Q, found_first))
            return jnp.linalg.qr(rest).Q, found_first

        basis, order = branch(jnp.all(found), lambda: (jnp.where(first, V, new), order), with_rest)
        return without_dust(basis, alone), jnp.where(first, at, order)

    if tolerance is None:
        basis, order = renewed()
    else:
        # A factor that is not finite has no measure; renewing it shows that.
        basis, order = branch((off_diagonal_part(Q, P) <= tolerance) & later, lambda: (Q, at), renewed)
    return jnp.where(jnp.isfinite(jnp.sum(P)), basis, jnp.nan), order


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


def _eigenvectors(A: Array, alone: Array) -> tuple[Array, Array, Array, Array]:
    """By descending eigenvalue; the smallest, the largest in size, and how many differ from the smallest. Those of
    coordinates that go with no other come last and do not count.
    """
    d = len(A)
    mean = jnp.trace(A) / d
    deviation = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(A)) / d - mean * mean, 0))
    lowest = jnp.minimum(mean - deviation * (d - 1) ** 0.5, 0) - 1  # below all (Wolkowicz and Styan 1980)
    values, V = jnp.linalg.eigh(jnp.where(jnp.eye(d, dtype=bool) & alone[None], -lowest, -A))
    counted = values < -lowest - 0.5
    largest = jnp.max(jnp.abs(values), where=counted, initial=0)
    least = jnp.min(-values, where=counted, initial=jnp.finfo(A.dtype).max)
    rank = jnp.sum(counted & known(-values, largest, least), dtype=jnp.int32)
    return V, least, largest, jnp.where(rank == d - 1, d, rank)  # a single one is as good as known


def _columns(M: Array, places: Array) -> Array:
    return M.at[:, places].get(mode="promise_in_bounds")
