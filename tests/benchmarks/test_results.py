"""Results are of one form, and shown as text; and the verbs do what they say."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as verbs
from benchmarks import catalogue, results
from benchmarks.results import Column, spread, table
from tests.benchmarks.made_up_results import lookup, made_up

COMMITTED = sorted(results.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_have_the_form_and_a_benchmark(path: Path) -> None:
    found = results.read(path)
    assert found["name"] == path.stem
    assert catalogue.benchmark_of(found) in catalogue.CATALOGUE


def test_every_committed_picture_is_of_a_result() -> None:
    others = {path.stem for path in results.RESULTS.iterdir() if path.suffix != ".json"}
    assert others <= {path.stem for path in COMMITTED}


# The form


def test_a_result_is_read_as_it_was_written_but_for_digits(tmp_path: Path) -> None:
    """Five significant digits; what is not finite becomes nothing."""
    found = made_up(times=(1.23456789, 2.0, float("inf")), details={"curve": [float("nan"), 0.1 + 0.2]})
    back = results.read(results.write(found, tmp_path / "new"))
    assert lookup(back, "steps/fo_soap/ms/low") == 1.2346
    assert lookup(back, "steps/fo_soap/ms/high") is None
    assert back["details"] == {"curve": [None, 0.3]}
    assert {key: back[key] for key in ("name", "what", "command", "seeds")} == {
        "name": "step_time_cpu",
        "what": "Steps that nobody timed.",
        "command": "python -m benchmarks step_time --tree none",
        "seeds": [0, 1],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 0}, "has schema 0, this program reads 1"),
        ({"more": 1}, "has the fields schema, .*, more; a result has"),
        ({"tables": {"t": {"title": "", "columns": {}, "rows": {"r": {"c": 1}}}}}, "holds 1 in t/r/c"),
        ({"tables": {"t": {"title": "", "columns": {"c": {}}, "rows": {"r": {"c": [1]}}}}}, r"holds \[1\] in t/r/c"),
    ],
)
def test_what_is_no_result_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        results.write(made_up(**change), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is no JSON"):
        results.read(tmp_path / "x.json")


def test_spreads_of_few_and_of_many() -> None:
    assert spread([4.0, 1.0]) == {"median": 2.5, "low": 1.0, "high": 4.0, "n": 2}
    assert spread(list(map(float, range(101)))) == {"median": 50.0, "low": 10.0, "high": 90.0, "n": 101}


def test_tables_refuse_cells_without_a_column() -> None:
    with pytest.raises(ValueError, match="no column c"):
        table("t", {"d": Column("d")}, {"a": {"c": 1}})


def test_columns_are_written_in_a_line_each() -> None:
    found = results.columns("label: method; ms: step, ms | .1f ±; share: of all | .0%;")
    assert found == {"label": Column("method"), "ms": Column("step, ms", ".1f", True), "share": Column("of all", ".0%")}


def test_tables_are_shown_with_labels_units_and_spread() -> None:
    part = made_up()["tables"]["steps"]
    assert results.rows_of(part) == [
        ["optimizer", "step, ms", "saved", "state"],
        ["`fo.soap` | every 10", "74.0 (72.0 to 79.0)", "-5%", "1234"],
        ["adamw", "", "12%", "none"],
    ]
    assert results.rows_of(part, ["state", "saved"], ["adamw"], "method") == [
        ["method", "state", "saved"],
        ["adamw", "none", "12%"],
    ]
    assert results.rows_of(part, ["ms"], ["fo_soap"], spread=False)[1] == ["`fo.soap` | every 10", "74.0"]
    with pytest.raises(KeyError, match="no column 'x'; there are label, ms, saved, state"):
        results.rows_of(part, ["x"])
    with pytest.raises(KeyError, match="no row 'y'; there are fo_soap, adamw"):
        results.rows_of(part, rows=["y"])


def test_large_and_small_numbers_are_readable() -> None:
    column = Column("")._asdict()
    assert [results.shown(x, column) for x in (12345.6, 0.00001234, float("inf"))] == ["12346", "1.23e-05", "inf"]
    assert results.shown(1e8, Column("", ".1e")._asdict()) == "1.0e+08"


def test_what_holds_is_a_word() -> None:
    assert [results.shown(cell, Column("holds")._asdict()) for cell in (True, False, None)] == ["yes", "no", ""]


# The verbs


class Twice:
    """A benchmark that gives its result twice, the second time with more.

    python -m benchmarks twice
    """

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument("--time", type=float, default=1.0)

    def measure(self, options: Namespace) -> Iterator[dict[str, Any]]:
        yield made_up(times=(options.time,))
        assert (options.out / "step_time_cpu.json").exists(), "written as soon as it is there"
        yield made_up(times=(options.time, options.time + 2))

    def draw(self, found: dict[str, Any]) -> Any:
        from matplotlib.figure import Figure

        return Figure((1, 1))


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (verbs, catalogue):
        monkeypatch.setattr(module, "load", lambda name: Twice())


@pytest.mark.usefixtures("twice")
def test_measuring_writes_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main(["step_time", "--time", "5", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"step_time_cpu.json", "step_time_cpu.png"}
    printed = capsys.readouterr().out
    assert printed.count("6.0 (5.0 to 7.0)") == 1
    assert printed.endswith(f"written: {tmp_path / 'step_time_cpu.json'}\n")


@pytest.mark.usefixtures("twice")
def test_help_tells_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verbs.main(["step_time", "--help"])
    printed = capsys.readouterr().out
    assert "python -m benchmarks twice" in printed
    assert "--time" in printed


def test_without_arguments_everything_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines[-len(catalogue.CATALOGUE) :]}
    assert list(listed) == list(catalogue.CATALOGUE)
    assert catalogue.summary("step_time") in listed["step_time"]


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    assert "unknown benchmark 'stp_time'. There are step_time, train_step," in str(verbs.main(["stp_time"]))


def test_a_command_says_what_differs_from_the_defaults_and_no_files() -> None:
    given = ["--methods=adamw,soap", "--rates=1e-3,2e-3", "--runs=somewhere", "--rounds=7", "--out=here"]
    options = catalogue.options_of("figure3", given)
    assert options.command == "python -m benchmarks figure3 --methods adamw,soap --rates 0.001,0.002"
    with pytest.raises(SystemExit):
        catalogue.options_of("figure3", ["--methods=adamw,sophia"])


def test_a_command_of_no_benchmark_is_named() -> None:
    with pytest.raises(ValueError, match=r"'step_time_cpu' has the command 'python x\.py'; it must begin with"):
        catalogue.benchmark_of(made_up(command="python x.py"))
