"""`value_and_grad` that returns statistics too, from a loss function as it is."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._xla import on_mesh
from ..statistics import LayerFactors, Samples
from . import forward, losses
from .bases import bases_of
from .devices import check_devices, check_normalizer, check_weighing
from .heads import marked_heads, tokens_of
from .kinds.kronecker import KroneckerFactors
from .kinds.protocol import Bases, StatisticsKind, Sums
from .kinds.sums import check_counts
from .marked import Counted, losses_in
from .program import jaxprs
from .program.leaves import LeafPlan
from .taps import Watch, run, watching, zeros
from .traced import Normalizer, Traced, check, check_losses, checked_kind, trace, warn_of_experts

FISHERS = ("empirical", "mc", "true")
SEEN_AGAIN = ("left", "count", "inputs")  # what each backward pass sums up anew


class Settings(NamedTuple):
    """What `value_and_grad` was given."""

    loss_fn: Callable[..., PyTree]
    kind: StatisticsKind
    fisher: str
    has_aux: bool
    normalizer: Normalizer
    batch_axis: int
    mask: Callable[..., ArrayLike] | None
    n_samples: int
    strict: bool


def value_and_grad(
    loss_fn: Callable[..., PyTree],
    statistics: object = None,
    fisher: str = "empirical",
    has_aux: bool = False,
    normalizer: Normalizer = None,
    batch_axis: int = 0,
    *,
    mask: Callable[..., ArrayLike] | None = None,
    n_samples: int = 1,
    strict: bool = False,
) -> Callable[..., tuple[PyTree, PyTree, PyTree]]:
    """Like `jax.value_and_grad`, with statistics of every linear and convolutional layer from the same backward pass.

    ``grad_fn(params, *args, fisher_key=None, bases=None, **kwargs)`` returns ``value, grads, stats``. ``stats`` has the
    structure of params, with a `LayerFactors` or `Samples` at each captured kernel and None elsewhere; a kernel's
    statistics include its bias. The model needs no change: ``loss_fn`` is traced, its products with parameters are
    found in the program, and each gets a tap.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)`` -> a scalar, with ``has_aux`` a pair of it and anything.
      statistics: `fo.KroneckerFactors` (the default), `fo.LayerSamples`, `fo.InputGram` or one of your own, see
        `fo.StatisticsKind`.
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
        pooling, say) are not masked, nor are experts of ragged products, of which a warning says so.
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

    def grad_fn(
        params: PyTree, *args: PyTree, fisher_key: PRNGKeyArray | None = None, bases: PyTree = None, **kwargs: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        return _evaluate(settings, params, args, kwargs, fisher_key, bases)

    return grad_fn


def _evaluate(
    settings: Settings, params: PyTree, args: PyTree, kwargs: PyTree, key: PRNGKeyArray | None, bases: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    _, kind, fisher, has_aux, normalizer, batch_axis, mask, n_samples, strict = settings
    if (fisher == "mc") != (key is not None):
        raise ValueError(
            "fisher='mc' draws labels: pass grad_fn(..., fisher_key=jax.random.key(step))."
            if fisher == "mc"
            else f"fisher_key is for fisher='mc' only; this is {fisher!r}."
        )
    traced = trace(settings.loss_fn, kind, params, args, kwargs)
    check(traced, kind, has_aux, strict)
    counted = losses_in(traced.program, traced.plan, traced.operands)
    check_losses(counted, fisher, normalizer)
    watched = marked_heads([leaf._replace(batch_axis=batch_axis) for leaf in traced.leaves if leaf.sites], kind)
    parameters = [(leaf, traced.operands[leaf.number]) for leaf in watched]
    value_type = jaxprs.aval(traced.program.jaxpr.outvars[0])
    if fisher != "empirical" or (normalizer is None and kind.of_gradients()):
        check_devices(value_type, counted.calls, parameters)
        if fisher == "empirical" and any(len(call) > 2 for call in counted.calls):
            check_weighing(traced.program, traced.plan)
    for leaf in watched:
        if why := kind.unavailable_for(leaf, fisher):
            raise ValueError(f"{leaf.path!r} has no such statistics: {why}.")
    N = _scale(settings, counted, parameters, args, kwargs)
    keep = counted.mask if mask is None else _told_mask(mask(*args, **kwargs), watched)
    pairs = bases_of(bases, watched, kind)
    probes = on_mesh(
        lambda _: [zeros(kind, leaf, x, keep, Q) for (leaf, x), Q in zip(parameters, pairs, strict=True)],
        traced.operands,
    )
    watch = watching(kind, watched, keep)._replace(
        fisher=fisher, samples=n_samples, key=key, at_losses=[], value=value_type
    )
    drawn = fisher != "empirical" and not kind.inputs_alone()
    passes = losses.passes(fisher, n_samples, counted.calls[0][0]) if drawn else 0
    (value, aux), grads, raw, at_losses = _differentiate(traced, watched, probes, pairs, watch, passes)
    found = {leaf.number: kind.finish(leaf, sums, N) for leaf, sums in zip(watched, raw, strict=True)}
    tokens = kind.head_tokens()
    if fisher != "empirical":
        # Gradients of drawn labels come divided, so that no kind can know it.
        found = {number: _divided_by(counted.total, x) for number, x in found.items()}
    for leaf in watched:
        if leaf.head is not None and tokens is not None:
            right = tokens_of(at_losses, leaf, traced.operands[leaf.number], tokens)
            found[leaf.number] = dataclasses.replace(found[leaf.number], right=right)
    stats = [_with_path(found.get(leaf.number), leaf, traced.leaves) for leaf in traced.leaves]
    value = (value, aux[0]) if has_aux else value
    return value, traced.treedef.unflatten(grads), traced.treedef.unflatten(stats)


def _told_mask(mask: ArrayLike, watched: list[LeafPlan]) -> Array:
    warn_of_experts(watched)
    return jnp.asarray(mask)


def _scale(
    settings: Settings, counted: Counted, parameters: list[tuple[LeafPlan, Any]], args: PyTree, kwargs: PyTree
) -> ArrayLike | None:
    """What sums of squared gradients are multiplied by; None where the layers know."""
    if settings.fisher != "empirical":
        return settings.kind.model_scale(counted.total)
    N: Any = settings.normalizer(*args, **kwargs) if callable(settings.normalizer) else settings.normalizer
    check_normalizer(N, parameters)
    return counted.total if N is None else N


def _differentiate(
    traced: Traced,
    watched: list[LeafPlan],
    probes: list[list[Sums]],
    pairs: list[Bases | None],
    watch: Watch,
    passes: int,
) -> tuple[tuple[Array, PyTree], list[Array], list[list[Sums]], dict[int, list[Array]]]:
    """The value and what else the loss returns, its gradients, what the taps returned, and what losses were given."""
    count = len(traced.leaves)

    def loss(values: list[Any], probes: list[list[Sums]]) -> PyTree:
        operands, pseudo, sums = [*values, *traced.operands[count:]], None, []
        if watch.kind.inputs_alone():
            state = {(leaf.number, ()): p for leaf, p in zip(watched, jax.lax.stop_gradient(probes), strict=True)}
            out, state = forward.run(traced.program, traced.plan, operands, state, watch)
            sums = [state[leaf.number, ()] for leaf in watched]
        else:
            scope = {(leaf.number, ()): (p, b) for leaf, p, b in zip(watched, probes, pairs, strict=True)}
            out, pseudo = run(traced.program, traced.plan, operands, scope, watch)
        value, *aux = out
        pseudo = jnp.zeros(0) if pseudo is None else pseudo
        logits = {number: xs for number, xs in (watch.at_losses or ()) if number in wanted}
        return (value, pseudo), (aux, logits, sums)

    wanted = {leaf.head for leaf in watched if leaf.head is not None}
    (value, pseudo), pull, (aux, at_losses, sums) = jax.vjp(loss, traced.operands[:count], probes, has_aux=True)
    grads, raw = pull((jnp.ones_like(value), jnp.zeros_like(pseudo)))
    raw = sums if watch.kind.inputs_alone() else raw
    if passes:
        basis = jnp.eye(passes, dtype=pseudo.dtype)

        def of_pass(ct: Array) -> list[list[Sums]]:
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
    return (value, rest), grads, raw, at_losses


def _mean_of_inputs(total: list[list[Sums]], passes: int) -> list[list[Sums]]:
    """Sums over backward passes, of which each has seen the same inputs."""
    return [[{k: x / passes if k in SEEN_AGAIN else x for k, x in slot.items()} for slot in s] for s in total]


def _divided_by(total: ArrayLike | None, statistics: PyTree) -> PyTree:
    """Statistics of drawn labels; of several losses, whose weights nobody adds up, by their positions."""
    if not isinstance(statistics, LayerFactors) or statistics.divisor is None:
        return statistics
    weight = statistics.weight
    divisor = weight if total is None else jnp.where(weight > 0, total, 0).astype(weight.dtype)
    return dataclasses.replace(statistics, divisor=divisor)


def _with_path(statistics: PyTree, leaf: LeafPlan, leaves: list[LeafPlan]) -> PyTree:
    if not isinstance(statistics, LayerFactors | Samples):
        return statistics
    bias = None if leaf.bias is None else leaves[leaf.bias].path
    return dataclasses.replace(statistics, bias=bias, axes=leaf.axes)
