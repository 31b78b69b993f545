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
from .heads import marked_heads, tokens_of, with_tokens
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
      fisher: which labels: "empirical" (the data's; costs no further pass where `fo.losses` is called once, with no
        weights or booleans, else one for each loss), "mc" (drawn from the model with ``fisher_key``; one more backward
        pass a sample) or "true" (all of them; one pass a class or output). The last two need the logits to pass through
        `fo.losses`, outside of loops.
      has_aux: as in `jax.value_and_grad`.
      normalizer: what the loss was divided by, a number or a function of ``*args, **kwargs``. None: `fo.losses` know
        it; else the positions of each dense layer (steps of a loop are positions), and the examples for convolutions
        and ``mode="reduce"``. It scales ``right``, for ``fisher="empirical"`` alone, and of the loss's own gradients,
        which have weights and factors squared: the others know theirs. Of a loss averaged over devices in a
        `jax.shard_map`: what all of theirs was divided by.
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
    _check_key(fisher, key)
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
    N = _normalizer(settings, parameters, args, kwargs)
    keep = counted.mask if mask is None else _told_mask(mask(*args, **kwargs), watched)
    pairs = bases_of(bases, watched, kind)
    probes = on_mesh(
        lambda _: [zeros(kind, leaf, x, keep, Q) for (leaf, x), Q in zip(parameters, pairs, strict=True)],
        traced.operands,
    )
    labels = _labels(settings, counted, watched, N)
    watch = watching(kind, watched, keep)._replace(
        fisher=labels, samples=n_samples, key=key, at_losses=[], value=value_type
    )
    (value, aux), grads, raw, at_losses, factors = _differentiate(traced, counted, watched, probes, pairs, watch)
    if known := labels is not None or (N is None and counted.total is not None and not kind.inputs_alone()):
        N = _scale(kind, labels, counted, factors)
    found = {leaf.number: kind.finish(leaf, sums, N) for leaf, sums in zip(watched, raw, strict=True)}
    if known:
        # Gradients of drawn labels come divided, and a loss may have a factor: no kind can know it.
        found = {number: _divided_by(counted.total, x) for number, x in found.items()}
    if (tokens := kind.head_tokens()) is not None:
        for leaf in watched:
            if leaf.head is not None:
                right = tokens_of(at_losses, leaf, traced.operands[leaf.number], tokens)
                found[leaf.number] = with_tokens(found[leaf.number], right, factors[leaf.head] if factors else 1)
    stats = [_with_path(found.get(leaf.number), leaf, traced.leaves) for leaf in traced.leaves]
    value = (value, aux[0]) if has_aux else value
    return value, traced.treedef.unflatten(grads), traced.treedef.unflatten(stats)


def _told_mask(mask: ArrayLike, watched: list[LeafPlan]) -> Array:
    warn_of_experts(watched)
    return jnp.asarray(mask)


def _check_key(fisher: str, key: PRNGKeyArray | None) -> None:
    if (fisher == "mc") != (key is not None):
        raise ValueError(
            "fisher='mc' draws labels: pass grad_fn(..., fisher_key=jax.random.key(step))."
            if fisher == "mc"
            else f"fisher_key is for fisher='mc' only; this is {fisher!r}."
        )


def _scale(kind: StatisticsKind, labels: str | None, counted: Counted, factors: list[Array]) -> ArrayLike:
    """What sums of squared gradients are multiplied by."""
    if labels is not None:
        return kind.model_scale(counted.number)
    assert counted.total is not None
    return kind.own_scale(counted.total, factors[0])


def _labels(settings: Settings, counted: Counted, watched: list[LeafPlan], N: ArrayLike | None) -> str | None:
    """Whose labels the gradients of further passes are of; None where those of the loss itself are, up to one number,
    those of its examples.
    """
    kind, several = settings.kind, len(counted.calls) > 1
    if kind.inputs_alone():
        return None
    if settings.fisher != "empirical":
        return settings.fisher
    # What does not add up over passes is of the sum of several losses.
    if N is not None or counted.alike or counted.hidden or not kind.of_gradients() or (several and not kind.adds_up()):
        return None
    for leaf in watched if several else ():
        if kind.unavailable_for(leaf, "true"):
            raise ValueError(
                f"{leaf.path!r} has rows for a long side, and loss_fn has {len(counted.calls)} losses of fo.losses, "
                "a pass each: rows do not add up. With normalizer= the gradients of their sum are taken."
            )
    return "empirical"


def _normalizer(
    settings: Settings, parameters: list[tuple[LeafPlan, Any]], args: PyTree, kwargs: PyTree
) -> ArrayLike | None:
    """What the user says that the loss was divided by."""
    if settings.fisher != "empirical":
        return None
    N: Any = settings.normalizer(*args, **kwargs) if callable(settings.normalizer) else settings.normalizer
    check_normalizer(N, parameters)
    return N


def _differentiate(
    traced: Traced,
    counted: Counted,
    watched: list[LeafPlan],
    probes: list[list[Sums]],
    pairs: list[Bases | None],
    watch: Watch,
) -> tuple[tuple[Array, PyTree], list[Array], list[list[Sums]], dict[int, list[Array]], list[Array]]:
    """The value and what else the loss returns, its gradients, what the taps returned, what losses were given, and the
    factor of each of them in the loss.
    """
    count = len(traced.leaves)

    def loss(values: list[Any], probes: list[list[Sums]], shifts: dict[int, Array]) -> PyTree:
        operands, pseudo, sums = [*values, *traced.operands[count:]], {}, []
        if forwards:
            state = {(leaf.number, ()): p for leaf, p in zip(watched, jax.lax.stop_gradient(probes), strict=True)}
            out, state = forward.run(traced.program, traced.plan, operands, state, watch)
            sums = [state[leaf.number, ()] for leaf in watched]
        else:
            scope = {(leaf.number, ()): (p, b) for leaf, p, b in zip(watched, probes, pairs, strict=True)}
            out, pseudo = run(traced.program, traced.plan, operands, scope, watch._replace(shifts=shifts or None))
        value, *aux = out
        logits = {number: xs for number, xs in (watch.at_losses or ()) if number in wanted}
        return (value, pseudo), (aux, logits, sums)

    forwards = watch.kind.inputs_alone()
    wanted = {leaf.head for leaf in watched if leaf.head is not None}
    shifts = {} if counted.hidden or forwards else dict(enumerate(losses.no_shifts(counted.results, watch.value)))
    primals = traced.operands[:count], probes, shifts
    (value, pseudo), pull, (aux, at_losses, sums) = jax.vjp(loss, *primals, has_aux=True)
    grads, raw, factors = pull((jnp.ones_like(value), jax.tree.map(jnp.zeros_like, pseudo)))
    raw = sums if forwards else raw
    if watch.fisher is not None:
        raw = _over_passes(lambda cts: pull((jnp.zeros_like(value), cts))[1], pseudo, factors, watch.fisher)
    structure = jax.tree.unflatten(traced.outputs, [value, *aux])
    rest = structure[1:] if isinstance(structure, tuple) else ()
    return (value, rest), grads, raw, at_losses, [jnp.sum(jnp.abs(c)) for c in factors.values()]


def _over_passes(
    pull: Callable[[dict[int, Array]], list[list[Sums]]],
    pseudo: dict[int, Array],
    factors: dict[int, Array],
    fisher: str,
) -> list[list[Sums]]:
    """The sums of one backward pass for each pseudo-loss: draws of all losses at once, the data's labels one by one."""
    apart = fisher == "empirical"
    passes = len(pseudo) if apart else max(map(len, pseudo.values()))

    def of_pass(i: Array | int) -> list[list[Sums]]:
        cts = {}
        for place, (number, like) in enumerate(pseudo.items()):
            chosen = jnp.full(1, i == place) if apart else jnp.arange(len(like)) == i
            share = jnp.sqrt(jnp.abs(factors[number])).astype(like.dtype)
            cts[number] = jaxprs.varying_as(chosen.reshape(-1, *[1] * share.ndim) * share, like)
        return pull(cts)

    raw = of_pass(0)
    if passes == 1:
        return raw
    add = lambda sums, i: (jax.tree.map(jnp.add, sums, of_pass(i)), None)  # noqa: E731
    return _mean_of_inputs(jax.lax.scan(add, raw, jnp.arange(1, passes))[0], passes)


def _mean_of_inputs(total: list[list[Sums]], passes: int) -> list[list[Sums]]:
    """Sums over backward passes, of which each has seen the same inputs."""
    return [[{k: x / passes if k in SEEN_AGAIN else x for k, x in slot.items()} for slot in s] for s in total]


def _divided_by(total: ArrayLike | None, statistics: PyTree) -> PyTree:
    """By the sum of a loss's weights; of several losses, whose weights nobody adds up, by their positions."""
    if not isinstance(statistics, LayerFactors) or statistics.divisor is None:
        return statistics
    weight = jnp.sum(statistics.weight)
    divisor = weight if total is None else jnp.where(weight > 0, total, 0).astype(weight.dtype)
    return dataclasses.replace(statistics, divisor=divisor)


def _with_path(statistics: PyTree, leaf: LeafPlan, leaves: list[LeafPlan]) -> PyTree:
    if not isinstance(statistics, LayerFactors | Samples):
        return statistics
    bias = None if leaf.bias is None else leaves[leaf.bias].path
    return dataclasses.replace(statistics, bias=bias, axes=leaf.axes)
