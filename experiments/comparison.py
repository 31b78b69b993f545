"""Runs of many methods on one task, kept on disk: rates tried on the first seed, the best of each on the other seeds.

A run that is there is not made again, so an interrupted comparison goes on where it was.
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.loop import Diverged
from experiments.run_folder import Row, replace_text

Run = dict[str, Any]  # method, rate, seed and rows, the entries of `train`; or, without rows, why it diverged


class Task(NamedTuple):
    """What is trained, and how a method's rate is chosen."""

    base: Any  # a configuration, a dataclass with optimizer, lr and seed
    data: Any  # with `sha256`
    train: Callable[..., list[Row]]  # (configuration, data) -> entries
    loss: str  # of the last entry: the rate with the lowest one is the best
    rates: Mapping[str, Sequence[float]]  # that are tried, by method


class Runs:
    """The runs there are of a task.

    Args:
        path: a JSON file, written anew after every run; what it holds already counts.
        task: what is trained.

    Raises:
        ValueError: the file holds runs with another setting or on other data.
    """

    def __init__(self, path: Path, task: Task):
        self.path, self.task = path, task
        self.fixed = {"setting": dataclasses.asdict(task.base), "sha256": task.data.sha256}
        self.runs: list[Run] = []
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if any(found[key] != value for key, value in self.fixed.items()):
                raise ValueError(
                    f"{str(path)!r} holds runs with another setting or on other data. Move it, or name another folder."
                )
            self.runs = found["runs"]

    def of(self, method: str, rate: float | None = None, seed: int | None = None) -> list[Run]:
        """Those of a method, perhaps at one rate or of one seed, by seed."""
        found = (
            run for run in self.runs
            if run["method"] == method and rate in (None, run["rate"]) and seed in (None, run["seed"])
        )  # fmt: skip
        return sorted(found, key=lambda run: run["seed"])

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run["method"] for run in self.runs))

    def final(self, run: Run) -> float:
        """What the run ended with; infinite if it diverged."""
        return run["rows"][-1][self.task.loss] if "rows" in run else float("inf")

    def best(self, method: str) -> list[Run]:
        """The method's runs, by seed, at the rate that ends lowest on the first seed."""
        first = min(run["seed"] for run in self.of(method))
        return self.of(method, min(self.of(method, seed=first), key=self.final)["rate"])

    def finals(self, method: str) -> list[float]:
        """Final losses at the best rate, by seed."""
        return [self.final(run) for run in self.best(method)]

    def order(self) -> list[str]:
        """The methods, the lowest median of final losses first."""
        return sorted(self.methods, key=lambda method: statistics.median(self.finals(method)))

    def shares(self, method: str, reference: str = "adamw") -> list[float | None]:
        """By seed, the share of the reference's steps after which the method's loss is what the reference ends with.

        Straight lines join the evaluations; None: it never is, or the reference diverged.
        """
        ends = {run["seed"]: run["rows"][-1] for run in self.best(reference) if "rows" in run}
        found: list[float | None] = []
        for run in self.best(method):
            if (end := ends.get(run["seed"])) and "rows" in run:
                step = first_below(run["rows"], self.task.loss, end[self.task.loss])
                found.append(None if step is None else step / end["step"])
            else:
                found.append(None)
        return found

    def missing(self, seeds: Sequence[int]) -> Iterator[tuple[str, float, int]]:
        """The runs still to be made; those of later seeds follow from what was made before them."""
        for method, rates in self.task.rates.items():
            for rate in rates:
                if not self.of(method, rate, seeds[0]):
                    yield method, rate, seeds[0]
        for seed in seeds[1:]:
            for method in self.task.rates:
                rate = self.best(method)[0]["rate"]
                if not self.of(method, rate, seed):
                    yield method, rate, seed

    def make(self, seeds: Sequence[int], on_run: Callable[["Runs"], object] = lambda runs: None) -> None:
        """Make what is missing, with a progress bar; ``on_run`` is called after each."""
        grid = self.task.rates
        total = sum(map(len, grid.values())) + len(grid) * (len(seeds) - 1)
        there = sum(len({run["rate"] for run in self.of(m, seed=seeds[0])} & {*rates}) for m, rates in grid.items())
        there += sum(bool(self.of(method, seed=seed)) for method in grid for seed in seeds[1:])
        with tqdm(total=total, unit="run", initial=there) as bar:
            for method, rate, seed in self.missing(seeds):
                bar.set_description_str(f"{method} {rate:g} seed {seed}")
                self._add(method, rate, seed)
                bar.update()
                on_run(self)
            bar.update(total - bar.n)

    def make_inside(self, seeds: Sequence[int], most: int = 4) -> None:
        """As `make`, after each grid of several rates is extended by a factor of two, ``most`` times at most, until its
        best rate is inside.
        """
        for _ in range(most):
            self.make(seeds[:1])
            rates = {name: [*tried, *self._beyond(name, seeds[0])] for name, tried in self.task.rates.items()}
            if rates == {name: [*tried] for name, tried in self.task.rates.items()}:
                break
            self.task = self.task._replace(rates=rates)
        self.make(seeds)

    def _beyond(self, method: str, seed: int) -> list[float]:
        """The rate beyond the end of the grid that is the best so far, if it is one of several."""
        tried, best = [run["rate"] for run in self.of(method, seed=seed)], self.best(method)[0]["rate"]
        return [best * 2] * (len(tried) > 1 and best == max(tried)) + [best / 2] * (
            len(tried) > 1 and best == min(tried)
        )

    def _add(self, method: str, rate: float, seed: int) -> None:
        run: Run = {"method": method, "rate": rate, "seed": seed}
        config = dataclasses.replace(self.task.base, optimizer=method, lr=rate, seed=seed)
        try:
            run["rows"] = self.task.train(config, self.task.data)
        except Diverged as error:
            run["diverged"] = str(error)
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps({**self.fixed, "runs": self.runs}, indent=1) + "\n")


def first_below(rows: Sequence[Row], loss: str, target: float, along: str = "step") -> float | None:
    """Where on ``along`` the loss comes down to ``target``, between evaluations by straight lines; None: nowhere.

    Example:
        >>> rows = [{"step": 0, "loss": 4.0}, {"step": 10, "loss": 2.0}]
        >>> first_below(rows, "loss", 2.5), first_below(rows, "loss", 1.0)
        (7.5, None)
    """
    for before, after in itertools.pairwise(rows):
        if after[loss] <= target:
            share = (before[loss] - target) / (before[loss] - after[loss]) if before[loss] > target else 0.0
            return before[along] + share * (after[along] - before[along])
    return None
