"""The whole tree around a masked one, whose hidden leaves say how the others are read."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from .axes import shapes


class Whole(NamedTuple):
    """A tree of parameters, and the ``axes`` that it was given."""

    params: PyTree
    axes: PyTree


_whole: contextvars.ContextVar[Whole | None] = contextvars.ContextVar("whole", default=None)


@contextlib.contextmanager
def part_of(params: PyTree, axes: PyTree) -> Iterator[None]:
    """Inside, `resolve_axes` reads every tree as a part of ``params``; of such calls in one another the outermost
    counts, since it has seen the most, unless an inner one is given axes of its own.
    """
    if (_whole.get() is not None and axes is None) or not jax.tree.leaves(params):
        yield
        return
    token = _whole.set(Whole(shapes(params), axes))
    try:
        yield
    finally:
        _whole.reset(token)


def whole_tree() -> Whole | None:
    """The tree that `part_of` was told."""
    return _whole.get()
