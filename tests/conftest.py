"""One set-up for every test: eight CPU devices, one BLAS thread, a lasting compilation cache, float64 on request."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# LAPACK's threads and XLA's would fight over the same cores.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Eight devices take turns on two cores: one that waits long for the others is not stuck.
flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

# One folder a worker: JAX writes an entry in place, and a second worker could read half of it.
worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
cache = Path(__file__).parents[1] / ".pytest_cache" / "jax" / worker
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402 (the environment comes first)


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
