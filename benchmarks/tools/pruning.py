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
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks.results import Column, result, spread, table
from experiments import prune_gpt
from experiments.prune_gpt_report import TITLES, picture
from experiments.trained_gpt import read_settings

# What the tables of perplexities are called, by the experiment's names, and what they hold.
VARIANTS = {"given": "given", "pruned": "sequential", "owl": "owl", "matrix": "matrix"}
WHAT = {
    "given": "inputs of the model as given, shares of each output's weights",
    "sequential": "inputs of the model as pruned so far",
    "owl": "OWL's share for each block",
    "matrix": "shares of whole matrices",
}
MODEL = {
    "perplexity": Column("perplexity by character"),
    "parameters": Column("parameters", ",d"),
    "steps": Column("training steps", "d"),
}
Draws = Mapping[tuple[str, str], Mapping[str, list[float]]]  # by variant and method, and by sparsity


def draws_of(rows: Sequence[Mapping[str, Any]], quantity: str) -> Draws:
    """The values of a quantity, of what `prune_gpt` measured."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["draw"]):
        of_method = found.setdefault((VARIANTS[row["variant"]], row["method"]), {})
        sparsity = row["sparsity"] if ":" in row["sparsity"] else f"{float(row['sparsity']):.0%}"
        of_method.setdefault(sparsity, []).append(row[quantity])
    return found


def ratios(draws: Draws, over: tuple[str, str], under: tuple[str, str]) -> dict[str, Any]:
    """One variant and method by another, draw by draw; what needs no data has one draw for all."""
    found = {}
    for key, a in draws.get(over, {}).items():
        if b := draws.get(under, {}).get(key):
            count = max(len(a), len(b))
            pairs = zip(a * (count // len(a)), b * (count // len(b)), strict=True)
            found[key] = spread([x / y for x, y in pairs])
    return found


def tables(model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the experiment's ``rows``, one for each model that was pruned."""
    draws, errors, found = draws_of(rows, "perplexity"), draws_of(rows, "error"), dict[str, Any]()

    def add(name: str, title: str, form: str, cells: Mapping[str, Mapping[str, Any]]) -> None:
        keys = dict.fromkeys(key for row in cells.values() for key in row)
        columns = {"label": Column("method"), **{key: Column(key, form, spread=True) for key in keys}}
        filled = {method: {"label": TITLES.get(method, method), **row} for method, row in cells.items() if row}
        if filled:
            found[name] = table(title, columns, filled)

    for name, what in WHAT.items():
        of_variant = {m: {key: spread(x) for key, x in draws.get((name, m), {}).items()} for m in TITLES}
        add(name, f"Perplexity after pruning: {what}", ".2f", of_variant)
    order = [method for method in TITLES if ("given", method) in draws]
    steps = {b: ratios(draws, ("given", b), ("given", a)) for a, b in itertools.pairwise(order)}
    add("order", "Perplexity as a share of the method's before", ".3f", steps)
    shared = [(f"{name}_share", draws, f"Perplexity by {what}") for name, what in WHAT.items() if name != "given"]
    shared.append(("sequential_error", errors, "Error of the layers by inputs as pruned so far"))
    for name, of, told in shared:
        variant = name.partition("_")[0]
        shares = {method: ratios(of, (variant, method), ("given", method)) for method in TITLES}
        add(name, f"{told}, share of that by inputs as given", ".3f", shares)
    for worse, better in itertools.pairwise(order):
        found["order"]["rows"][better]["label"] = f"{TITLES[better]} over {TITLES[worse]}"
    return {"model": table("The model before", MODEL, {"dense": model}), **found}


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
    model = {"perplexity": report["dense"], "parameters": parameters, "steps": report["steps"]}
    settings = {name: value for name, value in report["config"].items() if name not in ("run", "steps")}
    yield result(
        "pruning_gpt",
        "Perplexity on validation text of a character GPT whose kernels of attention and MLP are pruned.",
        options.command,
        tables(model, report["rows"]),
        settings=settings | {"model": "experiments/train_gpt.py", "text": Path(read_settings(run)[0].data).name},
        seeds=range(settings["draws"]),
    )


def draw(found: dict[str, Any]) -> Figure:
    """The experiment's picture, of medians and ranges over the draws."""
    parts, rows = found["tables"], []
    for variant, name in VARIANTS.items():
        for method, row in parts[name]["rows"].items() if name in parts else ():
            for key in row.keys() - {"label"}:
                ends = {"mean": row[key]["median"], "least": row[key]["low"], "most": row[key]["high"]}
                sparsity = key if ":" in key else str(float(key.rstrip("%")) / 100)
                rows.append({"method": method, "variant": variant, "sparsity": sparsity, "perplexity": ends})
    model = parts["model"]["rows"]["dense"]
    rows.sort(key=lambda row: row["sparsity"])
    return picture({"table": rows, "dense": model["perplexity"], "steps": model["steps"]})
