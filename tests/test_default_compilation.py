"""The suite compiles quickly (`conftest.py`). What hangs on rounding is run once more as users compile it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AGAIN = {
    "the authors' trajectories": [
        *("optimizers/test_soap.py", "optimizers/test_dykaf.py", "optimizers/test_frog.py"),
        *("-k", "the_authors"),
    ],
    "heads in float32": ["fisher/test_head_float32.py"],
    "pruning in float32": ["compression/test_sparsegpt.py", "compression/test_obs.py", "-k", "float32"],
    "orthogonalisation": ["linalg/test_orthogonalize.py", "-k", "scale or float32 or half or spectra or finite"],
}


@pytest.mark.parametrize("what", AGAIN)
def test_with_the_compilers_defaults(what: str) -> None:
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # whose programs are not these
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("fusion_emitters=false", "fusion_emitters=true"),
    }
    # A worker of its own, not one of this run's.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    files = [f"tests/{x}" if x.endswith(".py") else x for x in AGAIN[what]]
    # Shapes and types, which compilation does not change, are checked where the same tests run with the others.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "", "-p", "no:cacheprovider",
         "--jaxtyping-packages=", *files],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
