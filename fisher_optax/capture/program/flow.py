"""What every value of a program is made of: which products' results flow on to other products, which are looked up by,
which choose experts, and which the program returns.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var

from . import jaxprs
from .sites import Site
from .walk import Plan

UNKNOWN = -1  # the number of a product with parameters that is not understood
PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
VIEWS = frozenset({"convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim"})
CHOICES = frozenset({"top_k", "argmax", "sort", "approx_top_k"})


class Source(NamedTuple):
    """What a variable is made of."""

    sites: frozenset[int] = frozenset()  # the last products on the way to it, by their numbers
    leaves: frozenset[int] = frozenset()  # parameters that it is, cast at most
    choices: frozenset[int] = frozenset()  # products of whose results the best were chosen, before any other product
    parameters: bool = False  # whether any is in it
    data: bool = False
    one_hot: bool = False  # whether two integers are equal
    mixed: bool = False  # whether it came through a loop, or a product that is none with a parameter

    @property
    def is_weight(self) -> bool:
        """Whether it is made of parameters alone."""
        return self.parameters and not self.data and not self.sites

    @property
    def depends(self) -> bool:
        """Whether it is more than a constant."""
        return bool(self.data or self.sites or self.leaves)


def _merged(sources: Sequence[Source], **more: object) -> Source:
    return Source(
        frozenset().union(*(x.sites for x in sources)),
        choices=frozenset().union(*(x.choices for x in sources)),
        parameters=any(x.parameters for x in sources),
        data=any(x.data for x in sources),
        mixed=any(x.mixed for x in sources),
    )._replace(**more)


@dataclasses.dataclass
class Flow:
    """What became of the products of a program, by their numbers, and of its parameters."""

    following: set[int] = dataclasses.field(default_factory=set)  # whose input has come from another
    followed: set[int] = dataclasses.field(default_factory=set)  # whose result goes into another
    returned: set[int] = dataclasses.field(default_factory=set)  # that a result is made of, and of no other
    choosing: set[int] = dataclasses.field(default_factory=set)  # whose best results say which of a stack are used
    lookups: dict[int, bool] = dataclasses.field(default_factory=dict)  # that take rows, and whether data says which
    rows: dict[int, bool] = dataclasses.field(default_factory=dict)  # parameters of which single rows are taken

    @property
    def last(self) -> set[int]:
        """Products that follow another one and whose results reach no further product: output layers."""
        return self.following - self.followed


def follow(program: jaxprs.Program, plan: Plan, parameters: int) -> Flow:
    """Through a program whose first operands are so many ``parameters``; ``plan`` is what `walk` has found in it."""
    flow, operands = Flow(), program.jaxpr.invars
    walk = _Walk(flow, {site.number: site for site in sites_of(plan)})
    sources = [
        Source(leaves=frozenset({i}), parameters=True) if i < parameters else Source(data=True)
        for i in range(len(operands))
    ]
    for result in walk.through(program, plan, sources):
        flow.returned |= result.sites if len(result.sites) == 1 and not (result.mixed or result.one_hot) else set()
    return flow


def sites_of(plan: Plan) -> Iterator[Site]:
    """All products with parameters, those in loops and calls included."""
    yield from plan.sites.values()
    for plans in plan.inner.values():
        for inner in plans:
            yield from sites_of(inner)


class _Walk(NamedTuple):
    flow: Flow
    sites: dict[int, Site]

    def through(self, program: jaxprs.Program, plan: Plan, operands: Sequence[Source]) -> list[Source]:
        """What the results are made of."""
        env: dict[Var, Source] = dict(zip(program.jaxpr.invars, operands, strict=True))
        source = lambda v: Source() if isinstance(v, Literal) else env.get(v, Source())  # noqa: E731
        for i, eqn in enumerate(program.jaxpr.eqns):
            values = [source(v) for v in eqn.invars]
            if i in plan.sites:
                results = [self._product(plan.sites[i], values)] * len(eqn.outvars)
            else:
                results = self._inside(eqn, plan.inner.get(i), values) or [self._moved(eqn, values)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, results, strict=True))
        return [source(v) for v in program.jaxpr.outvars]

    def _product(self, site: Site, operands: list[Source]) -> Source:
        flow, everything = self.flow, _merged(operands)
        flow.followed |= everything.sites
        flow.following |= {site.number} if everything.sites else set()
        self._note_choices(everything.choices, [site])
        index = operands[1 if site.how == "embedding" else site.x]
        if site.how == "embedding" or index.one_hot:
            flow.lookups[site.number] = index.depends
        return Source(frozenset({site.number}), data=True)

    def _inside(self, eqn: JaxprEqn, plans: list[Plan] | None, operands: list[Source]) -> list[Source] | None:
        """The results of what has programs inside; None: nothing that is followed."""
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, (plans or [Plan()])[0], operands)
        if name == "cond":
            branches = zip(jaxprs.bodies(eqn), plans or [Plan()] * len(jaxprs.bodies(eqn)), strict=True)
            found = [self.through(branch, plan, operands[1:]) for branch, plan in branches]
            return [_merged([operands[0], *results], mixed=True) for results in zip(*found, strict=True)]
        if name in jaxprs.CALLS | jaxprs.REMAT or name == "shard_map" or (name in jaxprs.CUSTOM and plans):
            results = self.through(jaxprs.body(eqn), (plans or [Plan()])[0], operands)
            return [x._replace(mixed=True) for x in results] if name == "shard_map" else results
        return None

    def _scan(self, eqn: JaxprEqn, plan: Plan, operands: list[Source]) -> list[Source]:
        """A loop, until what it carries is made of nothing more."""
        consts, carry = jaxprs.scan_counts(eqn)
        while True:
            results = self.through(jaxprs.body(eqn), plan, operands)
            carried = [_merged(pair) for pair in zip(operands[consts : consts + carry], results[:carry], strict=True)]
            if carried == [_merged([x]) for x in operands[consts : consts + carry]]:
                return [x._replace(mixed=True) for x in results]
            operands = [*operands[:consts], *carried, *operands[consts + carry :]]

    def _moved(self, eqn: JaxprEqn, operands: list[Source]) -> Source:
        """Of anything else."""
        name, everything = eqn.primitive.name, _merged(operands)
        if everything.choices:
            self._note_choices(everything.choices, [self.sites[k] for k in everything.sites if k in self.sites])
        if name in PRODUCTS and any(x.is_weight for x in operands):
            self.flow.followed |= everything.sites
            return Source(frozenset({UNKNOWN}), data=True, mixed=True)
        if name in PRODUCTS or name == "while":
            return everything._replace(mixed=everything.mixed or everything.depends)
        if name == "convert_element_type":
            return operands[0]
        if name == "eq" and jnp.issubdtype(jaxprs.aval(eqn.invars[0]).dtype, jnp.integer):
            return everything._replace(one_hot=True)
        if name in ("gather", "dynamic_slice"):
            self._note_row(eqn, operands)
        if name in CHOICES and len(everything.sites) == 1 and not everything.mixed:
            (number,) = everything.sites
            chosen = number in self.sites and self.sites[number].n == _length(eqn)
            return everything._replace(choices=everything.choices | ({number} if chosen else set()))
        return everything._replace(one_hot=name in VIEWS and any(x.one_hot for x in operands))

    def _note_choices(self, choices: frozenset[int], products: Sequence[Site]) -> None:
        """What was chosen meets stacks: it chooses experts where it is one of as many as they have matrices."""
        experts = {atom.size for site in products for atom in site.batch}
        experts |= {site.groups.number for site in products if site.groups}
        self.flow.choosing |= {k for k in choices if self.sites[k].n in experts}

    def _note_row(self, eqn: JaxprEqn, operands: Sequence[Source]) -> None:
        """A row of a matrix that is taken by itself."""
        shape = jaxprs.shape(eqn.invars[0])
        if len(shape) == 2 and tuple(eqn.params["slice_sizes"]) == (1, shape[1]) and shape[0] > 1:
            by_data = any(x.depends for x in operands[1:])
            for leaf in operands[0].leaves:
                self.flow.rows[leaf] = self.flow.rows.get(leaf, False) or by_data


def _length(eqn: JaxprEqn) -> int:
    """How many numbers the best are chosen of."""
    p, shape = eqn.params, jaxprs.shape(eqn.invars[0])
    axis = p["axes"][0] if "axes" in p else p.get("dimension", p.get("reduction_dimension", -1))
    return shape[axis] if shape else 1
