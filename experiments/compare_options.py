"""The options of `compare_optimizers.py`: what they are, what they may be."""

import dataclasses
import math
from collections.abc import Sequence

from experiments.gpt_config import SHAKESPEARE_CHAR, Config
from experiments.options import option, require

LABELS = {
    "adamw": "AdamW",
    "muon": "Muon",
    "shampoo": "Shampoo (-1/4, grafted)",
    "shampoo_half": "Shampoo (-1/2, grafted)",
    "soap": "SOAP",
    "kfac": "KFAC (-1/2, grafted)",
    "kfac_soap": "KFAC-SOAP",
    "dykaf": "DyKAF",
    "kl_soap": "KL-SOAP",
    "frog": "FROG",
    "dykaf_rank1": "DyKAF, rank-one second moment",
    "kl_shampoo": "KL-Shampoo",
    "ekfac": "EKFAC (-1/2, grafted)",
    "kfac_true_head": "KFAC, the head's true Fisher",
    "kfac_empirical_head": "KFAC, the head's empirical Fisher",
    "kfrog": "K-FROG",
    "optax_muon": "Muon (optax.contrib)",
}  # of the rows of `optimizers.METHODS`, as legends and tables have them

SMALL = Config(data="shakespeare", steps=300, eval_every=30, eval_batches=10)
PRESETS = {"cpu": SMALL, "shakespeare-char": SHAKESPEARE_CHAR}
PER_METHOD = ("optimizer", "lr", "seed", "damping", "start")  # what the comparison itself sets, or each has of its own


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is compared. Each field is a command-line option, beside those of the GPT."""

    optimizers: str = option(",".join(list(LABELS)[:10]), f"some of {', '.join(LABELS)}, with commas between them")
    seeds: str = option("0", "with commas between them; rates are tried on the first, the best runs on the others")
    rates: str = option(None, "peak rates to try, the same for all, with commas; by default each one's own", str)

    def methods(self) -> list[str]:
        return list(dict.fromkeys(split(self.optimizers)))

    def seed_numbers(self) -> list[int]:
        """In ascending order."""
        return sorted({int(seed) if seed.isdecimal() else -1 for seed in split(self.seeds)})

    def grid(self, base: Config) -> dict[str, Sequence[float]]:
        """The rates of each method, after all has been checked. Raises `ValueError`, which names the option."""
        require(self, bool(self.methods()), "optimizers", "one at least")
        seeds = self.seed_numbers()
        require(self, bool(seeds) and seeds[0] >= 0, "seeds", "whole numbers from 0 on, with commas between them")
        known = {name: dataclasses.replace(base, optimizer=name).resolve() for name in self.methods()}
        if self.rates is None:
            return {name: (config.lr,) for name, config in known.items()}
        rates = [positive(rate) for rate in split(self.rates)]
        require(self, bool(rates) and all(rates), "rates", "positive numbers, with commas between them")
        return dict.fromkeys(known, sorted({rate for rate in rates if rate}))


def split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def positive(number: str) -> float | None:
    """The number in a text; None: it is no positive one."""
    try:
        value = float(number)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
