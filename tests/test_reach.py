"""How many files somebody meets who reads a method from its public function to the end."""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fisher_optax"
Definition = tuple[str, str]  # module, name


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_of(path): path for path in PACKAGE.rglob("*.py")}


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


@functools.cache
def definitions(module: str) -> dict[str, ast.stmt]:
    """What stands at the top of a file, by name."""
    found: dict[str, ast.stmt] = {}
    for node in tree_of(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


@functools.cache
def names_taken_in(package: str) -> set[str]:
    """What a package takes from its modules: a function hides the module of its name."""
    nodes = [node for node in tree_of(package).body if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.asname or alias.name for node in nodes for alias in node.names}


@functools.cache
def imports(module: str) -> dict[str, Definition]:
    """What a file imports of the package, by name: from which module, under which name ("" for the module itself)."""
    package = module.split(".") if PATHS[module].name == "__init__.py" else module.split(".")[:-1]
    found: dict[str, Definition] = {}
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, ast.ImportFrom):
            continue
        start = package[: len(package) + 1 - node.level] if node.level else []
        source = ".".join(start + (node.module.split(".") if node.module else []))
        for alias in node.names:
            inside = f"{source}.{alias.name}"
            if inside in PATHS and alias.name not in names_taken_in(source):
                found[alias.asname or alias.name] = (inside, "")
            elif source in PATHS:
                found[alias.asname or alias.name] = (source, alias.name)
    return found


def resolved(module: str, name: str) -> Definition | None:
    """Where ``name``, as a file has it, is defined."""
    while name not in definitions(module):
        if name not in imports(module):
            return None
        module, name = imports(module)[name]
        if not name:
            return module, ""
    return module, name


def reach(name: str) -> set[Definition]:
    """All that is named in a public function, in what that names, and so on."""
    todo, met = [resolved("fisher_optax", name)], set()
    while todo:
        definition = todo.pop()
        if definition is None or not definition[1] or definition in met:
            continue
        met.add(definition)
        module = definition[0]
        for node in ast.walk(definitions(module)[definition[1]]):
            if isinstance(node, ast.Name):
                todo.append(resolved(module, node.id))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                of_module = resolved(module, node.value.id)
                if of_module is not None and not of_module[1]:
                    todo.append(resolved(of_module[0], node.attr))
    return met


@pytest.mark.parametrize(("method", "most"), [("muon", 17), ("soap", 25), ("shampoo", 28), ("frog", 19), ("kfac", 34)])
def test_a_method_is_read_in_few_files(method: str, most: int) -> None:
    met = reach(method)
    files = sorted({module for module, _ in met})
    print(f"{method}: {len(met)} definitions in {len(files)} files: {', '.join(files)}")
    assert len(files) <= most


def test_the_walk_goes_through_packages_and_modules() -> None:
    assert ("fisher_optax.linalg.products", "times") in reach("soap")
    assert ("fisher_optax.preconditioner.factors.outer_product", "outer_product") in reach("soap")
