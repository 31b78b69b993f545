"""Walk a program and find what it does with each parameter."""

import collections
import dataclasses
import math
from collections.abc import Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from . import jaxprs
from .sites import FINDERS, Site, completed, is_leaf
from .views import REPEATED, Dims, Step, View, sizes, through, unstacked, whole

LOSS = "fisher_optax_loss_"  # the name of a jitted loss begins with this


@dataclasses.dataclass
class Plan:
    """What is to be done at the equations of one jaxpr, by their numbers."""

    sites: dict[int, Site] = dataclasses.field(default_factory=dict)
    inner: dict[int, list["Plan"]] = dataclasses.field(default_factory=dict)
    entries: dict[int, dict[int, View]] = dataclasses.field(default_factory=dict)  # parameters that enter a loop
    losses: dict[int, tuple[str, int]] = dataclasses.field(default_factory=dict)  # names, and numbers in the program

    def is_plain(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.sites or self.inner or self.losses)

    def has_losses(self) -> bool:
        """Whether a loss of `fo.losses` is in it."""
        return bool(self.losses) or any(plan.has_losses() for plans in self.inner.values() for plan in plans)


@dataclasses.dataclass
class Uses:
    """What was found of every parameter, by its number."""

    shapes: list[tuple[int, ...]]
    forward: bool = False  # whether inputs alone are asked for: where gradients cannot follow, too
    sites: dict[int, list[Site]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    biases: dict[int, list[tuple[Site, tuple[Step, ...]]]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )
    others: dict[int, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    count: int = 0
    losses: int = 0
    heads: dict[int, int] = dataclasses.field(default_factory=dict)  # by number of the site: the loss it gives logits
    # By number of the site: which operands of the program its input and its groups are, unchanged, and the axes of its
    # result.
    products: dict[int, tuple[list[int], Dims] | None] = dataclasses.field(default_factory=dict)

    def other(self, views: Sequence[View | None], what: str) -> None:
        """Parameters among ``views`` are used for something that is no product."""
        for view in views:
            if view is not None and view.root[0] == "leaf" and what not in self.others[view.root[1]]:
                self.others[view.root[1]].append(what)


def walk(jaxpr: Jaxpr, views: Sequence[View | None], uses: Uses, loops: int = 0) -> tuple[Plan, list[View | None]]:
    """The plan of a jaxpr, inside so many loops, whose operands are these views, and the views its results are."""
    env: dict[Var, View] = {v: view for v, view in zip(jaxpr.invars, views, strict=True) if view is not None}
    reads: collections.Counter[jaxprs.Operand] = collections.Counter(
        v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)
    )
    reads.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
    plan = Plan()

    def view_of(v: jaxprs.Operand) -> View | None:
        view = None if isinstance(v, Literal) else env.get(v)
        return None if view is None else view._replace(sole=view.sole and reads[v] == 1)

    for i, eqn in enumerate(jaxpr.eqns):
        operands = [view_of(v) for v in eqn.invars]
        results = _Step(plan, uses, i, eqn, operands, loops).results()
        env.update({v: view for v, view in zip(eqn.outvars, results, strict=False) if view is not None})
    return plan, [view_of(v) for v in jaxpr.outvars]


@dataclasses.dataclass
class _Step:
    """One equation on its way through `walk`."""

    plan: Plan
    uses: Uses
    i: int
    eqn: JaxprEqn
    views: list[View | None]
    loops: int

    def results(self) -> list[View | None]:
        name, params = self.eqn.primitive.name, self.eqn.params
        if name in jaxprs.CALLS and str(params.get("name", "")).startswith(LOSS):
            self.plan.losses[self.i] = params["name"].removeprefix(LOSS), self.uses.losses
            if params["name"] == f"{LOSS}softmax_cross_entropy" and (site := _logits_of(self.views[0])) is not None:
                self.uses.heads[site.number] = self.uses.losses
            self.uses.losses += 1
            self.uses.other(self.views, "a loss")
            return []
        if name in jaxprs.CALLS or name in jaxprs.REMAT:
            return self._enter(jaxprs.body(self.eqn), self.views)
        if name in ("scan", "cond", "while", "shard_map") or name in jaxprs.CUSTOM:
            kind = "custom" if name in jaxprs.CUSTOM else name
            return getattr(self, f"_{kind}")()
        if not any(self.views):
            return []
        if name in FINDERS and any(map(is_leaf, self.views)) and (site := self._site()):
            return site
        if name in ("add", "add_any") and len(self.views) == 2:
            return self._add()
        return self._moved()

    def _moved(self) -> list[View | None]:
        """A view moved about, or the end of what is known."""
        view, rest = self.views[0], self.views[1:]
        if view is not None and self.eqn.primitive.name == "unstack":
            found = unstacked(view, self.eqn.params["axis"])
            self.uses.other([view] if None in found else [], "unstack")
            return found
        shape = jaxprs.shape(self.eqn.outvars[0])
        moved = None if view is None else through(view, self.eqn.primitive.name, self.eqn.params, shape)
        if self.eqn.primitive.name == "stop_gradient" and self.uses.forward:  # which asks for no gradient
            moved = view
        self.uses.other(rest if moved else self.views, self.eqn.primitive.name)
        return [moved]

    def _site(self) -> list[View | None] | None:
        leaves = [v for v in self.views if v is not None and v.root[0] == "leaf"]
        found = FINDERS[self.eqn.primitive.name](self.eqn, self.views) if len(leaves) == 1 else None
        if found is None:
            return None
        site, dims = found
        complete = completed(site, self.uses.shapes[site.leaf])
        if complete is None:
            return None
        return [self._found(complete._replace(repeated=self._repeats(leaves[0]), number=self.uses.count), dims)]

    def _found(self, site: Site, dims: Dims) -> View:
        """Note a site and return the view that its result is."""
        operands = [site.x] if site.groups is None else [site.x, site.groups.operand]
        views = [v for v in (self.views[k] for k in operands) if v is not None and _is_operand(v)]
        known = [v.root[1] for v in views]
        self.uses.products[site.number] = (known, dims) if len(known) == len(operands) else None
        self.uses.count += 1
        self.uses.sites[site.leaf].append(site)
        self.plan.sites[self.i] = site
        return View(("product", site), dims)

    def _repeats(self, leaf: View) -> bool:
        """Whether a loop meets the same matrix more than once."""
        return self.loops > sum(item[0] == "scan" for item in leaf.steps)

    def _add(self) -> list[View | None]:
        for p, b in (self.views, self.views[::-1]):
            if p is None or b is None or p.root[0] != "product" or b.root[0] != "leaf":
                continue
            if p.sole and _is_bias(p, b):
                self.uses.biases[b.root[1]].append((p.root[1], b.steps))
                return [p]
        self.uses.other(self.views, self.eqn.primitive.name)
        return [None]

    def _enter(self, inner: jaxprs.Program, views: Sequence[View | None], loops: int = 0) -> list[View | None]:
        plan, results = walk(inner.jaxpr, views, self.uses, self.loops + loops)
        self._note([plan], views)
        return results

    def _scan(self) -> list[View | None]:
        consts, carry = jaxprs.scan_counts(self.eqn)
        views: list[View | None] = []
        for k, view in enumerate(self.views):
            if view is None or view.root[0] != "leaf":
                views.append(None)
            elif k < consts:
                views.append(view)
            elif k < consts + carry:
                self.uses.other([view], "carried through a loop")
                views.append(None)
            else:
                views.append(self._scanned(view))
        self._enter(jaxprs.body(self.eqn), views, loops=1)
        return []

    def _scanned(self, view: View) -> View | None:
        """One step's share of a parameter that a loop runs over."""
        first = view.dims[0]
        if not first:
            return view._replace(dims=view.dims[1:])
        if len(first) == 1 and first[0].source is not REPEATED:
            axis = first[0].source
            if first[0].size == self.uses.shapes[view.root[1]][axis]:
                return view._replace(dims=view.dims[1:], steps=(*view.steps, ("scan", axis)))
        self.uses.other([view], "a loop over part of an axis")
        return None

    def _cond(self) -> list[View | None]:
        views = [v if v is not None and v.root[0] == "leaf" else None for v in self.views[1:]]
        plans = [walk(branch.jaxpr, views, self.uses, self.loops)[0] for branch in jaxprs.bodies(self.eqn)]
        self._note(plans, views)
        return []

    def _while(self) -> list[View | None]:
        if not self.uses.forward:
            self.uses.other(self.views, "a while loop")
            return []
        *fixed, carry = jaxprs.while_operands(self.eqn, self.views)
        self.uses.other(carry, "carried through a loop")
        plans = []
        for program, views in zip(jaxprs.bodies(self.eqn), fixed, strict=True):
            leaves = [*(v if is_leaf(v) else None for v in views), *(None for _ in carry)]
            plans.append(walk(program.jaxpr, leaves, self.uses, self.loops + 1)[0])
        self._note(plans, self.views)
        return []

    def _note(self, plans: list[Plan], views: Sequence[View | None]) -> None:
        """The plans of several programs inside, unless there is nothing to do."""
        if not all(plan.is_plain() for plan in plans):
            self.plan.inner[self.i] = plans
            self.plan.entries[self.i] = {k: v for k, v in enumerate(views) if v is not None and is_leaf(v)}

    def _shard_map(self) -> list[View | None]:
        views: list[View | None] = []
        for view, spec in zip(self.views, self.eqn.params["in_specs"], strict=True):
            whole_leaf = view is not None and view.root[0] == "leaf" and not any(spec)
            views.append(view if whole_leaf else None)
            if not whole_leaf:
                self.uses.other([view], "split by a shard_map")
        # Without types nobody knows whose samples are whose: they would be added up, as in a loop.
        self._enter(jaxprs.body(self.eqn), views, loops=int(not self.eqn.params["check_vma"]))
        return []

    def _custom(self) -> list[View | None]:
        """A function with its own derivative stays whole, and its result is a site if it is a product of its operands;
        where no gradient is asked for, it is a function like any other.
        """
        if self.uses.forward:
            return self._enter(jaxprs.body(self.eqn), self.views)
        if not any(map(is_leaf, self.views)):
            return []
        shapes = [jaxprs.shape(v) for v in self.eqn.invars]
        views = [v if is_leaf(v) else whole(("input", k), shapes[k]) for k, v in enumerate(self.views)]
        inside = Uses(self.uses.shapes, count=self.uses.count)
        _, results = walk(jaxprs.body(self.eqn).jaxpr, views, inside)
        sites = [site for found in inside.sites.values() for site in found]
        out = results[0] if len(self.eqn.outvars) == 1 else None
        site = sites[0] if len(sites) == 1 and not inside.others and not inside.biases else None
        known = None if site is None else inside.products[site.number]
        if site is None or known is None or out is None or out.root != ("product", site) or out.dims != known[1]:
            self.uses.other(self.views, f"{self.eqn.primitive.name} of more than a product")
            return []
        x, *groups = known[0]
        site = site._replace(x=x, number=self.uses.count)
        if site.groups is not None:
            site = site._replace(groups=site.groups._replace(operand=groups[0]))
        return [self._found(site, out.dims)]


def _is_operand(view: View) -> bool:
    """Whether a view is of a whole operand, as it comes."""
    return view.root[0] == "input" and view.dims == whole(view.root, sizes(view.dims)).dims


def _logits_of(view: View | None) -> Site | None:
    """The product that logits are, whole and with its outputs along their last axis, if they are one."""
    if view is None or view.root[0] != "product":
        return None
    site, outputs = view.root[1], [a for d in view.dims for a in d if a.source is not None and a.source >= 0]
    last = view.dims[-1] if view.dims else ()
    return site if list(last) == outputs and site.n == math.prod(a.size for a in last) and not site.batch else None


def _is_bias(p: View, b: View) -> bool:
    """Whether ``b`` repeats over the positions of product ``p`` and has one entry for each of its outputs, in order."""
    pairs = []
    for dp, db in ([[a for a in d if a.size != 1] for d in dims] for dims in zip(p.dims, b.dims, strict=False)):
        positions = not any(a.source is not None and a.source >= 0 for a in dp)
        if positions and all(a.source is REPEATED for a in db):
            continue
        if positions or [a.size for a in dp] != [a.size for a in db] or any(a.source is REPEATED for a in (*dp, *db)):
            return False
        pairs += zip(dp, db, strict=True)

    def order(k: int) -> list[int]:
        return sorted(range(len(pairs)), key=lambda i: (pairs[i][k].source, -pairs[i][k].stride))

    return len(p.dims) == len(b.dims) and order(0) == order(1)
