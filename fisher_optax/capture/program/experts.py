"""Which axes of a weight's outputs count experts: those that another weight has a matrix for each of.

An axis of a product's result is followed through whatever acts on each entry alone. Where it meets a weight that has it
as a batch axis, or an axis that such a weight has made, what was made along it are the results of as many layers that
share an input; or, where a weight has no other outputs, one number for each expert: it is their router.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from . import jaxprs
from .leaves import LeafPlan
from .walk import Plan

Tag = tuple[int, int]  # the number of a product, and the axis of its weight
Tags = tuple[frozenset[Tag], ...]  # of each axis of a variable
NOTHING: frozenset[Tag] = frozenset()
BATCH = -1  # in the place of an axis: those that a product has a matrix for each entry of
# What acts on each entry alone.
ENTRYWISE = frozenset(
    {
        *(
            "add",
            "add_any",
            "sub",
            "mul",
            "div",
            "rem",
            "pow",
            "max",
            "min",
            "integer_pow",
            "square",
            "select_n",
            "clamp",
        ),
        *(
            "exp",
            "exp2",
            "expm1",
            "log",
            "log1p",
            "tanh",
            "logistic",
            "erf",
            "erfc",
            "sin",
            "cos",
            "sqrt",
            "rsqrt",
            "cbrt",
        ),
        *(
            "neg",
            "abs",
            "sign",
            "floor",
            "ceil",
            "round",
            "and",
            "or",
            "not",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "is_finite",
        ),
        *("stop_gradient", "convert_element_type", "reduce_precision", "copy", "copy_p", "pvary", "pcast", "name"),
        *("sharding_constraint", "reshard"),
    }
)
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"}


class Experts(NamedTuple):
    """What counts experts among the outputs of a leaf."""

    axes: tuple[int, ...] = ()  # beside other outputs
    is_router: bool = False  # all of its outputs: it weighs experts


def expert_axes(jaxpr: Jaxpr, plan: Plan, leaves: Sequence[LeafPlan]) -> list[Experts]:
    """Of each leaf, as all of its products show."""
    found: set[Tag] = set()
    _walk(jaxpr, plan, [_none(v) for v in jaxpr.invars], found)

    def of_leaf(leaf: LeafPlan) -> Experts:
        outputs = leaf.axes.outputs if leaf.axes and leaf.sites else ()
        axes = tuple(a for a in outputs if all((site.number, a) in found for site in leaf.sites))
        return Experts(axes) if len(axes) < len(outputs) else Experts(is_router=bool(axes))

    return [of_leaf(leaf) for leaf in leaves]


def _none(v: jaxprs.Operand) -> Tags:
    return (NOTHING,) * len(jaxprs.shape(v))


def _walk(jaxpr: Jaxpr, plan: Plan | None, operands: Sequence[Tags], found: set[Tag]) -> list[Tags]:
    """The tags of the results; ``found`` grows."""
    env: dict[Var, Tags] = dict(zip(jaxpr.invars, operands, strict=True))
    tags = lambda v: _none(v) if isinstance(v, Literal) else env.get(v, _none(v))  # noqa: E731
    for i, eqn in enumerate(jaxpr.eqns):
        results = _results(eqn, i, plan, [tags(v) for v in eqn.invars], found)
        env.update(zip(eqn.outvars, results, strict=True))
    return [tags(v) for v in jaxpr.outvars]


def _results(eqn: JaxprEqn, i: int, plan: Plan | None, operands: list[Tags], found: set[Tag]) -> list[Tags]:
    name, nothing = eqn.primitive.name, [_none(v) for v in eqn.outvars]
    inner = plan.inner.get(i, []) if plan else []
    if plan and (site := plan.sites.get(i)):
        if site.parts > 1 or site.how != "dense":
            return nothing
        found.update(*(operands[site.x][a] for a in site.x_axes[0]))
        result = list(nothing[0])
        for axis in site.y_axes[0]:
            result[axis] = frozenset({(site.number, BATCH)})
        if len(site.outputs) == len(site.y_axes[2]):
            for axis, atom in zip(site.y_axes[2], site.outputs, strict=True):
                result[axis] = NOTHING if atom.source is None else frozenset({(site.number, atom.source)})
        return [tuple(result)]
    if name in jaxprs.CALLS | jaxprs.REMAT | jaxprs.CUSTOM:
        return _walk(jaxprs.body(eqn).jaxpr, inner[0] if inner else None, operands, found)
    if name == "scan":
        consts, _ = jaxprs.scan_counts(eqn)
        body = jaxprs.body(eqn).jaxpr
        starts = [*operands[:consts], *map(_none, body.invars[consts:])]
        _walk(body, inner[0] if inner else None, starts, found)
        return nothing
    if name == "cond":
        for branch, of_branch in zip(jaxprs.bodies(eqn), inner, strict=False):
            _walk(branch.jaxpr, of_branch, operands[1:], found)
        return nothing
    if name == "dot_general":
        contracting, batch = eqn.params["dimension_numbers"]
        for a, b in (*zip(*contracting, strict=True), *zip(*batch, strict=True)):
            _meet(operands[0][a] | operands[1][b], found)
        return nothing
    result = _moved(eqn, operands) if len(nothing) == 1 else ()
    for tags in result:
        _meet(tags, found)
    return [result] if result else nothing


def _meet(tags: frozenset[Tag], found: set[Tag]) -> None:
    """Axes that are one with an axis that counts experts."""
    if any(axis == BATCH for _, axis in tags):
        found.update(tags)


def _moved(eqn: JaxprEqn, operands: list[Tags]) -> Tags:
    """Of a result whose axes are those of the operands."""
    name, p, shape = eqn.primitive.name, eqn.params, jaxprs.shape(eqn.outvars[0])
    shapes = [jaxprs.shape(v) for v in eqn.invars]
    if name == "transpose":
        return tuple(operands[0][a] for a in p["permutation"])
    if name == "broadcast_in_dim":
        places = dict(zip(p["broadcast_dimensions"], operands[0], strict=True))
        return tuple(places.get(a, NOTHING) for a in range(len(shape)))
    if name in REDUCTIONS:
        return tuple(tag for a, tag in enumerate(operands[0]) if a not in p["axes"])
    long = [(n, tag) for n, tag in zip(shapes[0], operands[0], strict=True) if n != 1] if shapes else []
    if name in ("reshape", "squeeze", "expand_dims") and [n for n, _ in long] == [n for n in shape if n != 1]:
        rest = iter(long)
        return tuple(next(rest)[1] if n != 1 else NOTHING for n in shape)
    fits = (
        s == () or (len(s) == len(shape) and all(n in (1, m) for n, m in zip(s, shape, strict=True))) for s in shapes
    )
    if name not in ENTRYWISE or not all(fits):
        return (NOTHING,) * len(shape)
    return tuple(
        NOTHING.union(*(tags[a] for tags, s in zip(operands, shapes, strict=True) if s and s[a] == n))
        for a, n in enumerate(shape)
    )
