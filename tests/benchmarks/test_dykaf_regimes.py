"""DyKAF's two regimes: what the measuring code makes of runs, and that its runs are those it says."""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import results
from benchmarks.training import dykaf_regimes
from experiments import fine_tuning, train_gpt, trained_gpt
from experiments.comparison import Runs, Task
from experiments.gpt_config import Config
from experiments.loop import Diverged
from experiments.text import Corpus, load_corpus
from tests.benchmarks.made_up_results import lookup

TINY: dict[str, Any] = dict(layers=1, width=16, heads=2, context=16, batch=4, steps=6, eval_every=3, eval_batches=2)
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


def options(folder: Path, **changed: Any) -> argparse.Namespace:
    command = "python -m benchmarks dykaf_regimes"
    given = {"runs": folder, "seeds": 3, "steps": 6, "start_steps": 6, "command": command}
    return argparse.Namespace(**{**given, **changed})


def made_up(path: Path, ends: dict[str, tuple[float, float, float]], rate: float = 0.1) -> Runs:
    """Runs that end, by seed, with these validation losses at ``rate`` and far higher at twice that."""
    corpus = Corpus("ab", np.zeros(9, np.int32), np.zeros(9, np.int32), "of the text")

    def train(config: Config, data: Any) -> list[dict[str, Any]]:
        loss = ends[config.optimizer][config.seed] if config.lr == rate else 3.5
        if loss == float("inf"):
            raise Diverged("the loss is nan")
        return [
            {"step": step, "train_loss": value - 0.5, "val_loss": value, "training_seconds": 1.0}
            for step, value in ((0, 4.0), (3, loss + 0.5), (6, loss))
        ]

    runs = Runs(path, Task(Config(steps=6), corpus, train, "val_loss", dict.fromkeys(ends, (rate, 2 * rate))))
    runs.make(range(3))
    return runs


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    """In pre-training rank one is clearly worse, in fine-tuning it is not clearly anything, and Muon diverges there."""
    soap = {"adamw": (2.5, 2.6, 2.7), "muon": (2.0, 2.1, 2.2), "soap": (2.0, 2.1, 2.2)}
    pretraining = {**soap, "dykaf": (1.9, 2.0, 2.11), "dykaf_rank1": (2.3, 2.4, 2.5)}
    finetuning = {**soap, "muon": (2.0, float("inf"), 2.0), "dykaf": (1.9, 2.2, 2.0), "dykaf_rank1": (1.8, 2.0, 2.1)}
    runs = {
        regime: made_up(tmp_path / f"{regime}.json", ends)
        for regime, ends in (("pre-training", pretraining), ("fine-tuning", finetuning))
    }
    found = dykaf_regimes.describe(runs, options(tmp_path))
    return results.read(results.write(found, tmp_path))


def test_the_tables_say_what_the_runs_say(found: dict[str, Any]) -> None:
    wanted = {
        "pre-training/dykaf/val_loss": 2.0,
        "pre-training/dykaf/val_loss/high": 2.11,
        "pre-training/dykaf/train_loss": 1.5,
        "pre-training/dykaf/rate": 0.1,
        "pre-training/dykaf/over_soap": -0.1,
        "pre-training/dykaf/over_soap/high": -0.09,
        "pre-training/dykaf/verdict": "lower",
        "pre-training/adamw/verdict": "higher",
        "pre-training/muon/verdict": "within the spread",
        "fine-tuning/muon/val_loss": "diverged",
        "fine-tuning/dykaf/verdict": "within the spread",
        "rank1/pre-training/full": 2.0,
        "rank1/pre-training/rank1": 2.4,
        "rank1/pre-training/gain": -0.4,
        "rank1/pre-training/verdict": "rank one is worse",
        "rank1/fine-tuning/gain": 0.1,
        "rank1/fine-tuning/gain/low": -0.1,
        "rank1/fine-tuning/verdict": "within the spread",
        "pre-training-grid/soap/0.1": 2.0,
        "pre-training-grid/soap/0.2": 3.5,
    }  # fmt: skip
    assert {path: lookup(found, path) for path in wanted} == wanted
    assert "over_soap" not in found["tables"]["pre-training"]["rows"]["soap"]


@pytest.mark.parametrize(
    ("differences", "said"),
    (
        ([-0.3, -0.2, -0.4], "below"),
        ([0.3, 0.2, 0.4], "above"),
        ([-0.1, -0.2, -0.4], "within the spread"),  # of one sign, and yet
        ([-0.1, 0.2], "within the spread"),
        ([0.0, 0.0, 0.0], "within the spread"),
        ([-0.3], None),
        ([], None),
    ),
)
def test_a_difference_counts_where_it_is_larger_than_its_spread(differences: list[float], said: str | None) -> None:
    assert dykaf_regimes.verdict(differences, "below", "above") == said


def test_the_picture_has_a_line_a_method(found: dict[str, Any]) -> None:
    figure = dykaf_regimes.draw(found)
    for axes in figure.axes:
        assert len(axes.lines) == len(fine_tuning.METHODS)
    lines = {str(line.get_label()).split(":")[0]: line for line in figure.axes[0].lines}
    assert set(lines) == {"AdamW", "Muon", "SOAP", "DyKAF", "DyKAF, rank-one second moment"}
    np.testing.assert_allclose(np.asarray(lines["DyKAF"].get_ydata()), [4.0, 2.5, 2.0])
    figure.canvas.draw()


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bool]]:
    """Tiny regimes on two texts, whatever the method trained by AdamW; the optimizer, the seed and whether there is a
    start, a run.
    """
    for name, content in (("own.txt", TEXT[:20_000]), ("new.txt", TEXT[20_000:40_000] + "~¬")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.setattr(fine_tuning, "START", Config(**TINY, data=str(tmp_path / "own.txt"), optimizer="adamw"))
    monkeypatch.setattr(fine_tuning, "BASE", Config(**TINY, data=str(tmp_path / "new.txt")))
    monkeypatch.setattr(fine_tuning, "RATES", dict.fromkeys(fine_tuning.RATES, (1e-3, 4e-3)))
    runs, train = [], train_gpt.train

    def by_adamw(config: Config, *args: Any, **options: Any) -> list[dict[str, Any]]:
        runs.append((config.optimizer, config.seed, "start" in options))
        return train(dataclasses.replace(config, optimizer="adamw"), *args, **options)

    monkeypatch.setattr(train_gpt, "train", by_adamw)
    return runs


def test_both_regimes_are_measured_and_only_fine_tuning_has_a_start(
    tmp_path: Path, asked: list[tuple[str, int, bool]]
) -> None:
    given = options(tmp_path / "runs", seeds=2)
    (found,) = dykaf_regimes.measure(given)
    results.check(found, "here")
    first, *runs = asked
    assert first == ("adamw", 0, False)
    per_regime = [(name, 0) for name in fine_tuning.METHODS for _ in range(2)]
    per_regime += [(name, 1) for name in fine_tuning.METHODS]
    assert runs == [(*run, start) for start in (False, True) for run in per_regime]

    trained, characters = trained_gpt.load_start(tmp_path / "runs" / "dykaf_start")
    corpus = load_corpus(fine_tuning.BASE.data, 96, 16, characters)
    windows = train_gpt.evenly_spaced_windows(corpus.validation, fine_tuning.BASE)
    start = float(train_gpt.evaluate(trained.model, trained.params, windows))
    firsts = {regime: of["adamw"]["curves"]["val_loss"][0][0] for regime, of in found["details"]["curves"].items()}
    assert firsts["fine-tuning"] == start
    assert abs(firsts["pre-training"] - start) > 0.01

    kept = json.loads((tmp_path / "runs" / "dykaf_finetuning.json").read_text())
    ends = [run["rows"][-1]["val_loss"] for run in kept["runs"] if run["method"] == "soap"]
    best = min((0, 1), key=lambda i: ends[i])
    assert lookup(found, "fine-tuning/soap/rate") == (1e-3, 4e-3)[best]
    assert lookup(found, "fine-tuning/soap/val_loss") == statistics.median([ends[best], ends[2]])

    asked.clear()
    (again,) = dykaf_regimes.measure(given)  # nothing is made twice
    assert asked == [("adamw", 0, False)]
    assert again["tables"] == found["tables"]


def test_another_start_or_another_text_is_not_mixed_in(tmp_path: Path, asked: list[Any]) -> None:
    base = fine_tuning.BASE
    _, given = fine_tuning.make_start(tmp_path / "a", 6, base)
    _, other = fine_tuning.make_start(tmp_path / "b", 3, base)
    path = tmp_path / "runs.json"
    task = Task(base, given, fine_tuning.fine_tune, "val_loss", {"adamw": (1e-3,)})
    Runs(path, task).make((0,))
    with pytest.raises(ValueError, match="another setting or on other data"):
        Runs(path, task._replace(data=other))
