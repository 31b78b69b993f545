"""Runs of many methods: which are made, which are best, what is told of them, on losses that are known beforehand."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import results
from benchmarks.catalogue import options_of
from benchmarks.training import comparison, figure3, steps_to_target
from experiments import loop, optimizers, peers
from experiments.compare_report import entries
from experiments.comparison import Runs, Task, first_below
from experiments.loop import Diverged, Plan, Stopwatch, stops
from experiments.steps_to_target import register
from tests.benchmarks.made_up_results import lookup


@dataclasses.dataclass(frozen=True)
class Setting:
    optimizer: str = "adamw"
    lr: float | None = None
    seed: int = 0
    steps: int = 40
    layers: int = 4
    width: int = 128


class Data(NamedTuple):
    sha256: str


class Text(NamedTuple):
    sha256: str
    characters: str


# The final loss is 1 + (log2 of the rate over the best)² / 100 + the seed / 1000, more for AdamW; it falls by a line.
BEST = {"adamw": 4e-3, "muon": 8e-3, "soap": 8e-3, "kfac": 2e-3, "kfac_soap": 3.2e-2}
ENDS = {"adamw": 2.0, "muon": 1.0, "soap": 1.2, "kfac": 2.1, "kfac_soap": 1.1}
RATES = (2e-3, 4e-3, 8e-3)
START = 5.0


def final(method: str, rate: float, seed: int) -> float:
    return ENDS[method] + math.log2(rate / BEST[method]) ** 2 / 100 + seed / 1000


def train(setting: Setting, data: Data) -> list[dict[str, Any]]:
    assert setting.lr is not None
    if setting.lr > 0.1:
        raise Diverged("the loss is nan")
    end = final(setting.optimizer, setting.lr, setting.seed)
    losses = [START + (end - START) * i / 4 for i in range(5)]
    return [
        {"step": 10 * i, "train_loss": loss, "val_loss": loss + 1, "training_seconds": 2.0 * i}
        for i, loss in enumerate(losses)
    ]


def task(*methods: str, rates: tuple[float, ...] = RATES) -> Task:
    return Task(Setting(), Data("0" * 64), train, "train_loss", dict.fromkeys(methods or tuple(BEST), rates))


def test_the_best_rate_on_the_first_seed_runs_on_the_others_and_nothing_runs_twice(tmp_path: Path) -> None:
    made: list[tuple[str, float | None, int]] = []

    def counted(setting: Setting, data: Data) -> list[dict[str, Any]]:
        made.append((setting.optimizer, setting.lr, setting.seed))
        return train(setting, data)

    path, wanted = tmp_path / "runs" / "a.json", task("adamw", "soap")._replace(train=counted)
    tried = [(method, rate, 0) for method in ("adamw", "soap") for rate in RATES]
    Runs(path, wanted).make((0,))
    assert made == tried
    Runs(path, wanted).make((0, 1, 2))
    assert made[len(tried) :] == [(m, r, s) for s in (1, 2) for m, r in (("adamw", 4e-3), ("soap", 8e-3))]
    runs = Runs(path, wanted)
    runs.make((0, 1, 2))
    assert len(made) == 10
    assert runs.finals("adamw") == pytest.approx([2.0, 2.001, 2.002])
    assert runs.order() == ["soap", "adamw"]
    with pytest.raises(ValueError, match="another setting or on other data"):
        Runs(path, wanted._replace(base=Setting(steps=41)))
    with pytest.raises(ValueError, match="another setting or on other data"):
        Runs(path, wanted._replace(data=Data("1" * 64)))


def test_a_run_that_diverges_is_kept_and_never_the_best(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs.json", task("adamw", rates=(1.0, 4e-3)))
    runs.make((0,))
    assert [run.get("diverged") for run in runs.of("adamw")] == ["the loss is nan", None]
    assert runs.best("adamw")[0]["rate"] == 4e-3
    grid = comparison.grid_table(runs, ["adamw"])
    assert grid["rows"]["adamw"] == {"0.004": 2.0, "1": "diverged", "best": 4e-3, "end": "lowest"}


def test_a_bar_begins_at_the_runs_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Runs(tmp_path / "runs.json", task("adamw")).make((0,))
    capsys.readouterr()
    Runs(tmp_path / "runs.json", task("adamw", "soap")).make((0, 1))
    assert "| 3/8" in capsys.readouterr().err


def test_the_step_at_a_loss_lies_on_the_line_between_evaluations() -> None:
    rows = [{"step": step, "loss": loss} for step, loss in ((0, 4.0), (10, 2.0), (20, 3.0), (30, 1.0))]
    asked = {4.5: 0.0, 3.0: 5.0, 2.0: 10.0, 1.5: 27.5, 0.5: None}
    assert {target: first_below(rows, "loss", target) for target in asked} == asked


def test_shares_are_of_the_references_steps_and_of_the_same_seed(tmp_path: Path) -> None:
    """From 5 in a line of 40 steps: to what AdamW ends with, seed by seed."""
    runs = Runs(tmp_path / "runs.json", task("adamw", "soap", "kfac"))
    runs.make((0, 1))
    assert runs.shares("adamw") == [1.0, 1.0]
    wanted = [(START - final("adamw", 4e-3, s)) / (START - final("soap", 8e-3, s)) for s in (0, 1)]
    assert runs.shares("soap") == pytest.approx(wanted)
    assert runs.shares("kfac") == [None, None]


# --- seconds and cuts


def test_the_chunk_that_compiles_counts_as_the_median_of_the_others() -> None:
    watch = Stopwatch(100.0)
    watch.add(1, 30.0)
    assert watch.seconds == 130.0
    watch.add(9, 9.0)
    watch.add(10, 20.0)
    watch.add(10, 10.0)
    assert watch.seconds == pytest.approx(100 + 1 + 9 + 20 + 10)
    assert Stopwatch(7.0).seconds == 7.0
    quick = Stopwatch(0.0)  # compiled before
    quick.add(1, 0.5)
    quick.add(10, 10.0)
    assert quick.seconds == 10.5


def test_the_first_chunk_is_one_step_and_the_others_end_at_multiples_and_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan(steps=32, eval_every=15, unit="tokens", units=1, advice="")
    assert list(stops(0, plan)) == [0, 1, 10, 15, 20, 30, 32]
    assert list(stops(15, plan)) == [15, 16, 20, 30, 32]
    assert list(stops(32, plan)) == [32]
    monkeypatch.setattr(loop.jax, "default_backend", lambda: "gpu")
    assert list(stops(0, plan._replace(eval_every=60, steps=120))) == [0, 1, 50, 60, 100, 120]


# --- what benchmarks make of runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    found = Runs(tmp_path / "runs.json", task())
    found.make((0, 1, 2))
    return found


def described(runs: Runs, times: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    compared = comparison.Comparison("figure3_reduced_cpu", "what", "title", runs.task, ("train_loss", "val_loss"))
    command = "python -m benchmarks figure3"
    made = comparison.describe(compared._replace(**changes), runs, entries(runs, BEST), times, range(3), command)
    results.check(made, made["name"])
    return json.loads(json.dumps(made))


def test_tables_say_what_the_runs_and_the_times_are(runs: Runs) -> None:
    times = {name: [2.0, 3.0, 4.0] for name in BEST} | {"soap": [6.0, 6.0, 12.0]}
    found = described(runs, times)

    def at(path: str) -> Any:
        return lookup(found, path)

    assert list(found["tables"]["methods"]["rows"]) == ["muon", "kfac_soap", "soap", "adamw", "kfac"]
    assert at("methods/soap/train_loss") == pytest.approx(1.201)
    assert at("methods/soap/val_loss/high") == pytest.approx(2.202)
    assert at("methods/soap/step_ms") == 6.0
    share = (START - final("adamw", 4e-3, 1)) / (START - final("soap", 8e-3, 1))
    assert at("methods/soap/to_adamw") == pytest.approx(share)
    assert at("methods/soap/time_to_adamw") == pytest.approx(share * 6 / 3)
    assert "to_adamw" not in found["tables"]["methods"]["rows"]["kfac"] or at("methods/kfac/to_adamw") is None
    assert at("grid/soap/0.004") == pytest.approx(1.21)
    assert [at(f"grid/{name}/end") for name in ("soap", "adamw", "kfac")] == ["highest", None, "lowest"]
    assert found["details"]["curves"]["soap"]["seconds"] == pytest.approx([0.0, 0.06, 0.12, 0.18, 0.24])
    assert "step_ms" not in described(runs, {})["tables"]["methods"]["columns"]


def test_a_pair_is_compared_seed_by_seed(runs: Runs) -> None:
    """Of seeds on which neither diverged; a label may be another than the experiments'."""
    tables = lambda runs, found, times: {  # noqa: E731
        "difference": comparison.difference(found, "kfac_soap", "soap", "val_loss")
    }
    found = described(runs, {}, tables=tables, labels={"soap": "another"})
    assert lookup(found, "difference/kfac_soap - soap/loss/high") == pytest.approx(-0.06)
    assert lookup(found, "difference/kfac_soap - soap/lower") == "3 of 3"
    assert lookup(found, "methods/soap/label") == "another"
    runs.best("soap")[1].pop("rows")
    assert lookup(described(runs, {}, tables=tables), "difference/kfac_soap - soap/lower") == "2 of 2"
    assert lookup(described(runs, {}), "methods/soap/train_loss") == "diverged"


def test_pictures_have_every_method_and_time_only_where_it_was_measured(runs: Runs) -> None:
    assert len(comparison.draw(described(runs, {})).axes[0].get_lines()) == len(BEST)
    for times, panels in (({}, 1), ({name: [2.0] for name in BEST}, 2)):
        figure = figure3.draw(described(runs, times))
        assert len(figure.axes) == panels
        (legend,) = figure.legends
        texts = [text.get_text() for text in legend.get_texts()]
        assert texts[0] == "Muon: 1.001 (1.000 to 1.002)"
        assert len(texts) == len(BEST)
        for axes, last in zip(figure.axes, (40.0, 0.08), strict=False):
            assert [line.get_xdata()[-1] for line in axes.get_lines()] == pytest.approx([last] * len(BEST))


# --- steps to a target


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other package is installed; rows that the benchmark adds to the examples' go again."""
    monkeypatch.setattr(peers, "methods", lambda: ({}, {"psgd_jax": "psgd_jax is not installed"}))
    monkeypatch.setattr(peers, "absence", lambda name: f"{name} is not installed")
    monkeypatch.setattr(optimizers, "METHODS", dict(optimizers.METHODS))


def test_a_grid_is_extended_until_its_best_rate_is_inside(tmp_path: Path) -> None:
    wanted = task("adamw", "kfac_soap")
    runs = Runs(tmp_path / "runs.json", wanted._replace(rates={**wanted.rates, "kfac": (4e-3,)}))
    runs.make_inside(range(2))
    tried = {name: sorted(run["rate"] for run in runs.of(name, seed=0)) for name in runs.methods}
    assert tried == {"adamw": [*RATES], "kfac_soap": [*RATES, 1.6e-2, 3.2e-2, 6.4e-2], "kfac": [4e-3]}
    assert [runs.best(name)[0]["rate"] for name in runs.methods] == [4e-3, 3.2e-2, 4e-3]
    assert {len(runs.best(name)) for name in runs.methods} == {2}


@pytest.mark.usefixtures("without_peers")
def test_the_promises_are_judged_by_every_seed_and_who_is_absent_is_named(tmp_path: Path) -> None:
    grid, absent = register()
    assert set(grid) == {"adamw", "muon", "soap", "optax_muon", "soap_packed", "soap_bfloat16", "soap_shorter"}
    methods = ("adamw", "muon", "soap")
    base = Setting(steps=40)
    runs = Runs(tmp_path / "runs.json", task(*methods)._replace(base=base, data=Text("0" * 64, "abc")))
    runs.make((0, 1))
    for run in runs.of("muon", 8e-3, 1):
        run["rows"] = [{**row, "train_loss": START - 0.05 * row["step"]} for row in run["rows"]]  # AdamW's share is 1.5
    for run in runs.of("soap", 8e-3):
        run["rows"] = [{**row, "train_loss": max(START - 0.15 * row["step"], 0.0)} for row in run["rows"]]
    compared = comparison.Comparison(
        "steps_to_target",
        "what",
        "title",
        runs.task,
        ("val_loss",),
        steps_to_target.COLUMNS,
        lambda runs, name, entry, times: steps_to_target.row(runs, name, entry),
        lambda runs, found, times: steps_to_target.notes([*found], absent),
    )
    command = options_of("steps_to_target", ["--seeds=2"]).command
    found = comparison.describe(compared, runs, entries(runs, methods), {}, range(2), command)
    results.check(found, found["name"])
    assert found["command"] == "python -m benchmarks steps_to_target --seeds 2"
    rows = found["tables"]["methods"]["rows"]
    assert rows["adamw"]["to_adamw"]["high"] == 1.0
    assert rows["soap"]["to_adamw"]["high"] == pytest.approx(3.0 / 0.15 / 40)
    assert (rows["soap"]["holds"], rows["muon"]["holds"]) == ("yes", "no")
    assert rows["muon"].get("to_adamw") is None  # never reached on one seed
    assert rows["adamw"]["state"] == pytest.approx(2.0, abs=0.01)
    assert lookup(found, "absent/psgd_jax/why") == "psgd_jax is not installed"
    assert lookup(found, "absent/kfac_jax/why") == "kfac_jax is not installed"
    assert len(steps_to_target.draw(found).axes[0].get_lines()) == len(methods)
