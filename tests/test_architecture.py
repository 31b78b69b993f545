"""What keeps the package readable: imports go one way, files and functions stay short, public names are explained."""

import ast
import collections
import graphlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fisher_optax"
FILES = sorted(
    path
    for folder in ("fisher_optax", "examples", "experiments", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
FILE_LINES, FUNCTION_LINES, ARGUMENTS = 300, 45, 16
BENCHMARK_LINES = 3500
EVERYTHING = "*"
# Words that point at a thing instead of naming it, and shares of all names and of all annotations.
POINTING = {"seen", "held", "kept", "mine", "given", "done", "one", "taken"}
MOST_POINTING, MOST_ANY = 0.005, 0.15

# Each module or folder of fisher_optax, and which others it may import. A folder inside has a row of its own where it
# may do less than the one around it.
BASE = {"_arguments", "_xla", "linalg", "matrices", "statistics"}
MAY_IMPORT = {
    "_arguments": set(),
    "_tables": set(),
    "_xla": set(),
    "linalg": {"_xla"},
    "matrices": {"_xla"},
    "statistics": {"linalg", "matrices"},
    # Wrappers know no preconditioner, and statistics from a model no optimizer.
    "transforms": BASE,
    "capture": {*BASE, "_tables"},
    # The preconditioner knows the contracts of its three parts, not them.
    "preconditioner": {*BASE, "preconditioner.contracts", "transforms"},
    # These never import each other.
    "preconditioner.contracts": {"_arguments", "matrices", "statistics"},
    "preconditioner.factors": {*BASE, "preconditioner.contracts"},
    "preconditioner.decompositions": {*BASE, "preconditioner.contracts"},
    "preconditioner.applications": {*BASE, "preconditioner.contracts", "transforms"},
    "fisher": {*BASE, "_tables", "capture", "preconditioner.factors"},
    "compression": {*BASE, "_tables", "capture", "fisher", "transforms"},
    "states": {
        *(BASE | {"_tables", "capture", "transforms"}),
        *("preconditioner", "preconditioner.applications", "preconditioner.contracts"),
    },
    # A named optimizer is a preconditioner put together; nothing but the package itself imports one.
    "optimizers": {
        *(BASE | {"capture", "fisher", "transforms"}),
        *("preconditioner", "preconditioner.applications", "preconditioner.contracts"),
        *("preconditioner.decompositions", "preconditioner.factors"),
    },
    "__init__": {EVERYTHING},
}


def row_of(names: Sequence[str]) -> str:
    """The row of the table that a module belongs to: of ``linalg.roots``, ``linalg``."""
    inside = ".".join(names[:2])
    return inside if inside in MAY_IMPORT else names[0]


def unit_of(path: Path) -> str:
    """The row of a file."""
    return row_of(path.relative_to(PACKAGE).with_suffix("").parts)


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
    return {row_of(name[1:]) if len(name) > 1 else "__init__" for name in ours}


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
from ..preconditioner.contracts import Kronecker
import fisher_optax.matrices.axes
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


def test_the_arguments_see_what_they_should() -> None:
    assert units_imported(IMPORTS, ["fisher_optax", "capture"]) == {
        "linalg",
        "preconditioner.contracts",
        "matrices",
        "soap",
    }
    assert units_imported("from .soap import soap", ["fisher_optax", "optimizers"]) == {"optimizers"}
    assert code_lines(ast.parse(FIVE_CODE_LINES).body[0], FIVE_CODE_LINES.splitlines()) == 5


def test_the_import_table_has_no_cycle() -> None:
    graph: dict[str, set[str]] = {unit: allowed for unit, allowed in MAY_IMPORT.items() if EVERYTHING not in allowed}
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


def test_few_modules_are_loose_beside_the_folders() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_a_method_takes_few_arguments_that_are_written_down() -> None:
    """Where `help`, editors and type checkers see them."""
    import fisher_optax

    methods = {name: inspect.signature(getattr(fisher_optax, name)) for name in fisher_optax.STATIC_ARGS}
    assert len(methods) == 27
    for name, signature in methods.items():
        kinds = {p.kind for p in signature.parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, name
        assert len(signature.parameters) <= ARGUMENTS, name
    for path in PACKAGE.rglob("*.py"):
        assert "locals()" not in path.read_text(encoding="utf-8"), path


def test_the_page_on_architecture_knows_every_part() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [row for row in MAY_IMPORT if row != "__init__" and row.rpartition(".")[2] not in page]


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


def test_benchmarks_stay_small() -> None:
    files = (ROOT / "benchmarks").rglob("*.py")
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= BENCHMARK_LINES


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns


def names(tree: ast.AST) -> Iterator[str]:
    """Of arguments, variables, functions and classes, where they are made."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def test_annotations_and_names_say_what_a_thing_is() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    types = [ast.unparse(x) for tree in trees for x in annotations(tree)]
    assert sum(re.search(r"\bAny\b", x) is not None for x in types) <= MOST_ANY * len(types)
    named = [name for tree in trees for name in names(tree)]
    pointing = collections.Counter(name for name in named if name in POINTING)
    assert pointing.total() <= MOST_POINTING * len(named), pointing


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
