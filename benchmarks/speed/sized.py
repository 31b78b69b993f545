"""Optimizers whose ordinary and refreshing steps are run apart, on trees of any size."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisher_optax as fo
from benchmarks import harness
from benchmarks.harness import PERIOD, RATE, Run
from benchmarks.steps import Stepper, mean_flops, over_period, update_of, zeros
from fisher_optax.preconditioner.transform import MatrixState, PreconditionState

ORDINARY = 1  # calls before a step that neither starts nor refreshes anything


class Method(NamedTuple):
    """An optimizer, and how many calls come before a step that refreshes; None: no step does."""

    build: Callable[[], optax.GradientTransformation]
    refresh_at: int | None = None


def shampoo() -> optax.GradientTransformation:
    return fo.shampoo(RATE, precondition_frequency=PERIOD, storage=fo.Storage(block_size=128))


# SOAP and DyKAF use up their first call to start the bases, so that the tenth step is the eleventh call.
METHODS = {
    "adamw": Method(lambda: optax.adamw(RATE)),
    "optax_muon": Method(lambda: optax.contrib.muon(RATE)),
    "fo_muon": Method(lambda: fo.muon(RATE)),
    "fo_soap": Method(lambda: fo.soap(RATE, precondition_frequency=PERIOD), PERIOD),
    "fo_dykaf": Method(lambda: fo.dykaf(RATE, precondition_frequency=PERIOD), PERIOD),
    "fo_shampoo_128": Method(shampoo, PERIOD - 1),
}


def apart(build: Callable[[], optax.GradientTransformation]) -> optax.GradientTransformation:
    """``build()`` once a matrix, so that none is stacked with another, and once for the rest."""

    def of(tree: Any) -> optax.GradientTransformationExtraArgs:
        labels = jax.tree.map_with_path(lambda p, x: jax.tree_util.keystr(p) if len(x.shape) > 1 else "rest", tree)
        return optax.partition({label: build() for label in jax.tree.leaves(labels)}, labels)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return of(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: of(params).init(params), update)


def each(kind: type, change: Callable[[Any], Any], state: Any) -> Any:
    """The state with every part of this kind changed."""
    is_part = lambda x: isinstance(x, kind)  # noqa: E731
    return jax.tree.map(lambda x: change(x) if is_part(x) else x, state, is_leaf=is_part)


def after_calls(state: Any, count: Any) -> Any:
    """The state as after ``count`` calls, as far as refreshes go by it."""
    return each(PreconditionState, lambda s: s._replace(count=jnp.asarray(count, s.count.dtype)), state)


def started(state: Any) -> Any:
    """With factors that are not zero, as after the step that starts them."""

    def plus_identity(x: Any) -> Any:
        square = x.ndim == 3 and x.shape[-1] == x.shape[-2]
        return x + jnp.eye(x.shape[-1], dtype=x.dtype) if square else x

    return each(MatrixState, lambda s: s._replace(factors=jax.tree.map(plus_identity, s.factors)), state)


class Contender:
    """A method compiled for a tree of arrays or their shapes; up to ``compiles`` times if that takes ``patience`` at
    most, in seconds.
    """

    def __init__(self, method: Method, params: Any, compiles: int = 1, patience: float = 0.0):
        tx = method.build()
        update = update_of(tx)

        def step(given: Any, state: Any, params: Any) -> tuple[Any, Any]:
            grads, count = given
            return update(grads, after_calls(state, count), params)

        params = zeros(params) if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct) else params
        self.method = method
        with harness.compiling_anew():
            self.steps = Stepper(step, (params, np.int32(0)), started(tx.init(params)), params)
            while len(self.steps.programs) < compiles and self.steps.programs[0].compile_s < patience:
                self.steps.compile()

    @property
    def state(self) -> Any:
        return self.steps.carried[0]

    @property
    def gflop(self) -> float:
        """Of the products of a step, refreshes spread over all."""
        return mean_flops(self.steps.flops) / 1e9

    def runs(self) -> dict[str, Run]:
        """Its kinds of step, by the calls that each counts before it."""
        kinds = {"step": ORDINARY, "refresh": self.method.refresh_at}
        return {
            kind: lambda grads, count=count: self.steps((grads, np.int32(count)))
            for kind, count in kinds.items()
            if count is not None
        }


def period(each: Mapping[str, Any]) -> Any:
    """The mean of the steps of a period, of numbers or of spreads; without a "refresh" all are alike."""
    step, refresh = each["step"], each.get("refresh", each["step"])
    if not isinstance(step, dict):
        return over_period({"step": step, "refresh": refresh})
    parts = {end: over_period({"step": step[end], "refresh": refresh[end]}) for end in ("median", "low", "high")}
    return {**parts, "n": min(step["n"], refresh["n"])}


def timed(
    runs: Mapping[str, Run], inputs: Sequence[Any], repeats: int, patience: float, progress: str
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` calls of each run, in turns, after one that does not count.

    A run that has taken ``patience`` seconds is not called again; one whose first call takes that long has only that.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        turns = {name: run for name, run in runs.items() if sum(times[name]) < patience}
        for name, seconds in harness.interleaved(turns, 1, lambda _, i=i: inputs[i % len(inputs)]).items():
            times[name] += seconds
        print(f"{progress}: round {i + 1} of {repeats + 1}, {len(turns)} of {len(runs)} kinds of step", flush=True)
    return {name: seconds[1:] or seconds for name, seconds in times.items()}
