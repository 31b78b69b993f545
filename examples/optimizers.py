"""The optimizers that the examples know by name, a row each."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import optax

import fisher_optax as fo


class Settings(Protocol):
    """What a row may read of an example's configuration."""

    @property
    def weight_decay(self) -> float: ...
    @property
    def refresh(self) -> int: ...  # steps between two renewals of a preconditioner


class Method(NamedTuple):
    """How to build an optimizer for a schedule, and the peak rate that suits the default GPT, 128 wide."""

    build: Callable[[optax.Schedule, Settings], optax.GradientTransformation]
    learning_rate: float


def decayed(params: optax.Params) -> optax.Params:
    """Weight decay's mask, nanoGPT's rule: matrices and embeddings decay, norms and biases do not."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def adamw(rate: optax.Schedule, settings: Settings) -> optax.GradientTransformation:
    # nanoGPT's b2 for characters: a step sees few of them, so the second moment averages over more steps.
    return optax.adamw(rate, b2=0.99, weight_decay=settings.weight_decay, mask=decayed)


def with_adamw(make: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """SOAP, or what takes its arguments, with AdamW's own betas for embeddings, norms and biases."""

    def build(rate: optax.Schedule, settings: Settings, **options: Any) -> optax.GradientTransformation:
        return make(
            rate,
            weight_decay=settings.weight_decay,
            precondition_frequency=settings.refresh,
            mask=decayed,
            fallback=adamw(rate, settings),
            **options,
        )

    return build


soap = with_adamw(fo.soap)


def muon(rate: optax.Schedule, settings: Settings) -> optax.GradientTransformation:
    return fo.muon(rate, weight_decay=settings.weight_decay, mask=decayed, fallback=adamw(rate, settings))


def optax_muon(rate: optax.Schedule, settings: Settings) -> optax.GradientTransformation:
    return optax.contrib.muon(rate, weight_decay=settings.weight_decay, weight_decay_mask=decayed)


METHODS = {
    "adamw": Method(adamw, 3e-3),
    "soap": Method(soap, 6e-3),
    "muon": Method(muon, 1e-2),
    "shampoo": Method(with_adamw(fo.shampoo), 3e-3),
    "dykaf": Method(with_adamw(fo.dykaf), 6e-3),
    "kl_soap": Method(with_adamw(fo.kl_soap), 6e-3),
    "kl_shampoo": Method(with_adamw(fo.kl_shampoo), 6e-3),
    "optax_muon": Method(optax_muon, 3e-2),
}


def find_method(name: str) -> Method:
    """The row of ``METHODS`` called ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"unknown optimizer {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]
