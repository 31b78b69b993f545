"""Which axes of each parameter are inputs, outputs and batch of a matrix: by the rules, or as the user says."""

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .axes import GIVEN, INFERRED, LeafAxes, MatrixAxes, how_many, listed, made, path_names
from .names import Leaf, bias_name, split_names
from .readings import Rules, no_matrix

STRICT, OUT_IN = "strict", "out_in"


def resolve_axes(params: PyTree, axes: PyTree = None, dtypes: DTypeLike = jnp.floating) -> list[LeafAxes]:
    """One ``LeafAxes`` per leaf of ``params``, in the order of ``jax.tree.leaves``.

    Args:
      params: arrays or ``ShapeDtypeStruct``, as a Flax dictionary, an ``nnx.State`` or any pytree. Boxes
        (``nn.Partitioned``, ``nnx.Param``) add nothing to a path; ``None`` and ``optax.MaskedNode`` are no leaves.
      axes: ``None``, the rules by path and shape; or a tree with ``MatrixAxes`` or ``None`` (fallback) for every leaf,
        matched by path, so that it may hold more than a masked ``params``; or a function from params to such a tree.
        A ``MatrixAxes`` given here makes the leaf a matrix, embeddings included, or a head where it says so.
        ``"strict"``: the rules, and a ValueError where a leaf is ambiguous. ``"out_in"``: the rules for a tree whose
        matrices all have their outputs first, as in PyTorch and Equinox, whatever their names.
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
    leaves = [_leaf(path, value) for path, value in flat]
    if isinstance(axes, str) and axes not in (STRICT, OUT_IN):
        raise ValueError(
            f"axes= must be None, {STRICT!r}, {OUT_IN!r}, a tree of fo.MatrixAxes or a function of params; got "
            f"{axes!r}."
        )
    if axes is None or isinstance(axes, str):
        read = list(map(Rules(leaves, outputs_first=axes == OUT_IN).read, leaves))
        if axes == STRICT:
            _refuse_ambiguous(read)
    else:
        read = _read_given(made(axes, params), leaves, dtypes)
    real = {x.names: x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}
    paths = {x.path: x for x in real.values()}
    return [x._replace(bias=_bias_path(x, leaf, paths, real)) for x, leaf in zip(read, leaves, strict=True)]


def _leaf(path: KeyPath, value: PyTree) -> Leaf:
    keys = path_names(path)
    return Leaf(keys, split_names(keys), jnp.shape(value), jnp.result_type(value))


def _refuse_ambiguous(leaves: list[LeafAxes]) -> None:
    if ambiguous := [leaf for leaf in leaves if leaf.is_ambiguous]:
        raise ValueError(
            f"axes='strict', and {how_many(ambiguous, leaves)} may be read in more ways than one: "
            f"{listed(ambiguous)}. {INFERRED}."
        )


def _bias_path(read: LeafAxes, leaf: Leaf, paths: dict[str, Leaf], real: dict[tuple[str, ...], Leaf]) -> str | None:
    """The path of a matrix's bias: the one its axes name, or the one beside it, if it is there and of that shape."""
    if read.axes is None:
        return None
    bias = paths.get(read.axes.bias) if read.axes.bias else real.get(bias_name(leaf))
    # Beside a stack along another axis than the first, a bias has its stack there too, and not in front.
    leading = read.axes.bias or read.axes.batch == tuple(range(len(read.axes.batch)))
    shape = tuple(leaf.shape[a] for a in read.axes.batch + read.axes.outputs)
    return bias.path if bias is not None and leading and bias.shape == shape else None


def label_params(params: PyTree, axes: PyTree = None) -> PyTree:
    """A tree like ``params`` that says what each leaf is, made for ``optax.partition``.

    ``"embedding"``: a look-up table by its own name; ``"head"``: a matrix of head, lm_head, logits and the like;
    ``"matrix"``: any other; ``"other"``: vectors, routers of experts, whatever is ambiguous. ``axes`` and what raises
    are as in ``resolve_axes``. Of parameters that could be called (Equinox, nnx) hand this function to
    ``optax.partition``, which calls such a tree.

    >>> label_params({"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}, "wte": jnp.ones((9, 3))})
    {'dense': {'bias': 'other', 'kernel': 'matrix'}, 'wte': 'embedding'}
    """
    return jax.tree.structure(params).unflatten([leaf.kind for leaf in resolve_axes(params, axes, jnp.inexact)])


def _read_given(tree: PyTree, leaves: list[Leaf], dtypes: DTypeLike) -> list[LeafAxes]:
    """The verdicts of a user's tree, matched by path."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
    entries = {path_names(path): value for path, value in flat}
    for names, value in entries.items():
        if not isinstance(value, MatrixAxes | None):
            raise TypeError(f"axes= at {'/'.join(names)!r} is {value!r}; wanted fo.MatrixAxes or None (fallback).")
    missing = [leaf.path for leaf in leaves if leaf.keys not in entries]
    if missing:
        raise ValueError(
            f"axes= has no entry for {missing[0]!r} ({len(missing)} of {len(leaves)} leaves are missing; it has "
            f"{', '.join(repr('/'.join(names)) for names in list(entries)[:4]) or 'no entries'}). Give every leaf of "
            "the parameters a fo.MatrixAxes, or None for the fallback, under the leaf's own path."
        )

    def read(leaf: Leaf, axes: MatrixAxes | None) -> LeafAxes:
        axes = axes and axes.resolve(leaf.path, leaf.shape)
        if axes and not jnp.issubdtype(leaf.dtype, dtypes):
            wanted = "real or complex" if dtypes is jnp.inexact else "real (of complex ones, fo.muon takes matrices)"
            raise ValueError(
                f"axes= makes a matrix of {leaf.path!r}, which is {leaf.dtype}; wanted is floating point, {wanted}. "
                "Give it None, the fallback."
            )
        if settled := no_matrix(leaf, dtypes):
            return settled
        if axes is None:
            return leaf.as_("other", None, f"{GIVEN}: fallback")
        return leaf.as_("head", axes, f"{GIVEN}: head") if axes.head else leaf.as_("matrix", axes, GIVEN)

    return [read(leaf, entries[leaf.keys]) for leaf in leaves]


def is_told(leaf: LeafAxes) -> bool:
    """Whether a matrix's inputs are known by more than the order of its axes: by a user, a name or a bias.

    >>> [is_told(leaf) for leaf in resolve_axes({"kernel": jax.numpy.ones((3, 5)), "table": jax.numpy.ones((3, 5))})]
    [True, False]
    """
    return leaf.bias is not None or "outputs first" in leaf.reason or "2-D leaf" not in leaf.reason
