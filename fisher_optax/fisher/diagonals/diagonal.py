"""The diagonal of the Fisher, or sums of it over groups: which parameters the model's predictions hang on, with error
bars.

    F_jj = E[(∂ log p / ∂θ_j)²]
is a mean of squares of single examples' gradients; the square of a batch's mean gradient is another thing, and shrinks
with the batch. Gradients are never kept: microbatches of them are squared, added up in groups and forgotten.

Sources: Kirkpatrick et al. 2017 (arXiv 1612.00796) for its use; Kunstner et al. 2019 (arXiv 1905.12558) for what the
data's own labels make of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..._arguments import hashable
from ..._xla import automatic, of_each, on_mesh
from ...capture.kinds.sums import check_counts
from ...matrices.axes import MatrixAxes
from ...matrices.floats import on_whole, without_rest
from ...matrices.rules import resolve_axes
from ..operators.matrix import FISHERS, check_temperature
from .diagonal_fisher import DiagonalFisher
from .frozen import warn_of_frozen
from .groups import Groups, grouping, program_axes
from .positions import position_squares
from .squares import Labels, check_example, example_of, squares

UNITS = ("sequence", "token", "position")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a step's program depends on but shapes."""

    loss_fn: Callable[..., PyTree]
    unit: str
    labels: Labels
    groups: Groups
    axes: tuple[MatrixAxes | None, ...] | None  # of the parameters' leaves, where they are given
    microbatch: int


def diagonal(
    example_loss_fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    unit: str = "sequence",
    fisher: str = "empirical",
    n_samples: int = 1,
    temperature: float = 1.0,
    key: PRNGKeyArray | None = None,
    groups: Groups = None,
    axes: PyTree = None,
    microbatch: int = 8,
    progress: Callable[[Iterable[PyTree]], Iterable[PyTree]] | None = None,
    on_batch: Callable[[DiagonalFisher], None] | None = None,
    resume: DiagonalFisher | None = None,
) -> DiagonalFisher:
    """The mean of squared gradients of single examples, by parameter or group, with its variance.

    Args:
      example_loss_fn: ``example_loss_fn(params, example)`` -> one example's (or sequence's) loss: by one call of
        `fo.losses`, whose weights say which tokens count; or the losses ``(n,)`` of its tokens, alone or with weights
        ``(n,)``; or any scalar, which counts as one token.
      params: where gradients are taken; what is no floating point passes through, and has None in the result.
      batches: each a tree of arrays with examples along the first axis; of one shape, or each new shape is compiled.
      unit: "sequence": ``(gradient of the sum over tokens)² / n``; "token": ``Σ_t (gradient of token t)² / n``, n
        backward passes an example; both with weight n, exact, for every parameter. Tokens of weight w count w times:
        n is ``Σ w``, and each gradient is times √w. "position": ``Σ_s a_s² δ_s² / n``
        over a layer's positions, at about the cost of one gradient; it equals "token" where a position feeds its own
        token's loss alone, and is none of the others under attention. It sees layers, and a microbatch is one example
        to its error bars.
      fisher: "empirical" (the data's labels), "mc" (drawn from the model, ``n_samples`` an example, with ``key``) or
        "true" (all labels; as many backward passes as tokens times classes, one after the other, in the memory of one;
        not for "position"). The last two need `fo.losses`.
      n_samples, temperature, key: as in `operator`.
      groups: None or "parameter", "rows" (output units, or tokens of a vocabulary), "heads", "tensor", "blocks", or a
        function of a leaf's path and squares; sums, so that totals stay.
      axes: as for `fo.soap`, for "rows" and "heads". None: for "rows" as the program uses each leaf, its tokens being
        the units of what is looked up; what it does not multiply by, and "heads", by the rules of `fo.label_params`.
      microbatch: how many examples' gradients exist at once; one, of a model with `jax.lax.ragged_dot`. Under a mesh, a
        multiple of the devices that examples are spread over.
      progress: what wraps the batches, as `tqdm.tqdm`.
      on_batch: called with what there is after every batch, to save it.
      resume: what an interrupted call had got to, with the same batches: those it has read are passed over. The result
        is bit for bit that of the call without interruption.

    Returns:
      A `DiagonalFisher`. Examples that are not finite, or with a label that is no class, are skipped and counted there.

    Raises:
      ValueError, TypeError: for unknown words, no batches, examples of different numbers, a resumed Fisher of other
        groups, a loss that is no multiple of one of `fo.losses`, and where no example counted.

    Warns:
      UserWarning: naming leaves that no gradient reaches, be it by `stop_gradient`: their importance is 0, and says
        nothing of them.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> loss = lambda W, xy: fo.losses.softmax_cross_entropy(xy[0] @ W, xy[1])
      >>> batch = (jnp.ones((4, 5, 3)), jnp.zeros((4, 5), int))  # 4 sequences of 5 tokens
      >>> fisher = fo.fisher.diagonal(loss, jnp.zeros((3, 2)), [batch, batch])
      >>> print(fisher.mean[0], fisher.n, fisher.w)
      [1.25 1.25] 8 40.0
    """
    labels = _labels(unit, fisher, n_samples, temperature, key)
    check_counts("diagonal", microbatch=microbatch)
    floats, whole = without_rest(params)
    loss_fn, params = hashable(on_whole(example_loss_fn, params, whole)), floats
    groups = hashable(groups) if callable(groups) else groups
    settings = Settings(loss_fn, unit, labels, groups, _flat_axes(params, axes), microbatch)
    state, read = resume, 0
    for i, batch in enumerate(batches if progress is None else progress(batches)):
        batch = jax.tree.map(jnp.asarray, batch)
        count, first = _count(batch, i), read
        read += count
        if groups == "rows" and settings.axes is None:
            found = program_axes(loss_fn, params, batch)
            settings = dataclasses.replace(settings, axes=_flat_axes(params, found))
        if resume is not None and i < int(resume.batches):
            continue
        # A key an example, by its place in all batches, so that labels do not depend on how these are cut.
        keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first, read))
        if state is None:
            check_example(settings.loss_fn, params, automatic(lambda batch: jax.tree.map(lambda x: x[0], batch), batch))
            warn_of_frozen(settings.loss_fn, params, batch)
            state = _start(settings, params, batch, keys)
        state = _step(settings, state, params, batch, keys)
        if on_batch is not None:
            on_batch(state)
    if state is None:
        raise ValueError("diagonal got no batches: an iterable that was read before is empty the second time.")
    if not float(state.w) > 0:
        raise ValueError(
            f"no example counted: {int(state.skipped)} were not finite or had a label that is no class, and the "
            "weights of the others are 0."
        )
    return state


def _flat_axes(params: PyTree, axes: PyTree) -> tuple[MatrixAxes | None, ...] | None:
    """Of each leaf; None for the rules."""
    return None if axes is None else tuple(leaf.axes for leaf in resolve_axes(params, axes))


def _labels(unit: str, fisher: str, n_samples: int, temperature: float, key: PRNGKeyArray | None) -> Labels:
    for name, value, known in (("unit", unit, UNITS), ("fisher", fisher, FISHERS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
    if (fisher == "mc") != (key is not None):
        what = "pass key=jax.random.key(0)" if fisher == "mc" else f"key is for 'mc' only; this is {fisher!r}"
        raise ValueError(f"fisher='mc' draws labels from the model: {what}.")
    if unit == "position" and fisher == "true":
        raise ValueError("unit='position' adds labels of different tokens up: fisher must be 'mc' or 'empirical'.")
    check_counts("diagonal", n_samples=n_samples)
    check_temperature(temperature)
    return Labels(fisher, n_samples, float(temperature))


def _count(batch: PyTree, i: int) -> int:
    """How many examples a batch has."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if not shapes or any(len(shape) == 0 for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"batch {i} has shapes {shapes}: every array must have the examples along its first axis.")
    if shapes[0][0] == 0:
        raise ValueError(f"batch {i} has no examples: its first axis has length 0.")
    return shapes[0][0]


def _microbatch_squares(
    settings: Settings, params: PyTree, batch: PyTree, keys: Array | None
) -> tuple[PyTree, Array, Array]:
    """Stacked squares and weights of independent draws, and how many examples are wrong that these do not show."""
    axes = None if settings.axes is None else jax.tree.structure(params).unflatten(settings.axes)
    reduce = grouping(settings.groups, params, axes)
    if settings.unit == "position":
        x, w, wrong = position_squares(settings.loss_fn, settings.labels, params, batch, keys)
        return jax.tree.map(lambda s: s[None], reduce(x)), w[None], wrong

    def of_example(example: PyTree, key: PRNGKeyArray | None) -> tuple[PyTree, Array]:
        made = example_of(settings.loss_fn, settings.labels, params, example, key)
        return squares(settings.unit, settings.labels.fisher == "true", reduce, params, made)

    x, w = of_each(of_example, batch, keys)
    return x, w, jnp.zeros([], jnp.int32)


def _start(settings: Settings, params: PyTree, batch: PyTree, keys: Array | None) -> DiagonalFisher:
    single, key = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), (batch, keys))
    x = jax.eval_shape(functools.partial(_microbatch_squares, settings), params, single, key)[0]
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), x)
    return on_mesh(lambda _: DiagonalFisher.zeros(like), (params, batch))


@functools.partial(jax.jit, static_argnums=0)
def _step(
    settings: Settings, state: DiagonalFisher, params: PyTree, batch: PyTree, keys: Array | None
) -> DiagonalFisher:
    return automatic(functools.partial(_add_batch, settings), state, params, batch, keys)


def _add_batch(
    settings: Settings, state: DiagonalFisher, params: PyTree, batch: PyTree, keys: Array | None
) -> DiagonalFisher:
    """One batch: whole microbatches in a loop, then what is left."""
    count = len(jax.tree.leaves(batch)[0])
    size = min(settings.microbatch, count)
    steps = count // size

    def add(state: DiagonalFisher, microbatch: tuple[PyTree, Array | None]) -> tuple[DiagonalFisher, None]:
        x, w, wrong = _microbatch_squares(settings, params, *microbatch)
        state = state.update(x, w)
        return state._replace(skipped=state.skipped + wrong), None

    # A microbatch takes its examples from all over the batch, so that one spread over devices keeps all of them busy.
    spread = lambda x: jnp.moveaxis(x[: steps * size].reshape(size, steps, *x.shape[1:]), 1, 0)  # noqa: E731
    state, _ = jax.lax.scan(add, state, jax.tree.map(spread, (batch, keys)))
    if rest := count - steps * size:
        state, _ = add(state, jax.tree.map(lambda x: x[-rest:], (batch, keys)))
    return state._replace(batches=state.batches + 1)
