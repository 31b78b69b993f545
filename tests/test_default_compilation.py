"""The suite compiles quickly (`conftest.py`). What hangs on rounding is run once more as users compile it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
AGAIN = (  # the authors' trajectories, heads and pruning in float32, orthogonalisation
    *(f"optimizers/test_{name}.py::test_the_authors_trajectories" for name in ("soap", "dykaf", "frog")),
    "optimizers/test_dykaf.py::test_the_authors_factors",
    *(f"optimizers/test_{name}.py::test_the_reference_follows_the_authors_trajectories" for name in ("soap", "frog")),
    "fisher/test_head_float32.py",
    "compression/test_sparsegpt.py::test_float32_and_narrower_weights_share_one_program",
    "compression/test_obs.py::test_float32_does_not_drift",
    "linalg/test_orthogonalize.py::test_any_scale",
    "linalg/test_orthogonalize.py::test_a_value_that_is_not_finite_spoils_its_own_matrix_only",
    "linalg/test_orthogonalize.py::test_float32_direct_error_is_rounding_times_the_slope_at_zero",
    "linalg/test_orthogonalize.py::test_float32_gram_error_is_the_predicted_drift",
    "linalg/test_orthogonalize.py::test_gram_on_well_conditioned_and_hard_spectra",
    "linalg/test_orthogonalize.py::test_products_in_half_precision_stay_bounded",
)


def test_with_the_compilers_defaults() -> None:
    """In one process, which imports and collects once."""
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # whose programs are not these
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("fusion_emitters=false", "fusion_emitters=true"),
    }
    # A worker of its own, not one of this run's.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    # Shapes and types, which compilation does not change, are checked where the same tests run with the others.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "", "-p", "no:cacheprovider",
         "--jaxtyping-packages=", *(f"tests/{test}" for test in AGAIN)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
