"""What the squares of a parameter's entries are added up to: a group keeps one number. Totals are conserved."""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jaxtyping import Array, PyTree

from ...capture.roles import read_roles
from ...matrices.axes import LeafAxes, listed, path_names
from ...matrices.rules import is_told, resolve_axes

WORDS = ("parameter", "rows", "heads", "tensor", "blocks")
Groups = str | Callable[[str, Array], PyTree] | None


def grouping(groups: Groups, params: PyTree, axes: PyTree = None) -> Callable[[PyTree], PyTree]:
    """A function of a tree like the parameters, of squares (None where there are none), that adds up groups.

    Args:
      groups: "parameter" or None: each entry by itself. "rows": by output unit of a matrix, by token of an embedding;
        entries of vectors by themselves. "heads": by attention head, of kernels and biases with an axis of heads
        (Flax's DenseGeneral); other leaves whole. "tensor": by leaf. "blocks": by top-level module, as a dictionary.
        Or a function of (path, squares), called for every leaf.
      params: of which only shapes are read.
      axes: as for `fo.soap`, for "rows" and "heads".

    Raises:
      ValueError: for another word, or "heads" where no leaf has any.
    """
    if groups is None or groups == "parameter":
        return lambda squares: squares
    if callable(groups):
        return lambda squares: jax.tree_util.tree_map_with_path(
            lambda p, x: groups("/".join(path_names(p)), x), squares
        )
    if groups not in WORDS:
        raise ValueError(f"groups must be one of {', '.join(map(repr, WORDS))}, or a function; got {groups!r}.")
    if groups == "blocks":
        return _blocks
    retained = {leaf.path: _kept(groups, leaf) for leaf in resolve_axes(params, axes)}
    if groups == "heads":
        _heads_of_biases(retained, resolve_axes(params, axes))
    if groups == "heads" and not any(retained.values()):
        raise ValueError(
            "groups='heads': no attention kernel with an axis of heads, as DenseGeneral((heads, size)) has. Where "
            "heads are merged into one axis, pass a function of (path, squares) that reshapes."
        )

    def reduce(path: KeyPath, x: Array) -> Array:
        keep = retained["/".join(path_names(path))]
        return jnp.sum(x, [a for a in range(x.ndim) if a not in keep])

    return lambda squares: jax.tree_util.tree_map_with_path(reduce, squares)


def program_axes(loss_fn: Callable[..., PyTree], params: PyTree, batch: PyTree) -> PyTree:
    """For "rows": the axes of each leaf in ``loss_fn(params, example)``, with tokens as outputs; of what the program
    does not multiply by, those of the rules.

    Warns:
      UserWarning: naming what is so read by the order of its axes alone, or not at all.
    """
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    roles = read_roles(loss_fn, params, example)
    unknown = [role.named for role in roles if role.axes is None and (role.kind == "other" or role.named.is_ambiguous)]
    if doubtful := [leaf for leaf in unknown if leaf.is_ambiguous or not is_told(leaf)]:
        warnings.warn(
            f"diagonal: the program does not multiply by {len(doubtful)} leaves as they are, and which axes are "
            f"units for groups='rows' is unknown: {listed(doubtful)}. Matrices go by the order of their axes, inputs "
            "first, and others by single entries. Pass axes= with a fo.MatrixAxes for each, or None for entries.",
            stacklevel=3,
        )
    return jax.tree.structure(params).unflatten([role.units for role in roles])


def _kept(groups: str, leaf: LeafAxes) -> tuple[int, ...]:
    """The axes of a leaf that stay."""
    axes, rank = leaf.axes, len(leaf.shape)
    if groups == "tensor":
        return ()
    if groups == "rows":
        if axes is None:
            return tuple(range(rank))
        return tuple(sorted(axes.batch + (axes.inputs if leaf.kind == "embedding" else axes.outputs)))
    if axes is None or not leaf.reason.startswith(("attention", "user")):
        return ()
    outputs, inputs = axes.outputs, axes.inputs
    heads = outputs[:1] if len(outputs) == 2 else inputs[:1] if len(inputs) == 2 else ()
    return tuple(sorted(axes.batch + heads)) if heads else ()


def _heads_of_biases(retained: dict[str, tuple[int, ...]], leaves: list[LeafAxes]) -> None:
    for leaf in leaves:
        if leaf.axes is not None and leaf.bias is not None and retained[leaf.path] and len(leaf.axes.outputs) == 2:
            retained[leaf.bias] = tuple(range(len(leaf.axes.batch) + 1))


def _blocks(squares: PyTree) -> dict[str, Array]:
    """Totals of the modules below the root, or below its one "params"."""
    totals: dict[str, Array] = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(squares)
    for path, x in flat:
        names = path_names(path)
        inner = names[1:] if names[0] == "params" else names
        name = (inner or names)[0]
        totals[name] = totals.get(name, 0) + jnp.sum(x)
    return totals
