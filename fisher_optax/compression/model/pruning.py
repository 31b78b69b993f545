"""Prune a whole model: layer by layer in the order of use, each on what the pruned layers before it make of the data.

Source: reconstruction layer by layer as in Frantar and Alistarh 2023 (arXiv 2301.00774), section 3.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree
from tqdm import tqdm

from ...fisher import DiagonalFisher
from ...matrices.axes import made
from ...matrices.floats import is_floating, on_whole, without_rest
from ..leaf_axes import leaf_axes
from ..matrix.masks import Pattern, ReadSparsity, Sparsity, as_sparsity, check_pattern, global_masks
from .calibration import Mask, first_of, rereadable
from .coverage import left_by_rule, left_dense, warn_of_left, warn_of_unknown
from .layers import Layers, find_layers, layers_by_rule, left_by_axes
from .methods import Method, find_method
from .one_layer import Calibration, knowledge, prune_piece, second_moments
from .pieces import Layer
from .reports import LeftDense, PrunedLayer, PruningReport


class PrunedModel(NamedTuple):
    """What `prune` returns; unpacks as ``params, masks, report``."""

    params: PyTree
    masks: PyTree  # like params: True where a weight stays, None for what was not pruned
    report: PruningReport


def prune(
    apply_fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    method: str = "sparsegpt",
    sparsity: Sparsity | Mapping[str, Sparsity] = 0.5,
    *,
    layers: Layers = None,
    axes: PyTree = None,
    sequential: bool = True,
    progress: bool = True,
    scope: str | None = None,
    mask: Mask = None,
    loss_fn: Callable[..., Array] | None = None,
    fisher: PyTree = None,
    upper: PyTree = None,
    **options: PyTree,
) -> PrunedModel:
    """Removes weights of a model's dense and convolutional layers; the parameters given stay as they are.

    The model needs no change: its layers are found in the program that ``apply_fn`` traces to. Each is a matrix of
    inputs by outputs (of a convolution, window and channels by channels; a scanned stack layer by layer). What a method
    needs is taken for one layer at a time, in one pass over the batches: memory holds one ``inputs x inputs`` matrix
    besides the model. The errors in the report take that matrix whatever the method. Inputs are those of the forward
    pass: what outputs do with a layer (`stop_gradient`, rounding, an index) changes nothing.

    Args:
      apply_fn: ``apply_fn(params, batch)`` -> the model's outputs, any tree.
      params: a Flax dictionary or any tree of arrays; integers and random states pass through as they are.
      batches: calibration data, read once a layer: a list, or what can be read again. One shape, or each is compiled.
        Methods of weights alone, or of a Fisher, take none: with ``[]`` layers are found by the names and shapes of the
        parameters, with one batch of `jax.ShapeDtypeStruct` in the program. Data serve to measure their errors.
      method: "magnitude", "wanda", "sparsegpt", "obs", "fisher" (with ``fisher=``), "obert" (with ``loss_fn=``), or
        what was registered by `register`.
      sparsity: a share of each layer's weights in [0, 1); "N:M", to keep N of every M inputs; or one of these for each
        layer by name, as `owl` returns.
      layers: which; None: all kernels but embeddings, which the program looks up (tied to a head or not), and heads, by
        name or by giving a number for each row of an embedding. Patterns of paths, as ``["block_*/up"]``, or a function
        of a path.
      axes: None, those of the program; or, to divide fused kernels, as for `fo.soap`: `fo.MatrixAxes` for each leaf,
        with ``parts=`` where it is divided, and None for what stays dense. Each part is pruned as a leaf of its own
        would be, and has its own name in reports and ``sparsity``, like "qkv/kernel[:, 0:64]". With data, axes have to
        be those of the program; without, no more is known of a leaf.
      sequential: take a layer's inputs from the model as pruned so far, rather than from the model as given.
      progress: show a progress bar.
      scope: where k of n are counted: "matrix" or "output" (a method's own by default), or "global": over all layers,
        for methods with scores (magnitude, wanda, fisher); of those that look at data, with ``sequential=False``.
      mask: of a batch, True for the positions that count (as in `fo.value_and_grad`), to leave padding out.
      loss_fn: ``loss_fn(params, example)`` -> a scalar, of one example of a batch; for methods that need gradients.
      fisher: a tree of F like params, or a `fo.fisher.DiagonalFisher` of single parameters.
      upper: a tree of upper ends of F, as ``fisher.confidence_interval(0.95)[1]``; with ``threshold=``, method "fisher"
        removes only what is certainly below, be it fewer than asked for.
      **options: of the method, as ``damping=``.

    Returns:
      `PrunedModel`: parameters, masks (for `keep_masks`), and a `PruningReport`, which lists also what is left
      dense, and why.

    Raises:
      ValueError, TypeError: for unknown methods, layers and options; an M that does not divide a layer's inputs; data
        or weights that are not finite; batches that can be read only once. Before anything is computed where possible.

    Warns:
      UserWarning: where a damping had to be raised; for matrices that stay dense since the program shows no layer
        there, or since names and shapes alone do not tell what they are, unless ``layers`` says what is meant; for
        weights that no input has reached, or no gradient where the method knows gradients, which then go by size; and
        for uses of a layer whose inputs are not known.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, fisher_optax as fo
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jax.random.normal(jax.random.key(0), (64, 4))
      >>> params = model.init(jax.random.key(1), x)
      >>> pruned, masks, report = fo.compression.prune(model.apply, params, [x], sparsity="2:4", progress=False)
      >>> round(report.sparsity, 3), float(jnp.mean(pruned["params"]["layers_0"]["kernel"] == 0))
      (0.5, 0.5)
    """
    if scope not in (None, "global"):
        options["scope"] = scope
    batches, chosen = rereadable(batches), find_method(method, options)
    if scope == "global" and upper is not None:
        raise ValueError(
            "upper= decides weight by weight, and scope='global' by rank over all layers: give one of them."
        )
    if scope == "global" and sequential and chosen.needs_batches:
        raise ValueError("scope='global' ranks all layers at once, by the model as given: pass sequential=False.")
    trees = [_like_params(name, x, params) for name, x in (("fisher", fisher), ("upper", upper))]
    floats, whole = without_rest(params)
    apply_fn = on_whole(apply_fn, params, whole)
    loss_fn = None if loss_fn is None else on_whole(loss_fn, params, whole)
    first = None if not chosen.needs_batches and next(iter(batches), None) is None else first_of(batches)
    found, left = _found(apply_fn, floats, first, layers, made(axes, params))
    shares = sparsities(sparsity, found)
    data = Calibration(apply_fn, loss_fn, _data(chosen, batches, first), mask, *trees)
    _check(chosen, data)
    ranked = _ranked(chosen, data, floats, found, shares, progress) if scope == "global" else None
    bar = tqdm(found, method, disable=not progress, unit="layer")
    new, masks, rows = _layer_by_layer(chosen, data, floats, bar, shares, ranked, sequential)
    if layers is None:
        warn_of_left(rows, left, by_program=first is not None)
    if chosen.needs != "weights":
        warn_of_unknown(rows)
    report = PruningReport(method, tuple(rows), tuple(left))
    return PrunedModel(whole(new), masks, report)


def _layer_by_layer(
    method: Method,
    data: Calibration,
    params: PyTree,
    layers: Iterable[Layer],
    shares: dict[str, ReadSparsity],
    ranked: dict[str, Array] | None,
    sequential: bool,
) -> tuple[PyTree, PyTree, list[PrunedLayer]]:
    """New parameters, masks, and what is said of each piece."""
    leaves, structure = jax.tree.flatten(params)
    values, rows = list(map(jnp.asarray, leaves)), []
    masks: list[Array | None] = [None] * len(leaves)
    known = lambda: structure.unflatten(values) if sequential else params  # noqa: E731
    for layer in layers:
        began, i = time.perf_counter(), layer.leaf
        H = second_moments(data, known(), layer)
        before = masks[i]
        stays = jnp.ones(layer.stored, bool) if before is None else before
        for piece in layer.pieces:
            own = None if ranked is None else ranked[piece.name]
            new, mask, row = prune_piece(method, data, known(), piece, values[i], H, shares[piece.name], own)
            values[i], stays = piece.written(values[i], new), piece.written(stays, mask)
            rows.append(row._replace(seconds=time.perf_counter() - began))
            began = time.perf_counter()
        masks[i] = stays
    return structure.unflatten(values), structure.unflatten(masks), rows


def _found(
    apply_fn: Callable[..., PyTree], params: PyTree, first: PyTree | None, layers: Layers, axes: PyTree
) -> tuple[list[Layer], list[LeftDense]]:
    """The layers to prune and what is left, by the program; without a batch by names and shapes."""
    if first is None:
        named = leaf_axes(params, axes)
        found = layers_by_rule(named, layers)
        return found, left_by_rule(named, found)
    found = find_layers(apply_fn, params, first, layers, axes)
    return found, left_dense(apply_fn, params, first, found, left_by_axes(params, axes))


def _data(method: Method, batches: Iterable[PyTree], first: PyTree | None) -> Iterable[PyTree] | None:
    """The data; None where there are none and the method needs none."""
    shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(first))
    return None if first is None or (shapes and not method.needs_batches) else batches


def sparsities(sparsity: Sparsity | Mapping[str, Sparsity], layers: Sequence[Layer]) -> dict[str, ReadSparsity]:
    """What each layer, or part of one, is to lose, by its name.

    Raises:
      ValueError: for a mapping that does not name the layers, and for an M that does not divide a layer's inputs.
    """
    pieces = [piece for layer in layers for piece in layer.pieces]
    if isinstance(sparsity, Mapping):
        names = {piece.name for piece in pieces}
        if wrong := sorted(names ^ set(sparsity)):
            verb = "lacks" if wrong[0] in names else "names, besides the layers to prune,"
            raise ValueError(f"sparsity= {verb} {wrong[0]!r}. It needs one entry for each of {sorted(names)[:8]}.")
        shares = {piece.name: as_sparsity(sparsity[piece.name]) for piece in pieces}
    else:
        shares = {piece.name: as_sparsity(sparsity) for piece in pieces}
    for piece in pieces:
        if isinstance(share := shares[piece.name], Pattern):
            try:
                check_pattern(share, piece.shape[0])
            except ValueError as error:
                raise ValueError(f"{piece.name!r}: {error}") from None
    return shares


def _check(method: Method, data: Calibration) -> None:
    if data.upper is not None and method.name != "fisher":
        raise ValueError(f"upper= is for method 'fisher', with threshold=; this is {method.name!r}.")
    if callable(method.needs) and data.loss_fn is None:
        raise ValueError(f"{method.name} needs gradients: pass loss_fn(params, example), the loss of one example.")
    if method.needs == "fisher" and data.fisher is None:
        raise ValueError(f"{method.name} needs fisher=, as from fo.fisher.diagonal(example_loss, params, batches).")


def _like_params(name: str, tree: PyTree, params: PyTree) -> list[ArrayLike | None] | None:
    """What ``tree`` has for each floating-point leaf."""
    if tree is None:
        return None
    leaves, structure = jax.tree.flatten(params)
    tree = tree.mean if isinstance(tree, DiagonalFisher) else tree
    try:
        found = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"{name}= must be a tree like params, or a DiagonalFisher by parameter: {error}") from None
    pairs = [(F, W) for F, W in zip(found, leaves, strict=True) if is_floating(W)]
    for F, W in pairs:
        if F is not None and jnp.shape(F) != jnp.shape(W):
            raise ValueError(
                f"{name}= has an entry of shape {jnp.shape(F)} for a parameter of {jnp.shape(W)}: take it by "
                "fo.fisher.diagonal(..., groups=None)."
            )
    return [F for F, _ in pairs]


def _ranked(
    method: Method,
    data: Calibration,
    params: PyTree,
    layers: Sequence[Layer],
    shares: dict[str, ReadSparsity],
    progress: bool,
) -> dict[str, Array]:
    """Masks of all layers, from the scores of all of them."""
    if method.scores is None:
        raise ValueError(f"{method.name} has no scores to rank over all layers; scope='global' is for those that have.")
    if len(set(shares.values())) > 1:
        raise ValueError("scope='global' takes one sparsity for all layers together.")
    found, leaves = {}, jax.tree.leaves(params)
    for layer in tqdm(layers, f"{method.name} scores", disable=not progress, unit="layer"):
        H = second_moments(data, params, layer) if method.needs == "inputs" else None
        for piece in layer.pieces:
            known, _ = knowledge(method, data, params, piece, H)
            W = piece.read(jnp.asarray(leaves[layer.leaf]))
            found[piece.name] = jnp.stack([method.scores(w, *X) for w, X in zip(W, known, strict=True)])
    return global_masks(found, next(iter(shares.values())))
