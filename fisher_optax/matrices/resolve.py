"""Which axes of each parameter are inputs, outputs and batch of a matrix: by rules, or as the user says."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .axes import LeafAxes, MatrixAxes, path_names
from .rules import BIAS_BESIDE, Leaf, Rules, no_matrix
from .trees import made


def resolve_axes(
    params: Any, axes: Any | Callable[[Any], Any] | None = None, dtypes: Any = jnp.floating
) -> list[LeafAxes]:
    """One ``LeafAxes`` per leaf of ``params``, in the order of ``jax.tree.leaves``.

    Args:
      params: arrays or ``ShapeDtypeStruct``, as a Flax dictionary, an ``nnx.State`` or any pytree. Boxes
        (``nn.Partitioned``, ``nnx.Param``) add nothing to a path; ``None`` and ``optax.MaskedNode`` are no leaves.
      axes: ``None``, the rules by path and shape; or a tree with ``MatrixAxes`` or ``None`` (fallback) for every leaf,
        matched by path, so that it may hold more than a masked ``params``; or a function from params to such a tree.
        A ``MatrixAxes`` given here makes the leaf a matrix, embeddings and heads included.
      dtypes: what ``axes`` may make a matrix of, ``jnp.floating`` or ``jnp.inexact``. The rules leave complex leaves
        to the fallback.

    The rules need neighbours: where ``optax.masked`` or ``optax.partition`` hides some, pass the whole tree's axes.
    Raises ``ValueError`` for leaves that ``axes`` lacks or does not fit, by shape or by dtype, ``TypeError`` for an
    entry of another type.

    >>> params = {"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
    >>> [(leaf.path, leaf.kind, leaf.reason) for leaf in resolve_axes(params)]
    [('dense/bias', 'other', 'vector'), ('dense/kernel', 'matrix', 'Dense kernel')]
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    leaves = [Leaf(path_names(path), jnp.shape(value), jnp.result_type(value)) for path, value in flat]
    read = list(map(Rules(leaves).read, leaves)) if axes is None else _read_given(made(axes, params), leaves, dtypes)
    shapes = {leaf.path: leaf.shape for leaf in read if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return [leaf._replace(bias=_bias_path(leaf, shapes)) for leaf in read]


def _bias_path(leaf: LeafAxes, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The path of a matrix's bias: the one its axes name, or the one beside it, if it is there and of that shape."""
    if leaf.axes is None:
        return None
    module, _, name = leaf.path.rpartition("/")
    path = leaf.axes.bias or "/".join(filter(None, (module, BIAS_BESIDE.get(name, "/"))))
    shape = tuple(leaf.shape[a] for a in leaf.axes.batch + leaf.axes.outputs)
    return path if shapes.get(path) == shape else None


def label_params(params: Any, axes: Any | Callable[[Any], Any] | None = None) -> Any:
    """A tree like ``params`` that says what each leaf is, made for ``optax.partition``.

    ``"embedding"``: below a name with "embed", wte or wpe; ``"head"``: a matrix of head, lm_head, logits; ``"matrix"``:
    any other; ``"other"``: vectors and whatever is ambiguous. ``axes`` and what raises are as in ``resolve_axes``. Of
    parameters that could be called (Equinox, nnx) hand this function to ``optax.partition``, which calls such a tree.

    >>> label_params({"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}, "wte": jnp.ones((9, 3))})
    {'dense': {'bias': 'other', 'kernel': 'matrix'}, 'wte': 'embedding'}
    """
    return jax.tree.structure(params).unflatten([leaf.kind for leaf in resolve_axes(params, axes, jnp.inexact)])


def _read_given(tree: Any, leaves: list[Leaf], dtypes: Any) -> list[LeafAxes]:
    """The verdicts of a user's tree, matched by path."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
    given = {path_names(path): value for path, value in flat}
    for names, value in given.items():
        if not isinstance(value, MatrixAxes | None):
            raise TypeError(f"axes= at {'/'.join(names)!r} is {value!r}; wanted fo.MatrixAxes or None (fallback).")
    missing = ["/".join(leaf.names) for leaf in leaves if leaf.names not in given]
    if missing:
        raise ValueError(
            f"axes= has no entry for {missing[0]!r} ({len(missing)} of {len(leaves)} leaves are missing; it has "
            f"{', '.join(repr('/'.join(names)) for names in list(given)[:4]) or 'no entries'}). Give every leaf of the "
            "parameters a fo.MatrixAxes, or None for the fallback, under the leaf's own path."
        )

    def read(leaf: Leaf, axes: MatrixAxes | None) -> LeafAxes:
        path = "/".join(leaf.names)
        axes = axes and axes.resolve(path, leaf.shape)
        if axes and not jnp.issubdtype(leaf.dtype, dtypes):
            wanted = "real or complex" if dtypes is jnp.inexact else "real (of complex ones, fo.muon takes matrices)"
            raise ValueError(
                f"axes= makes a matrix of {path!r}, which is {leaf.dtype}; wanted is floating point, {wanted}. Give it "
                "None, the fallback."
            )
        return no_matrix(leaf, dtypes) or leaf.as_(
            "matrix" if axes else "other", axes, "user" if axes else "user: fallback"
        )

    return [read(leaf, given[leaf.names]) for leaf in leaves]
