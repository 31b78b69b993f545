"""What travels between the parts: Kronecker factors, what a decomposition makes of them, and the three contracts of
the seam.

All three act on one matrix gradient ``G: (m, n)``, ``m`` inputs by ``n`` outputs. Everything about its left (input)
and right (output) side comes in pairs; a side that is not
preconditioned is ``None``. In a state, matrices of one shape are stacked along a leading axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int


class Kronecker(NamedTuple):
    """Running factors of ``F ≈ left ⊗ right`` for one matrix (row-major ``vec``)."""

    left: Float[Array, "*stack m m"] | None
    right: Float[Array, "*stack n n"] | None
    seen: Any = ()  # what a rule counts: calls, or the sum of its weights


class Eigenbasis(NamedTuple):
    """Orthonormal eigenvectors of the two factors, as columns, by descending eigenvalue."""

    left: Float[Array, "*stack m m"] | None
    right: Float[Array, "*stack n n"] | None


class Eigenpairs(NamedTuple):
    """An `Eigenbasis` with the eigenvalues of its columns."""

    left: Float[Array, "*stack m m"] | None
    right: Float[Array, "*stack n n"] | None
    left_values: Float[Array, "*stack m"] | None
    right_values: Float[Array, "*stack n"] | None


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
    has it needs them. ``read(factors)`` is what is decomposed.
    """

    name: str
    init: Callable[[int, int, bool, bool, Any], Kronecker]
    update: Callable[[Array, Kronecker, Any], Kronecker]
    track: Callable[[Array, Kronecker, Any], Any] | None = None
    read: Callable[[Kronecker], Kronecker] = lambda factors: factors


class Decomposition(NamedTuple):
    """What turns a factor ``A: (d, d)`` into a basis or a root; one that is not finite is never used.

    ``start(A, old)`` is exact and used once; ``refresh(A, old, tolerance)`` may be iterative, and keeps ``old`` where
    that is off by no more than ``tolerance`` (None: never).
    """

    name: str
    returns: type
    start: Callable[[Array, Array], Refreshed]
    refresh: Callable[[Array, Array, float | None], Refreshed]


class Moments(NamedTuple):
    """What an application holds in the basis, and must be carried over when the basis turns."""

    linear: tuple[Array, ...]  # transform like the gradient
    quadratic: tuple[Array, ...]  # transform like its square
    left: tuple[Array, ...] = ()  # ... like the sums of its square over columns,
    right: tuple[Array, ...] = ()  # ... or over rows


class Application(NamedTuple):
    """What is done to one matrix gradient with the basis (or roots) at hand.

    ``accepts`` lists what a decomposition may return for it; ``NoneType`` stands for no decomposition at all.
    """

    name: str
    accepts: tuple[type, ...]
    init: Callable[[Array], Any]
    update: Callable[..., tuple[Array, Any]]  # (G, state, basis, **extra) -> (direction, state)
    moments: Callable[[Any], Moments]
    with_moments: Callable[[Any, Moments], Any]
    sees_itself: bool = False  # whether a gradient acts on itself, through factors that hold it already
