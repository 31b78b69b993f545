"""Every benchmark in the catalogue has the interface of one, and every committed result draws."""

import argparse
import inspect
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import catalogue, results
from benchmarks.catalogue import CATALOGUE, parser_of

RESULTS = sorted(results.RESULTS.glob("*.json"))


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_benchmark_says_what_it_measures_and_can_be_called(name: str) -> None:
    benchmark, first = catalogue.load(name), catalogue.summary(name)
    assert first[:1].isupper()
    assert first.endswith("."), f"the first line of {name}'s docstring is no sentence: {first!r}"
    assert len(inspect.signature(benchmark.measure).parameters) == 1
    assert inspect.isgeneratorfunction(benchmark.measure), f"{name}'s results come one by one"
    assert CATALOGUE[name].minutes > 0


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_benchmark_needs_no_options(name: str, tmp_path: Path) -> None:
    """Its parser builds, prints its help, and its defaults are complete."""
    parser = parser_of(name)
    assert catalogue.summary(name) in parser.format_help()
    options = parser.parse_args([f"--out={tmp_path}"])
    assert isinstance(options, argparse.Namespace)
    assert options.out == tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_has_the_picture_that_its_benchmark_draws(path: Path) -> None:
    """It is drawn from the file alone, and lies beside it."""
    found = results.read(path)
    benchmark = catalogue.load(catalogue.benchmark_of(found))
    assert path.with_suffix(".png").exists() == hasattr(benchmark, "draw")
    if hasattr(benchmark, "draw"):
        figure = benchmark.draw(found)
        assert isinstance(figure, Figure)
        assert any(axes.has_data() for axes in figure.axes)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_what_can_be_typed_again(path: Path) -> None:
    found = results.read(path)
    name, *given = found["command"].split()[3:]
    catalogue.options_of(name, given)
