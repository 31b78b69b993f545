"""Data parallelism inside a `jax.shard_map`: whose examples a loss is of, by what differs between devices.

JAX adds up gradients over devices wherever a parameter is the same on all of them and what it meets is not. Statistics
look like gradients and follow: they are of all these devices' examples, of one device's where the parameter differs
too. What a loss of `fo.losses` divides by is known of one device's call alone. Where `loss_fn` has put the calls of
several devices together, all of their examples count, whether it took the mean of the losses, or of sums.

Without types that say what differs (``check_vma=False``, `jax.pmap`, `jax.vmap`) JAX adds nothing up: everything is one
device's, and is averaged by `fo.all_reduce_statistics`.
"""

import math
from collections.abc import Sequence

from jax.core import ShapedArray
from jax.extend.core import Literal, Var

from .program.jaxprs import Program, Typed, Value, aval, varying
from .program.leaves import LeafPlan
from .program.walk import Plan

Split = tuple[tuple[str, int], ...]  # axes of a mesh and their sizes
Call = tuple[ShapedArray, ...]  # what a loss is given: types of logits, labels and weights


def devices_along(split: Sequence[tuple[str, int]]) -> int:
    """How many there are."""
    return math.prod(size for _, size in split)


def counted_over(value: Typed, logits: Typed, labels: Typed, *weights: Typed) -> tuple[str, ...]:
    """The axes over which a call's examples are split and ``value``, what the loss function returns, is not."""
    del logits
    return tuple(sorted(varying(labels, *weights) - varying(value)))


def check_devices(value: Typed, calls: Sequence[Call], parameters: Sequence[tuple[LeafPlan, Value]]) -> None:
    """Raises ``ValueError`` where it cannot be told how many examples the gradients of a parameter are of."""
    for logits, labels, *weights in calls:
        if axes := _names(varying(logits) - varying(labels, *weights, value)):
            raise ValueError(
                f"the labels given to fo.losses are the same on all devices along {axes}, and the logits are not: each "
                "label could be one example or one a device. Let the labels differ too, by jax.lax.pcast(labels, "
                f"{axes}, to='varying'), or have the same logits everywhere, by jax.lax.pmean(logits, {axes})."
            )
        everywhere = frozenset.intersection(*(varying(x) for _, x in parameters))
        if axes := _names(everywhere & frozenset(counted_over(value, logits, labels, *weights))):
            raise ValueError(
                f"loss_fn returns one loss for all devices along {axes}, and each has parameters of its own: they "
                "would get but a part of the gradient. Return each device's loss from loss_fn, or differentiate with "
                "the parameters that are the same on all of them."
            )
        for leaf, x in parameters:
            if axes := _names(varying(value) & varying(logits, labels, *weights) - varying(x)):
                raise ValueError(
                    f"loss_fn returns a loss for each device along {axes}, and {leaf.path!r} is the same on all of "
                    "them: JAX would add up its gradients, which makes them those of the sum of the losses, not the "
                    f"mean. Return jax.lax.pmean(loss, {axes}) from loss_fn; or differentiate with parameters of each "
                    f"device's own, jax.lax.pcast(params, {axes}, to='varying'), and average gradients by "
                    "jax.lax.pmean and statistics by fo.all_reduce_statistics."
                )


def check_weighing(program: Program, plan: Plan) -> None:
    """Raises ``ValueError`` where losses of devices are weighed before they are added up, with no types to say how many
    examples each stands for: with types, all of them together are known.
    """
    plain: set[Var] = set()  # losses, and sums and multiples of them that are the same on all devices
    weighed: set[Var] = set()
    for i, eqn in enumerate(program.jaxpr.eqns):
        operands = {v for v in eqn.invars if not isinstance(v, Literal)}
        if i in plan.losses or any(p.has_losses() for p in plan.inner.get(i, [])):
            plain.update(eqn.outvars)
        elif eqn.primitive.name == "psum" and operands & weighed and not varying(*map(aval, operands)):
            raise ValueError(
                "loss_fn weighs the losses of devices before it adds them up, where nothing says what differs between "
                "them (jax.pmap, jax.vmap, check_vma=False): how many examples each stands for cannot be seen. Return "
                "each device's own loss; put gradients together by jax.lax.psum(W * g, axis) / jax.lax.psum(W, axis), "
                "W the sum of its weights, and statistics by fo.all_reduce_statistics. Or use jax.shard_map with "
                "check_vma=True."
            )
        elif eqn.primitive.name != "psum" and operands & (plain | weighed):
            multiple = eqn.primitive.name not in ("mul", "div") or len(operands) == 1
            (plain if multiple and not operands & weighed else weighed).update(eqn.outvars)


def check_normalizer(normalizer: Value | None, parameters: Sequence[tuple[LeafPlan, Value]]) -> None:
    """Raises ``ValueError`` where it is another number on each device, and the statistics are not."""
    for leaf, x in parameters:
        if axes := _names(varying(normalizer) - varying(x)):
            raise ValueError(
                f"normalizer differs between the devices along {axes}, and the statistics of {leaf.path!r} are of all "
                f"of them: return what the loss of all was divided by, jax.lax.psum(normalizer, {axes})."
            )


def _names(axes: frozenset[str]) -> str:
    """As they are written in a call; empty without any."""
    return ("({})" if len(axes) > 1 else "{}").format(", ".join(map(repr, sorted(axes))))
