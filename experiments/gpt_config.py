"""The options of `train_gpt.py`: what they are, what they may be, the model they describe."""

import dataclasses
import math
from collections.abc import Collection

import jax.numpy as jnp

from experiments.models.gpt import GPT
from experiments.optimizers import METHODS, find_method
from experiments.options import option, require

DTYPES = ("float32", "bfloat16")
HEADS = ("tied", "own")
COUNTS = ("steps", "batch", "context", "layers", "width", "heads", "vocab", "refresh", "eval_every", "eval_batches")
SHAPE = ("context", "layers", "width", "heads", "head", "vocab")  # what the parameters and the symbols hang on


@dataclasses.dataclass(frozen=True)
class Config:
    """What defines a run. Each field is a command-line option; the defaults are the preset ``cpu``."""

    preset: str = option("cpu", "cpu or shakespeare-char: the defaults of the other options; those shown are cpu's")
    data: str = option("stdlib", "stdlib (the Python library's sources), shakespeare, a text file or a folder of them")
    optimizer: str = option("soap", f"one of {', '.join(METHODS)}")
    lr: float = option(None, "peak learning rate; by default the optimizer's own, less for widths over 128", float)
    warmup: int = option(None, "steps of warm-up before the cosine; by default a tenth of all, 100 at most", int)
    weight_decay: float = option(0.1, "decoupled weight decay")
    refresh: int = option(10, "steps between two renewals of a preconditioner")
    damping: float = option(None, "of an optimizer that inverts curvature; by default its own", float)
    steps: int = option(1000, "optimizer steps")
    batch: int = option(16, "windows of text a step")
    context: int = option(64, "characters a window")
    layers: int = option(4, "transformer blocks")
    width: int = option(128, "width of the residual stream")
    heads: int = option(4, "attention heads")
    head: str = option("tied", "the output layer: tied to the embedding, or own")
    dropout: float = option(0.0, "dropout rate")
    dtype: str = option("float32", f"type of the computation, {' or '.join(DTYPES)}; parameters stay float32")
    start: str = option("", "folder of a run to begin with the parameters of, and to read text by; by default none")
    vocab: int = option(96, "characters with a symbol of their own; all rarer ones share one")
    seed: int = option(0, "of the initial parameters, the batches and the dropout")
    eval_every: int = option(100, "steps between two evaluations, each with a checkpoint")
    eval_batches: int = option(20, "batches that an evaluation averages over, always the same")

    def resolve(self) -> "Config":
        """Fills in what is None and checks everything. Raises `ValueError`, which names the option."""
        # The tuned width is 128. A rate falls as 1 / width, and 384 then has nanoGPT's 1e-3 for AdamW.
        method = find_method(self.optimizer)
        own_rate = method.learning_rate * min(1.0, 128 / max(self.width, 1))
        config = dataclasses.replace(
            self,
            lr=own_rate if self.lr is None else self.lr,
            damping=method.damping if self.damping is None else self.damping,
            warmup=min(100, self.steps // 10) if self.warmup is None else self.warmup,
        )
        check(config)
        return config


SHAKESPEARE_CHAR = Config(
    preset="shakespeare-char", data="shakespeare", steps=5000, eval_every=250, batch=64, context=256, layers=6,
    width=384, heads=6, dropout=0.2,
)  # fmt: skip
PRESETS = {config.preset: config for config in (Config(), SHAKESPEARE_CHAR)}


def make_model(config: Config, symbols: int) -> GPT:
    c = config
    return GPT(
        symbols, c.context, c.layers, c.width, c.heads, c.dropout, dtype=jnp.dtype(c.dtype), tied=c.head == "tied"
    )


def shaped_as(config: Config, start: Config, given: Collection[str]) -> Config:
    """``config`` with the shape of the run it starts from. Raises `ValueError` if the options ``given`` contradict."""
    for name in (name for name in SHAPE if name in given):
        wanted = getattr(start, name)
        require(config, getattr(config, name) == wanted, name, f"{wanted}, as in {config.start!r}, or left out")
    return dataclasses.replace(config, **{name: getattr(start, name) for name in SHAPE})


def check(config: Config) -> None:
    for name in COUNTS:
        require(config, getattr(config, name) >= 1, name, "at least 1")
    require(config, config.width % config.heads == 0, "heads", f"a divisor of --width {config.width}")
    require(config, 0 <= config.warmup < config.steps, "warmup", f"at least 0 and less than --steps {config.steps}")
    require(config, 0 < config.lr < math.inf, "lr", "a positive number")
    if find_method(config.optimizer).damping is None:
        require(config, config.damping is None, "damping", f"left out: {config.optimizer} has none")
    else:
        require(config, 0 < config.damping < math.inf, "damping", "a positive number")
    require(config, 0 <= config.weight_decay < math.inf, "weight_decay", "zero or a positive number")
    require(config, 0 <= config.dropout < 1, "dropout", "at least 0 and less than 1")
    require(config, 0 <= config.seed < 2**31, "seed", "at least 0 and less than 2^31")
    require(config, config.head in HEADS, "head", " or ".join(HEADS))
    if find_method(config.optimizer).own_head:
        require(config, config.head == "own", "head", f"own: {config.optimizer} treats it apart")
    require(config, config.dtype in DTYPES, "dtype", " or ".join(DTYPES))
