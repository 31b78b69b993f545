"""What pruning leaves of a GPT: magnitude, Wanda, SparseGPT and OBS by perplexity, as `experiments.prune_gpt` compares.

The GPT of ``experiments.train_gpt`` is trained first, in about two and a half minutes, if ``--run`` does not name one.
Each method is calibrated on several draws of windows of the training text; differences are taken draw by draw. An
interrupted run goes on where it was.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.results import Column
from experiments import prune_gpt
from experiments.prune_gpt_report import TITLES, picture
from experiments.trained_gpt import read_settings

# What the tables of perplexities are called, by the example's names, and what they hold.
VARIANTS = {"given": "given", "pruned": "sequential", "owl": "owl", "matrix": "matrix"}
WHAT = {
    "given": "inputs of the model as given, shares of each output's weights",
    "sequential": "inputs of the model as pruned so far",
    "owl": "OWL's share for each block",
    "matrix": "shares of whole matrices",
}


class Model(NamedTuple):
    """What was pruned."""

    perplexity: float
    parameters: int
    steps: int


def column_of(sparsity: str) -> str:
    """``0.5`` -> ``50%``; patterns as they are."""
    return sparsity if ":" in sparsity else f"{float(sparsity):.0%}"


class Grid:
    """The values of a quantity by the draws, of what `prune_gpt` measured."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], quantity: str):
        self.draws: dict[tuple[str, str, str], list[float]] = {}
        for row in sorted(rows, key=lambda row: row["draw"]):
            key = VARIANTS[row["variant"]], row["method"], column_of(row["sparsity"])
            self.draws.setdefault(key, []).append(row[quantity])
        self.columns = list(dict.fromkeys(column for _, _, column in self.draws))

    def rows(self, variant: str) -> dict[str, dict[str, Any]]:
        """Spreads by method and sparsity."""
        found: dict[str, dict[str, Any]] = {}
        for (of, method, column), values in self.draws.items():
            if of == variant:
                found.setdefault(method, {"label": TITLES[method]})[column] = results.spread(values)
        return found

    def ratios(self, over: tuple[str, str], under: tuple[str, str]) -> dict[str, Any]:
        """One variant and method by another, draw by draw; what needs no data has one draw for all."""
        found = {}
        for column in self.columns:
            a, b = (self.draws.get((*key, column), []) for key in (over, under))
            if a and b:
                count = max(len(a), len(b))
                pairs = zip(a * (count // len(a)), b * (count // len(b)), strict=True)
                found[column] = results.spread([x / y for x, y in pairs])
        return found


def tables(model: Model, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the example's ``rows``, one for each model that was pruned."""
    grid, errors = Grid(rows, "perplexity"), Grid(rows, "error")
    found = {"model": results.table("The model before", MODEL, {"dense": model._asdict()})}
    for name, what in WHAT.items():
        found[name] = by_sparsity(f"Perplexity after pruning: {what}", ".2f", grid.rows(name))
    steps = {
        better: {
            "label": f"{TITLES[better]} over {TITLES[worse]}",
            **grid.ratios(("given", better), ("given", worse)),
        }
        for worse, better in itertools.pairwise(grid.rows("given"))
    }
    found["order"] = by_sparsity("Perplexity as a share of the method's before", ".3f", steps)
    for name, what in WHAT.items():
        if name != "given":
            title = f"Perplexity by {what}, share of that by inputs as given"
            found[f"{name}_share"] = by_sparsity(title, ".3f", against_given(grid, name))
    title = "Error of the layers by inputs as pruned so far, share of that by inputs as given"
    found["sequential_error"] = by_sparsity(title, ".3f", against_given(errors, "sequential"))
    return {name: part for name, part in found.items() if part["rows"]}


def against_given(grid: Grid, variant: str) -> dict[str, dict[str, Any]]:
    """A variant's values over those of inputs as given, by method."""
    rows = {method: grid.ratios((variant, method), ("given", method)) for method in TITLES}
    return {method: {"label": TITLES[method], **cells} for method, cells in rows.items() if cells}


def by_sparsity(title: str, form: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A table with a column for each sparsity that there is."""
    keys = dict.fromkeys(key for row in rows.values() for key in row if key != "label")
    columns = {"label": Column("method"), **{key: Column(key, form, spread=True) for key in keys}}
    return results.table(title, columns, rows)


MODEL = {
    "perplexity": Column("perplexity by character"),
    "parameters": Column("parameters", ",d"),
    "steps": Column("training steps", "d"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, help="folder of a run of train_gpt.py; by default one is trained")
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"), help="what the experiment writes")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    work = options.work
    given = [f"--out={work}", *([f"--run={options.run}"] if options.run else [])]
    prune_gpt.main([*given, *(["--resume"] if (work / "config.json").exists() else [])])
    report = json.loads((work / "report.json").read_text(encoding="utf-8"))
    run = Path(report["config"]["run"] or work / "gpt")
    parameters = sum(x.size for x in jax.tree.leaves(prune_gpt.load(run)[0].params))
    text, model = Path(read_settings(run)[0].data).name, Model(report["dense"], parameters, report["steps"])
    settings = {name: value for name, value in report["config"].items() if name not in ("run", "steps")}
    yield results.result(
        "pruning_gpt",
        "Perplexity on validation text of a character GPT whose kernels of attention and MLP are pruned.",
        options.command,
        tables(model, report["rows"]),
        settings={**settings, "model": "experiments/train_gpt.py", "text": text},
        seeds=range(settings["draws"]),
    )


def draw(found: dict[str, Any]) -> Figure:
    """The example's picture, of medians and ranges over the draws."""
    table = [
        {
            "method": method,
            "variant": variant,
            "sparsity": column if ":" in column else str(float(column.rstrip("%")) / 100),
            "perplexity": {"mean": cell["median"], "least": cell["low"], "most": cell["high"]},
        }
        for variant, name in VARIANTS.items()
        for method, row in found["tables"].get(name, {"rows": {}})["rows"].items()
        for column, cell in row.items()
        if column != "label"
    ]
    model = found["tables"]["model"]["rows"]["dense"]
    return picture({"table": table, "dense": model["perplexity"], "steps": model["steps"]})
