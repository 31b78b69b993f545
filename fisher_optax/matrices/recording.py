"""What an init says of each leaf while somebody asks: the rows of a report."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

from .axes import LeafAxes, MatrixAxes


class Row(NamedTuple):
    """One leaf in a report."""

    path: str
    shape: tuple[int, ...]
    method: str  # the method, "fallback", or "-" where no transformation of this package sees the leaf
    kind: str  # "matrix", "head", "embedding", "other"
    axes: MatrixAxes | None
    matrices: tuple[tuple[int, ...], ...]  # what the leaf is cut into
    state_bytes: int
    refresh_flops: int  # to renew all bases of the leaf once
    reason: str
    block_size: int | None = None


_rows: contextvars.ContextVar[list[Row] | None] = contextvars.ContextVar("rows", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Row]]:
    """The rows that inits inside write."""
    rows: list[Row] = []
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)


def is_recording() -> bool:
    """Whether an init should write its rows."""
    return _rows.get() is not None


def record(leaf: LeafAxes, **cells: Any) -> None:
    """Write a row for ``leaf``."""
    rows = _rows.get()
    if rows is not None:
        defaults = {"matrices": (), "refresh_flops": 0, "reason": leaf.reason}
        rows.append(Row(path=leaf.path, shape=leaf.shape, kind=leaf.kind, **(defaults | cells)))


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No rows from inits inside."""
    token = _rows.set(None)
    try:
        yield
    finally:
        _rows.reset(token)
