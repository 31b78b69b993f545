"""What a model says of its labels: the logits, labels and weights that its loss hands to `fo.losses`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .devices import check_devices, counted_over
from .distributions import DISTRIBUTIONS, Distribution
from .kinds.kronecker import KroneckerFactors
from .losses import example_weights, no_shifts, total
from .marked import losses_in
from .program import jaxprs
from .program.jaxprs import Value
from .program.walk import Plan
from .traced import trace


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("logits", "labels", "weights", "total", "factor"),
    meta_fields=("name",),
)
@dataclasses.dataclass(frozen=True)
class Output:
    """One call of `fo.losses`."""

    name: str
    logits: Any  # (*positions, C), in float32 at least; 0 where the weight is
    labels: Any
    weights: Any  # (*positions,)
    total: Any  # what the sum over examples is divided by, those of other devices included
    factor: Any  # of the mean in the loss: its derivative by it; of each, where vmap made several means of one

    @property
    def distribution(self) -> Distribution:
        """Which the logits are of."""
        return DISTRIBUTIONS[self.name]

    @property
    def shares(self) -> Float[Array, "*positions"]:
        """Of each position in the loss: its weight over the sum of them all, times the factor."""
        of_each = self.factor * self.factor.size  # the total is of all of them
        return of_each.reshape(*of_each.shape, *[1] * (self.weights.ndim - of_each.ndim)) * self.weights / self.total


def outputs(
    loss_fn: Callable[..., PyTree], params: PyTree, *args: PyTree, shifts: Sequence[Array] | None = None
) -> tuple[list[Output], Array]:
    """What ``loss_fn(params, *args)`` hands to `fo.losses`, and what it returns with ``shifts`` added to the logits.

    Raises:
      ValueError: for such a call in a loop, a branch or a vmap, and in a shard_map where it is unclear how many
        examples it is of.
    """
    run = _Run(loss_fn, params, args, shifts)
    value, pull, (found, out) = jax.vjp(run, run.zeros, has_aux=True)
    factors = pull(jnp.ones_like(value))[0] if found else []
    return [dataclasses.replace(x, factor=c) for x, c in zip(found, factors, strict=True)], out


def is_sum_of_losses(loss_fn: Callable[..., PyTree], params: PyTree, *args: PyTree) -> Bool[Array, ""]:
    """Whether the whole is a sum of multiples of losses of `fo.losses`, and of what they do not enter: factors then do
    not change with the losses.
    """
    run = _Run(loss_fn, params, args, None)
    directions = [jnp.cos(1 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in run.zeros]
    change = jax.jvp(lambda zeros: jax.grad(lambda z: run(z)[0])(zeros), (run.zeros,), (directions,))[1]
    return jnp.all(jnp.stack([jnp.all(x == 0) for x in change]))


class _Run:
    """A loss function's program, as a function of what is added to its losses."""

    def __init__(
        self, loss_fn: Callable[..., PyTree], params: PyTree, args: tuple[PyTree, ...], shifts: Sequence[Array] | None
    ) -> None:
        self.traced, self.shifts = trace(loss_fn, KroneckerFactors(), params, args, {}), shifts
        program, plan, operands = self.traced.program, self.traced.plan, self.traced.operands
        counted = losses_in(program, plan, operands)
        if counted.hidden:
            raise ValueError(f"a loss of fo.losses stands inside a {counted.hidden}: compute it outside.")
        self.value = jaxprs.aval(program.jaxpr.outvars[0])
        check_devices(self.value, counted.calls, [(leaf, operands[leaf.number]) for leaf in self.traced.leaves])
        self.zeros = no_shifts(counted.results, self.value)

    def __call__(self, added: list[Array]) -> tuple[Array, tuple[list[Output], Array]]:
        """The value, the losses (with no factors yet), and the value again, which is not differentiated."""
        found: dict[int, Output] = {}

        def operands_of(name: str, number: int, values: list[Value]) -> list[Array]:
            z, y, *weights = map(jnp.asarray, values)  # constants of a program may be NumPy's, or numbers
            z = z if self.shifts is None else z + self.shifts[number].astype(z.dtype)
            w, logits = example_weights(z, *weights), z.astype(jnp.promote_types(z.dtype, jnp.float32))
            # What is left out may be NaN.
            logits, labels = (
                jnp.where((w == 0).reshape(*w.shape, *[1] * (x.ndim - w.ndim)), 0, x) for x in (logits, y)
            )
            found[number] = Output(name, logits, labels, w, total(w, counted_over(self.value, *values)), None)
            return [z, y, *weights]

        def result_of(number: int, x: Array) -> Array:
            return x + jaxprs.varying_as(added[number], x)

        traced = self.traced
        out, *_ = _run(traced.program, traced.plan, traced.operands, operands_of, result_of)
        return out, ([found[number] for number in sorted(found)], out)


def _run(
    program: jaxprs.Program,
    plan: Plan,
    operands: Sequence[Value],
    operands_of: Callable[[str, int, list[Value]], list[Array]],
    result_of: Callable[[int, Array], Array],
) -> list[Any]:
    """The results of a program whose losses are given other operands, and give other results."""
    env = jaxprs.environment(program, operands)
    for i, eqn in enumerate(program.jaxpr.eqns):
        values = [jaxprs.read(env, v) for v in eqn.invars]
        inner = plan.inner.get(i, [])
        if any(p.has_losses() for p in inner):
            out = _run(jaxprs.body(eqn), inner[0], values, operands_of, result_of)
        elif i in plan.losses:
            name, number = plan.losses[i]
            out = [result_of(number, x) for x in jaxprs.bind(eqn, operands_of(name, number, values))]
        else:
            out = jaxprs.bind(eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))
    return [jaxprs.read(env, v) for v in program.jaxpr.outvars]
