"""What travels between the parts: Kronecker factors, what a decomposition makes of them, and the three contracts of
a preconditioner.

All three act on one matrix gradient ``G: (m, n)``, ``m`` inputs by ``n`` outputs. Everything about its left (input)
and right (output) side comes in pairs; a side that is not
preconditioned is ``None``. In a state, matrices of one shape are stacked along a leading axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

PRECISIONS = ("highest", "high", "default")  # of products on an accelerator


class Kronecker(NamedTuple):
    """Running factors of ``F ≈ left ⊗ right`` for one matrix (row-major ``vec``)."""

    left: Any  # (*stack, m, m), `LowRank`, or None
    right: Any  # (*stack, n, n), `LowRank`, or None
    seen: Any = ()  # what a rule counts: calls, or the sum of its weights


class Eigenbasis(NamedTuple):
    """Orthonormal eigenvectors of the two factors, as columns, by descending eigenvalue."""

    left: Float[Array, "*stack m m"] | None
    right: Float[Array, "*stack n n"] | None


class Eigenpairs(NamedTuple):
    """An `Eigenbasis` with the eigenvalues of its columns; of `LowRank`, only the columns whose values are not 0."""

    left: Float[Array, "*stack m j"] | None
    right: Float[Array, "*stack n k"] | None
    left_values: Float[Array, "*stack j"] | None
    right_values: Float[Array, "*stack k"] | None


class InverseRoot(NamedTuple):
    """A negative power of each factor."""

    left: Float[Array, "*stack m m"] | None
    right: Float[Array, "*stack n n"] | None


class Refreshed(NamedTuple):
    """What a decomposition makes of one factor."""

    value: Float[Array, "d d"]
    order: Int[Array, " d"]  # column j of `value` continues column order[j] of the old basis


class FactorRule(NamedTuple):
    """How a pair of Kronecker factors follows the gradients.

    ``init(m, n, left, right, dtype)`` makes the start for an ``m x n`` matrix; ``left`` and ``right`` say which sides
    are wanted. ``update(G, factors, basis)`` sees both factors and the current basis, since some rules read the other
    side. ``track(G, factors, basis)`` follows the eigenvalues of `Eigenpairs` between two decompositions; a rule that
    has it needs them. ``read(factors)`` is what is decomposed. With ``of_statistics`` both get, in the place of G, the
    layer's `LayerFactors`, and are not called where there are none. ``overwrite(statistics, factors, accept)`` is
    ``update`` in place and only where ``accept``, for factors that are kept as they come.
    """

    name: str
    init: Callable[[int, int, bool, bool, Any], Kronecker]
    update: Callable[[Any, Kronecker, Any], Kronecker]
    track: Callable[[Array, Kronecker, Any], Any] | None = None
    read: Callable[[Kronecker], Kronecker] = lambda factors: factors
    of_statistics: bool = False
    overwrite: Callable[[Any, Kronecker, Any], Kronecker] | None = None


class Decomposition(NamedTuple):
    """What turns a factor ``A: (d, d)`` into a basis or a root; one that is not finite is never used.

    ``renew(A, old, first, tolerance)`` may be iterative but for the first, and keeps ``old`` where that is off by no
    more than ``tolerance`` (None: never).
    """

    name: str
    returns: type
    renew: Callable[[Array, Array, Bool[Array, ""], float | None], Refreshed]


class Moments(NamedTuple):
    """What an application holds in the basis, and must be carried over when the basis turns."""

    linear: tuple[Array, ...]  # transform like the gradient
    quadratic: tuple[Array, ...]  # transform like its square
    left: tuple[Array, ...] = ()  # ... like the sums of its square over columns,
    right: tuple[Array, ...] = ()  # ... or over rows


class Application(NamedTuple):
    """What is done to one matrix gradient with the basis (or roots) at hand.

    ``accepts`` lists what a decomposition may return for it; ``NoneType`` stands for no decomposition at all.
    ``observe(state, statistics, basis)`` takes in the layer's `LayerFactors`, in the basis they were seen in.
    """

    name: str
    accepts: tuple[type, ...]
    init: Callable[[Array], Any]
    update: Callable[..., tuple[Array, Any]]  # (G, state, basis, **extra) -> (direction, state)
    moments: Callable[[Any], Moments]
    with_moments: Callable[[Any, Moments], Any]
    sees_itself: bool = False  # whether a gradient acts on itself, through factors that hold it already
    observe: Callable[[Any, Any, Any], Any] | None = None
    precision: str = "highest"  # of rotations: of gradients, and of moments when a basis turns


class MatrixState(NamedTuple):
    """What is kept of a matrix; in the state, of all matrices of one shape along a leading axis."""

    factors: Any  # Kronecker, or () without a decomposition
    basis: Any  # Eigenbasis or InverseRoot, or ()
    application: Any  # the application's own state


class Due(NamedTuple):
    """The matrices of a stack that something is to be done with."""

    places: Int[Array, " N"]  # theirs come first
    count: Int[Array, ""]
