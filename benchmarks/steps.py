"""An optimizer's step, compiled: its state is donated from call to call, its products are counted."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import harness
from benchmarks.harness import PERIOD
from benchmarks.results import spread
from experiments.flops import FACTORISATIONS, FlopCount, count_matmul_flops


def update_of(tx: Any, **extra: Any) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """``(gradients, state, parameters)`` to state and parameters, in the order of the arguments: JAX hands donated
    buffers to results of their shape in that order, and parameters written where a momentum was would be copied first.
    """

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, **extra)
        return state, optax.apply_updates(params, updates)

    return step


def zeros(shapes: Any) -> Any:
    """A tree of arrays of these shapes and types."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


class Stepper:
    """A step as a run for `harness.interleaved`: it takes an input and ``carried``, and returns ``carried`` anew,
    perhaps with more behind it.
    """

    def __init__(self, step: Callable[..., Any], given: Any, *carried: Any):
        self.step, self.given = step, given
        self.carried = [jax.tree.map(jnp.copy, x) for x in carried]  # no buffer twice, or it could not be donated
        self.flops = count_matmul_flops(step, given, *carried)
        self.programs: list[harness.Program] = []
        self.compile()

    def compile(self) -> None:
        """Once more, for another measurement of the time it takes."""
        donate = range(1, 1 + len(self.carried))
        self.programs.append(harness.compile_program(self.step, self.given, *self.carried, donate=donate))

    @property
    def refreshes(self) -> bool:
        """Whether a later step than the first factorises."""
        return bool(refreshing(self.flops).factorisations)

    def __call__(self, given: Any) -> Any:
        out = self.programs[-1].run(given, *self.carried)
        self.carried = [*out[: len(self.carried)]]
        return out

    def compiling(self) -> dict[str, Any]:
        """Cells of a table: what compiling took."""
        return {key: spread([getattr(p, key) for p in self.programs]) for key in ("compile_s", "trace_s")}


def update_stepper(tx: optax.GradientTransformation, params: Any, grads: Any = None) -> Stepper:
    """An optimizer's update alone, from parameters or their shapes."""
    start = zeros(params) if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct) else params
    return Stepper(update_of(tx), params if grads is None else grads, tx.init(start), start)


def ordinary(count: FlopCount) -> FlopCount:
    """The path that refreshes nothing; where every step factorises, the costliest."""
    return count.costliest(without=FACTORISATIONS, loops=False) or refreshing(count)


def refreshing(count: FlopCount) -> FlopCount:
    """The costliest path; where bases follow without an eigendecomposition, which then is the first step's, another."""
    later, whole = count.costliest(without=("eigh",)), count.costliest()
    assert whole is not None, "without any condition there is a path"
    return later if later is not None and later.factorisations else whole


def mean_flops(count: FlopCount, between: int | None = None) -> float:
    """Of a step, refreshes spread over all; ``between`` of those that refresh nothing, where that is known better."""
    between = ordinary(count).products if between is None else between
    return between + (refreshing(count).products - between) / PERIOD


def peak_bytes(compiled: Any) -> int:
    """What a compiled program needs beside its arguments: temporaries and those results that are not donated."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def times_of(seconds: Sequence[float]) -> dict[str, list[float]]:
    """Milliseconds of the usual step, the slowest and the mean, one a repeat of `PERIOD` steps."""
    kinds = {"step": statistics.median, "slowest": max, "mean": statistics.mean}
    return {key: harness.by_repeat(seconds, of) for key, of in kinds.items()}
