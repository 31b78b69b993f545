"""What `lm_head.py` says: its numbers as JSON, its tables as Markdown, and a summary for the screen."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

import fisher_optax as fo
from experiments.lm_head_parts import Measured
from experiments.lm_head_text import Text, code
from experiments.run_folder import versions
from experiments.trained_gpt import Trained

EXTREMES = 15  # tokens at either end of the table of importances
OFTEN = (0, 1, 10, 100, np.inf)  # bounds of the classes of frequency
CLASSES = ("never", "1 to 9 times", "10 to 99 times", "100 times or more")
PACKAGES = ("flax", "optax", "orbax-checkpoint", "numpy", "scipy", "matfree")


class Findings(NamedTuple):
    """All that a report is made of."""

    config: Any
    trained: Trained
    texts: list[Text]
    names: list[str]  # of tokens
    counts: np.ndarray  # of each among the labels of the first text
    measured: Measured
    shift: fo.fisher.ImportanceShift


def find(config: Any, trained: Trained, texts: list[Text], names: list[str], measured: Measured) -> Findings:
    counts = np.bincount(texts[0].labels.ravel(), minlength=len(names))
    shift = fo.fisher.importance_shift(measured.model, measured.other, config.rate)
    return Findings(config, trained, texts, names, counts, measured, shift)


def interval(fisher: fo.fisher.DiagonalFisher, level: float) -> tuple[np.ndarray, np.ndarray]:
    lower, upper = fisher.confidence_interval(level)
    return np.asarray(lower, np.float64), np.asarray(upper, np.float64)


def quotient(a: Any, b: Any) -> np.ndarray:
    """NaN where ``b`` is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)


def ratios(m: Measured) -> dict[str, np.ndarray]:
    """Empirical over true Fisher, of the head alone (against its closed form) and of the tied row (drawn labels)."""
    return {"head": quotient(m.head_empirical.mean, m.head_true), "whole row": quotient(m.empirical.mean, m.model.mean)}


def comparisons(m: Measured) -> dict[str, dict[str, float]]:
    """How an estimate agrees with what it is held against."""
    found = {}
    for name, estimate, against in (
        ("head: model's labels / exact", m.head_model.mean, m.head_true),
        ("head: text's labels / exact", m.head_empirical.mean, m.head_true),
        ("whole row: text's labels / model's", m.empirical.mean, m.model.mean),
    ):
        a, b = np.asarray(estimate, np.float64), np.asarray(against, np.float64)
        found[name] = {
            "correlation": float(np.corrcoef(a, b)[0, 1]),
            "rank_correlation": float(np.corrcoef(scipy.stats.rankdata(a), scipy.stats.rankdata(b))[0, 1]),
            "trace_ratio": float(a.sum() / b.sum()),
        }
    return found


def by_frequency(found: Findings) -> list[dict[str, Any]]:
    """Medians of `ratios` of tokens that are alike in frequency."""
    rows = []
    for name, low, high in zip(CLASSES, OFTEN, OFTEN[1:], strict=False):
        those = (found.counts >= low) & (found.counts < high)
        known = {of: ratio[those & np.isfinite(ratio)] for of, ratio in ratios(found.measured).items()}
        medians = {of: float(np.median(ratio)) if len(ratio) else None for of, ratio in known.items()}
        rows.append({"occurs": name, "tokens": int(those.sum()), **medians})
    return rows


def capacity(density: fo.fisher.Density) -> float:
    """``(Σλ)² / Σλ²`` of all eigenvalues, from two moments of the density."""
    first, second = (float(density.expectation(f)[0]) for f in (lambda λ: λ, lambda λ: λ * λ))
    return density.size * first**2 / second


def token_rows(found: Findings) -> list[dict[str, Any]]:
    """A row a token, the most important first."""
    m, shift = found.measured, found.shift
    lower, upper = interval(m.model, found.config.level)
    columns = {
        "token": found.names,
        "count": found.counts,
        "importance": m.model.mean, "lower": lower, "upper": upper,
        "importance_other": m.other.mean,
        "ratio_of_shares": shift.ratio, "z": shift.z, "p": shift.p, "significant": shift.significant,
        "empirical": m.empirical.mean,
        "head_true": m.head_true, "head_model": m.head_model.mean, "head_empirical": m.head_empirical.mean,
    }  # fmt: skip
    lists = [x if isinstance(x, list) else np.asarray(x).tolist() for x in columns.values()]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
    return sorted(rows, key=lambda row: -row["importance"])


def payload(found: Findings, seconds: float) -> dict[str, Any]:
    """What ``report.json`` holds."""
    m = found.measured
    texts = [
        {"name": t.name, "unknown": t.unknown, "loss": loss} for t, loss in zip(found.texts, m.losses, strict=True)
    ]
    lower, upper = m.density.trace_interval(found.config.level)
    blocks = {
        name: {
            "size": b.size, "rank_bound": b.rank_bound, "trace": float(b.trace),
            "effective_rank": float(b.effective_rank), "participation": float(b.participation),
        }
        for name, b in m.blocks.items()
    }  # fmt: skip
    λ = m.spectrum
    return {
        "versions": versions(*PACKAGES),
        "config": dataclasses.asdict(found.config),
        "seconds": round(seconds, 1),
        "steps_trained": found.trained.step,
        "texts": texts,
        "n_eff": float(m.model.n_eff),
        "tokens": token_rows(found),
        "labels": {"comparisons": comparisons(m), "by_frequency": by_frequency(found)},
        "spectrum": {
            "eigenvalues": np.asarray(λ.eigenvalues).tolist(),
            "residuals": np.asarray(λ.residuals).tolist(),
            "converged": np.asarray(λ.converged).tolist(),
            "gap": float(λ.gap) if len(λ.gaps) else None,
            "trace": float(m.density.trace),
            "lower": lower,
            "upper": upper,
            "participation": capacity(m.density),
            "parameters": m.density.size,
        },
        "blocks": blocks,
        "blocks_labels": m.drawn,
    }


def names_of(rows: list[dict[str, Any]]) -> str:
    return " ".join(code(row["token"]) for row in rows)


def shifted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The clearest first."""
    return sorted((row for row in rows if row["significant"]), key=lambda row: row["p"])


def summary(data: dict[str, Any]) -> str:
    """A few lines a part."""
    first, other = data["texts"]
    tokens, spectrum, c = data["tokens"], data["spectrum"], data["config"]
    different = shifted(tokens)
    more, less = ([row for row in different if (row["z"] > 0) is up][:10] for up in (True, False))
    blocks = data["blocks"]
    total, top = sum(b["trace"] for b in blocks.values()), max(blocks, key=lambda name: blocks[name]["trace"])
    lines = [
        f"A GPT of {spectrum['parameters']:,} parameters after {data['steps_trained']} steps: {first['loss']:.3f} nats "
        f"per character on {first['name']}, {other['loss']:.3f} on {other['name']} ({c['sequences']} sequences of "
        f"{c['context']} characters of each; {first['unknown']} and {other['unknown']} characters of these texts have "
        "no symbol of their own).",
        f"Importance: most {names_of(tokens[:10])}; least {names_of(tokens[-10:])}.",
        f"Shift: {len(different)} of {len(tokens)} tokens differ, at a false-discovery rate of {c['rate']:g}. More in "
        f"{other['name']}: {names_of(more) or 'none'}; less: {names_of(less) or 'none'}.",
    ]
    lines += [
        f"Labels, {name}: correlation {x['correlation']:.3f}, of ranks {x['rank_correlation']:.3f}, trace "
        f"{x['trace_ratio']:.2f} times."
        for name, x in data["labels"]["comparisons"].items()
    ]
    lines += [seen(data["labels"]["by_frequency"])]
    found = spectrum["eigenvalues"]
    lines += [
        f"Spectrum: largest eigenvalue {found[0]:.3g}, {sum(spectrum['converged'])} of {len(found)} converged; trace "
        f"{spectrum['trace']:.4g} in [{spectrum['lower']:.4g}, {spectrum['upper']:.4g}]; participation "
        f"ratio {spectrum['participation']:.0f} of {spectrum['parameters']:,} directions.",
        f"Blocks: most of the trace, {blocks[top]['trace'] / total:.0%}, in {top}; effective rank "
        f"{blocks[top]['effective_rank']:.0f} of {blocks[top]['rank_bound']} directions at most, from "
        f"{data['blocks_labels']} labels.",
    ]
    return "\n".join(lines) + "\n"


def seen(rows: list[dict[str, Any]]) -> str:
    """What the labels of the text make of rare tokens."""
    parts = [
        f"{row['head']:.2g} for the {row['tokens']} that occur {row['occurs']}"
        for row in rows
        if row["head"] is not None
    ]
    return f"Labels, rare tokens: of the head's exact Fisher the text's labels show, in the median, {', '.join(parts)}."


def cell(x: Any) -> str:
    if isinstance(x, str):
        return x.replace("|", "\\|")
    return "-" if x is None else f"{x:,}" if isinstance(x, int) else f"{x:.3g}"


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *(tuple(map(cell, row)) for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def markdown(data: dict[str, Any]) -> str:
    """What ``report.md`` holds: the summary, the tables, the pictures."""
    tokens, level = data["tokens"], f"{data['config']['level']:.0%} interval"
    ends = sorted({*range(len(tokens))[:EXTREMES], *range(len(tokens))[-EXTREMES:]})
    ranked = [
        (i + 1, code(t["token"]), t["count"], t["importance"], f"{t['lower']:.3g} to {t['upper']:.3g}")
        for i, t in enumerate(tokens)
        if i in ends
    ]
    parts = {
        "importance": [
            f"By the model's labels, {data['config']['samples']} a character; n_eff is {data['n_eff']:.0f} sequences.",
            "",
            *table(("rank", "token", "occurs", "Fisher", level), ranked),
        ],
        "shift": table(
            ("token", "share, times", "z", "p"),
            [(code(t["token"]), t["ratio_of_shares"], t["z"], t["p"]) for t in shifted(tokens)],
        ),
        "labels": [
            *table(
                ("", "correlation", "of ranks", "trace, times"),
                [(name, *x.values()) for name, x in data["labels"]["comparisons"].items()],
            ),
            "",
            "Medians of the empirical over the true Fisher:",
            "",
            *table(
                ("occurs", "tokens", "head", "whole row"),
                [tuple(row.values()) for row in data["labels"]["by_frequency"]],
            ),
        ],
        "spectrum": ["![density](density.png)"],
        "blocks": table(
            ("block", "parameters", "at most", "trace", "effective rank", "participation ratio"),
            [(name, *block.values()) for name, block in data["blocks"].items()],
        ),
    }
    lines = ["# What a GPT's tokens are worth", "", summary(data).replace("\n", "\n\n").strip(), ""]
    for name, body in parts.items():
        lines += [f"## {name.capitalize()}", "", f"![{name}]({name}.png)", "", *body, ""]
    return "\n".join(lines)
