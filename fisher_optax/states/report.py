"""What each leaf gets and why: `report`."""

import math
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from .._tables import table
from ..capture.report import CaptureReport, capture_report
from ..matrices.axes import shapes
from ..matrices.rules import resolve_axes
from ..transforms.fallback import Row, recorded


class Report(NamedTuple):
    """The rows of `report`; printed, a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("leaf", "shape", "method", "matrices", "state", "refresh", "why")
        cells, totals = [_cells(row) for row in self.rows], _totals(self.rows)
        if any(row.rule is not None for row in self.rows):
            head, totals = (*head, "rule", "pattern", "rate", "decay"), (*totals, "", "", "", "")
            cells = [(*own, *_of_rule(row)) for own, row in zip(cells, self.rows, strict=True)]
        return table(head, cells, totals)


def report(tx: Any, params: PyTree, *args: PyTree, **options: PyTree) -> Report | CaptureReport:
    """What an optimizer, or the capture of a loss, does with each leaf of ``params``, and why not more.

    Of an optimizer: method, matrices, state, cost of a refresh. It sees through `optax.chain`, `optax.masked`,
    `optax.partition` and the like: ``tx.init`` is traced, never run, and writes down what it does. A leaf that passes
    two transformations of this package has two rows. `fo.groups` adds rule, pattern, factor
    of the rate and decay.

    Of a loss function: in what kind of product each leaf is used, which statistics it gets, and whether a gradient
    reaches it. The loss is traced, never run.

    Args:
      tx: any transformation; or ``loss_fn(params, *args)``, as for `fo.value_and_grad`.
      params: parameters, or their `jax.ShapeDtypeStruct`.
      *args: of the loss function; arrays, or their `jax.ShapeDtypeStruct`.
      **options: ``statistics=`` as in `fo.value_and_grad`; others go to the loss function.

    Returns:
      A `Report` or a `CaptureReport`: ``rows`` are the data, ``str`` the table. State is in bytes, refresh in flops for
      renewing all bases of the leaf once.

    Example:
      >>> import jax, fisher_optax as fo
      >>> params = {"Dense_0": {"kernel": jax.ShapeDtypeStruct((64, 256), "float32"),
      ...                       "bias": jax.ShapeDtypeStruct((256,), "float32")}}
      >>> [row.method for row in fo.report(fo.soap(3e-3), params).rows]
      ['fallback', 'soap']
      >>> loss = lambda p, x: (x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]).sum()
      >>> [row.use for row in fo.report(loss, params, jax.ShapeDtypeStruct((8, 64), "float32")).rows]
      ['bias of Dense_0/kernel', 'dense']
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")) and callable(tx):
        return capture_report(tx, params, *args, **options)
    if args or options:
        raise TypeError("report(tx, params) takes no more for an optimizer; arguments are a loss function's.")
    with recorded() as rows:
        jax.eval_shape(lambda p: tx.init(p), shapes(params))  # a new function: a trace that is cached writes no rows
    unseen = [
        Row(leaf.path, leaf.shape, "-", leaf.kind, None, (), 0, 0, "not given to a method of this package")
        for leaf in resolve_axes(params)
    ]
    missing = [row for row in unseen if row.path not in {r.path for r in rows}]
    order = {row.path: i for i, row in enumerate(unseen)}
    return Report(tuple(sorted([*rows, *missing], key=lambda row: order.get(row.path, len(order)))))


def _cells(row: Row) -> tuple[str, ...]:
    blocks = ", ".join((f"{math.prod(batch)} of " if batch else "") + f"{m}x{n}" for *batch, m, n in row.matrices)
    return (
        row.path,
        "x".join(map(str, row.shape)) or "scalar",
        row.method,
        blocks,
        _in_units(row.state_bytes, "B"),
        _in_units(row.refresh_flops, "F"),
        row.reason,
    )


def _of_rule(row: Row) -> tuple[str, ...]:
    rule, rate = ("" if x is None else f"{x:g}" for x in (row.rule, row.rate))
    return rule, row.pattern, rate, row.decay


def _totals(rows: tuple[Row, ...]) -> tuple[str, ...]:
    size = sum(math.prod(row.shape) for row in {row.path: row for row in rows}.values())
    return (
        "total",
        f"{size:,}",
        "",
        "",
        _in_units(sum(r.state_bytes for r in rows), "B"),
        _in_units(sum(r.refresh_flops for r in rows), "F"),
        "",
    )


def _in_units(x: float, unit: str) -> str:
    if not x:
        return ""
    power = min(int(math.log10(x) / 3), 5)
    return f"{x / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"
