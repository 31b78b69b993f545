"""What keeps the package readable: imports go one way, files and functions stay short, public names are explained."""

import ast
import graphlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fisher_optax"
FILES = sorted(
    path for folder in ("fisher_optax", "examples", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
)
FILE_LINES, FUNCTION_LINES = 300, 45
EVERYTHING = "*"

# Each module or sub-package of fisher_optax, and which others it may import.
MAY_IMPORT = {
    "branching": set(),
    "checks": set(),
    "linalg": {"branching"},
    "matrix_axes": set(),
    "stacks": set(),
    "tables": set(),
    "types": {"matrix_axes"},
    "trees": {"matrix_axes"},
    "axes_rules": {"matrix_axes"},
    "axes": {"axes_rules", "matrix_axes", "trees"},
    "decay": {"checks", "hyperparameters", "trees"},
    "hyperparameters": {"checks"},
    "momentum": {"branching", "checks"},
    "matrices": {"matrix_axes"},
    "sharding": {"matrix_axes"},
    "layers": {"matrices", "matrix_axes", "sharding"},
    "storage": {"linalg", "types"},
    "curvature": {"layers", "matrix_axes", "storage", "types"},
    "accumulation": {"curvature", "matrix_axes", "types"},
    "guard": {"branching", "linalg", "sharding", "trees", "types"},
    "refresh": {"branching", "linalg", "stacks", "transport", "types"},
    "transport": {"stacks", "types"},
    "step": {"branching", "refresh", "stacks", "storage", "types"},
    # Statistics from a model know nothing of optimizers.
    "capture": {"linalg", "matrices", "matrix_axes", "sharding", "tables", "trees", "types"},
    "states": {"guard", "matrix_axes", "trees"},
    "reporting": {"axes", "capture", "matrix_axes", "tables", "trees"},
    "routing": {"axes", "branching", "layers", "matrix_axes", "reporting", "trees"},
    # What a preconditioner is put together from: these never import each other.
    "factors": {"branching", "checks", "linalg", "types"},
    "grafting": {"axes", "guard", "hyperparameters", "matrix_axes", "routing"},
    "decompositions": {"branching", "linalg", "types"},
    "applications": {"checks", "linalg", "types"},
    # The seam knows their contracts in `types`, not them.
    "seam": {
        *("branching", "matrices", "matrix_axes", "refresh", "routing", "sharding", "step", "storage", "types"),
    },
    "precondition": {"guard", "refresh", "seam", "storage", "types"},
    "bases": {"axes", "layers", "matrices", "seam", "trees", "types"},
    "warm_start": {
        *("applications", "curvature", "layers", "linalg", "matrices", "matrix_axes", "momentum", "routing", "seam"),
        *("trees", "types"),
    },
    # A named optimizer is the seam called with parts; nothing but the package itself imports one.
    "optimizers": {
        *("applications", "axes", "axes_rules", "checks", "curvature", "decay", "decompositions", "factors", "fisher"),
        *("grafting", "guard", "hyperparameters", "layers", "linalg", "matrices", "matrix_axes", "momentum"),
        *("precondition", "routing", "seam", "types"),
    },
    "train_state": set(),
    "fisher": {
        *("axes", "capture", "checks", "factors", "layers", "linalg", "matrices", "matrix_axes", "sharding", "tables"),
        "types",
    },
    "compression": {
        *("axes", "branching", "capture", "checks", "fisher", "guard", "hyperparameters", "linalg", "matrices"),
        *("matrix_axes", "tables", "trees", "types"),
    },
    "__init__": {EVERYTHING},
}


def unit_of(path: Path) -> str:
    """The row of the table a file belongs to: ``factors/outer_product.py`` -> ``factors``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST, package: list[str]) -> Iterator[list[str]]:
    """Absolute dotted names of all imports, wherever in the file; ``package`` is the one the file belongs to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = start + (node.module.split(".") if node.module else [])
            yield from ([*module, alias.name] for alias in node.names)


def units_imported(source: str, package: list[str]) -> set[str]:
    """Rows of the table that ``source`` imports; a name taken from ``fisher_optax`` itself counts as one."""
    ours = (name for name in imported_modules(ast.parse(source), package) if name[0] == "fisher_optax")
    return {name[1] if len(name) > 1 else "__init__" for name in ours}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of the body that are not blank, a comment, or part of a docstring (its own or a nested one)."""
    numbers = set(range(function.body[0].lineno, function.body[-1].end_lineno + 1))
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(
            node, clean=False
        ):
            numbers -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(1 for number in numbers if (text := lines[number - 1].strip()) and not text.startswith("#"))


IMPORTS = """
from .. import linalg
from ..types import Kronecker
import fisher_optax.axes
import jax
def f():
    from fisher_optax import soap
"""
FIVE_CODE_LINES = '''
def f():
    """One.

    Two."""
    # why

    x = (1 +
         2)
    def g():
        """Doc."""
        return x
    return g
'''


def test_the_checks_see_what_they_should() -> None:
    assert units_imported(IMPORTS, ["fisher_optax", "factors"]) == {"linalg", "types", "axes", "soap"}
    assert units_imported("from .soap import soap", ["fisher_optax", "optimizers"]) == {"optimizers"}
    assert code_lines(ast.parse(FIVE_CODE_LINES).body[0], FIVE_CODE_LINES.splitlines()) == 5


def test_the_import_table_has_no_cycle() -> None:
    graph = {unit: allowed for unit, allowed in MAY_IMPORT.items() if EVERYTHING not in allowed}
    assert set().union(*graph.values()) <= set(graph)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    unit = unit_of(path)
    assert unit in MAY_IMPORT, f"{unit} has no row in MAY_IMPORT: say what it may import"
    allowed = MAY_IMPORT[unit]
    imported = units_imported(path.read_text(encoding="utf-8"), ["fisher_optax", *path.relative_to(PACKAGE).parts[:-1]])
    forbidden = set() if EVERYTHING in allowed else imported - allowed - {unit}
    assert not forbidden, (
        f"{unit} may import {sorted(allowed) or 'nothing of ours'}, but {path.name} imports {sorted(forbidden)}"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_and_finished(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= FILE_LINES, f"{path.name} has {len(lines)} lines: split it by topic"
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {node.name: size for node in functions if (size := code_lines(node, lines)) > FUNCTION_LINES}
    assert not long, f"more than {FUNCTION_LINES} code lines: {long}"
    unfinished = [number for number, line in enumerate(lines, 1) if "TO" + "DO" in line or "FIX" + "ME" in line]
    assert not unfinished, f"unfinished at lines {unfinished}"


def test_every_public_name_is_explained() -> None:
    import fisher_optax

    values = {name: getattr(fisher_optax, name) for name in fisher_optax.__all__}
    unexplained = [name for name, value in values.items() if callable(value) and not has_own_docstring(value)]
    unexplained += [name for name, value in values.items() if inspect.ismodule(value) and not inspect.getdoc(value)]
    assert not unexplained


def has_own_docstring(value: object) -> bool:
    """A dataclass or NamedTuple without one gets its signature as docstring, which explains nothing."""
    doc, name = inspect.getdoc(value) or "", getattr(value, "__name__", "")
    return bool(doc) and not doc.startswith(f"{name}(")
