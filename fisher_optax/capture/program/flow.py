"""Which products' results flow on to other products with parameters, and which to the loss alone."""

from collections.abc import Sequence
from typing import NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from . import jaxprs
from .walk import Plan

UNKNOWN = -1  # the number of a product with parameters that is not understood
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")


class Source(NamedTuple):
    """What a variable is made of."""

    sites: frozenset[int] = frozenset()  # the last products on the way to it, by their numbers
    parameters: bool = False
    data: bool = False

    @property
    def is_weight(self) -> bool:
        """Whether it is made of parameters alone."""
        return self.parameters and not self.data and not self.sites


def last_products(jaxpr: Jaxpr, plan: Plan, parameters: int) -> set[int]:
    """The numbers of the products that follow another one and whose results reach no further product: output layers.

    Args:
      jaxpr, plan: the program, whose first operands are so many ``parameters``, and what `walk` has found in it.
    """
    flow = _Flow(set(), set())
    flow.walk(jaxpr, plan, [Source(parameters=i < parameters, data=i >= parameters) for i in range(len(jaxpr.invars))])
    return flow.following - flow.followed


class _Flow(NamedTuple):
    following: set[int]  # sites whose input has come from another
    followed: set[int]  # sites whose result goes into another

    def walk(self, jaxpr: Jaxpr, plan: Plan | None, operands: Sequence[Source]) -> list[Source]:
        """What the results are made of."""
        env: dict[Var, Source] = dict(zip(jaxpr.invars, operands, strict=True))
        source = lambda v: Source() if isinstance(v, Literal) else env.get(v, Source())  # noqa: E731
        for i, eqn in enumerate(jaxpr.eqns):
            results = self._results(eqn, i, plan, [source(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
        return [source(v) for v in jaxpr.outvars]

    def _results(self, eqn: JaxprEqn, i: int, plan: Plan | None, operands: list[Source]) -> list[Source]:
        name, site = eqn.primitive.name, plan and plan.sites.get(i)
        everything = _merged(operands)
        if site:
            self.followed.update(everything.sites)
            self.following.update({site.number} if everything.sites else ())
            return [Source(frozenset({site.number}), data=True)] * len(eqn.outvars)
        if name in PRODUCTS and any(x.is_weight for x in operands):
            self.followed.update(everything.sites)
            return [Source(frozenset({UNKNOWN}), data=True)]
        inner = plan.inner.get(i, []) if plan else []
        if name == "scan":
            return self._scan(eqn, inner[0] if inner else None, operands)
        if name == "cond":
            plans = inner or [None] * len(jaxprs.bodies(eqn))
            branches = zip(jaxprs.bodies(eqn), plans, strict=True)
            found = [self.walk(branch.jaxpr, p, operands[1:]) for branch, p in branches]
            return [_merged([operands[0], *results]) for results in zip(*found, strict=True)]
        if name in jaxprs.CALLS | jaxprs.REMAT or name == "shard_map":
            return self.walk(jaxprs.body(eqn).jaxpr, inner[0] if inner else None, operands)
        return [everything] * len(eqn.outvars)

    def _scan(self, eqn: JaxprEqn, plan: Plan | None, operands: list[Source]) -> list[Source]:
        """A loop, until what it carries is made of nothing more."""
        consts, carry = jaxprs.scan_counts(eqn)
        while True:
            results = self.walk(jaxprs.body(eqn).jaxpr, plan, operands)
            carried = [_merged(pair) for pair in zip(operands[consts : consts + carry], results[:carry], strict=True)]
            if carried == operands[consts : consts + carry]:
                return results
            operands = [*operands[:consts], *carried, *operands[consts + carry :]]


def _merged(sources: Sequence[Source]) -> Source:
    return Source(
        frozenset().union(*(x.sites for x in sources)),
        any(x.parameters for x in sources),
        any(x.data for x in sources),
    )
