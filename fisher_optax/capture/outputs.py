"""What a model says of its labels: the logits, labels and weights that its loss hands to `fo.losses`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .devices import check_devices, counted_over
from .kinds.kronecker import KroneckerFactors
from .losses import DISTRIBUTIONS, Distribution, example_weights, total
from .marked import losses_in
from .program import jaxprs
from .program.jaxprs import Value
from .program.walk import Plan
from .traced import Traced, trace


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("logits", "labels", "weights", "total"), meta_fields=("name",)
)
@dataclasses.dataclass(frozen=True)
class Output:
    """One call of `fo.losses`."""

    name: str
    logits: Any  # (*positions, C), in float32 at least; 0 where the weight is
    labels: Any
    weights: Any  # (*positions,)
    total: Any  # what the sum over examples is divided by, those of other devices included

    @property
    def distribution(self) -> Distribution:
        """Which the logits are of."""
        return DISTRIBUTIONS[self.name]

    @property
    def shares(self) -> Array:
        """Of each position in the mean: its weight over the sum of them all."""
        return self.weights / self.total


def outputs(
    loss_fn: Callable[..., PyTree], params: PyTree, *args: PyTree, shifts: Sequence[Array] | None = None
) -> tuple[list[Output], Array]:
    """What ``loss_fn(params, *args)`` hands to `fo.losses`, and what it returns with ``shifts`` added to the logits.

    Raises:
      ValueError: for such a call in a loop, a branch or a vmap, and in a shard_map where it is unclear how many
        examples it is of.
    """
    traced = trace(loss_fn, KroneckerFactors(), params, args, {})
    counted = losses_in(traced.program, traced.plan, traced.operands)
    if counted.hidden:
        raise ValueError(f"a loss of fo.losses stands inside a {counted.hidden}: compute it outside.")
    parameters = [(leaf, traced.operands[leaf.number]) for leaf in traced.leaves]
    check_devices(jaxprs.aval(traced.program.jaxpr.outvars[0]), counted.calls, parameters)
    return _evaluated(traced, shifts)


def _evaluated(traced: Traced, shifts: Sequence[Array] | None) -> tuple[list[Output], Array]:
    found: dict[int, Output] = {}
    value = jaxprs.aval(traced.program.jaxpr.outvars[0])

    def at_loss(name: str, number: int, values: list[Value]) -> list[Array]:
        z, y, *weights = map(jnp.asarray, values)  # constants of a program may be NumPy's, or numbers
        z = z if shifts is None else z + shifts[number].astype(z.dtype)
        w, logits = example_weights(z, *weights), z.astype(jnp.promote_types(z.dtype, jnp.float32))
        # What is left out may be NaN.
        logits, labels = (jnp.where((w == 0).reshape(*w.shape, *[1] * (x.ndim - w.ndim)), 0, x) for x in (logits, y))
        found[number] = Output(name, logits, labels, w, total(w, counted_over(value, *values)))
        return [z, y, *weights]

    out, *_ = _run(traced.program, traced.plan, traced.operands, at_loss)
    return [found[number] for number in sorted(found)], out


def _run(
    program: jaxprs.Program,
    plan: Plan,
    operands: Sequence[Value],
    at_loss: Callable[[str, int, list[Value]], list[Array]],
) -> list[Any]:
    """The results of a program whose losses are given other operands."""
    env = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    env.update(zip(program.jaxpr.invars, operands, strict=True))
    for i, eqn in enumerate(program.jaxpr.eqns):
        values = [jaxprs.read(env, v) for v in eqn.invars]
        inner = plan.inner.get(i, [])
        if any(p.has_losses() for p in inner):
            out = _run(jaxprs.body(eqn), inner[0], values, at_loss)
        else:
            out = jaxprs.bind(eqn, at_loss(*plan.losses[i], values) if i in plan.losses else values)
        env.update(zip(eqn.outvars, out, strict=True))
    return [jaxprs.read(env, v) for v in program.jaxpr.outvars]
