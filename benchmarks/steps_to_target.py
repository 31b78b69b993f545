"""How many steps SOAP and Muon need for the validation loss that AdamW ends with, and what SOAP's smaller states cost.

    python benchmarks/steps_to_target.py

The 808k-parameter character GPT of `examples/train_gpt.py` on the Python standard library's sources: context 64, batch
16, 300 steps, warm-up and cosine, the same for all; what SOAP and Muon do not take gets the AdamW of AdamW's own row.
Rates are tuned on the first seed, each method among its three: AdamW for the lowest final loss, the others for the
fewest steps to it; the best is run on all seeds. Writes ``results/steps_to_target.json`` and ``.png``.
"""

import argparse
import functools
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import optimizers  # noqa: E402
import text  # noqa: E402
import train_gpt  # noqa: E402
from benchmarks import harness  # noqa: E402
from gpt_config import Config  # noqa: E402

mpl.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RATES = {
    "adamw": (1e-3, 3e-3, 1e-2),
    "muon": (5e-3, 1e-2, 2e-2),
    "soap": (3e-3, 6e-3, 1e-2),
    "optax_muon": (1e-2, 3e-2, 6e-2),
}
TARGETS = {"soap": 0.55, "muon": 0.65}  # the share of AdamW's steps that the project promises
SMALL_RATE = 6e-3  # the smaller states are compared with the full one at one rate
SMALLER = {
    "soap, packed factors": {"factor_storage": "packed"},
    "soap, bfloat16 factors and bases": {"factor_dtype": jnp.bfloat16},
    "soap, shorter side only": {"sides": "shorter"},
}


COLUMNS = {
    "method": "method",
    "rate": "rate",
    "val_loss": "final val loss",
    "spread": "spread",
    "share_of_steps": "share of AdamW's steps",
    "worst_share": "worst seed",
    "promised": "at most",
    "state": "state/params",
}
Rows = list[dict[str, Any]]  # the entries of one run, as `train_gpt.train` returns them


def first_below(rows: Rows, loss: float) -> float | None:
    """The step at which the validation loss comes down to ``loss``, between evaluations by straight lines."""
    for before, after in itertools.pairwise(rows):
        if after["val_loss"] <= loss:
            share = (before["val_loss"] - loss) / (before["val_loss"] - after["val_loss"])
            return before["step"] + share * (after["step"] - before["step"])
    return None


def quality(rows: Rows, target: float) -> tuple[float, float]:
    """What a rate is chosen by: the steps to the loss that AdamW ends with, then its own final loss."""
    return first_below(rows, target) or float("inf"), rows[-1]["val_loss"]


def state_ratio(method: str, corpus: Any) -> float:
    """Bytes of optimizer state over bytes of parameters."""
    config = Config(optimizer=method).resolve()
    model = train_gpt.make_model(config, len(corpus.characters))
    params = jax.eval_shape(lambda key: train_gpt.initial_params(model, key), jax.random.key(0))
    state = jax.eval_shape(train_gpt.make_optimizer(train_gpt.program_of(config), 1.0).init, params)
    return harness.nbytes(state) / harness.nbytes(params)


def summary(runs: dict[str, list[Rows]], rates: dict[str, float], corpus: Any) -> list[dict[str, Any]]:
    """A row a method: final losses, and the share of AdamW's steps to AdamW's final loss of the same seed."""
    targets = [rows[-1]["val_loss"] for rows in runs["adamw"]]
    table = []
    for name, seeds in runs.items():
        final = [rows[-1]["val_loss"] for rows in seeds]
        steps = [first_below(rows, target) for rows, target in zip(seeds, targets, strict=False)]
        shares = [s / seeds[0][-1]["step"] for s in steps if s is not None]
        reached = shares and len(shares) == len(steps)
        table.append(
            {
                "method": name,
                "rate": rates[name],
                "seeds": len(seeds),
                "val_loss": statistics.mean(final),
                "spread": max(final) - min(final),
                "share_of_steps": statistics.mean(shares) if reached else None,
                "worst_share": max(shares) if reached else None,
                "promised": TARGETS.get(name),
                "state": state_ratio(name, corpus),
            }
        )
    return table


def picture(runs: dict[str, list[Rows]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    target = statistics.mean(rows[-1]["val_loss"] for rows in runs["adamw"])
    axes.axhline(target, color="grey", linewidth=0.8, linestyle=":", label="AdamW's final loss")
    for i, name in enumerate(n for n in runs if n not in SMALLER):
        for j, rows in enumerate(runs[name]):
            axes.plot(
                [r["step"] for r in rows],
                [r["val_loss"] for r in rows],
                color=f"C{i}",
                linewidth=1.2,
                alpha=0.8,
                label=name if j == 0 else None,
            )
    axes.set(
        xlabel="step",
        ylabel="validation loss [nats per character]",
        ylim=(1.6, 3.4),
        title="808k-parameter character GPT, three seeds each",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def train_all(
    base: Config, corpus: Any, seeds: int
) -> tuple[dict[str, dict[float, Rows]], dict[str, float], dict[str, list[Rows]]]:
    """The tuning runs by method and rate, the best rates, and the runs of each method at its best rate, one a seed."""
    for name, options in SMALLER.items():
        optimizers.METHODS[name] = optimizers.Method(functools.partial(optimizers.soap, **options), SMALL_RATE)

    def run(name: str, rate: float, seed: int) -> Rows:
        config = Config(**{**vars(base), "optimizer": name, "lr": rate, "seed": seed})
        bar.set_description_str(f"{name} {rate:g} seed {seed}")
        try:
            rows = train_gpt.train(config, corpus)
        except train_gpt.Diverged:
            rows = [{"step": base.steps, "val_loss": float("inf")}]
        bar.update()
        return rows

    count = sum(map(len, RATES.values())) + len(RATES) * (seeds - 1) + len(SMALLER) * seeds
    with tqdm(total=count, unit="run") as bar:
        tuning = {name: {rate: run(name, rate, 0) for rate in grid} for name, grid in RATES.items()}
        target = min(rows[-1]["val_loss"] for rows in tuning["adamw"].values())
        rates = {name: min(grid, key=lambda rate: quality(grid[rate], target)) for name, grid in tuning.items()}
        runs = {
            name: [tuning[name][rate], *(run(name, rate, seed) for seed in range(1, seeds))]
            for name, rate in rates.items()
        }
        rates |= dict.fromkeys(SMALLER, SMALL_RATE)
        runs |= {name: [run(name, rates[name], seed) for seed in range(seeds)] for name in SMALLER}
    return tuning, rates, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    environment = harness.environment()
    base = Config(steps=args.steps, eval_every=15, eval_batches=10)
    corpus = text.load_corpus(base.data, base.vocab, base.context)
    tuning, rates, runs = train_all(base, corpus, args.seeds)

    rows = summary(runs, rates, corpus)
    print(harness.table(rows, COLUMNS))
    payload = {
        "environment": environment,
        "setting": vars(base),
        "text_sha256": corpus.sha256,
        "table": rows,
        "tuning": {name: {f"{rate:g}": r[-1]["val_loss"] for rate, r in grid.items()} for name, grid in tuning.items()},
        "curves": {name: [[[r["step"], r["val_loss"]] for r in rs] for rs in seeds] for name, seeds in runs.items()},
    }
    print(harness.write_results("steps_to_target", payload, args.out))
    picture(runs, args.out / "steps_to_target.png")


if __name__ == "__main__":
    main()
