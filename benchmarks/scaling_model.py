"""What a step should take, from what it computes and what the machine can do.

    predicted time = flops of products / their rate + factorisations + bytes / rate of memory

Rates are measured in the same run: that of products of one size of the method's, of every factorisation alone, and of
memory by adding two arrays. Bytes are gradients read, state and parameters read and written.
"""

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.flops import FlopCount

LOOP_FLOPS = 2e9  # of products in a loop that is timed as one, or a call's own cost would show
MOST_TURNS = 1000
FLOATS = 2**24  # of the arrays that memory is timed with

Run = Callable[[Any], Any]


class Product(NamedTuple):
    """Of ``(m, k)`` and ``(k, n)``; not ``exact``: in the hardware's own precision for float32."""

    m: int
    k: int
    n: int
    exact: bool = True

    @property
    def name(self) -> str:
        return f"{self.m}x{self.k}x{self.n}" + ("" if self.exact else " default")

    @property
    def turns(self) -> int:
        """Times there and back in one run."""
        return min(MOST_TURNS, max(1, round(LOOP_FLOPS / (4 * self.m * self.k * self.n))))

    @property
    def flops(self) -> int:
        """Of one run."""
        return 4 * self.m * self.k * self.n * self.turns

    def run(self) -> Run:
        """``X ← (X Y) Yᵀ``, where the rows of Y are orthonormal, so that X stays as it is however often."""
        x, y = jax.random.normal(jax.random.key(0), (self.m, self.k)), jnp.eye(self.k, self.n)
        precision = jax.lax.Precision.HIGHEST if self.exact else None

        def turn(x: Any, y: Any) -> Any:
            return jnp.matmul(jnp.matmul(x, y, precision=precision), y.T, precision=precision)

        run = jax.jit(lambda x, y: jax.lax.scan(lambda x, _: (turn(x, y), None), x, length=self.turns)[0])
        return lambda _: run(x, y)


class Rates(NamedTuple):
    """Median seconds."""

    flop: Mapping[Product, float]  # one of the product's
    call: Mapping[str, float]  # of a factorisation alone, by its name in `FlopCount`
    byte: float

    def seconds(self, path: FlopCount, product: Product, moved: int) -> float:
        """The predicted time of a path that moves so many bytes."""
        calls = sum(times * self.call[call] for call, times in path.factorisations.items())
        return path.products * self.flop[product] + calls + moved * self.byte


def rate_runs(products: Iterable[Product], calls: Iterable[str]) -> dict[str, Run]:
    """What `rates` needs the times of."""
    return {
        **{p.name: p.run() for p in products},
        **{call: _factorisation(call) for call in calls},
        "memory": _adding(),
    }


def rates(products: Iterable[Product], calls: Iterable[str], median: Mapping[str, float]) -> Rates:
    """From the median seconds of `rate_runs`."""
    return Rates(
        {product: median[product.name] / product.flops for product in products},
        {call: median[call] for call in calls},
        median["memory"] / (12 * FLOATS),
    )


def _factorisation(call: str) -> Run:
    """One call, e.g. "eigh (384, 384)"; of several operands, the first tells the size."""
    name, _, shapes = call.partition(" ")
    x = jax.random.normal(jax.random.key(0), ast.literal_eval(shapes.split(", (")[0]))
    H, τ = jnp.linalg.qr(x, mode="raw")
    runs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "geqrf": (lambda x: jnp.linalg.qr(x, mode="raw"), (x,)),
        "householder_product": (jax.lax.linalg.householder_product, (H.mT, τ)),
        "qr": (lambda x: jnp.linalg.qr(x).Q, (x,)),
        "eigh": (jnp.linalg.eigh, (x @ x.mT,)),
        "cholesky": (jnp.linalg.cholesky, (x @ x.mT,)),
    }
    run, operands = jax.jit(runs[name][0]), runs[name][1]
    return lambda _: run(*operands)


def _adding() -> Run:
    """``x ← x + y`` where x is, as a step updates what it is given."""
    y, add = jnp.zeros(FLOATS), jax.jit(jnp.add, donate_argnums=0)
    kept = [jnp.ones(FLOATS)]

    def run(_: Any) -> Any:
        kept[0] = add(kept[0], y)
        return kept[0]

    return run


def timed(
    runs: Mapping[str, Run], inputs: Sequence[Any], repeats: int, patience: float, progress: str
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` calls of each run, in turns, after one that does not count.

    A run that has taken ``patience`` seconds is not called again; one whose first call takes that long has only that.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        names = [name for name in runs if sum(times[name]) < patience]
        first = i % len(names) if names else 0
        given = inputs[i % len(inputs)]
        turns = {name: runs[name] for name in names[first:] + names[:first]}
        for name, seconds in harness.interleaved(turns, 1, lambda _, given=given: given).items():
            times[name] += seconds
        print(f"{progress}: round {i + 1} of {repeats + 1}, {len(names)} of {len(runs)} kinds of step", flush=True)
    return {name: seconds[1:] or seconds for name, seconds in times.items()}


def exponent(sizes: Sequence[float], costs: Sequence[float], last: int = 3) -> float | None:
    """The power of the size by which the cost grows over the last points; None of fewer than two.

    Example:
        >>> exponent([1, 2, 4, 8], [50.0, 4.0, 16.0, 64.0])
        2.0
    """
    if len(sizes) < 2:
        return None
    return round(float(np.polyfit(np.log(sizes[-last:]), np.log(costs[-last:]), 1)[0]), 3)


def curve(
    rows: Mapping[str, Any], method: str, column: str
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Sizes, medians and both ends of the spread of the rows ``method_SIZE`` that have this cell."""
    points = []
    for row, cells in rows.items():
        name, _, size = row.rpartition("_")
        cell = cells.get(column)
        if name == method and cell is not None:
            ends = [cell["median"], cell["low"], cell["high"]] if isinstance(cell, dict) else [cell] * 3
            points.append((float(size), *ends))
    sizes, median, low, high = zip(*sorted(points), strict=True) if points else ((), (), (), ())
    return list(sizes), list(median), list(low), list(high)
