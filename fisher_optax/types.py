"""What travels between the parts: Kronecker factors, what a decomposition makes of them, and the three contracts of the seam.

A matrix gradient is ``G: (*batch, m, n)``, ``m`` inputs by ``n`` outputs. Everything about its left (input) and right (output) side comes in pairs;
a side that is not preconditioned is ``None``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int


class Kronecker(NamedTuple):
    """Running factors of ``F ≈ left ⊗ right`` for one matrix (row-major ``vec``)."""

    left: Float[Array, "*batch m m"] | None
    right: Float[Array, "*batch n n"] | None


class Eigenbasis(NamedTuple):
    """Orthonormal eigenvectors of the two factors, as columns, by descending eigenvalue."""

    left: Float[Array, "*batch m m"] | None
    right: Float[Array, "*batch n n"] | None


class InverseRoot(NamedTuple):
    """A negative power of each factor."""

    left: Float[Array, "*batch m m"] | None
    right: Float[Array, "*batch n n"] | None


class Refreshed(NamedTuple):
    """What a decomposition makes of a stack of factors."""

    value: Float[Array, "*batch d d"] | None
    order: Int[Array, "*batch d"] | None  # column j of `value` continues column order[j] of the old basis
    failed: Bool[Array, "*batch"]  # the new value was not finite and the old one was kept


class FactorRule(NamedTuple):
    """How a pair of Kronecker factors follows the gradients.

    ``init(shape, left, right, dtype)`` makes the start for a matrix of ``shape = (*batch, m, n)``; ``left`` and ``right`` say which sides are wanted.
    ``update(G, factors, bases)`` sees both factors and the current bases, since some rules read the other side.
    """

    name: str
    init: Callable[[tuple[int, ...], bool, bool, Any], Kronecker]
    update: Callable[[Array, Kronecker, Any], Kronecker]


class Decomposition(NamedTuple):
    """What turns a stack of factors ``A: (N, d, d)`` into bases or roots.

    ``start(A)`` is exact and used once; ``refresh(A, old)`` may be iterative; ``refresh_where(A, old, tolerance)`` refreshes only the matrices
    for which ``old`` is off by more than ``tolerance``. Each keeps the old value where the new one is not finite.
    """

    name: str
    returns: type
    start: Callable[[Array, Array], Refreshed]
    refresh: Callable[[Array, Array], Refreshed]
    refresh_where: Callable[[Array, Array, float], Refreshed]


class Moments(NamedTuple):
    """What an application holds in the basis, and must be carried over when the basis turns."""

    linear: tuple[Any, ...]  # trees of matrices that transform like the gradient
    quadratic: tuple[Any, ...]  # trees of matrices that transform like its square


class Application(NamedTuple):
    """What is done to the gradient with the bases (or roots) at hand; all trees are trees of matrices.

    ``accepts`` lists what a decomposition may return for it; ``NoneType`` stands for no decomposition at all.
    """

    name: str
    accepts: tuple[type, ...]
    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]  # (G, state, bases, **extra) -> (directions, state)
    moments: Callable[[Any], Moments]
    with_moments: Callable[[Any, Moments], Any]
