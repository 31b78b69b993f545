"""The tiers: every pattern means a test, every law is quick for one optimizer of each kind, and CI runs both."""

import ast
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests import tiers, workers
from tests.optimizer_rows import ROWS

ROOT = Path(__file__).parents[1]
FILES = {path.relative_to(tiers.TESTS).as_posix(): path for path in sorted(tiers.TESTS.rglob("test_*.py"))}


def functions(name: str) -> list[ast.FunctionDef]:
    nodes = ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def of_each_row(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("each(") for decorator in function.decorator_list)


@pytest.mark.parametrize("pattern", (*tiers.SLOW, *tiers.FIRST_CASE, *workers.LONGEST))
def test_every_pattern_means_a_test(pattern: str) -> None:
    path, _, function = pattern.partition("::")
    files = [file for file in FILES if fnmatchcase(file, path)]
    assert files
    if function.strip("*"):
        assert function in [node.name for file in files for node in functions(file)]


def test_the_kinds_are_rows() -> None:
    assert set(tiers.KINDS) < {row.name for row in ROWS}


def of_rows(path: str, *names: str) -> list[bool]:
    rows = {row.name: row for row in ROWS}
    return tiers.slow([tiers.Case(path, "test_f", {"row": rows[name], "x": x}) for name in names for x in (0, 1)])


def test_rows_of_the_kinds_are_quick_or_else_the_first() -> None:
    assert of_rows("laws/test_calls.py", "soap", "ekfac") == [False, False, True, True]
    assert of_rows("laws/test_calls.py", "frog", "ekfac") == [False, True, True, True]
    assert of_rows("optimizers/test_sharding.py", "soap", "ekfac") == [True] * 4


@pytest.mark.parametrize(
    ("path", "wanted"), [("optimizers/test_soap.py", [False, True]), ("matrices/test_axes.py", [False, False])]
)
def test_first_cases_are_quick(path: str, wanted: list[bool]) -> None:
    assert tiers.slow([tiers.Case(path, "test_f", {"x": x}) for x in (0, 1)]) == wanted


# One process: importing everything takes far longer than collecting it once more.
COLLECT = """
import pytest
common = ["-q", "-n0", "-p", "no:cacheprovider", "--jaxtyping-packages=", "--collect-only", "tests/laws"]
for words in (["-m", "not slow"], ["-m", "slow"], []):
    pytest.main([*common, *words])
    print("next")
"""


def collected() -> list[set[str]]:
    """The laws in the quick tier, in the slow one, and where their folder is named."""
    run = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=True)
    return [{line for line in part.splitlines() if "::" in line} for part in run.stdout.split("next\n")[:3]]


def test_each_law_is_in_one_tier_or_the_other() -> None:
    """By pytest itself: named files are run whole; of each law the quick tier has rows of the kinds, or one."""
    quick, slow, both = collected()
    assert quick | slow == both
    assert not quick & slow
    rows = sorted((row.name for row in ROWS), key=len, reverse=True)
    laws = [f"tests/{f}::{law.name}" for f in FILES if f.startswith("laws") for law in functions(f) if of_each_row(law)]
    laws = [law for law in laws if law.removeprefix("tests/") not in tiers.SLOW]
    assert len(laws) > 30
    for law in laws:
        cases = [name.rstrip("]") for path, _, name in (nodeid.partition("[") for nodeid in quick) if path == law]
        found = {next(row for row in rows if f"{case}-".startswith(f"{row}-")) for case in cases}
        assert found
        assert found <= set(tiers.KINDS) or len(found) == 1, law


def test_what_shares_programs_is_run_by_one_worker() -> None:
    calls, faults = (f"tests/laws/test_{name}.py::test_f" for name in ("calls", "faults"))
    assert workers.share(f"{calls}[soap]") == workers.share(f"{faults}[soap-nan]") != workers.share(f"{faults}[muon]")
    soap = "tests/optimizers/test_soap.py"
    assert workers.share(f"{soap}::test_a[x]") == workers.share(f"{soap}::test_b")


def test_ci_runs_both_tiers() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert "-m not slow" in options["addopts"]
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "pytest" in line] == ["pip install -e '.[test]' && pytest", "pytest -m slow"]
