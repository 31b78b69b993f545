"""Loss over steps of the methods that take statistics of layers, beside SGD, AdamW, Muon and SOAP.

    python -m benchmarks.training_curves --task gpt --seeds 3

`digits` is the CNN of `examples/train_images.py` on scikit-learn's digits, 10 epochs; `gpt` the 808k-parameter GPT of
`examples/train_gpt.py`, 300 steps; `gpt_head` the same with an output layer of its own, for K-FAC's ways with that. A
method's rate is the one of its grid with the lowest final held-out loss on seed 0; digits, `gpt_head` and the pair SOAP
and KFAC-SOAP then go on with the other seeds. The file is written after each run, and a run that it holds is not
repeated. Writes ``results/training_curves_<task>.json`` and ``.png``.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import gpt_config  # noqa: E402
import images  # noqa: E402
import images_config  # noqa: E402
import text  # noqa: E402
import train_gpt  # noqa: E402
import train_images  # noqa: E402
from benchmarks import harness  # noqa: E402
from loop import Diverged  # noqa: E402

PAIR = ("kfac_soap", "soap")
REFERENCES = ("sgd", "adamw", "muon", "soap")  # drawn dashed
COLORED = ("adamw", "muon", "soap", "kfac_soap", "kfac", "ekfac", "frog", "sgd", "kfrog", "kfac_true_head")
COLORS = {name: f"C{i}" for i, name in enumerate(COLORED)} | {"kfac_empirical_head": "C2"}  # the same in all pictures

Run = dict[str, Any]  # method, rate, seed and rows, the entries of `train`; or, without rows, why it diverged


class Task(NamedTuple):
    """What is trained, and with which rates."""

    base: Any  # a configuration of the example
    data: Any
    train: Callable[..., list[dict[str, Any]]]
    loss: str  # the held-out loss in the entries
    rates: dict[str, tuple[float, ...]]  # a grid a method
    repeated: Sequence[str]  # the methods that run on every seed
    pair: tuple[str, str]  # of them, compared seed by seed
    labels: dict[str, Any]  # of the picture


def gpt() -> Task:
    base = gpt_config.Config(steps=300, eval_every=50, eval_batches=10)
    rates = {
        # One rate: the best of three in results/steps_to_target.json, which has the same setting.
        "soap": (6e-3,),
        "kfac_soap": (3e-3, 6e-3, 1e-2),
        "adamw": (3e-3,),
        "muon": (1e-2,),
        "kfac": (3e-3, 6e-3, 1e-2),
        "ekfac": (3e-3, 6e-3, 1e-2),
        "frog": (3e-3, 6e-3, 1e-2),
        "kfrog": (1e-4, 3e-4, 1e-3),
    }
    labels = {"title": "808k-parameter character GPT", "ylabel": "validation loss (nats per character)"}
    corpus = text.load_corpus(base.data, base.vocab, base.context)
    return Task(base, corpus, train_gpt.train, "val_loss", rates, PAIR, PAIR, {**labels, "ylim": (1.7, 3.0)})


def digits() -> Task:
    base = images_config.Config(epochs=10)
    rates = {
        "sgd": (0.03, 0.1, 0.3),
        "adamw": (3e-3, 9e-3, 2e-2),
        "muon": (3e-3, 1e-2, 3e-2),
        "soap": (1e-3, 3e-3, 9e-3),
        "kfac_soap": (1e-3, 3e-3, 9e-3),
        "kfac": (3e-3, 1e-2, 3e-2),
        "ekfac": (3e-3, 1e-2, 3e-2),
        "frog": (1e-3, 3e-3, 9e-3),
        "kfrog": (1e-4, 3e-4, 1e-3),
    }
    labels = {"title": "CNN on scikit-learn's digits", "ylabel": "test loss (nats per image)", "yscale": "log"}
    return Task(base, images.load_images(base.data), train_images.train, "test_loss", rates, tuple(rates), PAIR, labels)


def gpt_head() -> Task:
    """K-FAC with three right sides for a head of the GPT's own."""
    tied = gpt()
    base = dataclasses.replace(tied.base, head="own")
    rates = dict.fromkeys(("kfac", "kfac_true_head", "kfac_empirical_head"), (6e-3, 1e-2)) | {"adamw": (3e-3,)}
    labels = {**tied.labels, "title": "GPT with its own head"}
    return tied._replace(base=base, rates=rates, repeated=tuple(rates), pair=("kfac_true_head", "kfac"), labels=labels)


TASKS = {"gpt": gpt, "gpt_head": gpt_head, "digits": digits}


class Results:
    """The runs there are, kept in a file."""

    def __init__(self, path: Path, task: Task):
        self.path, self.task = path, task
        self.fixed = {"setting": dataclasses.asdict(task.base), "sha256": task.data.sha256}
        self.environment, self.runs = harness.environment(), list[Run]()
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if any(found[key] != value for key, value in self.fixed.items()):
                raise ValueError(f"{path} holds runs with another setting or on other data: move it, or give --out.")
            self.environment, self.runs = found["environment"], found["runs"]

    def of(self, method: str, rate: float | None = None, seed: int | None = None) -> list[Run]:
        return [
            r for r in self.runs
            if r["method"] == method and rate in (None, r["rate"]) and seed in (None, r["seed"])
        ]  # fmt: skip

    def add(self, method: str, rate: float, seed: int) -> None:
        run: Run = {"method": method, "rate": rate, "seed": seed}
        config = dataclasses.replace(self.task.base, optimizer=method, lr=rate, seed=seed)
        try:
            run["rows"] = self.task.train(config, self.task.data)
            run["damping"] = config.resolve().damping
        except Diverged as error:
            run["diverged"] = str(error)
        self.runs.append(run)
        self.write()

    def final(self, run: Run) -> float:
        return run["rows"][-1][self.task.loss] if "rows" in run else float("inf")

    def best(self, method: str) -> list[Run]:
        """The method's runs at the rate that ends lowest on seed 0, by seed."""
        rate = min(self.of(method, seed=0), key=self.final)["rate"]
        return sorted(self.of(method, rate), key=lambda run: run["seed"])

    def table(self) -> list[dict[str, Any]]:
        rows = []
        for method in dict.fromkeys(run["method"] for run in self.runs):
            best = self.best(method)
            losses = [self.final(run) for run in best]
            row = {"method": method, "rate": best[0]["rate"], "seeds": len(best), "loss": statistics.mean(losses)}
            tuning = {f"{run['rate']:g}": round(self.final(run), 4) for run in self.of(method, seed=0)}
            rows.append({**row, "spread": max(losses) - min(losses), "tuning": tuning})
        return sorted(rows, key=lambda row: row["loss"])

    def difference(self) -> list[dict[str, float]]:
        """How much lower or higher the first of the pair's loss is at each evaluation, by seed and on average."""
        ours, theirs = (self.best(name) if self.of(name) else [] for name in self.task.pair)
        both = [(a["rows"], b["rows"]) for a, b in zip(ours, theirs, strict=False) if "rows" in a and "rows" in b]
        found = []
        for pairs in zip(*(zip(a, b, strict=True) for a, b in both), strict=True):
            by_seed = [a[self.task.loss] - b[self.task.loss] for a, b in pairs]
            found.append({"step": pairs[0][0]["step"], "by_seed": by_seed, "mean": statistics.mean(by_seed)})
        return found

    def write(self) -> None:
        derived = {"table": self.table(), " minus ".join(self.task.pair): self.difference()}
        payload = {"environment": self.environment, **self.fixed, **derived, "runs": self.runs}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)  # all of it or nothing


def missing(results: Results, methods: Sequence[str], seeds: int) -> Iterator[tuple[str, float, int]]:
    """The runs still to be made: of each method its grid on seed 0, then the best rate on the other seeds."""
    for method in methods:
        for rate in results.task.rates[method]:
            if not results.of(method, rate, seed=0):
                yield method, rate, 0
        for seed in range(1, seeds if method in results.task.repeated else 1):
            rate = results.best(method)[0]["rate"]
            if not results.of(method, rate, seed):
                yield method, rate, seed


def draw(axes: Axes, results: Results, methods: Sequence[str], *, every_seed: bool) -> None:
    for name in methods:
        runs = [run for run in results.best(name) if "rows" in run][: None if every_seed else 1]
        for i, run in enumerate(runs):
            axes.plot(
                [row["step"] for row in run["rows"]],
                [row[results.task.loss] for row in run["rows"]],
                "--" if name in REFERENCES else "-",
                color=COLORS[name],
                linewidth=1.6,
                alpha=0.85,
                label=f"{name}, rate {run['rate']:g}: {results.final(run):.3g}" if i == 0 else None,
            )
    axes.set(xlabel="step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def picture(results: Results, path: Path) -> None:
    """All methods on seed 0 on the left; the pair's seeds on the right."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    order = [row["method"] for row in results.table()]
    draw(left, results, order, every_seed=False)
    draw(right, results, [name for name in results.task.pair if name in order], every_seed=True)
    labels = dict(results.task.labels)
    left.set(**{**labels, "title": f"{labels.pop('title')}, seed 0: the best rate of each method, and its final loss"})
    right.set(**labels, title=f"{' and '.join(results.task.pair)}, every seed")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these (default: all)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in TASKS if args.task == "all" else [args.task]:
        task = TASKS[name]()
        results = Results(args.out / f"training_curves_{name}.json", task)
        with tqdm(unit="run") as bar:
            for method, rate, seed in missing(results, args.methods or list(task.rates), args.seeds):
                bar.set_description_str(f"{name}: {method} {rate:g} seed {seed}")
                results.add(method, rate, seed)
                bar.update()
        results.write()
        columns = ("method", "rate", "seeds", "loss", "spread", "tuning")
        print(harness.table(results.table(), dict(zip(columns, columns, strict=True))))
        picture(results, args.out / f"training_curves_{name}.png")


if __name__ == "__main__":
    main()
