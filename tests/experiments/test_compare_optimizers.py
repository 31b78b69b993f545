"""Optimizers side by side, from command line to files: it tells what was run, a run goes on, errors are lines."""

import argparse
import dataclasses
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmarks import results
from benchmarks.catalogue import options_of
from benchmarks.training import figure3
from experiments import compare_optimizers, train_gpt
from experiments.compare_options import LABELS, PRESETS, Selection
from experiments.gpt_config import Config
from experiments.optimizers import METHODS
from experiments.text import load_corpus
from tests.benchmarks.made_up_results import lookup
from tests.experiments.experiment_runs import flags, refusal

TINY: dict[str, Any] = dict(layers=1, width=16, heads=2, context=16, batch=4, eval_batches=2, steps=4, eval_every=2)

fail = functools.partial(refusal, compare_optimizers.main)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A real text of 20,000 characters."""
    path = tmp_path / "text.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


def test_a_small_comparison(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two methods, two rates, two seeds, stopped in the second run of the second seed: no run is made twice, each
    method compiles once, and the report says what the runs say. Then the same runs, timed."""
    made: list[tuple[str, float, int]] = []
    train = train_gpt.train

    def counted(config: Config, *args: Any, **kwargs: Any) -> Any:
        if len(made) == 5 and not made.count(("stopped", 0.0, 0)):
            made.append(("stopped", 0.0, 0))
            raise KeyboardInterrupt
        made.append((config.optimizer, config.lr, config.seed))
        return train(config, *args, **kwargs)

    monkeypatch.setattr(train_gpt, "train", counted)
    compiled, out = train_gpt.advance._cache_size(), tmp_path / "pair"
    options = flags(**TINY, data=data, optimizers="adamw,muon", rates="1e-2,1e-3", seeds="1,0", out=out)
    with pytest.raises(SystemExit, match="go on with --resume"):
        compare_optimizers.main(options)
    compare_optimizers.main(["--resume", *flags(out=out)])
    grid = [(method, rate, 0) for method in ("adamw", "muon") for rate in (1e-3, 1e-2)]
    assert made[:4] == grid
    assert [(method, seed) for method, _, seed in made[4:]] == [("adamw", 1), ("stopped", 0), ("muon", 1)]
    assert train_gpt.advance._cache_size() == compiled + 2

    runs = json.loads((out / "runs.json").read_text())["runs"]
    report = json.loads((out / "report.json").read_text())
    finals = {(r["method"], r["rate"], r["seed"]): r["rows"][-1]["train_loss"] for r in runs}
    for name, one in report["methods"].items():
        assert one["rate"] == min((1e-3, 1e-2), key=lambda rate: finals[name, rate, 0])
        assert one["train_loss"] == [finals[name, one["rate"], seed] for seed in (0, 1)]
        assert one["steps"] == [0, 2, 4]
        line = f"| {LABELS[name]} | {one['rate']:g} | {statistics.median(one['train_loss']):.4f} ("
        assert line in (out / "report.md").read_text()
    assert report["methods"]["adamw"]["to_adamw"] == [1.0, 1.0]
    printed = capsys.readouterr()
    assert (out / "report.md").read_text() in printed.out
    assert "6/6" in printed.err
    assert matplotlib.image.imread(out / "comparison.png").shape[0] > 500
    assert "already holds results" in fail(capsys, *options)
    assert "another configuration: seeds is '1,0' there and '2' here" in fail(
        capsys, "--resume", *flags(seeds="2", out=out)
    )

    benchmark(out / "runs.json", data, monkeypatch)
    assert train_gpt.advance._cache_size() == compiled + 2  # what is timed is what was trained


def benchmark(runs: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figure 3 of those runs: a result without times, then with them, whole periods of both methods in turns."""
    base = dataclasses.replace(PRESETS["cpu"], **TINY, data=str(data))
    monkeypatch.setitem(PRESETS, "cpu", base)
    stops, advance = [], train_gpt.advance

    def watched(program: Any, model: Any, state: Any, text: Any, stop: Any, peak: Any) -> Any:
        stops.append((program.optimizer, int(stop) - int(state.step)))
        return advance(program, model, state, text, stop, peak)

    monkeypatch.setattr(train_gpt, "advance", watched)
    given = ["--methods=adamw,muon", "--rates=1e-2,1e-3", "--seeds=2", "--rounds=2", f"--runs={runs}"]
    before, after = figure3.measure(options_of("figure3", given))
    monkeypatch.setattr(train_gpt, "advance", advance)
    assert "step_ms" not in before["tables"]["methods"]["columns"]
    assert sorted(stops) == [("adamw", 10)] * 3 + [("muon", 10)] * 3
    results.check(after, after["name"])
    for name in ("adamw", "muon"):
        step_ms = lookup(after, f"methods/{name}/step_ms")
        assert after["details"]["curves"][name]["seconds"][-1] == pytest.approx(4e-3 * step_ms)
        assert lookup(after, f"methods/{name}/step_ms/n") == 2
    assert lookup(after, "methods/adamw/time_to_adamw") == pytest.approx(1.0)
    runs_sha = json.loads(runs.read_text())["sha256"]
    assert runs_sha == load_corpus(str(data), base.vocab, base.context).sha256


def test_every_method_of_the_gpt_has_a_label_and_every_default_is_one() -> None:
    assert set(LABELS) == set(METHODS)
    assert len(Selection().methods()) == 10


def test_the_presets_are_the_posts_setting_and_one_for_two_cores() -> None:
    small, full = PRESETS["cpu"], PRESETS["shakespeare-char"]
    assert {small.data, full.data} == {"shakespeare"}
    assert (full.steps, full.eval_every, full.layers, full.width, full.context) == (5000, 250, 6, 384, 256)
    assert (full.batch, full.dropout) == (64, 0.2)
    assert Selection().grid(full)["adamw"] == (pytest.approx(1e-3),)  # nanoGPT's
    assert dataclasses.replace(full, optimizer="adamw").resolve().warmup == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"optimizers": "adamw,sophia"}, f"unknown optimizer 'sophia': choose from {', '.join(METHODS)}"),
        ({"optimizers": ","}, "--optimizers must be one at least, not ,"),
        ({"optimizers": "adamw,kfac_true_head"}, "--head must be own: kfac_true_head treats it apart, not tied"),
        ({"seeds": "0,-1"}, "--seeds must be whole numbers from 0 on, with commas between them, not 0,-1"),
        ({"seeds": "many"}, "--seeds must be whole numbers"),
        ({"rates": "1e-3,fast"}, "--rates must be positive numbers, with commas between them, not 1e-3,fast"),
        ({"rates": "0"}, "--rates must be positive numbers"),
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"lr": 0.1}, "unrecognized arguments: --lr=0.1"),
        ({"data": "/nowhere/text"}, "no text at '/nowhere/text'"),
    ),
    ids=lambda value: value if isinstance(value, str) else " ".join(flags(**value)),
)
def test_a_bad_option_is_named(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], message: str
) -> None:
    assert message in fail(capsys, *flags(**{"data": data, **arguments}, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
