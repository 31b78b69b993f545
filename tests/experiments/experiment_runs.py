"""What the tests of the experiments share: command lines, runs that are cut off, what a run has left in its folder."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import train_gpt

ROOT = Path(__file__).parents[2]
# A program that a test starts finds this checkout first, whatever folder it is started in.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

SMALL_GPT: dict[str, Any] = dict(
    layers=1, width=16, heads=2, context=16, batch=4, eval_batches=2, steps=40, eval_every=40, vocab=40,
    optimizer="adamw",
)  # fmt: skip

Main = Callable[[list[str]], None]  # of a script


def flags(**options: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def small_gpt(folder: Path) -> Path:
    """A GPT's run on 20,000 characters of real text, with 40 symbols: rare ones share the last."""
    (folder / "text.txt").write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    train_gpt.main(flags(**SMALL_GPT, data=folder / "text.txt", out=folder / "run"))
    return folder / "run"


def metrics(out: Path) -> list[dict[str, Any]]:
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def last_checkpoint(out: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Step and leaves by path of what the run saved last, read without any of the experiment's code."""
    manager = ocp.CheckpointManager((out / "checkpoints").absolute())
    step = manager.latest_step()
    leaves = jax.tree_util.tree_leaves_with_path(manager.restore(step, args=ocp.args.StandardRestore()))

    def as_numbers(leaf: jax.Array) -> np.ndarray:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return step, {jax.tree_util.keystr(path): as_numbers(leaf) for path, leaf in leaves}


def assert_same_run(out: Path, reference: Path) -> None:
    """The same numbers, bit for bit, in the last checkpoint and in all evaluations."""
    (step, ours), (wanted_step, wanted) = last_checkpoint(out), last_checkpoint(reference)
    assert step == wanted_step
    assert ours.keys() == wanted.keys()
    assert [name for name in ours if not np.array_equal(ours[name], wanted[name])] == []
    assert without_seconds(metrics(out)) == without_seconds(metrics(reference))


def interrupt(main: Main, arguments: list[str], step: int, patching: pytest.MonkeyPatch) -> None:
    """A run stopped after the line of that step is written and before its checkpoint is: the worst moment."""
    save = ocp.CheckpointManager.save

    def save_until(self: ocp.CheckpointManager, reached: int, **kwargs: Any) -> bool:
        if reached == step:
            raise KeyboardInterrupt
        return save(self, reached, **kwargs)

    with patching.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", save_until)
        with pytest.raises(SystemExit, match="go on with --resume"):
            main(arguments)


def refusal(main: Main, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
