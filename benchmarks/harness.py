"""What every benchmark shares: the machine, compiling and timing, and what the times of repeats are summed up to.

Times are only comparable within one run, so contenders take turns. A repeat is `PERIOD` steps: every method that
refreshes something does so once in each.
"""

import contextlib
import datetime
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
PERIOD = 10  # steps between refreshes, of every method that has them
WARM_UP = 2  # steps that are not counted: the first starts the bases
RATE = 1e-3  # of all optimizers: no time depends on it

Run = Callable[[Any], Any]


class Program(NamedTuple):
    """A compiled function and what compiling it took."""

    run: jax.stages.Compiled
    trace_s: float  # Python to StableHLO
    compile_s: float  # StableHLO to the machine's code


@functools.cache
def environment() -> dict[str, Any]:
    """Hardware, versions and settings that a time depends on, as they were at the first call."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # of the machine as the run began: above 0, others were at work
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "OPENBLAS_NUM_THREADS") if name in os.environ},
    }


def compile_program(fn: Callable[..., Any], *args: Any, donate: Sequence[int] = ()) -> Program:
    """Trace and compile ``fn(*args)``, each timed; arguments at ``donate`` give their memory to the results."""
    began = time.perf_counter()
    fresh = lambda *args: fn(*args)  # noqa: E731  JAX would remember what it made of `fn` itself
    lowered = jax.jit(fresh, donate_argnums=tuple(donate)).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return Program(compiled, traced - began, time.perf_counter() - traced)


@contextlib.contextmanager
def compiling_anew() -> Iterator[None]:
    """Without JAX's cache on disk: a program found there would seem to compile in no time."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def interleaved(
    runs: Mapping[str, Run], rounds: int, make_input: Callable[[int], Any], progress: str = ""
) -> dict[str, list[float]]:
    """Seconds of each call of each of ``runs`` over ``rounds`` rounds, in which they take turns.

    Round ``i`` hands every run ``make_input(i)``, ready before the clock starts; the clock stops when the result is
    ready. Who goes first changes with the round. ``progress`` names the rounds in a line on the terminal.
    """
    names, times = list(runs), {name: [] for name in runs}
    for i in range(rounds):
        given = jax.block_until_ready(make_input(i))
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            jax.block_until_ready(runs[name](given))
            times[name].append(time.perf_counter() - began)
        if progress:
            print(f"\r{progress} {i + 1}/{rounds}", end="" if i + 1 < rounds else "\n", flush=True)
    return times


def matrix_product(m: int, k: int, n: int, dtype: Any = jnp.float32, precision: Any = None) -> Run:
    """A compiled product of ``(m, k)`` and ``(k, n)``, as a run for `interleaved`: it ignores its input.

    ``precision`` as in `jnp.matmul`: without one, an accelerator may round float32 before it multiplies.
    """
    left, right = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(((m, k), (k, n))))
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    jax.block_until_ready(product(left, right))
    return lambda _: product(left, right)


def by_repeat(seconds: Sequence[float], sum_up: Callable[[Sequence[float]], float] = statistics.mean) -> list[float]:
    """Milliseconds a step, one a repeat: by default the mean of its steps, which spreads a refresh over all."""
    return [1e3 * sum_up(seconds[i : i + PERIOD]) for i in range(0, len(seconds), PERIOD)]


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in ``tree``; arrays may be ``jax.ShapeDtypeStruct``."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
