"""One set-up for every test: eight CPU devices, one BLAS thread, quick and lasting compilation, float64 on request."""

import gc
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

# LAPACK's threads and XLA's would fight over the same cores.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Eight devices take turns on two cores: one that waits long for the others is not stuck.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_cpu_collective_call_terminate_timeout_seconds=600"]
# Tests compile far longer than they run, and what makes programs fast is three quarters of it. As users compile them:
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS=--xla_cpu_use_fusion_emitters=true pytest
FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
if metadata.version("jaxlib").startswith("0.10."):  # later ones have no others, and end at a flag they do not know
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Where in the source an instruction comes from, ten frames of it, is a tenth of the time, and for profiles alone.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()  # the last of two counts
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

# One folder a worker, which has the environment of the process that starts it: JAX writes an entry in place, and a
# second worker could read half of it. Steps that are not compiled as a whole compile the same branches at every call.
folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder, os.environ.get("PYTEST_XDIST_WORKER", "")))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

# A seventh of the time to collect was to look through all that had been imported for garbage, again and again.
gc.set_threshold(20_000, 20, 50)

import jax  # noqa: E402 (the environment comes first)

import tests.typechecker  # noqa: E402, F401 (jaxtyping looks it up by its name)
from tests import tiers, workers  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Files and tests that are named are run whole, slow or not."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if named and not hasattr(config, "workerinput") and not any(a[:2] == "-m" for a in config.invocation_params.args):
        config.option.markexpr = ""


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m leaves out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in functions.values():
        for item, slow in zip(cases, tiers.slow([tiers.case(item) for item in cases]), strict=True):
            if slow:
                item.add_marker("slow")
    items.sort(key=lambda item: workers.rank(tiers.case(item).path))


def pytest_collection_finish() -> None:
    """What has been imported and collected stays until the end, and no test's garbage is among it."""
    gc.freeze()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> workers.Shares:
    return workers.Shares(config, log)


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test in double precision."""
    with jax.enable_x64(True):
        yield


MAPS = Path("/proc/self/maps")
MOST_MAPS = 25_000


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Compiled programs are maps of memory. Linux gives a process 65,530 and aborts what asks for more; a worker that
    compiles all that these tests do would come there.
    """
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
