"""The main example begun from another run: with its parameters and its symbols, its model and nothing else of it."""

import argparse
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import text, train_gpt, trained_gpt
from experiments.gpt_config import Config
from tests.experiments.experiment_runs import assert_same_run, flags, interrupt, metrics, refusal, small_gpt

SHORT: dict[str, Any] = dict(steps=6, eval_every=3, eval_batches=2, batch=4, optimizer="adamw", lr=1e-3)
fail = functools.partial(refusal, train_gpt.main)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 40 symbols of its own and one that rare characters share."""
    return small_gpt(tmp_path_factory.mktemp("start"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Another text than the start's, with characters that it has no symbol for."""
    path = tmp_path / "other.txt"
    path.write_text("~¬" + Path(argparse.__file__).read_text(encoding="utf-8")[30_000:40_000], encoding="utf-8")
    return path


def negative_log_likelihood(trained: trained_gpt.Trained, windows: np.ndarray) -> float:
    """Nats per character, by NumPy from the model's logits."""
    logits = np.asarray(jax.jit(trained.model.apply)({"params": trained.params}, windows[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float(np.take_along_axis(log_p, windows[:, 1:, None], -1).mean())


def test_it_begins_at_the_loss_of_the_start_and_goes_on_bitwise_after_a_kill(
    tmp_path: Path, start: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(**SHORT, data=data, start=start)
    train_gpt.main([*arguments, f"--out={tmp_path / 'whole'}"])
    trained, characters = trained_gpt.load_start(start)
    tokens, unknown = text.tokens_of(data.read_text(encoding="utf-8"), characters)
    assert f"{unknown:,} characters have none of their own" in capsys.readouterr().out
    held_out = tokens[len(tokens) * 9 // 10 :]
    first = np.linspace(0, len(held_out) - 17, 8).astype(int)
    wanted = negative_log_likelihood(trained, held_out[first[:, None] + np.arange(17)])
    rows = metrics(tmp_path / "whole")
    assert rows[0]["val_loss"] == pytest.approx(wanted, rel=1e-5)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]

    saved = json.loads((tmp_path / "whole" / "config.json").read_text())
    digest = trained_gpt.digest(*jax.tree.leaves(trained.params))
    assert (saved["start"], saved["start_sha256"], saved["layers"], saved["vocab"]) == (str(start), digest, 1, 40)

    interrupt(train_gpt.main, [*arguments, f"--out={tmp_path / 'parts'}"], 6, monkeypatch)
    train_gpt.main(["--resume", f"--out={tmp_path / 'parts'}"])
    assert_same_run(tmp_path / "parts", tmp_path / "whole")

    # What was started can be started from, without the text that its symbols come from.
    again, symbols = trained_gpt.load_start(tmp_path / "whole")
    assert (again.step, symbols) == (6, characters)
    settings, saved = trained_gpt.read_settings(tmp_path / "whole")
    assert trained_gpt.corpus_of(tmp_path / "whole", settings, saved).characters == characters


def test_another_start_is_refused(tmp_path: Path, start: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, out = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(start, copy)
    train_gpt.main(flags(**{**SHORT, "steps": 2}, data=data, start=copy, out=out))
    assert f"start is '{copy}' there and '{start}' here" in fail(capsys, "--resume", *flags(out=out, start=start))
    shutil.rmtree(copy)
    train_gpt.main(flags(**SHORT, data=data, start=start, out=copy))
    assert "start_sha256 is" in fail(capsys, "--resume", *flags(out=out))


def test_what_contradicts_the_start_is_named(
    tmp_path: Path, start: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = flags(**SHORT, data=data, start=start, out=out)
    for option, value, there in (("layers", 2, 1), ("vocab", 96, 40), ("head", "own", "tied")):
        message = fail(capsys, *arguments, f"--{option}={value}")
        assert f"--{option} must be {there}, as in '{start}', or left out, not {value}" in message
    assert f"no run in '{tmp_path / 'none'}'" in fail(capsys, *arguments, f"--start={tmp_path / 'none'}")
    assert not out.exists()
    config = (start / "config.json").read_bytes()
    assert "--start must be another run than --out" in fail(capsys, *arguments, f"--out={start}", "--overwrite")
    assert (start / "config.json").read_bytes() == config
    with pytest.raises(ValueError, match="--layers must be 1, as in"):
        train_gpt.train(Config(start=str(start), context=16, width=16, heads=2, vocab=40, layers=4))


def test_parameters_in_memory_are_begun_with_and_kept(start: Path, data: Path) -> None:
    trained, characters = trained_gpt.load_start(start)
    before = trained_gpt.digest(*jax.tree.leaves(trained.params))
    config = Config(**SHORT, data=str(data), layers=1, width=16, heads=2, context=16, vocab=40)
    corpus = text.load_corpus(str(data), 40, 16, characters)
    losses = [[row["val_loss"] for row in train_gpt.train(config, corpus, start=trained.params)] for _ in range(2)]
    named = train_gpt.train(Config(**{**vars(config), "start": str(start)}))
    assert losses[0] == losses[1] == [row["val_loss"] for row in named]
    assert trained_gpt.digest(*jax.tree.leaves(trained.params)) == before
    with pytest.raises(ValueError, match="start= came without corpus="):
        train_gpt.train(config, start=trained.params)
    other = text.load_corpus(str(data), 20, 16)
    with pytest.raises(ValueError, match=r"\['embed'\]\['embedding'\] has the shape \(41, 16\) there and \(21, 16\)"):
        train_gpt.train(config, other, start=trained.params)
