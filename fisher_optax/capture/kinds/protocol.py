"""What a kind of statistics is: the one thing that capture has plugged into it."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from ..program.leaves import LeafPlan
from ..program.sites import Site

Bases = tuple[Array | None, Array | None]  # Q_A and Q_B of one parameter


class Tapped(NamedTuple):
    """What a tap hands to `StatisticsKind.collect`: a product's input, the loss's gradient at its output, and more."""

    x: Array
    delta: Array  # zeros where the kind takes inputs alone
    mask: Array | None  # of the positions that count
    bases: Bases | None  # where the kind needs them
    devices: int = 1  # whose sums are added up
    device: Array | int = 0  # the number of this one
    groups: Array | None = None  # of a ragged product, how many rows each expert has


Sums = dict[str, Array]  # of one product; those of several, of loops' steps and of devices are added up


@runtime_checkable
class StatisticsKind(Protocol):
    """What is summed up at each product with a parameter on the way back, or where it is of inputs alone on the way
    forward, and what the sums are made into.

    `fo.value_and_grad` finds the products of a loss with its parameters and gives each a tap. A kind says what a tap
    returns (`collect`), and what becomes of a parameter's sums (`finish`). Only these two have to be written; the
    others say what the kind cannot do or has to know, and have defaults for one that can do everything.

    Example (the mean of each layer's inputs):
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> class MeanInputs(fo.StatisticsKind):
      ...     def collect(self, plan, site, tapped):
      ...         rows = tapped.x.reshape(-1, site.m)
      ...         return {"sum": rows.sum(0), "count": jnp.asarray(1.0 * len(rows))}
      ...     def finish(self, plan, slots, normalizer):
      ...         return slots[0]["sum"] / slots[0]["count"]
      >>> grad_fn = fo.value_and_grad(lambda W, x: jnp.sum(x @ W), MeanInputs())
      >>> print(grad_fn(jnp.ones((2, 3)), jnp.array([[1.0, 2.0], [3.0, 4.0]]))[2])
      [2. 3.]
    """

    def collect(self, plan: LeafPlan, site: Site, tapped: Tapped) -> Sums:
        """The sums over one product's positions; ``x`` and ``delta`` have the axes that ``site`` describes."""
        ...

    def finish(self, plan: LeafPlan, slots: list[Sums], normalizer: ArrayLike | None) -> PyTree[Array]:
        """A parameter's statistics from the sums of its slots.

        Args:
          normalizer: what sums of squared gradients are to be multiplied by; None: what the layer's uses say.
        """
        ...

    def unavailable(self, sites: tuple[Site, ...]) -> str:
        """Why the sites of a parameter have no such statistics, or nothing. Rows of experts are for kinds that say so,
        by a method of their own: `collect` has to tell them apart by ``tapped.groups``.
        """
        return "experts, whose rows this kind does not tell apart" if sites[0].groups is not None else ""

    def unavailable_for(self, plan: LeafPlan, fisher: str) -> str:
        """Why this kind of Fisher has no such statistics, or nothing."""
        del plan, fisher
        return ""

    def slots(self, plan: LeafPlan) -> int:
        """How many sites of the parameter keep their sums apart."""
        del plan
        return 1

    def model_scale(self, number: ArrayLike | None) -> ArrayLike:
        """What the sums of drawn labels' gradients are multiplied by; ``number`` is that of the examples that count."""
        del number
        return 1

    def own_scale(self, total: ArrayLike, factor: Array) -> ArrayLike:
        """What the sums of the loss's own gradients are multiplied by, ``factor`` being that of the mean in the loss:
        it is in them twice, and in the Fisher once.
        """
        return total / jnp.where(factor == 0, 1, factor)

    def of_gradients(self) -> bool:
        """Whether gradients are in it, whose scale has to be known."""
        return True

    def adds_up(self) -> bool:
        """Whether the sums of several backward passes are those of all their gradients."""
        return True

    def inputs_alone(self) -> bool:
        """Whether it looks at inputs alone: they are then collected on the way forward, whatever gradients reach."""
        return False

    def needs_bases(self) -> bool:
        """Whether `collect` is to get bases."""
        return False

    def without_bases(self) -> "StatisticsKind":
        """The same kind, as far as it goes without bases."""
        return self

    def head_tokens(self) -> int | None:
        """How many tokens' logits stand for the right side of the layer that gives a softmax its logits, if any."""
        return None

    def longest_side(self) -> float:
        """Sides longer than this are sampled."""
        return math.inf
