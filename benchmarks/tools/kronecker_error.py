"""How near a Kronecker product follows the Fisher: DyKAF, Shampoo and KL factors against the nearest one.

`experiments.kronecker_error` says what is drawn and what an error is. "Off-diagonal" is the share of |F|² outside the
diagonal in the eigenbasis of L and R: what SOAP and DyKAF ignore. All in float64.
"""

import argparse
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import pictures, results
from benchmarks.catalogue import positive
from benchmarks.results import columns
from experiments import kronecker_error as experiment
from experiments.kronecker_error import EVERY, NEAREST, SAMPLES, SETTINGS, STEPS

EARLY = 20  # steps: an error that tables tell beside the last
LABELS = {
    NEAREST: "nearest Kronecker product",
    "dykaf": "DyKAF",
    "dykaf_parallel": "DyKAF, parallel",
    "shampoo_trace": "Shampoo, trace-scaled",
    "shampoo_half": "Shampoo, L^½ ⊗ R^½",
    "kl": "KL",
}
TITLES = {"independent": "independent N(0, I)", "kronecker": "Kronecker covariance", "drifting": "drifting"}
WHAT = {"_early": f"error at {EARLY}", "": f"at {STEPS}", "_off": "off-diagonal"}
ERRORS = columns("label: method") | columns(
    ";".join(f"{setting}{key}: {title}: {what} ±" for setting, title in TITLES.items() for key, what in WHAT.items())
    + "".join(f"; hessian_{count}: Hessian: error, {count} samples ±" for count in SAMPLES)
)
DYKAF = columns(
    "lower: error lower by | .1% ±; lower_off: off-diagonal lower by | .1% ±; first: first nearer at step | d"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=positive, default=5, help="how many")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    measured, medians = dict[str, dict[str, Any]](), dict[str, Any]()
    with jax.enable_x64(True):
        for setting, make in {**SETTINGS, "hessian": None}.items():
            of_seed = experiment.hessian_errors if make is None else functools.partial(experiment.run_setting, make)
            seeds = [of_seed(seed) for seed in tqdm(range(options.seeds), desc=setting)]
            measured[setting] = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    for setting in SETTINGS:
        middle = {name: np.median(seeds, 0).T.tolist() for name, seeds in measured[setting].items()}
        medians[setting] = {name: dict(zip(("error", "off"), both, strict=True)) for name, both in middle.items()}
    yield results.result(
        "kronecker_error",
        "How far Kronecker products made from single gradients are from a Fisher that is known.",
        options.command,
        tables(measured),
        settings=experiment.SETTINGS_TOLD,
        seeds=range(options.seeds),
        details={"steps": list(range(EVERY, STEPS + 1, EVERY)), "medians": medians},
    )


def tables(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of what `experiment.run_setting` and `experiment.hessian_errors` found for each seed."""
    rows: dict[str, dict[str, Any]] = {name: {"label": label} for name, label in LABELS.items()}
    for setting in SETTINGS:
        for name, seeds in measured[setting].items():
            error, off = np.moveaxis(np.array(seeds), 2, 0)  # each (seeds, times)
            at = {setting: error[:, -1], f"{setting}_early": error[:, EARLY // EVERY - 1], f"{setting}_off": off[:, -1]}
            rows[name] |= {key: results.spread(values.tolist()) for key, values in at.items()}
    for name, seeds in measured["hessian"].items():
        cells = zip(SAMPLES, map(list, zip(*seeds, strict=True)), strict=True)
        rows[name] |= {f"hessian_{count}": results.spread(values) for count, values in cells}
    gains = {setting: gain(measured[setting]) for setting in SETTINGS}
    return {
        "errors": results.table("Relative error, and share of |F|² off the diagonal in the eigenbasis", ERRORS, rows),
        "dykaf": results.table("DyKAF against trace-scaled Shampoo", DYKAF, gains),
    }


def gain(methods: Mapping[str, Any]) -> dict[str, Any]:
    """By how much DyKAF's error, and its off-diagonal share, are the lower, seed by seed; and since which step."""
    ours, theirs = (np.array(methods[name]) for name in ("dykaf", "shampoo_trace"))  # each (seeds, times, 2)
    lower = [results.spread(values.tolist()) for values in (1 - ours[:, -1] / theirs[:, -1]).T]
    nearer = np.flatnonzero(np.median(ours[..., 0], 0) < np.median(theirs[..., 0], 0))
    first = int((nearer[0] + 1) * EVERY) if len(nearer) else None
    return {"lower": lower[0], "lower_off": lower[1], "first": first}


def draw(found: dict[str, Any]) -> Figure:
    """Errors above, off-diagonal shares below, over steps; beside them the Hessian's, over samples."""
    figure, rows = Figure(figsize=(17, 7.5), layout="constrained"), found["tables"]["errors"]["rows"]
    axes, steps, medians = figure.subplots(2, 4), found["details"]["steps"], found["details"]["medians"]
    # Of two lines that often coincide, the upper one is broken.
    styles = dict(zip(LABELS, ("k--", "C0-", "C1:", "C2-", "C3-.", "C4-"), strict=True))
    for column, setting in enumerate(TITLES):
        for ax, kind in zip(axes[:, column], ("error", "off"), strict=True):
            for name, values in medians[setting].items():
                ax.plot(steps, values[kind], styles[name], label=LABELS[name], lw=1.4)
            what = "relative error" if kind == "error" else "off-diagonal share of |F|²"
            ax.set(title=TITLES[setting], xlabel="steps", ylabel=what, yscale="log")
    hessian, legend = axes[:, 3]
    for name, style in styles.items():
        pictures.line(hessian, SAMPLES, [rows[name][f"hessian_{count}"] for count in SAMPLES], style)
    hessian.set(title="Hessian of a softmax regression", xlabel="samples", xscale="log", yscale="log")
    for ax in axes.flat[:-1]:
        pictures.plain_ticks(ax)
    legend.axis("off")
    legend.legend(*axes[0, 0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.suptitle(f"Kronecker products against a known Fisher, medians of {len(found['seeds'])} seeds")
    return figure
