"""A loss function's program, and errors for what cannot be captured of it."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from ..matrices.axes import path_names, shapes
from .kinds.protocol import StatisticsKind
from .marked import Counted
from .program import jaxprs
from .program.leaves import LeafPlan, leaf_plans
from .program.views import whole
from .program.walk import Plan, Uses, walk

NOTHING = (
    "no layer of this model can be captured: {why}. Wanted are products of an input with a parameter (Dense, Conv, "
    "einsum, ...); fo.report(loss_fn, params, *args, statistics=fo.{kind}(...)) lists what was found"
)


class Traced(NamedTuple):
    """A loss function's program, and what it does with the parameters."""

    program: jaxprs.Program
    plan: Plan
    leaves: list[LeafPlan]
    treedef: Any  # of the parameters
    operands: list[Any]  # all arrays, NumPy's too, or their shapes; the parameters first
    outputs: Any  # the structure of what it returns


Normalizer = ArrayLike | Callable[..., ArrayLike] | None


def checked_kind(statistics: object) -> StatisticsKind:
    """A TypeError for what is no kind of statistics."""
    if isinstance(statistics, type) or not isinstance(statistics, StatisticsKind):
        raise TypeError(
            "statistics must be fo.KroneckerFactors(), fo.LayerSamples(), fo.InputGram() or another "
            f"fo.StatisticsKind; got {statistics!r}."
        )
    return statistics


def trace(loss_fn: Callable[..., PyTree], kind: StatisticsKind, params: PyTree, args: PyTree, kwargs: PyTree) -> Traced:
    """Trace ``loss_fn(params, *args, **kwargs)``; what is no array is left to it as it is."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths, values = ["/".join(path_names(path)) for path, _ in flat], [x for _, x in flat]
    for path, x in zip(paths, jax.tree.leaves(shapes(params)), strict=True):
        if not (kind.inputs_alone() or jnp.issubdtype(x.dtype, jnp.inexact)):
            raise TypeError(f"gradients need floating-point parameters; {path!r} is {x.dtype}.")
    others, others_def = jax.tree.flatten((args, kwargs))
    arrays = [i for i, x in enumerate(others) if isinstance(x, jax.Array | jax.ShapeDtypeStruct)]
    outputs: list[Any] = []

    def flat_loss(*operands: Array) -> list[Array]:
        filled = list(others)
        for i, x in zip(arrays, operands[len(values) :], strict=True):
            filled[i] = x
        args, kwargs = others_def.unflatten(filled)
        out = loss_fn(treedef.unflatten(operands[: len(values)]), *args, **kwargs)
        leaves, structure = jax.tree.flatten(out)
        outputs.append(structure)
        return leaves

    operands = [*values, *(others[i] for i in arrays)]
    program = jaxprs.program(jax.make_jaxpr(flat_loss)(*operands))
    uses = Uses([tuple(jnp.shape(x)) for x in values], forward=kind.inputs_alone())
    views = [whole(("leaf", i), shape) for i, shape in enumerate(uses.shapes)] + [None] * len(arrays)
    plan, _ = walk(program.jaxpr, views, uses)
    leaves = leaf_plans(uses, paths, [jnp.result_type(x) for x in values], kind.unavailable)
    return Traced(program, plan, leaves, treedef, operands, outputs[0])


def check(traced: Traced, kind: StatisticsKind, has_aux: bool, strict: bool) -> None:
    out: Any = jax.tree.unflatten(traced.outputs, [jaxprs.aval(v) for v in traced.program.jaxpr.outvars])
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"has_aux=True: loss_fn must return a pair of loss and aux; it returned {type(out).__name__}.")
    value: Any = out[0] if has_aux else out
    if jax.tree.structure(value) != jax.tree.structure(0) or value.shape != ():
        shown = f"shape {value.shape}" if hasattr(value, "shape") else type(value).__name__
        raise TypeError(f"loss_fn must return a scalar{', then aux' if has_aux else ''}; it returned {shown}.")
    if not any(leaf.sites for leaf in traced.leaves):
        matrices = [leaf for leaf in traced.leaves if len(leaf.shape) > 1]
        why = f"{matrices[0].path!r} ({matrices[0].use}): {matrices[0].reason}" if matrices else "it has no matrices"
        raise ValueError(NOTHING.format(why=why, kind=type(kind).__name__) + ".")
    if strict and (bad := [leaf for leaf in traced.leaves if leaf.reason and len(leaf.shape) > 1]):
        listed = "; ".join(f"{leaf.path!r} ({leaf.use}): {leaf.reason}" for leaf in bad)
        raise ValueError(f"strict=True, and not all parameters are captured: {listed}.")


def warn_of_experts(leaves: list[LeafPlan]) -> None:
    """Says which layers a mask of positions does not reach."""
    if experts := [leaf.path for leaf in leaves if leaf.sites and leaf.sites[0].groups is not None]:
        warnings.warn(
            f"mask= does not reach {', '.join(map(repr, experts))}: rows of experts are in another order than "
            "positions, and all that an expert gets count. To leave positions out, sort them behind all others, and "
            "count them in no entry of group_sizes.",
            stacklevel=3,
        )


def check_losses(counted: Counted, fisher: str, normalizer: Normalizer) -> None:
    if counted.hidden and (fisher != "empirical" or normalizer is None):
        wanted = "pass normalizer=" if fisher == "empirical" else f"fisher={fisher!r} needs it"
        raise ValueError(
            f"a loss of fo.losses stands inside a {counted.hidden}, where its examples cannot be counted: compute it "
            f"outside, or {wanted}."
        )
    if fisher != "empirical" and not counted.calls:
        raise ValueError(
            f"fisher={fisher!r} needs the model's distribution: compute the loss by fo.losses.softmax_cross_entropy, "
            "sigmoid_cross_entropy or gaussian; none was found in loss_fn."
        )
    if fisher == "true" and len(counted.calls) > 1:
        raise ValueError(
            f"fisher='true' goes through the outputs of one loss; loss_fn calls fo.losses {len(counted.calls)} times. "
            "Use fisher='mc'."
        )
