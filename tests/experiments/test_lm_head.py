"""The example that looks at a trained GPT's tokens: its numbers, its pictures, a run in parts, what it refuses."""

import contextlib
import functools
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

import fisher_optax as fo
from experiments import (
    lm_head,
    lm_head_folder,
    lm_head_parts,
    lm_head_plots,
    lm_head_report,
    lm_head_text,
    train_gpt,
    trained_gpt,
)
from experiments.text import UNKNOWN
from tests.experiments.experiment_runs import flags, interrupt, refusal, small_gpt
from tests.reference.curvature import relative
from tests.reference.diagonal import interval, of_sequence
from tests.reference.softmax_head import kernel_diagonal, softmax

TINY = dict(sequences=24, samples=2, spectrum_sequences=2, eigenvalues=3, probes=2, context=12)
fail = functools.partial(refusal, lm_head.main)
FISHERS = ("model-labels", "other-text", "text-labels", "head-model-labels", "head-text-labels")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_gpt(tmp_path_factory.mktemp("gpt"))


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example writes in one go, and what it prints in ``said.txt``."""
    out, said = tmp_path_factory.mktemp("lm") / "head", io.StringIO()
    with contextlib.redirect_stdout(said):
        lm_head.main(flags(**TINY, run=trained, out=out))
    (out / "said.txt").write_text(said.getvalue(), encoding="utf-8")
    return out


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def by_token(out: Path, column: str) -> np.ndarray:
    """Of the report, in the order of the vocabulary."""
    rows = {row["token"]: row[column] for row in report(out)["tokens"]}
    return np.array([rows[name] for name in setting(out)[1]])


@functools.cache
def setting(out: Path) -> tuple[trained_gpt.Trained, list[str], np.ndarray]:
    """Parameters, names of tokens and windows of the first text, read anew."""
    run = Path(json.loads((out / "config.json").read_text())["run"])
    config = trained_gpt.read_settings(run)[0]
    corpus = train_gpt.load_corpus(config.data, config.vocab, config.context)
    windows = lm_head_text.evenly_spaced("--text", corpus.validation, TINY["sequences"], TINY["context"])
    names = [lm_head_text.shown(character) for character in corpus.characters]
    return trained_gpt.load_trained(run, config, len(names)), names, windows


def test_everything_is_written_and_said(whole: Path) -> None:
    said = (whole / "said.txt").read_text(encoding="utf-8")
    assert len(said.splitlines()) <= 24
    assert all(f"\n{part}" in said for part in ("Importance: ", "Shift: ", "Labels, ", "Spectrum: ", "Blocks: "))
    assert "characters of these texts have no symbol of their own" in said
    for name in lm_head_folder.PICTURES:
        picture = matplotlib.image.imread(whole / name)[::3, ::3]
        assert len(np.unique(picture @ np.array([1, 2, 4, 0]))) > 40, name
        assert f"({name})" in (whole / "report.md").read_text(encoding="utf-8")
    found = report(whole)
    assert found["versions"]["jax"] == jax.__version__
    assert found["config"].items() >= TINY.items()
    assert len(found["tokens"]) == 41
    values = [row["importance"] for row in found["tokens"]]
    assert values == sorted(values, reverse=True)
    assert (found["n_eff"], found["steps_trained"]) == (TINY["sequences"], 40)


def test_the_texts_own_labels_give_the_squares_of_single_sequences(whole: Path) -> None:
    """In the report to float32's rounding; the intervals of what is saved are Student's."""
    (_, model, params, _), _, windows = setting(whole)

    @jax.jit
    def gradient(window: Any) -> Any:
        total = lambda p: TINY["context"] * train_gpt.mean_loss(model, p, window[None])  # noqa: E731
        return jax.grad(total)(params)["embed"]["embedding"]

    n = np.full(len(windows), float(TINY["context"]))
    rows = [of_sequence(np.asarray(gradient(w), np.float64).reshape(1, -1), np.ones(1)) for w in windows]
    x = np.array(rows).reshape(len(windows), 41, -1).sum(-1) / TINY["context"]
    assert relative(by_token(whole, "empirical"), n @ x / n.sum()) < 1e-5
    saved = lm_head_parts.rows_of(fo.fisher.DiagonalFisher(**last_state(whole, "text-labels")))
    for ours, wanted in zip(lm_head_report.interval(saved, 0.9), interval(x, n, 0.9), strict=True):
        assert relative(ours, wanted) < 1e-4


def test_the_models_labels_are_those_of_one_direct_call(whole: Path) -> None:
    (_, model, params, _), _, windows = setting(whole)
    direct = fo.fisher.diagonal(
        lm_head_parts.WindowLoss(model), params, windows.reshape(3, 8, -1), groups=lm_head_parts.token_rows,
        fisher="mc", n_samples=TINY["samples"], key=jax.random.key(0),
    )  # fmt: skip
    rows = lm_head_parts.rows_of(direct)
    assert relative(by_token(whole, "importance"), rows.mean) < 1e-6
    for name, wanted in zip(("lower", "upper"), rows.confidence_interval(0.95), strict=True):
        assert relative(by_token(whole, name), wanted) < 1e-6


def test_the_heads_reference_is_the_sum_over_all_labels(whole: Path) -> None:
    """On hidden states from which the model's own logits come."""
    (_, model, params, _), _, windows = setting(whole)
    hidden = lm_head_parts.hidden_states(model, params, jnp.asarray(windows))
    logits = np.asarray(hidden, np.float64) @ np.asarray(params["embed"]["embedding"], np.float64).T
    assert relative(logits, model.apply({"params": params}, windows[:, :-1])) < 1e-5
    P, h = softmax(logits).reshape(-1, 41), np.asarray(hidden, np.float64).reshape(-1, hidden.shape[-1])
    assert relative(by_token(whole, "head_true"), kernel_diagonal(P, np.ones(len(P)), h).sum(1)) < 1e-5
    loss = -np.log(np.take_along_axis(P, windows[:, 1:].reshape(-1, 1), 1)).mean()
    assert report(whole)["texts"][0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_spectra_are_those_of_the_operators(whole: Path) -> None:
    """And the trace of the drawn Fisher's blocks is the sum of its squared scores."""
    (_, model, params, _), _, windows = setting(whole)
    loss, found = lm_head_parts.WindowLoss(model), report(whole)
    F = fo.fisher.operator(loss, params, windows[[0, -1]])
    assert relative(found["spectrum"]["eigenvalues"], fo.fisher.spectrum(F, 3).eigenvalues) < 1e-6
    drawn = fo.fisher.operator(loss, params, windows[[0, -1]], fisher="mc", key=jax.random.key(0))
    assert found["blocks_labels"] == 2 * TINY["context"] == len(drawn.rows())
    total = sum(block["trace"] for block in found["blocks"].values())
    assert total == pytest.approx(float(jnp.sum(jnp.square(drawn.rows()))), rel=1e-4)


def test_capacity_is_the_participation_ratio_of_all_eigenvalues() -> None:
    λ, none = jnp.arange(1.0, 41.0), jnp.zeros(0)
    density = fo.fisher.Density(none, none, none, jnp.stack([λ, λ]), jnp.full((2, 40), 1 / 40), 40)
    assert lm_head_report.capacity(density) == pytest.approx(float(fo.fisher.participation_ratio(λ)), rel=1e-5)


def last_state(out: Path, name: str) -> dict[str, Any]:
    """What is saved of a Fisher, read without the example's code."""
    manager = ocp.CheckpointManager((out / "fishers" / name).absolute())
    return dict(manager.restore(manager.latest_step(), args=ocp.args.StandardRestore()))


def test_an_interrupted_run_goes_on_bitwise_as_if_it_had_not_been(
    trained: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of a Fisher, then among the spectra; nothing that was saved is computed again."""
    saved, save, out = [], ocp.CheckpointManager.save, tmp_path / "parts"

    def recorded(self: ocp.CheckpointManager, step: int, **kwargs: Any) -> bool:
        saved.append((Path(self.directory).name, step))
        return save(self, step, **kwargs)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lm_head, "draw", lambda *args: None)
    monkeypatch.setattr(lm_head_folder, "SAVE_EVERY", 1)
    monkeypatch.setattr(ocp.CheckpointManager, "save", recorded)
    interrupt(lm_head.main, flags(**TINY, run=trained, out=out), 3, monkeypatch)
    assert saved == [("model-labels", 1), ("model-labels", 2)]
    with monkeypatch.context() as patch:
        patch.setattr(fo.fisher, "density", stop)
        with pytest.raises(SystemExit, match=re.escape(f"go on with --resume --out {out}")):
            lm_head.main(["--resume", f"--out={out}"])
    assert saved == [(name, step) for name in FISHERS for step in (1, 2, 3)]
    monkeypatch.setattr(fo.fisher, "spectrum", stop)
    lm_head.main(["--resume", f"--out={out}"])
    assert len(saved) == 15
    for name in FISHERS:
        ours, wanted = (dict(jax.tree_util.tree_leaves_with_path(last_state(x, name))) for x in (out, whole))
        assert ours.keys() == wanted.keys()
        assert all(np.array_equal(ours[path], wanted[path]) for path in wanted), name
    assert {**report(out), "seconds": 0} == {**report(whole), "seconds": 0}


def test_a_text_is_put_into_the_runs_symbols() -> None:
    """What has none shares the last or, where there is no such, is left out; both are counted."""
    shared, unknown = lm_head_text.tokens_of("a~b\nc~", "\nab" + UNKNOWN)
    assert (shared.tolist(), unknown) == ([1, 3, 2, 0, 3, 3], 3)
    dropped, unknown = lm_head_text.tokens_of("a~b\nc~", "\nab")
    assert (dropped.tolist(), unknown) == ([1, 2, 0], 3)
    assert len(lm_head_text.manual()) > 100_000


@pytest.mark.parametrize("extra", (0, 1, 17))
def test_windows_share_no_character(extra: int) -> None:
    windows = lm_head_text.evenly_spaced("--text", np.arange(5 * 8 + extra), 5, 7)
    assert len(np.unique(windows)) == windows.size == 40
    assert (windows[0, 0], windows[-1, -1]) == (0, 39 + extra)


def test_every_token_has_a_name_that_can_be_seen() -> None:
    names = [lm_head_text.shown(c) for c in ("\n", " ", "\t", "\x0b", "é", "語", UNKNOWN)]
    assert names == ["\\n", "␣", "\\t", "U+000B", "é", "U+8A9E", "(rare)"]
    assert [lm_head_text.code(name) for name in ("`", "a")] == ["`` ` ``", "`a`"]
    assert lm_head_report.cell("`|`") == "`\\|`"


def test_names_in_a_picture_lie_over_nothing() -> None:
    """No two of them, no point, and inside the axes."""
    x, y = np.exp(np.random.default_rng(0).normal(size=(2, 60)))
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y, "o", markersize=3)
    axes.set(xscale="log", yscale="log")
    lm_head_plots.name_points(axes, x, y, [f"t{i}" for i in range(60)], range(60))
    assert len(axes.texts) > 30
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    points = axes.transData.transform(np.column_stack([x, y]))
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in box.corners())


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"unit": "position"}, "--unit must be sequence or token, not position"),
        ({"sequences": 1}, "--sequences must be at least 2, not 1"),
        ({"context": 17}, "--context must be between 1 and the run's, 16, not 17"),
        ({"spectrum_sequences": 25}, "--spectrum-sequences must be at most --sequences, not 25"),
        ({"level": 95}, "--level must be between 0 and 1, not 95.0"),
        ({"rate": "nan"}, "--rate must be between 0 and 1, not nan"),
        ({"seed": -1}, "--seed must be at least 0 and less than 2^31, not -1"),
        ({"eigenvalues": 10**9}, "--eigenvalues must be at most"),
        ({"sequences": "many"}, "argument --sequences: invalid int value: 'many'"),
        ({"text": "/nowhere"}, "no text at '/nowhere'. --text takes a file"),
        ({"other": "/nowhere"}, "no text at '/nowhere'. --other takes a file"),
        ({"sequences": 160}, "--text has 2,000 characters, and 160 windows of 13 that do not"),
        ({"run": "/nowhere"}, "no run in '/nowhere'. Train one: python -m experiments.train_gpt --optimizer"),
    ),
    ids=lambda value: value if isinstance(value, str) else " ".join(flags(**value)),
)  # fmt: skip
def test_a_bad_option_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], message: str
) -> None:
    assert message in fail(capsys, *flags(**{**TINY, "run": trained, **arguments}, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_be_read_is_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    arguments = flags(**TINY, run=copy, out=tmp_path / "out")
    shutil.rmtree(copy / "checkpoints")
    assert "has no checkpoint yet" in fail(capsys, *arguments)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, "text_sha256": "0"}))
    assert "is no longer the text that" in fail(capsys, *arguments)
    (copy / "config.json").write_text(json.dumps({**settings, "head": "own"}))
    assert "has --head own; wanted one whose head is its embedding" in fail(capsys, *arguments)
    (copy / "config.json").write_text('{"epochs": 3, "data": "digits"}')
    assert "holds no run of train_gpt.py" in fail(capsys, *arguments)
    (copy / "config.json").write_text("{")
    assert "is damaged" in fail(capsys, *arguments)


def test_results_are_neither_lost_nor_mixed_with_others(
    trained: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = lambda folder: {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}  # noqa: E731
    before, run = contents(whole), contents(trained)
    assert "already holds results" in fail(capsys, *flags(**TINY, run=trained, out=whole))
    message = fail(capsys, "--resume", *flags(out=whole, samples=3, seed=1))
    assert "samples is 2 there and 3 here; seed is 0 there and 1 here" in message
    assert "windows_sha256 is" in fail(capsys, "--resume", *flags(out=whole, text="stdlib"))
    assert "no run to resume" in fail(capsys, "--resume", f"--out={tmp_path}")
    assert "holds a run of another program" in fail(capsys, "--overwrite", *flags(**TINY, run=trained, out=trained))
    assert (contents(whole), contents(trained)) == (before, run)

    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "notes.txt").write_text("mine")
    lm_head_folder.Results(copy, json.loads((whole / "config.json").read_text()), overwrite=True)
    assert sorted(path.name for path in copy.iterdir()) == ["config.json", "notes.txt", "said.txt"]
