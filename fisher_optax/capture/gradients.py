"""`value_and_grad` that returns statistics too, from a loss function as it is."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._xla import on_mesh
from ..matrices.axes import path_names, shapes
from ..statistics import LayerFactors, Samples
from . import losses
from .bases import bases_of
from .devices import check_devices, check_normalizer, check_weighing
from .heads import marked_heads, tokens_of
from .kinds.kronecker import KroneckerFactors
from .kinds.sums import check_counts
from .marked import Counted, losses_in
from .program import jaxprs
from .program.leaves import LeafPlan, leaf_plans
from .program.views import whole
from .program.walk import Plan, Uses, walk
from .taps import Watch, run, zeros

FISHERS = ("empirical", "mc", "true")
SEEN_AGAIN = ("left", "count", "inputs")  # what each backward pass sums up anew
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
    operands: list[Any]  # all arrays, the parameters first
    outputs: Any  # the structure of what it returns


class Settings(NamedTuple):
    """What `value_and_grad` was given."""

    loss_fn: Callable[..., Any]
    kind: Any
    fisher: str
    has_aux: bool
    normalizer: Any
    batch_axis: int
    mask: Any
    n_samples: int
    strict: bool


def checked_kind(statistics: Any) -> Any:
    """A TypeError for what is no kind of statistics."""
    if isinstance(statistics, type) or not hasattr(statistics, "collect"):
        raise TypeError(
            f"statistics must be fo.KroneckerFactors(), fo.LayerSamples() or fo.InputGram(); got {statistics!r}."
        )
    return statistics


def trace(loss_fn: Callable[..., Any], kind: Any, params: Any, args: Any, kwargs: Any) -> Traced:
    """Trace ``loss_fn(params, *args, **kwargs)``; what is no array is left to it as it is."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths, values = ["/".join(path_names(path)) for path, _ in flat], [x for _, x in flat]
    for path, x in zip(paths, jax.tree.leaves(shapes(params)), strict=True):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(f"gradients need floating-point parameters; {path!r} is {x.dtype}.")
    others, others_def = jax.tree.flatten((args, kwargs))
    arrays = [i for i, x in enumerate(others) if isinstance(x, jax.Array | jax.ShapeDtypeStruct)]
    outputs: list[Any] = []

    def flat_loss(*operands: Any) -> Any:
        given = list(others)
        for i, x in zip(arrays, operands[len(values) :], strict=True):
            given[i] = x
        args, kwargs = others_def.unflatten(given)
        out = loss_fn(treedef.unflatten(operands[: len(values)]), *args, **kwargs)
        leaves, structure = jax.tree.flatten(out)
        outputs.append(structure)
        return leaves

    operands = [*values, *(others[i] for i in arrays)]
    program = jaxprs.program(jax.make_jaxpr(flat_loss)(*operands))
    uses = Uses([tuple(jnp.shape(x)) for x in values])
    views = [whole(("leaf", i), shape) for i, shape in enumerate(uses.shapes)] + [None] * len(arrays)
    plan, _ = walk(program.jaxpr, views, uses)
    leaves = leaf_plans(uses, paths, [jnp.result_type(x) for x in values], kind.unavailable)
    return Traced(program, plan, leaves, treedef, operands, outputs[0])


def value_and_grad(
    loss_fn: Callable[..., Any],
    statistics: Any = None,
    fisher: str = "empirical",
    has_aux: bool = False,
    normalizer: Any = None,
    batch_axis: int = 0,
    *,
    mask: Callable[..., Any] | None = None,
    n_samples: int = 1,
    strict: bool = False,
) -> Callable[..., Any]:
    """Like `jax.value_and_grad`, with statistics of every linear and convolutional layer from the same backward pass.

    ``grad_fn(params, *args, fisher_key=None, bases=None, **kwargs)`` returns ``value, grads, stats``. ``stats`` has the
    structure of params, with a `LayerFactors` or `Samples` at each captured kernel and None elsewhere; a kernel's
    statistics include its bias. The model needs no change: ``loss_fn`` is traced, its products with parameters are
    found in the program, and each gets a tap.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)`` -> a scalar, with ``has_aux`` a pair of it and anything.
      statistics: `fo.KroneckerFactors` (the default), `fo.LayerSamples` or `fo.InputGram`.
      fisher: which labels: "empirical" (the data's; costs no further pass), "mc" (drawn from the model with
        ``fisher_key``; one more backward pass a sample) or "true" (all of them; one pass a class or output). The last
        two need the logits to pass through `fo.losses`, outside of loops.
      has_aux: as in `jax.value_and_grad`.
      normalizer: what the loss was divided by, a number or a function of ``*args, **kwargs``. None: `fo.losses` know
        it; else the positions of each dense layer (steps of a loop are positions), and the examples for convolutions
        and ``mode="reduce"``. It scales ``right``, for ``fisher="empirical"`` alone: the others know theirs. Of a loss
        averaged over devices in a `jax.shard_map`: what all of theirs was divided by.
      batch_axis: which axis of a dense layer's positions counts examples. Of layers without that axis, the first does.
      mask: a function of ``*args, **kwargs``: True for the positions (or examples) that count. Others drop out of the
        inputs too. None: those whose weight in `fo.losses` is not 0. Layers whose positions are no such axes (after
        pooling, say) are not masked.
      n_samples: draws of labels for "mc".
      strict: a ValueError where a parameter of two axes or more is used in a way that is not captured.

    Raises:
      TypeError, ValueError: for unknown words, a loss that is no scalar, a model without any captured layer, a missing
        ``fisher_key``.

    Source: Martens and Grosse 2015 (arXiv 1503.05671), section 5 for sampled labels.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> loss = lambda p, x, y: fo.losses.gaussian(x @ p["kernel"] + p["bias"], y)
      >>> value, grads, stats = fo.value_and_grad(loss)(params, jnp.ones((5, 3)), jnp.ones((5, 2)))
      >>> stats["kernel"].left.shape, stats["kernel"].right.shape
      ((4, 4), (2, 2))
    """
    kind = checked_kind(KroneckerFactors() if statistics is None else statistics)
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {', '.join(map(repr, FISHERS))}; got {fisher!r}.")
    check_counts("value_and_grad", n_samples=n_samples)
    if isinstance(batch_axis, bool) or not isinstance(batch_axis, int) or batch_axis < 0:
        raise ValueError(f"value_and_grad: batch_axis must be an integer of at least 0; got {batch_axis!r}.")

    settings = Settings(loss_fn, kind, fisher, has_aux, normalizer, batch_axis, mask, n_samples, strict)

    def grad_fn(params: Any, *args: Any, fisher_key: Any = None, bases: Any = None, **kwargs: Any) -> Any:
        return _evaluate(settings, params, args, kwargs, fisher_key, bases)

    return grad_fn


def _evaluate(settings: Settings, params: Any, args: Any, kwargs: Any, key: Any, bases: Any) -> tuple[Any, Any, Any]:
    _, kind, fisher, has_aux, normalizer, batch_axis, mask, n_samples, strict = settings
    if (fisher == "mc") != (key is not None):
        raise ValueError(
            "fisher='mc' draws labels: pass grad_fn(..., fisher_key=jax.random.key(step))."
            if fisher == "mc"
            else f"fisher_key is for fisher='mc' only; this is {fisher!r}."
        )
    traced = trace(settings.loss_fn, kind, params, args, kwargs)
    _check(traced, kind, has_aux, strict)
    counted = losses_in(traced.program, traced.plan, traced.operands)
    _check_losses(counted, fisher, normalizer)
    watched = marked_heads([leaf._replace(batch_axis=batch_axis) for leaf in traced.leaves if leaf.sites], kind)
    parameters = [(leaf, traced.operands[leaf.number]) for leaf in watched]
    value_type = jaxprs.aval(traced.program.jaxpr.outvars[0])
    if fisher != "empirical" or (normalizer is None and "right" in getattr(kind, "sides", ("right",))):
        check_devices(value_type, counted.calls, parameters)
        if fisher == "empirical" and any(len(call) > 2 for call in counted.calls):
            check_weighing(traced.program, traced.plan)
    for leaf in watched:
        if why := kind.unavailable_for(leaf, fisher):
            raise ValueError(f"{leaf.path!r} has no such statistics: {why}.")
    N = _scale(settings, counted, parameters, args, kwargs)
    keep = counted.mask if mask is None else jnp.asarray(mask(*args, **kwargs))
    given = bases_of(bases, watched, kind)
    probes = on_mesh(
        lambda _: [zeros(kind, leaf, x, keep, Q) for (leaf, x), Q in zip(parameters, given, strict=True)],
        traced.operands,
    )
    by_site = {site.number: leaf for leaf in watched for site in leaf.sites}
    slots = {number: min(k, kind.slots(leaf) - 1) for leaf in watched for number, k in leaf.turns.items()}
    watch = Watch(kind, by_site, slots, keep, fisher, n_samples, key, [], value_type)
    passes = 0 if fisher == "empirical" else losses.passes(fisher, n_samples, counted.calls[0][0])
    (value, aux), grads, raw, given_losses = _differentiate(traced, watched, probes, given, watch, passes)
    done = {leaf.number: kind.finish(leaf, seen, N) for leaf, seen in zip(watched, raw, strict=True)}
    for leaf in watched:
        if leaf.head is not None:
            right = tokens_of(given_losses, leaf, traced.operands[leaf.number], kind.head_rows)
            done[leaf.number] = dataclasses.replace(done[leaf.number], right=right)
    stats = [_with_path(done.get(leaf.number), leaf, traced.leaves) for leaf in traced.leaves]
    value = (value, aux[0]) if has_aux else value
    return value, traced.treedef.unflatten(grads), traced.treedef.unflatten(stats)


def _scale(settings: Settings, counted: Counted, parameters: Any, args: Any, kwargs: Any) -> Any:
    """What sums of squared gradients are multiplied by; None where the layers know."""
    if settings.fisher != "empirical":
        return settings.kind.model_scale(counted.total)
    N = settings.normalizer(*args, **kwargs) if callable(settings.normalizer) else settings.normalizer
    check_normalizer(N, parameters)
    return counted.total if N is None else N


def _differentiate(
    traced: Traced, watched: list[LeafPlan], probes: Any, given: Any, watch: Watch, passes: int
) -> tuple[Any, Any, Any, dict[int, Any]]:
    """The value and what else the loss returns, its gradients, what the taps returned, and what losses were given."""
    count = len(traced.leaves)

    def loss(values: Any, probes: Any) -> Any:
        scope = {(leaf.number, ()): (p, b) for leaf, p, b in zip(watched, probes, given, strict=True)}
        out, pseudo = run(traced.program, traced.plan, [*values, *traced.operands[count:]], scope, watch)
        value, *aux = out
        pseudo = jnp.zeros(0) if pseudo is None else pseudo
        return (value, pseudo), (aux, {number: given for number, given in (watch.seen or ()) if number in wanted})

    wanted = {leaf.head for leaf in watched if leaf.head is not None}
    (value, pseudo), pull, (aux, given_losses) = jax.vjp(loss, traced.operands[:count], probes, has_aux=True)
    grads, raw = pull((jnp.ones_like(value), jnp.zeros_like(pseudo)))
    if passes:
        basis = jnp.eye(passes, dtype=pseudo.dtype)

        def of_pass(ct: Any) -> Any:
            return pull((jnp.zeros_like(value), ct))[1]

        if passes == 1:
            raw = of_pass(basis[0])
        else:
            total, _ = jax.lax.scan(
                lambda sums, ct: (jax.tree.map(jnp.add, sums, of_pass(ct)), None), of_pass(basis[0]), basis[1:]
            )
            raw = _mean_of_inputs(total, passes)
    structure = jax.tree.unflatten(traced.outputs, [value, *aux])
    rest = structure[1:] if isinstance(structure, tuple) else ()
    return (value, rest), grads, raw, given_losses


def _mean_of_inputs(total: Any, passes: int) -> Any:
    """Sums over backward passes, of which each has seen the same inputs."""
    return [[{k: x / passes if k in SEEN_AGAIN else x for k, x in slot.items()} for slot in s] for s in total]


def _check(traced: Traced, kind: Any, has_aux: bool, strict: bool) -> None:
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


def _check_losses(counted: Counted, fisher: str, normalizer: Any) -> None:
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


def _with_path(statistics: Any, leaf: LeafPlan, leaves: list[LeafPlan]) -> Any:
    if not isinstance(statistics, LayerFactors | Samples):
        return statistics
    bias = None if leaf.bias is None else leaves[leaf.bias].path
    return dataclasses.replace(statistics, bias=bias, axes=leaf.axes)
