"""What `prune_gpt.py` says: a table as Markdown, its numbers as JSON, which order the methods have, and a picture."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.run_folder import versions

PICTURE = "perplexity.png"
TITLES = {"magnitude": "Magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "obs": "OBS"}
VARIANTS = {
    "given": "inputs of the model as given",
    "pruned": "inputs of the model as pruned so far",
    "owl": "OWL's share for each block",
    "matrix": "shares of whole matrices",
}
COLOURS = {"magnitude": "tab:gray", "wanda": "tab:orange", "sparsegpt": "tab:blue", "obs": "tab:green"}
PACKAGES = ("flax", "optax", "numpy")


def payload(measured: dict[str, Any], config: Any, step: int) -> dict[str, Any]:
    """All numbers, with means and spreads over the draws."""
    rows, table = measured["rows"], []
    for sparsity, method, variant in dict.fromkeys((row["sparsity"], row["method"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["sparsity"], row["method"], row["variant"]) == (sparsity, method, variant)]
        one = {"method": method, "sparsity": sparsity, "variant": variant, "draws": len(mine)}
        means = {name: statistics([row[name] for row in mine]) for name in ("perplexity", "error", "seconds")}
        table.append({**one, "achieved": mine[0]["achieved"], **means})
    return {
        "config": dataclasses.asdict(config),
        "steps": step,
        "versions": versions(*PACKAGES),
        "dense": measured["dense"],
        "table": table,
        "orders": list(orders(table)),
        "rows": rows,
    }


def entry(table: list[dict[str, Any]], method: str, sparsity: str, variant: str) -> dict[str, Any] | None:
    """The row of these; magnitude has the same inputs either way, none."""
    variant = "given" if method == "magnitude" and variant == "pruned" else variant
    rows = (x for x in table if (x["method"], x["sparsity"], x["variant"]) == (method, sparsity, variant))
    return next(rows, None)


def statistics(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}


def spread(x: dict[str, float]) -> float:
    return x["most"] - x["least"]


def orders(table: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of neighbours in the order magnitude, Wanda, SparseGPT, OBS: by how much the later one is better, in perplexity
    and in error, and whether the draws spread less than that.
    """
    for row in table:
        earlier = list(TITLES)[: list(TITLES).index(row["method"])]
        found = [x for method in earlier if (x := entry(table, method, row["sparsity"], row["variant"])) is not None]
        if not found:
            continue
        before = found[-1]
        one = {"better": row["method"], "worse": before["method"]} | {k: row[k] for k in ("sparsity", "variant")}
        # Errors over other inputs do not compare.
        for quantity in ("perplexity", "error") if before["variant"] == row["variant"] else ("perplexity",):
            gain = before[quantity]["mean"] - row[quantity]["mean"]
            noise = max(spread(before[quantity]), spread(row[quantity]))
            verdict = "yes" if gain > noise else "no" if gain < -noise else "within the spread"
            one[quantity] = {"gain": gain, "spread": noise, "holds": verdict}
        yield one


def number(x: dict[str, float]) -> str:
    """The mean, and half of what the draws differ by."""
    digits = 2 if x["mean"] < 100 else 1 if x["mean"] < 1000 else 0
    half = spread(x) / 2
    return f"{x['mean']:.{digits}f}" + (f" ± {half:.{max(digits, 2)}f}" if half else "")


def short(x: dict[str, float]) -> str:
    return f"{x['mean']:.3g}"


def markdown(data: dict[str, Any]) -> str:
    c, table = data["config"], data["table"]
    lines = [
        "# Pruning a GPT",
        "",
        f"Perplexity on {c['validation']} windows of the validation text; dense **{data['dense']:.3f}**. Calibration: "
        f"{c['draws']} draws of {c['sequences']} windows of the training text; means, ± half of the range over draws. "
        "Pruned are the kernels of attention and MLP, a share of each output's weights, on the inputs in the model as "
        "given. Sequential: on those in the model as pruned so far; OWL: each block with its own share; By matrix: "
        "shares of whole matrices. The error is ½ tr ΔᵀHΔ over those inputs, summed over layers.",
        "",
        "| Method | Sparsity | Perplexity | Error | Sequential | Error | OWL | Error | By matrix | Error | Seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in table if row["variant"] == "given"):
        cells = [TITLES[row["method"]], shown(row["sparsity"])]
        for variant in VARIANTS:
            found = entry(table, row["method"], row["sparsity"], variant)
            cells += ["", ""] if found is None else [number(found["perplexity"]), short(found["error"])]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']['mean']:.1f} |")
    lines += ["", "## Does the later method win?", "", summary(data), ""]
    return "\n".join(lines)


def shown(sparsity: str) -> str:
    return sparsity if ":" in sparsity else f"{float(sparsity):.0%}"


def summary(data: dict[str, Any]) -> str:
    """One line for each pair of neighbours."""
    lines = []
    for x in data["orders"]:
        where = f"{shown(x['sparsity'])}, {VARIANTS[x['variant']]}"
        parts = (
            f"{name} {q['holds']} ({q['gain']:+.3g}, spread {q['spread']:.2g})"
            for name, q in ((name, x[name]) for name in ("perplexity", "error") if name in x)
        )
        lines.append(f"- {TITLES[x['better']]} over {TITLES[x['worse']]} at {where}: {'; '.join(parts)}")
    return "\n".join(lines)


LINES: dict[str, Any] = {"given": "-", "pruned": ":", "owl": "--"}  # of the variants that are drawn


def draw(data: dict[str, Any], path: Path) -> None:
    picture(data).savefig(path, dpi=150)


def picture(data: dict[str, Any]) -> Figure:
    """Perplexity against the share removed, and of the patterns beside each other."""
    table = data["table"]
    shares = sorted({float(x["sparsity"]) for x in table if ":" not in x["sparsity"]})
    patterns = list(dict.fromkeys(x["sparsity"] for x in table if ":" in x["sparsity"]))
    methods = [method for method in TITLES if any(x["method"] == method for x in table)]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for method in methods:
        for variant in LINES:
            draw_line(left, [x for x in table if (x["method"], x["variant"]) == (method, variant)], method, variant)
    for i, method in enumerate(methods):
        draw_bars(right, table, method, patterns, (i - (len(methods) - 1) / 2) * 0.2)
    highest = max(x["perplexity"]["most"] for x in table if x["variant"] in LINES)
    for axes in (left, right):
        axes.axhline(data["dense"], color="black", linewidth=0.8)
    left.set(yscale="log", xlabel="share of weights removed", ylabel="perplexity (characters)")
    ticks = [t for t in (3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500) if data["dense"] <= t <= highest]
    left.set_yticks(ticks, list(map(str, ticks)))
    left.minorticks_off()
    left.set_ylim(0.95 * data["dense"], 1.08 * highest)
    left.set_xticks(shares, [f"{s:.0%}" for s in shares])
    right.set_xticks(range(len(patterns)), [f"{p[0]} of {p[2:]} kept" for p in patterns])
    left.annotate(
        f"dense {data['dense']:.2f}", (0.99, data["dense"]), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    handles = [
        Line2D([], [], color=COLOURS[method], marker="o", markersize=4, label=TITLES[method]) for method in methods
    ]
    drawn = {x["variant"] for x in table}
    handles += [Line2D([], [], color="black", linestyle=LINES[v], label=VARIANTS[v]) for v in LINES if v in drawn]
    left.legend(handles=handles, fontsize=8, loc="upper left")
    figure.suptitle(f"Pruning a GPT of {data['steps']} training steps: validation perplexity")
    return figure


def draw_line(axes: Axes, rows: list[dict[str, Any]], method: str, variant: str) -> None:
    rows = sorted((row for row in rows if ":" not in row["sparsity"]), key=lambda row: float(row["sparsity"]))
    if not rows:
        return
    values = [row["perplexity"] for row in rows]
    axes.errorbar(
        [float(row["sparsity"]) for row in rows], [v["mean"] for v in values], yerr=error_bars(values), capsize=2,
        color=COLOURS[method], linestyle=LINES[variant], marker="o" if variant == "given" else None, markersize=4,
    )  # fmt: skip


def draw_bars(axes: Axes, table: list[dict[str, Any]], method: str, patterns: list[str], shift: float) -> None:
    values = [found["perplexity"] for p in patterns if (found := entry(table, method, p, "given"))]
    places = np.arange(len(values)) + shift
    axes.bar(places, [v["mean"] for v in values], 0.18, color=COLOURS[method], yerr=error_bars(values), capsize=2)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value['mean']:.2f}", (place, value["most"]), ha="center", va="bottom", fontsize=8)


def error_bars(values: list[dict[str, float]]) -> np.ndarray:
    return np.array([[v["mean"] - v["least"] for v in values], [v["most"] - v["mean"] for v in values]])
