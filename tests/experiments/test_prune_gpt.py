"""The example that prunes a GPT: its numbers, its order of methods, its picture, a run in parts, what it refuses."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

import fisher_optax as fo
from experiments import prune_gpt, prune_gpt_report, train_gpt, trained_gpt
from tests.experiments.experiment_runs import flags, refusal, small_gpt

TINY = dict(methods="magnitude,wanda,sparsegpt", sparsities="0.5,2:4", draws=2, sequences=8, validation=8)
fail = functools.partial(refusal, prune_gpt.main)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_gpt(tmp_path_factory.mktemp("gpt"))


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example writes in one go."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune_gpt.main(flags(**TINY, run=trained, out=out))
    return out


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_numbers_are_those_of_the_pruned_model(trained: Path, whole: Path) -> None:
    """One entry of the table, computed anew from the run's folder."""
    settings, saved = trained_gpt.read_settings(trained)
    corpus = trained_gpt.corpus_of(trained, settings, saved)
    gpt = trained_gpt.load_trained(trained, settings, len(corpus.characters))
    data = prune_gpt.calibration(corpus.train, 16, prune_gpt.Config(sequences=8), 1)
    apply_fn = prune_gpt.Logits(gpt.model)
    pruned = fo.compression.prune(apply_fn, gpt.params, data, "wanda", "2:4", progress=False)
    windows = np.linspace(0, len(corpus.validation) - 17, 8).astype(int)[:, None] + np.arange(17)
    loss = train_gpt.mean_loss(gpt.model, pruned.params, corpus.validation[windows])
    rows = report(whole)["rows"]
    wanted = dict(method="wanda", sparsity="2:4", variant="pruned", draw=1)
    (row,) = (row for row in rows if wanted.items() <= row.items())
    assert row["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert row["error"] == pytest.approx(pruned.report.error, rel=1e-5)
    assert row["achieved"] == 0.5
    assert len(rows) == (2 * (1 + 2 + 2)) + (2 * (2 + 2)) + (3 * 2) + (1 + 2)  # given, pruned so far, OWL, by matrix
    assert report(whole)["dense"] < row["perplexity"]


def test_the_table_has_means_and_spreads_and_the_verdicts_follow_from_them() -> None:
    def entry(method: str, *perplexities: float) -> dict[str, Any]:
        found = prune_gpt_report.statistics(list(perplexities))
        return {"method": method, "sparsity": "0.5", "variant": "given", "perplexity": found, "error": found}

    table = [entry("magnitude", 9.0), entry("wanda", 8.0, 7.0), entry("sparsegpt", 7.0, 7.4), entry("obs", 8.0, 8.1)]
    found = [x["perplexity"]["holds"] for x in prune_gpt_report.orders(table)]
    assert found == ["yes", "within the spread", "no"]
    assert prune_gpt_report.number(table[1]["perplexity"]) == "7.50 ± 0.50"


def test_table_and_picture_show_every_method(whole: Path) -> None:
    text = (whole / "report.md").read_text(encoding="utf-8")
    for name in ("Magnitude | 50%", "Wanda | 2:4", "SparseGPT | 50%"):
        assert f"| {name} |" in text
    picture = matplotlib.image.imread(whole / prune_gpt_report.PICTURE)
    assert picture.shape[0] > 500
    assert picture[..., :3].std() > 0.05


def test_an_interrupted_run_goes_on_where_it_was(
    trained: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models that were pruned before are not pruned again."""
    out, prune, calls = tmp_path / "out", fo.compression.prune, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return prune(*args, **kwargs)

    monkeypatch.setattr(fo.compression, "prune", counted)
    with pytest.raises(SystemExit, match="go on with --resume"):
        prune_gpt.main(flags(**TINY, run=trained, out=out))
    prune_gpt.main([*flags(out=out), "--resume"])
    assert len(calls) == 5 + len(report(whole)["rows"]) - 4
    numbers = lambda data: [{k: v for k, v in row.items() if k != "seconds"} for row in data["rows"]]  # noqa: E731
    assert numbers(report(out)) == numbers(report(whole))


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    common = dict(run=trained, out=tmp_path / "out")
    assert "--methods must be some of magnitude, wanda" in fail(capsys, *flags(**common, methods="obd"))
    assert "sparsity must be a share" in fail(capsys, *flags(**common, sparsities="0.5,1.5"))
    assert "--spread must be so that 0.95 stays in [0, 1)" in fail(capsys, *flags(**common, sparsities="0.95"))
    assert "3:6 needs inputs in groups of 6; this kernel has 16" in fail(capsys, *flags(**common, sparsities="3:6"))
    assert "no run in" in fail(capsys, *flags(run=tmp_path / "none", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
