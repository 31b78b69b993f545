"""What lower precision of an accelerator's products costs SOAP, and its refresh by products, emulated on a CPU.

A product at "high" multiplies two parts of bfloat16 of each operand, and leaves out the product of the small ones; at
"default" it multiplies the operands rounded to bfloat16, as on a TPU; sums are float32. `fo.Products` says which
products. "Refresh by products" is ``fo.Refresh(decomposition="cholesky")``, what a TPU does. Losses are of the 808k
character GPT of `experiments.train_gpt` after 300 steps at one rate, of float32 and of the refresh by products
on several seeds.
"Apart" is of a matrix of side 8 under gradients whose covariances have well-separated eigenvalues, and change: after
100 steps with a refresh every 10, the distance from the run in float32 by QR, as a part of the way that one has moved.
It is also given for the gradients of SOAP's golden trajectories, random ones, whose close eigenvalues the rounds of a
first basis by products leave mixed.
"""

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import fisher_optax as fo
from benchmarks import pictures
from benchmarks.results import Column, ends, result, spread, table
from benchmarks.training import tables
from experiments import optimizers, train_gpt
from experiments.comparison import Runs, Task
from experiments.gpt_config import Config
from experiments.text import load_corpus

matmul = jnp.matmul
RATE = 6e-3
GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "soap.npz"
SIDE, RATIO, NOISE = 8, 0.5, 0.2  # ratio of one singular value of a gradient to the next
WAYS: dict[str, dict[str, Any]] = {
    "highest": {},
    "rotations_high": {"products": fo.Products(rotations="high")},
    "rotations_default": {"products": fo.Products(rotations="default")},
    "factors_high": {"products": fo.Products(factors="high")},
    "factors_default": {"products": fo.Products(factors="default")},
    "basis_high": {"products": fo.Products(basis="high")},
    "basis_default": {"products": fo.Products(basis="default")},
    "cholesky": {"refresh": fo.Refresh(decomposition="cholesky")},
    "cholesky_basis_high": {
        "refresh": fo.Refresh(decomposition="cholesky"),
        "products": fo.Products(basis="high"),
    },
}
LABELS = {"highest": "float32, by QR", "cholesky": "refresh by products"}
COLUMNS = {
    "label": Column("products"),
    "val_loss": Column("validation loss after 300 steps", ".3f", spread=True),
    "apart": Column("apart after 100 steps", ".1e", spread=True),
    "golden": Column("apart on the golden trajectories' gradients", ".1e", spread=True),
}


def emulated(X: jax.Array, Y: jax.Array, precision: Any = None) -> jax.Array:
    """``X Y`` as an accelerator multiplies at this precision."""
    exact = functools.partial(matmul, precision="highest")
    if precision not in ("high", "default"):
        return exact(X, Y)
    (x, x_rest), (y, y_rest) = _rounded(X), _rounded(Y)
    if precision == "default":
        return exact(x, y)
    x_small, y_small = _rounded(x_rest)[0], _rounded(y_rest)[0]
    return exact(x, y) + (exact(x, y_small) + exact(x_small, y))


def _rounded(X: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X rounded to bfloat16, and what is left. XLA takes a cast there and back for none, this not."""
    x = jax.lax.reduce_precision(X, exponent_bits=8, mantissa_bits=7)
    return x, X - x


def gradients(seed: int, steps: int) -> np.ndarray:
    """Of known singular vectors with well-separated singular values, of random signs and with noise between them."""
    rng = np.random.default_rng(seed)
    L, R = (np.linalg.qr(rng.standard_normal((SIDE, SIDE)))[0] * RATIO ** (np.arange(SIDE) / 2) for _ in range(2))
    signs = rng.choice((-1.0, 1.0), (steps, SIDE))[:, None] * np.eye(SIDE)
    return (L @ (signs + NOISE * rng.standard_normal((steps, SIDE, SIDE))) @ R.T).astype(np.float32)


def way(options: dict[str, Any], W: np.ndarray, grads: np.ndarray, **numbers: Any) -> np.ndarray:
    """How far a matrix is from W after these gradients."""
    tx = fo.soap(RATE, **numbers, **options)
    params = {"kernel": jnp.asarray(W, jnp.float32)}

    def step(carry: Any, G: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update({"kernel": G}, state, params)
        return (optax.apply_updates(params, updates), state), None

    start, given = (params, tx.init(params)), jnp.asarray(grads, jnp.float32)
    (params, _), _ = jax.jit(lambda c, Gs: jax.lax.scan(step, c, Gs))(start, given)
    return np.asarray(params["kernel"], np.float64) - W


def apart(name: str, seeds: int) -> list[float]:
    """On separated gradients: as a part of the way, from the run in float32 by QR."""
    return [_distance(name, np.zeros((SIDE, SIDE)), gradients(seed, 100)) for seed in range(seeds)]


def golden(name: str) -> list[float]:
    """The same on the gradients of SOAP's golden trajectories."""
    cases = ("square_f1", "square_f5_wd", "shampoo_beta")
    refreshes = {"square_f1": 1, "square_f5_wd": 5, "shampoo_beta": 2}
    with np.load(GOLDEN) as arrays:
        return [
            _distance(name, arrays[f"{c}/params0"], arrays[f"{c}/grads"], precondition_frequency=refreshes[c])
            for c in cases
        ]


def _distance(name: str, W: np.ndarray, grads: np.ndarray, **numbers: Any) -> float:
    mine, exact = (way(WAYS[key], W, grads, weight_decay=0.0, **numbers) for key in (name, "highest"))
    return float(np.linalg.norm(mine - exact) / np.linalg.norm(exact))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=300)
    tables.add_run_options(parser)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = Config(steps=options.steps, eval_every=max(1, options.steps // 10), eval_batches=10)
    corpus = load_corpus(base.data, base.vocab, base.context)
    names = {name: f"soap_{name}" for name in WAYS}
    for name, how in WAYS.items():
        optimizers.METHODS[names[name]] = optimizers.Method(functools.partial(optimizers.soap, **how), RATE)
    task = Task(base, corpus, train_gpt.train, "val_loss", dict.fromkeys(names.values(), (RATE,)))
    rows, runs = {}, Runs(options.runs or tables.KEPT / "precision.json", task)
    with mock.patch.object(jnp, "matmul", emulated):
        runs.make(range(1))
        runs.task = task._replace(rates={names[name]: (RATE,) for name in LABELS})
        runs.make(range(options.seeds))
        for name in WAYS:
            label = LABELS.get(name, name.replace("cholesky_", "refresh by products, ").replace("_", " "))
            losses = [runs.final(run) for run in runs.of(names[name])]
            of_seeds = {"val_loss": spread(losses), "apart": spread(apart(name, 3)), "golden": spread(golden(name))}
            rows[name] = {"label": label, **of_seeds}
    yield result(
        "precision",
        "What lower precision of an accelerator's products costs SOAP, and its refresh by products, emulated on a CPU.",
        options.command,
        {"precision": table("SOAP by the precision of its products", COLUMNS, rows)},
        settings=tables.setting_of(runs),
        seeds=range(options.seeds),
    )


def draw(found: dict[str, Any]) -> Figure:
    rows = found["tables"]["precision"]["rows"]
    moved = {name: row | {"apart": row["apart"] if row["apart"]["median"] else None} for name, row in rows.items()}
    figure = pictures.bars(
        "SOAP by the precision of its products, emulated",
        pictures.Bars(rows, "val_loss", "validation loss"),
        pictures.Bars(moved, "apart", "apart, of the way moved", log=True),
    )
    losses = [end for row in rows.values() for end in ends(row["val_loss"])]
    figure.axes[0].set_xlim(min(losses) - 0.01, max(losses) + 0.01)
    return figure
