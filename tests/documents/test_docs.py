"""The pages of the site tell the truth: their blocks run, their defaults hold, and no public name is missing."""

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fisher_optax as fo
from fisher_optax.fisher.operators import approximations

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
# A block of Python runs; `py` marks what is shown alone, as files that are tested by themselves.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
INCLUDED = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)
METHODS = sorted({name for name in PAGES if name.startswith("methods/")} - {"methods/index.md", "methods/parts.md"})
DEFAULTS = re.compile(r"^\| `fo\.(\w+)` \| default \| why \|\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)
API = re.compile(r"^::: fisher_optax\.(\S+)$", re.MULTILINE)


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if BLOCK.search(text)])
def test_every_block_runs_and_prints_what_the_page_says(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, as one program. A method that a page adds is not there for other tests."""
    monkeypatch.setattr(approximations, "METHODS", dict(approximations.METHODS))
    names: dict[str, Any] = {}
    for code, printed in BLOCK.findall(PAGES[name]):
        exec(compile(code, name, "exec"), names)
        assert capsys.readouterr().out == printed, code


def test_every_page_is_in_the_navigation_and_every_entry_a_page() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    entries = re.findall(r"(\S+\.md)$", site.split("\nnav:\n")[1], re.MULTILINE)
    assert sorted(entries) == sorted(PAGES)


def test_included_files_exist() -> None:
    included = {file for text in PAGES.values() for file in INCLUDED.findall(text)}
    assert {file for file in included if not (ROOT / file).is_file()} == set()


def test_every_example_has_a_page() -> None:
    """But for the main job, which README's first command runs, and its model."""
    included = {file for text in PAGES.values() for file in INCLUDED.findall(text)}
    there = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    assert there - included <= {"examples/train_gpt.py", "examples/gpt.py"}


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_page_has_its_parts(name: str) -> None:
    """The rule, a small picture of what it does, use, defaults, cost and source, in this order."""
    text = PAGES[name]
    parts = ["Rule", "What it does", "Use", "Defaults", "Cost", "Source"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == parts
    (picture,) = re.findall(r"!\[[^\]]+\]\(\.\./(pictures/\w+\.png)\)", text)
    assert 10_000 < (DOCS / picture).stat().st_size < 100_000


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_page_has_the_defaults_of_the_signature(name: str) -> None:
    ((method, rows),) = DEFAULTS.findall(PAGES[name])
    parameters = inspect.signature(getattr(fo, method)).parameters
    shown = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", rows, re.MULTILINE)
    assert len(shown) == rows.count("\n") > 3
    assert {argument: default for argument, default in shown if default != repr(parameters[argument].default)} == {}


def exported(module: ModuleType) -> set[str]:
    """The names of one of the package's modules that are meant for users."""
    if hasattr(module, "__all__"):
        return {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    if module.__file__ and module.__file__.endswith("__init__.py"):
        source = Path(module.__file__).read_text(encoding="utf-8")
        return set(re.findall(r"^from \S+ import (\w+) as \1$", source, re.MULTILINE))
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    public = {name for name in own if inspect.isfunction(getattr(module, name)) and not name.startswith("_")}
    # What losses share is public to other modules alone: it has no example.
    return {name for name in public if module is not fo.losses or "Example" in (getattr(module, name).__doc__ or "")}


def test_the_reference_has_every_public_name() -> None:
    """Each once, and none that there is not."""
    there = [name for text in PAGES.values() for name in API.findall(text)]
    assert sorted(set(there)) == sorted(there)
    modules = {"": fo, "fisher.": fo.fisher, "compression.": fo.compression, "linalg.": fo.linalg}
    modules |= {"fisher.geometry.": fo.fisher.geometry, "fisher.plots.": fo.fisher.plots, "losses.": fo.losses}
    modules |= {f"{part}.": getattr(fo, part) for part in ("factors", "decompositions", "applications")}
    wanted = {prefix + name for prefix, module in modules.items() for name in exported(module)}
    # Muon's polynomials and the application of SOAP are exported twice; Flax's class is imported when asked for.
    wanted -= {"linalg.jordan", "linalg.polar_express", "linalg.you"}
    assert set(there) == wanted | {"states.train_state.TrainState"}


def test_the_first_run_is_the_readmes() -> None:
    """One program on both pages, with one output."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert BLOCK.findall(readme)[0] == BLOCK.findall(PAGES["index.md"])[0]
