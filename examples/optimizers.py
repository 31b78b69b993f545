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


def soap(rate: optax.Schedule, settings: Settings, **options: Any) -> optax.GradientTransformation:
    # Embeddings, norms and biases are AdamW's, as above: SOAP's own betas of .95 suit its matrices, not them.
    return fo.soap(
        rate,
        weight_decay=settings.weight_decay,
        precondition_frequency=settings.refresh,
        mask=decayed,
        fallback=adamw(rate, settings),
        **options,
    )


def like_soap(
    make: Callable[..., optax.GradientTransformation],
) -> Callable[[optax.Schedule, Settings], optax.GradientTransformation]:
    """A relative of SOAP that takes its arguments."""

    def build(rate: optax.Schedule, settings: Settings) -> optax.GradientTransformation:
        return make(
            rate,
            weight_decay=settings.weight_decay,
            precondition_frequency=settings.refresh,
            mask=decayed,
            fallback=adamw(rate, settings),
        )

    return build


def shampoo(rate: optax.Schedule, settings: Settings, **options: Any) -> optax.GradientTransformation:
    return fo.shampoo(
        rate,
        weight_decay=settings.weight_decay,
        precondition_frequency=settings.refresh,
        mask=decayed,
        fallback=adamw(rate, settings),
        **options,
    )


def muon(rate: optax.Schedule, settings: Settings) -> optax.GradientTransformation:
    return fo.muon(rate, weight_decay=settings.weight_decay, mask=decayed, fallback=adamw(rate, settings))


def optax_muon(rate: optax.Schedule, settings: Settings) -> optax.GradientTransformation:
    return optax.contrib.muon(rate, weight_decay=settings.weight_decay, weight_decay_mask=decayed)


METHODS = {
    "adamw": Method(adamw, 3e-3),
    "soap": Method(soap, 6e-3),
    "muon": Method(muon, 1e-2),
    "shampoo": Method(shampoo, 3e-3),
    "dykaf": Method(like_soap(fo.dykaf), 6e-3),
    "kl_soap": Method(like_soap(fo.kl_soap), 6e-3),
    "kl_shampoo": Method(like_soap(fo.kl_shampoo), 6e-3),
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
