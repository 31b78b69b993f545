"""Every example, copied alone into an empty folder beside the installed package, prints what its docstring shows."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
FILES = sorted(FOLDER.glob("*.py"))
BY_ITSELF = [path.stem for path in FILES if path.stem not in ("gpt", "train_gpt")]
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?%?")
# How far shares and losses may be from those shown: another BLAS rounds in another way, and training magnifies that, in
# what pruning has all but destroyed most of all. `CLAIMS` are what an example is for, and have bounds of their own.
POINTS, POINTS_PRUNED, FACTOR = 10, 20, 3.0
# Nothing of how tests compile: an example runs as its reader runs it.
OURS = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "PYTHONPATH")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which the package can be imported, and nothing else of the repository."""
    site = tmp_path_factory.mktemp("site")
    (site / "fisher_optax").symlink_to(ROOT / "fisher_optax")
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return {**kept, "PYTHONPATH": str(site)}


def shown(name: str) -> list[str]:
    """The output in an example's docstring: what is indented after the command."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
    lines = [line[4:].rstrip() for line in text.splitlines() if line.startswith("    ")]
    return lines[1:]


def numbers(line: str) -> list[float]:
    return [float(found.strip("%").replace(",", "")) for found in NUMBER.findall(line)]


def of(printed: list[str], *words: str) -> list[float]:
    """The numbers after ``words`` in the one line that begins with them."""
    start = re.compile(r"\s+".join(map(re.escape, words)) + r"(?!\w)")
    (line,) = (line[match.end() :] for line in printed if (match := start.match(line)))
    return numbers(line)


def soap_is_ahead(printed: list[str]) -> bool:
    return of(printed, "soap:")[0] < 0.5 * of(printed, "adamw:")[0]


def nine_directions_hold_most(printed: list[str]) -> bool:
    return all(numbers(line)[-1] > 50 for line in printed)


def correcting_is_better_and_nothing_revives(printed: list[str]) -> bool:
    magnitude, sparsegpt, obs = (of(printed[2:-1], name)[1] for name in ("magnitude", "sparsegpt", "obs"))
    zeros, gone = numbers(printed[-1])[-3:-1]
    return magnitude < sparsegpt <= obs + 1 and zeros == gone > 0


def fishers_are_better_than_the_average(printed: list[str]) -> bool:
    return of(printed, "Fisher-weighted")[-1] > of(printed, "average")[-1] > of(printed, "base")[-1]


def eight_devices_do_as_one(printed: list[str]) -> bool:
    alone, shared = re.findall(r"\d+\.\d+", printed[-1])
    whole, first = of(printed, "SOAP's", "state:")
    return abs(float(alone) - float(shared)) < 1e-3 * float(alone) and abs(first - whole / 8) < 0.01


def it_learns(printed: list[str]) -> bool:
    return numbers(printed[-1])[-1] > 92


CLAIMS: dict[str, Callable[[list[str]], bool]] = {
    "soap_mlp": soap_is_ahead,
    "muon_nnx": it_learns,
    "kfac_cnn": it_learns,
    "kfac_nnx": it_learns,
    "fisher_spectrum": nine_directions_hold_most,
    "prune": correcting_is_better_and_nothing_revives,
    "merge": fishers_are_better_than_the_average,
    "sharded": eight_devices_do_as_one,
}


def assert_alike(printed: str, told: str, points: int) -> None:
    """The same words, equal whole numbers, and measured ones that are near."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", told).split()
    for found, wanted in zip(NUMBER.findall(printed), NUMBER.findall(told), strict=True):
        (x,), (y,) = numbers(found), numbers(wanted)
        if wanted.endswith("%"):
            assert abs(x - y) <= points, printed
        elif "." in wanted:
            assert y / FACTOR <= x <= y * FACTOR, printed
        else:
            assert x == y, printed


@pytest.mark.parametrize("name", BY_ITSELF)
def test_it_prints_what_its_docstring_shows(name: str, tmp_path: Path, environment: dict[str, str]) -> None:
    """Without a word on stderr, so without a warning."""
    shutil.copy(FOLDER / f"{name}.py", tmp_path)
    program = [sys.executable, "-P", f"{name}.py"]
    run = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert (run.returncode, run.stderr) == (0, "")
    printed, told = run.stdout.splitlines(), shown(name)
    assert len(printed) == len(told)
    for lines in zip(printed, told, strict=True):
        assert_alike(*lines, POINTS_PRUNED if name == "prune" else POINTS)
    assert CLAIMS[name](printed), run.stdout
    if name == "fisher_spectrum":
        assert (tmp_path / "fisher_spectrum.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """Starts `train_gpt.py`, alone with its model."""
    folder = tmp_path_factory.mktemp("gpt")
    for name in ("gpt.py", "train_gpt.py"):
        shutil.copy(FOLDER / name, folder)

    def start(*arguments: str) -> subprocess.Popen[str]:
        program = [sys.executable, *(arguments or ("-c", "pass"))]
        pipe = subprocess.PIPE
        return subprocess.Popen(program, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def arrays(out: Path, step: int) -> list[np.ndarray]:
    with ocp.CheckpointManager(out / "checkpoints") as checkpoints:
        return [np.asarray(x) for x in jax.tree.leaves(checkpoints.restore(step, args=ocp.args.StandardRestore()))]


# Few steps between evaluations, so that a short run has a checkpoint in its middle.
SHORT = "import train_gpt; train_gpt.EVERY = 20; train_gpt.main()"
STEPS, LOSS = 40, (2.35, 2.65)  # from 4.6 before the first


def test_a_gpt_that_is_killed_and_resumed_ends_as_if_it_had_not_been(
    tmp_path: Path, gpt: Callable[..., subprocess.Popen[str]]
) -> None:
    """And learns, draws its losses, and refuses a folder that is in use."""
    options = ["-c", SHORT, "--optimizer", "muon", "--steps", str(STEPS), "--out"]
    status, whole, err = ended(gpt(*options, str(tmp_path / "whole")))
    assert status == 0, err
    value = float(whole.splitlines()[-1].partition("validation loss ")[2].partition(";")[0])
    assert LOSS[0] < value < LOSS[1]
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 10_000

    killed = gpt(*options, str(tmp_path / "killed"))
    while not (tmp_path / "killed" / "checkpoints" / "20").exists():
        assert killed.poll() is None, ended(killed)
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    assert ended(killed)[0] == -signal.SIGKILL
    status, _, err = ended(gpt(*options, str(tmp_path / "killed")))
    assert status == 1
    assert "is not empty. Go on with its run by --resume" in err
    status, resumed, err = ended(gpt(*options, str(tmp_path / "killed"), "--resume"))
    assert status == 0, err
    assert resumed.splitlines()[1:-1] == whole.splitlines()[1:-1]
    for ours, wanted in zip(*(arrays(tmp_path / name, STEPS) for name in ("killed", "whole")), strict=True):
        assert np.array_equal(ours, wanted)


REFUSED = [
    (("--steps", "150"), 2, "--steps must be a multiple of 100, not 150"),
    (("--resume",), 1, "it holds no run"),
    (("--text", "nowhere.txt"), 1, "cannot read the text"),
    (("--text", "gpt.py"), 1, "Give one of 10,000 or more by --text FILE"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), REFUSED)
def test_a_gpt_says_what_is_wrong_before_it_makes_a_folder(
    arguments: tuple[str, ...], status: int, message: str, tmp_path: Path, gpt: Callable[..., subprocess.Popen[str]]
) -> None:
    code, _, err = ended(gpt("train_gpt.py", "--out", str(tmp_path / "run"), *arguments))
    assert code == status
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


EVERY_OPTIMIZER = """
import jax, jax.numpy as jnp, train_gpt
params = {"block": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
for name, (make, rate, options) in train_gpt.OPTIMIZERS.items():
    jax.eval_shape(make(rate, **options).init, params)
    print(name)
"""


def test_every_optimizer_of_the_gpt_can_be_made(gpt: Callable[..., subprocess.Popen[str]]) -> None:
    code, out, err = ended(gpt("-c", EVERY_OPTIMIZER))
    assert code == 0, err
    assert len(out.split()) >= 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_short_and_needs_nothing_else_of_ours(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {n.name for x in nodes if isinstance(x, ast.Import) for n in x.names}
    names |= {x.module or "." for x in nodes if isinstance(x, ast.ImportFrom)}
    others = {"examples", "experiments", "benchmarks", "tests", "sys.path", *(p.stem for p in FILES)}
    assert {name.partition(".")[0] for name in names} & others <= ({"gpt"} if path.stem == "train_gpt" else set())
    assert "sys.path" not in source


def test_the_table_lists_every_example() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", table, re.M)) == {path.stem for path in FILES} - {"gpt"}
