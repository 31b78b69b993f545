"""The main example from command line to files: it learns, survives a kill bitwise, and says what is wrong."""

import argparse
import dataclasses
import doctest
import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import optax
import pytest

from experiments import run_folder, train_gpt
from experiments.gpt_config import Config
from experiments.optimizers import METHODS, Method
from tests.experiments.experiment_runs import (
    ENVIRONMENT,
    assert_same_run,
    flags,
    interrupt,
    last_checkpoint,
    metrics,
    refusal,
)

SCRIPT = train_gpt.__name__
TINY = dict(layers=1, width=32, heads=2, context=16, batch=4, eval_batches=4, steps=20, eval_every=5)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A real text of 30,000 characters."""
    path = tmp_path / "text.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    return path


fail = functools.partial(refusal, train_gpt.main)


def same_run(out: Path, reference: Path) -> None:
    assert_same_run(out, reference)
    assert (out / "sample.txt").read_text() == (reference / "sample.txt").read_text()


def test_the_script_runs_end_to_end(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", SCRIPT, *flags(**TINY, data=data, optimizer="soap", out=out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20]
    assert [row["tokens"] for row in rows] == [64 * row["step"] for row in rows]
    assert rows[0]["train_loss"] == pytest.approx(np.log(66), abs=0.5)  # of a uniform guess among its symbols
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.3
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    assert sorted(row["seconds"] for row in rows) == [row["seconds"] for row in rows]
    sample = (out / "sample.txt").read_text(encoding="utf-8")
    assert len(sample) == train_gpt.SAMPLE_CHARACTERS
    assert sample in done.stdout
    assert json.loads((out / "config.json").read_text())["lr"] == METHODS["soap"].learning_rate
    assert last_checkpoint(out)[0] == 20
    assert "20/20" in done.stderr
    assert "tokens/s" in done.stderr
    picture = matplotlib.image.imread(out / "loss.png")
    assert picture.shape[:2] == (675, 1050)
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50  # two curves, grid, text


# AdamW is in the next test; the states of the others are made of the same parts.
@pytest.mark.parametrize("optimizer", ("soap", "kfac"))
def test_an_interrupted_run_goes_on_bitwise_as_if_it_had_not_been(
    tmp_path: Path, data: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flags(**{**TINY, "eval_every": 7}, data=data, optimizer=optimizer)
    train_gpt.main([*arguments, f"--out={tmp_path / 'whole'}"])

    compiled = train_gpt.advance._cache_size()
    interrupt(train_gpt.main, [*arguments, f"--out={tmp_path / 'parts'}"], 14, monkeypatch)
    assert [row["step"] for row in metrics(tmp_path / "parts")] == [0, 7, 14]
    assert last_checkpoint(tmp_path / "parts")[0] == 7
    train_gpt.main(["--resume", f"--out={tmp_path / 'parts'}"])
    same_run(tmp_path / "parts", tmp_path / "whole")
    assert train_gpt.advance._cache_size() == compiled  # which another program would round in another way


def test_a_killed_run_goes_on_bitwise_as_if_it_had_not_been(tmp_path: Path, data: Path) -> None:
    arguments = flags(**{**TINY, "steps": 300, "eval_every": 15}, data=data, optimizer="adamw", dropout=0.1)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", SCRIPT, *arguments, f"--out={out}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 300
        while not ((out / "metrics.jsonl").exists() and metrics(out)[-1:] and metrics(out)[-1]["step"] >= 30):
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert last_checkpoint(out)[0] < 300
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5')  # what a kill in the middle of a line leaves
    train_gpt.main(["--resume", f"--out={out}"])
    train_gpt.main([*arguments, f"--out={tmp_path / 'whole'}"])
    same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("optimizer", [name for name, row in METHODS.items() if row.statistics])
def test_a_method_of_layers_statistics_lowers_the_loss(data: Path, optimizer: str) -> None:
    """In few steps, with the row's own rate and damping: what it asks of the layers is what it takes."""
    head = "own" if METHODS[optimizer].own_head else "tied"
    steps = {**TINY, "steps": 4, "warmup": 1, "eval_every": 4}
    config = Config(**steps, data=str(data), optimizer=optimizer, head=head)
    before, after = train_gpt.train(config)
    assert after["train_loss"] < before["train_loss"]


def test_the_rate_warms_up_and_falls_to_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[optax.Schedule] = []

    def build(schedule: optax.Schedule, settings: object) -> optax.GradientTransformation:
        asked.append(schedule)
        return optax.sgd(schedule)

    monkeypatch.setitem(METHODS, "probe", Method(build, 3e-3))
    config = Config(optimizer="probe", steps=100, warmup=10, width=384, heads=6).resolve()
    assert config.lr == pytest.approx(1e-3)
    train_gpt.make_optimizer(config, config.lr)
    rates = np.array([asked[0](step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 1e-4 * np.arange(1, 11), rtol=1e-5)
    assert np.all(np.diff(rates[9:]) < 0)
    assert rates[-1] == pytest.approx(1e-4)


def test_many_rates_and_seeds_compile_the_step_once(data: Path) -> None:
    config = Config(**TINY, data=str(data), optimizer="adamw", refresh=7)  # the only test with this refresh
    compiled_before = train_gpt.advance._cache_size()
    losses = set()
    for seed, lr in ((0, 1e-3), (0, 3e-3), (1, 3e-3)):
        losses.add(train_gpt.train(dataclasses.replace(config, seed=seed, lr=lr))[-1]["val_loss"])
    assert len(losses) == 3
    assert train_gpt.advance._cache_size() == compiled_before + 1


def test_a_diverging_run_stops_with_a_message(tmp_path: Path, data: Path) -> None:
    with pytest.raises(SystemExit, match=r"^stopped: the loss is nan .* smaller --lr"):
        train_gpt.main(flags(**TINY, data=data, optimizer="adamw", lr=1e30, out=tmp_path / "run"))
    assert all(np.isfinite(row["val_loss"]) for row in metrics(tmp_path / "run"))


def test_the_docstring_experiment_runs() -> None:
    result = doctest.testmod(train_gpt)
    assert result.attempted > 0
    assert result.failed == 0


# --- what can be wrong with a command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"optimizer": "sgd"}, f"unknown optimizer 'sgd': choose from {', '.join(METHODS)}"),
        ({"preset": "gpu"}, "invalid choice: 'gpu'"),
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"eval_every": -5}, "--eval-every must be at least 1, not -5"),
        ({"width": 30, "heads": 4}, "--heads must be a divisor of --width 30, not 4"),
        ({"steps": 5, "warmup": 5}, "--warmup must be at least 0 and less than --steps 5, not 5"),
        ({"lr": "nan"}, "--lr must be a positive number, not nan"),
        ({"lr": 0}, "--lr must be a positive number, not 0.0"),
        ({"weight_decay": -1}, "--weight-decay must be zero or a positive number, not -1.0"),
        ({"optimizer": "kfac", "damping": 0}, "--damping must be a positive number, not 0.0"),
        ({"damping": 0.1}, "--damping must be left out: soap has none, not 0.1"),
        ({"head": "none"}, "--head must be tied or own, not none"),
        ({"optimizer": "kfac_true_head"}, "--head must be own: kfac_true_head treats it apart, not tied"),
        ({"dropout": 1}, "--dropout must be at least 0 and less than 1, not 1.0"),
        ({"seed": -1}, "--seed must be at least 0 and less than 2^31, not -1"),
        ({"dtype": "float16"}, "--dtype must be float32 or bfloat16, not float16"),
        ({"steps": "many"}, "argument --steps: invalid int value: 'many'"),
        ({"data": "/nowhere/text"}, "no text at '/nowhere/text'. --data takes a file, a folder"),
    ),
    ids=lambda value: value if isinstance(value, str) else " ".join(flags(**value)),
)
def test_a_bad_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], message: str
) -> None:
    assert message in fail(capsys, *flags(**arguments, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    (
        (b"", r"has 0 characters, but its last tenth must hold a window of 16 .* so 170 are needed"),
        (b"abc" * 56, r"has 168 characters, but"),
        (b"caf\xe9" * 100, r"is not UTF-8 text: byte 3 is 0xe9"),
    ),
    ids=("empty", "short", "latin1"),
)
def test_a_bad_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    found = fail(capsys, *flags(data=path, context=16, out=tmp_path / "run"))
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)


def test_a_folder_without_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"no .txt, .md, .rst, .py file in '{tmp_path}'" in refusal(
        train_gpt.main, capsys, *flags(data=tmp_path, out=tmp_path / "run")
    )


def test_a_run_is_neither_lost_nor_mixed_with_another(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = flags(**TINY, data=data, optimizer="adamw", out=out)
    train_gpt.main(arguments)
    (out / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}

    assert "already holds a run" in fail(capsys, *arguments)
    message = fail(capsys, "--resume", *flags(out=out, optimizer="soap", lr=1e-3))
    assert "optimizer is 'adamw' there and 'soap' here; lr is 0.003 there and 0.001 here" in message
    assert "no run to resume" in fail(capsys, "--resume", f"--out={tmp_path}")
    assert "at least 1" in fail(capsys, *arguments, "--overwrite", "--batch=0")
    assert before == {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}

    data.write_text(data.read_text(encoding="utf-8") + "more", encoding="utf-8")
    assert "text_sha256 is" in fail(capsys, "--resume", f"--out={out}")
    train_gpt.main([*arguments, "--overwrite", "--seed=1"])
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "metrics.jsonl").read_bytes() != before["metrics.jsonl"]
    assert len(metrics(out)) == 5

    (out / "config.json").write_text("{")
    assert "config.json' is damaged" in fail(capsys, "--resume", f"--out={out}")


def test_a_finished_run_resumed_stays_as_it_is(tmp_path: Path, data: Path) -> None:
    config, corpus, run, _ = train_gpt.prepare(
        {**TINY, "data": str(data), "optimizer": "adamw"}, tmp_path / "run", resume=False, overwrite=False
    )
    rows = train_gpt.train(config, corpus, run)
    again = run_folder.RunFolder(tmp_path / "run", run_folder.read_config(tmp_path / "run"), resume=True)
    assert train_gpt.train(config, corpus, again) == rows == metrics(tmp_path / "run")
