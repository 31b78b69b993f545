"""Merging two tuned models, from command line to files: all methods are told of, a run goes on, errors are lines."""

import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import merge_tasks, merge_tasks_parts, merge_tasks_report
from experiments.images import load_images
from tests.experiments.experiment_runs import flags, refusal
from tests.experiments.test_image_parts import TINY, write_mnist

fail = functools.partial(refusal, merge_tasks.main)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_mnist(folder, TINY)
    return folder


def test_a_small_run(
    tmp_path: Path, mnist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files, ends of the paths, the number that validation chose; and a second seed that is interrupted goes on."""
    monkeypatch.setattr(merge_tasks_parts, "SHARES", np.array([0.0, 0.5, 1.0]))
    monkeypatch.setattr(merge_tasks_parts, "SCALES", np.array([0.5, 1.0]))
    options, measured = dict(data=mnist, seeds=2, base_epochs=1, epochs=1, examples=4), []
    measure = merge_tasks.measure

    def until_second(*args: Any) -> Any:
        if args[4] == 1 and not measured.count(1):
            measured.append(1)
            raise KeyboardInterrupt
        measured.append(args[4])
        return measure(*args)

    monkeypatch.setattr(merge_tasks, "measure", until_second)
    out = tmp_path / "merge"
    with pytest.raises(SystemExit, match="go on with --resume"):
        merge_tasks.main(flags(**options, out=out))
    merge_tasks.main(["--resume", *flags(out=out)])
    assert measured == [0, 1, 1]
    printed = capsys.readouterr()
    assert "12/12" in printed.err
    assert (out / "report.md").read_text() in printed.out
    assert matplotlib.image.imread(out / "merge.png").shape[0] > 500

    saved: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert saved["config"]["data"] == load_images(str(mnist)).name
    assert [seed["seed"] for seed in saved["seeds"]] == [0, 1]
    table = (out / "report.md").read_text()
    for seed in saved["seeds"]:
        methods = seed["methods"]
        assert all(f"\n| {name} |" in table for name in methods)
        for name in ("average", "Fisher-weighted average", "Fisher-weighted average, scales kept"):
            path = methods[name]["path"]
            assert [path[0], path[-1]] == [methods[f"tuned on task {i}"]["test"] for i in (1, 2)]
            assert methods[name]["test"] == path[methods[name]["numbers"].index(methods[name]["number"])]
            assert methods[name]["at one half"] == path[1]
        # Half the sum of two task vectors is their average.
        assert methods["task arithmetic"]["path"][0] == methods["average"]["path"][1]
        assert methods["task arithmetic, Fisher"]["path"][0] == methods["Fisher-weighted average"]["path"][1]
    assert "already holds results" in fail(capsys, *flags(**options, out=out))


def test_tasks_share_no_image_of_another_part(mnist: Path) -> None:
    """A fifth is held out; classes are cut in halves; a negative and a turned image are what they say."""
    data = load_images(str(mnist))
    tasks = merge_tasks_parts.make_tasks(data, "classes")
    half = (data.classes + 1) // 2
    for parts in (tasks.train, tasks.validation, tasks.test):
        assert bool((parts[0][1] < half).all() and (parts[1][1] >= half).all())
    assert len(tasks.base[1]) + sum(len(y) for _, y in tasks.validation) == len(data.train.labels)
    image = jnp.arange(4.0).reshape(1, 2, 2, 1)
    (turned, _), (negative, _) = merge_tasks_parts.split("distortions", 1, image, jnp.zeros(1, int))
    np.testing.assert_array_equal(turned[0, :, :, 0], [[1, 3], [0, 2]])
    np.testing.assert_array_equal(negative, -image)


def test_the_verdict_says_who_loses() -> None:
    """Also where it is the Fisher."""
    rows = {name: {"both": x, "both_by_seed": [x, x + 0.02]} for name, x in (("a", 0.5), ("b", 0.6))}
    text = merge_tasks_report.compared(rows, "a", "b")
    assert text == "A is 10.0 points below b (better for 0 of 2 seeds, worse for 2)."


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"seeds": 0}, "--seeds must be at least 1, not 0"),
        ({"density": 0.0}, "--density must be above 0 and at most 1, not 0.0"),
        ({"drop": 1.0}, "--drop must be at least 0 and below 1, not 1.0"),
        ({"fisher": "exact"}, "argument --fisher: invalid choice: 'exact'"),
        ({"tasks": "none"}, "argument --tasks: invalid choice: 'none'"),
        ({"data": "/nowhere"}, "no folder '/nowhere'. --data takes 'digits', or a folder"),
    ),
)
def test_a_bad_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], message: str
) -> None:
    assert message in fail(capsys, *flags(**arguments, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
