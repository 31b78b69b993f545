"""What turns a preconditioner into an optimizer: rate, decay, mask, fallback, alike for SOAP and its relatives."""

from collections.abc import Callable
from typing import Any

import optax

from .._checks import in_range
from ..preconditioner.transform import Preconditioner
from ..transforms.decay import Mask, decay_after_step, decayed_weights
from ..transforms.fallback import with_fallback
from ..transforms.first_step import skip_first_call
from ..transforms.freeze import Freezable, chain
from ..transforms.hyperparameters import scheduled
from ..transforms.skip_nonfinite import skip_nonfinite

KINDS = ("matrix", "head")
OnMatrices = Callable[[Any], Freezable]  # of the matrices' axes, or of layers


def adam(b1: Any, b2: Any, eps: Any) -> Freezable:
    """Optax's Adam, of numbers or schedules."""
    return scheduled(optax.scale_by_adam, b1=b1, b2=b2, eps=eps)


def direction(
    name: str,
    method: Preconditioner,
    fallback: optax.GradientTransformation | None,
    axes: Any,
    *,
    adam: optax.GradientTransformation,
    route: Callable[..., Any] = with_fallback,
    on_matrices: OnMatrices | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``method`` on matrices, and on the rest ``fallback``, a direction; by default ``adam``.

    Args:
      route: `with_fallback`, or `layers_with_fallback` where a matrix takes its bias along.
      on_matrices: ``method.on_matrices``, or what stands for it on layers.
    """
    build, rest = on_matrices or method.on_matrices, method.with_first(adam if fallback is None else fallback)
    return skip_nonfinite(route(name, build, rest, axes=axes, kinds=KINDS, describe=method.describe))


def optimizer(
    name: str,
    method: Preconditioner,
    fallback: optax.GradientTransformation | None,
    axes: Any,
    *,
    learning_rate: Any,
    weight_decay: Any,
    mask: Mask,
    adam: optax.GradientTransformation,
    route: Callable[..., Any] = with_fallback,
    on_matrices: OnMatrices | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`direction` with rate and decay after the step; ``fallback`` is complete, by default AdamW made of ``adam``."""
    in_range("learning_rate", learning_rate, 0)
    in_range("weight_decay", weight_decay, 0)
    skips = method.policy.options.first_step == "skip"
    build = on_matrices or method.on_matrices

    def built(matrices: list[Any]) -> Freezable:
        decay = decay_after_step(learning_rate, weight_decay, mask, lambda updates: True)
        decay = skip_first_call(decay, freeze=False) if skips else decay
        return chain(build(matrices), optax.scale_by_learning_rate(learning_rate), decay)

    if fallback is None:
        # AdamW, whose Adam waits with the matrices while its schedules count calls, as theirs do.
        rest = optax.chain(decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate))
        rest = skip_first_call(rest, freeze=False) if skips else rest
        fallback = chain(method.with_first(adam), rest)
    else:
        fallback = method.with_first(fallback)
    return skip_nonfinite(route(name, built, fallback, axes=axes, kinds=KINDS, describe=method.describe))
