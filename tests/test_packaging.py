"""What is shipped and what the README, the changelog and CI say of it are the same thing."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def readme_test_command() -> str:
    """The one line in the README's code blocks that runs pytest."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    (command,) = (line.strip() for block in blocks for line in block.splitlines() if re.search(r"\bpytest\b", line))
    return command


def test_ci_runs_the_readmes_test_command() -> None:
    assert readme_test_command() in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_ci_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_version_is_the_changelogs_first_and_the_citations() -> None:
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", CHANGELOG, flags=re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    in_bibtex = re.search(r"version = \{(.*)\}", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert cited is not None
    assert in_bibtex is not None
    assert {versions[0], cited[1], in_bibtex[1]} == {PROJECT["version"]}


def test_a_bullet_of_the_changelog_has_at_most_twenty_words() -> None:
    bullets = re.findall(r"^- (.*(?:\n  .*)*)", CHANGELOG, flags=re.MULTILINE)
    assert len(bullets) > 10
    assert [bullet for bullet in bullets if len(bullet.split()) > 20] == []


def test_linters_are_pinned_to_one_version() -> None:
    """In every extra that has one, and in the hooks that run before a commit."""
    extras = PROJECT["optional-dependencies"]
    hooks = re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    ruffs = [requirement for extra in extras.values() for requirement in extra if requirement.startswith("ruff")]
    assert len({*ruffs, *hooks}) == 1
    assert "==" in ruffs[0]
    assert all("==" in x for x in (*extras["docs"], *extras["dev"]) if re.match("pyright|ruff|mkdocs", x))


def test_the_oldest_versions_in_ci_are_the_lower_bounds() -> None:
    """``>=0.10`` is tested as ``==0.10.0``."""
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / ".github" / "oldest.txt").read_text(), flags=re.MULTILINE))
    bounded = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["flax"]]
    for name, bound in re.findall(r"([\w-]+)>=(\S+)", "\n".join(bounded)):
        assert tested[name] == ".".join([*bound.split("."), "0", "0"][:3])


def test_ci_tests_every_python_of_the_classifiers() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (matrix,) = re.findall(r"python: \[(.*)\]", workflow)
    pythons = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert re.findall(r'"(.*?)"', matrix) == pythons


def test_the_package_ships_its_types() -> None:
    import fisher_optax

    assert (Path(fisher_optax.__file__).parent / "py.typed").is_file()


def test_the_oldest_python_is_the_first_classifier() -> None:
    """``requires-python``, the classifiers, ruff's and pyright's target name one version."""
    pythons = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    pyright = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    assert pyright["pythonVersion"] == pythons[0]


# Files that need more than the package does, loaded when they are used: the extra, and what it installs.
OPTIONAL = {"states/train_state.py": ("flax", "flax"), "fisher/plots.py": ("plots", "matplotlib")}


def third_party(paths: Iterable[Path]) -> set[str]:
    """The modules that these files import, without Python's own and ours."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"fisher_optax"}


def required(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}


def test_dependencies_are_what_the_package_imports() -> None:
    """Every third-party module the package imports is declared, and nothing else is; Flax and matplotlib are extras."""
    paths, own = set((ROOT / "fisher_optax").rglob("*.py")), required(PROJECT["dependencies"])
    apart = {ROOT / "fisher_optax" / name: extra for name, extra in OPTIONAL.items()}
    assert third_party(paths - apart.keys()) == own
    for path, (extra, package) in apart.items():
        assert third_party([path]) - own == required(PROJECT["optional-dependencies"][extra]) == {package}


def test_the_package_is_imported_without_flax_and_matplotlib() -> None:
    """Only what needs them asks for them."""
    program = "import sys, fisher_optax; sys.exit('flax' in sys.modules or 'matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
