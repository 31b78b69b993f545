"""Steps to a loss: the methods and rates that are compared, SOAP's smaller states and other packages among them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

import fisher_optax as fo
from experiments import optimizers, peers, train_gpt
from experiments.gpt_config import Config
from experiments.kfac_jax import train_kfac_jax
from experiments.text import Corpus

RATES = {
    "adamw": (1e-3, 3e-3, 1e-2),
    "muon": (5e-3, 1e-2, 2e-2),
    "soap": (3e-3, 6e-3, 1e-2),
    "optax_muon": (1e-2, 3e-2, 6e-2),
}
SMALL_RATE = 6e-3  # the smaller states are compared with the full one at one rate
SMALLER = {
    "soap_packed": ("packed=True", fo.Storage(packed=True)),
    "soap_bfloat16": ("factor_dtype=jnp.bfloat16", fo.Storage(factor_dtype=jnp.bfloat16)),
    "soap_shorter": ('sides="shorter"', fo.Storage(sides="shorter")),
}
KFAC_JAX = {"kfac_jax": (1e-2, 3e-2, 1e-1)}
LABELS = {name: peer.label for name, peer in peers.PEERS.items()} | {
    **{name: f"`fo.soap(storage=fo.Storage({how}))`" for name, (how, _) in SMALLER.items()},
    "muon": "`fo.muon`",
    "soap": "`fo.soap`",
    "optax_muon": "`optax.contrib.muon`",
    "kfac_jax": "K-FAC (kfac-jax)",
}


def register() -> tuple[dict[str, Sequence[float]], dict[str, str]]:
    """The rates to try of each method, after all have a row of `optimizers.METHODS`; why others are absent."""
    rows, absent = peers.methods()
    grid: dict[str, Sequence[float]] = {**RATES, **dict.fromkeys(SMALLER, (SMALL_RATE,))}
    grid |= {name: (row.learning_rate / 2, row.learning_rate, row.learning_rate * 2) for name, row in rows.items()}
    for name, (_, storage) in SMALLER.items():
        rows[name] = optimizers.Method(functools.partial(optimizers.soap, storage=storage), SMALL_RATE)
    optimizers.METHODS.update(rows)
    if reason := peers.absence("kfac_jax"):
        return grid, {**absent, "kfac_jax": reason}
    return {**grid, **KFAC_JAX}, absent


def train(config: Config, corpus: Corpus) -> list[dict[str, Any]]:
    return (train_kfac_jax if config.optimizer == "kfac_jax" else train_gpt.train)(config, corpus)
