"""What surrounds a compiled training step, the same in every experiment: evaluations, progress, checkpoints, endings.

A run is cut at the steps of `stops`. Between two of them only the compiled program works; at each, Python looks at the
loss, and at some it evaluates and saves. Where the cuts fall changes no number, so a resumed run ends as a whole one.
"""

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float
from tqdm import tqdm

from experiments.run_folder import Row, RunFolder

# Steps between two looks at the loss: Python stays out of them, and the progress bar still moves.
CHUNKS = {"cpu": 10}
LONG_CHUNK = 50  # of every accelerator: its steps are shorter, and it waits at each look

Scalar = Float[Array, ""]


class Plan(NamedTuple):
    """How long a run is, how often it is evaluated, and what it counts."""

    steps: int
    eval_every: int  # steps
    unit: str  # what it is trained on, as the metrics and the progress bar call it
    units: int  # of it in a step
    advice: str  # what to try when the loss is not finite


class Stopwatch:
    """Seconds that the training steps took, without evaluations and without compiling.

    The first chunk compiles, so its steps count as the median of those after it, once there are any: `stops` makes it
    one step long, so that there are when the first evaluation comes.
    """

    def __init__(self, before: float):
        self.before = before  # seconds, of the steps before this program went on with the run
        self.chunks: list[tuple[int, float]] = []

    def add(self, steps: int, seconds: float) -> None:
        self.chunks.append((steps, seconds))

    @property
    def seconds(self) -> float:
        if not self.chunks:
            return self.before
        (steps, first), *others = self.chunks
        if others:
            first = min(first, steps * statistics.median(seconds / n for n, seconds in others))
        return self.before + first + sum(seconds for _, seconds in others)


class Diverged(FloatingPointError):
    """The loss is no longer a finite number."""


def require_finite(loss: Scalar | float, where: str, advice: str) -> float:
    if not math.isfinite(value := float(loss)):
        raise Diverged(f"the loss is {value} {where}. {advice}")
    return value


def is_evaluated(step: int, plan: Plan) -> bool:
    return step % plan.eval_every == 0 or step == plan.steps


def stops(step: int, plan: Plan) -> Iterator[int]:
    """The steps from ``step`` to the end, both included, between which Python has nothing to do."""
    chunk = CHUNKS.get(jax.default_backend(), LONG_CHUNK)
    inner = (s for s in range(step + 1, plan.steps) if s % chunk == 0 or is_evaluated(s, plan))
    yield from sorted({step, min(step + 1, plan.steps), *inner, plan.steps})


def run_steps(
    plan: Plan,
    state: Any,
    advance: Callable[[Any, int], tuple[Any, Scalar]],
    evaluate: Callable[[Any], dict[str, Any]],
    describe: Callable[[Row], str],
    *,
    began: float,
    run: RunFolder | None = None,
    progress: bool = False,
    on_evaluation: Callable[[Row], object] | None = None,
) -> tuple[Any, list[Row]]:
    """Takes ``state`` to the last step, and returns it with an entry an evaluation.

    Args:
        plan: when to stop and to evaluate.
        state: the first one, with its number of steps in ``state.step``.
        advance: from a state and a later step, the state at that step and the mean of the losses on the way.
        evaluate: from a state, what to put into its entry; numbers that have ``loss`` in their name must be finite.
        describe: an entry in a few words, for the progress bar.
        began: `time.perf_counter` at the start of the run.
        run: where to write and, if it holds a checkpoint, to go on from; None to write nothing.
        progress: show a progress bar.
        on_evaluation: called with each new entry.

    Raises:
        Diverged: a loss is not finite. What ``run`` holds is from before.
    """
    rows: list[Row] = []
    if run:
        state, rows = run.restore(state)
        began -= rows[-1]["seconds"] if rows else 0.0
    stopwatch = Stopwatch(rows[-1]["training_seconds"] if rows else 0.0)
    with tqdm(total=plan.steps, initial=int(state.step), unit="step", disable=not progress) as bar:
        for stop in stops(int(state.step), plan):
            if (step := int(state.step)) < stop:
                chunk_began = time.perf_counter()
                state, loss = advance(state, stop)
                loss = require_finite(loss, f"between steps {step} and {stop}", plan.advice)
                stopwatch.add(stop - step, elapsed := time.perf_counter() - chunk_began)
                speed = (stop - step) * plan.units / elapsed
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} {plan.unit}/s", refresh=False)
                bar.update(stop - step)
            if is_evaluated(stop, plan) and not (rows and rows[-1]["step"] == stop):
                found = evaluate(state)
                for value in (value for name, value in found.items() if "loss" in name):
                    require_finite(value, f"at step {stop}", plan.advice)
                times = {"seconds": time.perf_counter() - began, "training_seconds": stopwatch.seconds}
                times = {name: round(seconds, 3) for name, seconds in times.items()}
                rows.append({"step": stop, **found, **times, plan.unit: stop * plan.units})
                bar.set_description_str(describe(rows[-1]))
                if run:
                    run.record(rows, state)
                if on_evaluation:
                    on_evaluation(rows[-1])
    return state, rows


@contextlib.contextmanager
def ending_with_a_message(out: Path) -> Iterator[None]:
    """Ends the program with one line when the training in it diverges or is interrupted."""
    try:
        yield
    except Diverged as error:
        sys.exit(f"stopped: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; go on with --resume --out {out}")
