"""Which axes of each parameter are inputs, outputs and batch of a matrix: by the rules, or as the user says.

The canonical matrix of a leaf is ``in x out``, as Flax stores kernels (``y = x W``); every leaf is a batch of such
matrices or none at all. Nothing is guessed: a leaf for which two readings fit is no matrix, and its reason says so.

A reading rests on the bias beside a kernel, whose axes are the kernel's last, on the stack around it
(`stacks.Stacks`), and on whole names. A ``weight``, as PyTorch and Equinox store it, has its outputs first unless
biases say otherwise; an embedding has its tokens there.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .axes import AMBIGUOUS, GIVEN, INFERRED, ROUTER, LeafAxes, MatrixAxes, how_many, listed, made, path_names
from .names import ATTENTION_INPUTS, ATTENTION_OUTPUTS, EINSUMS, Leaf, bias_name, described, split_names, whole_tree
from .stacks import Stacks

STRICT, OUT_IN = "strict", "out_in"
WINDOWS = (1, 2, 3, 4, 5, 7)  # of a convolution that nothing names


def resolve_axes(
    params: PyTree, axes: PyTree = None, dtypes: DTypeLike = jnp.floating, kinds: tuple[str, ...] = ("matrix", "head")
) -> list[LeafAxes]:
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
      kinds: of which ``"strict"`` wants every leaf read.

    The rules need neighbours: where ``optax.masked`` or ``optax.partition`` hides some, pass the whole tree's axes.
    Raises ``ValueError`` for leaves that ``axes`` lacks or does not fit, by shape or by dtype, ``TypeError`` for an
    entry of another type.

    >>> params = {"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
    >>> [(leaf.path, leaf.kind, leaf.reason) for leaf in resolve_axes(params)]
    [('dense/bias', 'other', 'vector'), ('dense/kernel', 'matrix', 'Dense kernel')]
    """
    whole = whole_tree()
    axes = whole.axes if axes is None and whole is not None else axes
    leaves = _leaves(params)
    around = leaves if whole is None else list({x.keys: x for x in [*_leaves(whole.params), *leaves]}.values())
    if isinstance(axes, str) and axes not in (STRICT, OUT_IN):
        raise ValueError(
            f"axes= must be None, {STRICT!r}, {OUT_IN!r}, a tree of fo.MatrixAxes or a function of params; got "
            f"{axes!r}."
        )
    if axes is None or isinstance(axes, str):
        read = list(map(Rules(around, outputs_first=axes == OUT_IN).read, leaves))
        if axes == STRICT:
            _refuse_ambiguous(read, kinds)
    else:
        read = _read_given(made(axes, params if whole is None else whole.params), leaves, dtypes)
    real = {x.names: x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}
    paths = {x.path: x for x in real.values()}
    return [x._replace(bias=_bias_path(x, leaf, paths, real)) for x, leaf in zip(read, leaves, strict=True)]


def _leaf(path: KeyPath, value: PyTree) -> Leaf:
    keys = path_names(path)
    return Leaf(keys, split_names(keys), jnp.shape(value), jnp.result_type(value))


def _leaves(params: PyTree) -> list[Leaf]:
    return [_leaf(path, value) for path, value in jax.tree_util.tree_flatten_with_path(params)[0]]


def ambiguous_among(leaves: list[LeafAxes], kinds: tuple[str, ...]) -> list[LeafAxes]:
    """Those that may be matrices of these kinds."""
    return [leaf for leaf in leaves if leaf.is_ambiguous and leaf.kind in ("other", *kinds)]


def _refuse_ambiguous(leaves: list[LeafAxes], kinds: tuple[str, ...]) -> None:
    if ambiguous := ambiguous_among(leaves, kinds):
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

    >>> [is_told(leaf) for leaf in resolve_axes({"kernel": jax.numpy.ones((3, 5)), "w1": jax.numpy.ones((3, 5))})]
    [True, False]
    """
    return leaf.bias is not None or "outputs first" in leaf.reason or "2-D leaf" not in leaf.reason


# How a leaf is read, by its own name, its shape and the leaves around it.


def no_matrix(leaf: Leaf, dtypes: DTypeLike = jnp.floating) -> LeafAxes | None:
    """The verdict on a leaf that is no matrix of these dtypes whatever its name, or None."""
    if not jnp.issubdtype(leaf.dtype, dtypes):
        return leaf.as_("other", None, f"{leaf.dtype}, not real floating point")
    small = "empty" if 0 in leaf.shape else {0: "scalar", 1: "vector"}.get(len(leaf.shape))
    return leaf.as_("other", None, small) if small else None


class Rules:
    """The rules, for leaves that are seen together; ``outputs_first`` says that all matrices are stored so."""

    def __init__(self, leaves: list[Leaf], outputs_first: bool = False):
        self.stacks = Stacks(leaves, outputs_first)
        # What is stacked along its second axis is read as one layer of the stack.
        self.layers = {
            module: Rules([_without_second_axis(x) for x in self.stacks.below[module]], outputs_first)
            for module in self.stacks.along_second
        }

    def read(self, leaf: Leaf) -> LeafAxes:
        """What the leaf is."""
        if settled := no_matrix(leaf):
            return settled
        found = self._in_stacks(leaf)
        is_unread = found.axes is None and not self.stacks.is_vector(leaf)
        return leaf.as_("other", None, ROUTER) if is_unread and self.stacks.is_router(leaf) else found

    def _in_stacks(self, leaf: Leaf) -> LeafAxes:
        """What the leaf is, of layers that are stacked along any axis."""
        first, second = self.stacks.outermost(leaf)
        if second is None or (first is not None and len(first) < len(second)):
            return self._read(leaf)
        found = _with_second_axis(self.layers[second].read(_without_second_axis(leaf)), leaf)
        if first != second or found.axes is None:
            return found
        other = self._read(leaf)
        if other.axes is None or other.axes.same_matrix(found.axes, leaf.shape):
            return other
        return _ambiguous(leaf, "stacked along its first axis or its second")

    def _read(self, leaf: Leaf) -> LeafAxes:
        """What the leaf is, stacked along leading axes alone."""
        stacks = self.stacks
        depth = stacks.depth(leaf)
        rank = len(leaf.shape) - depth
        if stacks.is_vector(leaf) or rank < 2:
            if rank > 1 and not depth and stacks.is_vector_by_module(leaf):
                return _ambiguous(leaf, "a normalisation by its module's name, a matrix by its shape")
            return leaf.as_("other", None, ("stacked scalar", "stacked vector", "bias or normalisation")[min(rank, 2)])
        outputs_first = stacks.is_outputs_first(leaf)
        if outputs_first is None:
            return _ambiguous(leaf, "its outputs may come first or last")
        bias, fits = stacks.bias_of(leaf)
        if bias:
            # Neighbours show at least ``depth`` stacked axes; where the bias fits more as well, those may be true.
            known = depth == max(fits, default=-1) and not stacks.may_be_along_second(leaf, depth)
            inputs = tuple(range(len(leaf.shape) - len(bias))) if not outputs_first else tuple(range(1, rank))
            doubt = "its bias fits stacked and unstacked" if fits else "its bias does not fit"
            inputs = inputs if known else ()
        elif stacks.is_expert(leaf, depth):
            depth, inputs, doubt = depth + 1, (1,) if outputs_first else (0,), ""
        else:
            inputs, doubt = self._inputs_by_name(leaf, depth, outputs_first)
        return self._verdict(leaf, depth, inputs, doubt)

    def _inputs_by_name(self, leaf: Leaf, depth: int, outputs_first: bool) -> tuple[tuple[int, ...], str]:
        """Which axes of one layer are inputs for a leaf without a bias, or none and what is in doubt."""
        if self.stacks.may_be_stacked(leaf, depth):
            return (), "perhaps stacked"
        shape, kernel = leaf.shape[depth:], leaf.name == "kernel"
        rank, window = len(shape), shape[2:] if outputs_first else shape[:-2]
        square = rank == 4 and window[0] == window[1] in WINDOWS
        convolution = (2 < rank < 6 and leaf.is_convolution) or square
        if outputs_first:
            return (tuple(range(1, rank)), "") if rank == 2 or convolution else ((), "no bias and no telling name")
        einsum = EINSUMS.get(leaf.module if leaf.name in ("w", "kernel") else leaf.name)
        if einsum is not None and einsum[0] == rank:
            return einsum[1], ""
        if rank == 2:
            return (0,), ""
        if rank == 3 and (kernel or leaf.name == "w") and leaf.module in ATTENTION_INPUTS | ATTENTION_OUTPUTS:
            return ((0,) if leaf.module in ATTENTION_INPUTS else (0, 1)), ""
        if (axis := self.stacks.gated_input(leaf, depth)) is not None:
            return (axis,), ""
        if kernel and convolution:
            return tuple(range(rank - 1)), ""
        return (), "no bias and no telling name"

    def _verdict(self, leaf: Leaf, depth: int, inputs: tuple[int, ...], doubt: str) -> LeafAxes:
        """The leaf as ``depth`` batch axes, then one layer with these input axes; without inputs, ambiguous."""
        embedding = self.stacks.is_table(leaf)
        if not inputs:
            return _ambiguous(leaf, doubt, embedding)
        outputs = tuple(a for a in range(len(leaf.shape) - depth) if a not in inputs)
        axes = MatrixAxes([depth + a for a in inputs], [depth + a for a in outputs], range(depth))
        stack = f", stacked {' x '.join(map(str, leaf.shape[:depth]))}" if depth else ""
        if embedding:
            return leaf.as_("embedding", axes, f"embedding{stack}")
        reason = described(leaf, axes) + stack
        if self.stacks.is_router(leaf):
            return leaf.as_("other", axes, f"{ROUTER}: {reason}")
        return leaf.as_("head", axes, f"head: {reason}") if leaf.is_head else leaf.as_("matrix", axes, reason)


def _ambiguous(leaf: Leaf, doubt: str, is_table: bool = False) -> LeafAxes:
    noun = leaf.name if leaf.name in ("kernel", "embedding") else "leaf"
    kind = "embedding" if is_table else "head" if leaf.is_head else "other"
    return leaf.as_(kind, None, f"{AMBIGUOUS} {len(leaf.shape)}-D {noun}: pass axes= ({doubt})")


# A stack along the second axis, as `nn.scan(variable_axes={"params": 1})` makes it.


def _without_second_axis(leaf: Leaf) -> Leaf:
    """One layer's share of it."""
    return leaf._replace(shape=(*leaf.shape[:1], *leaf.shape[2:]))


def _with_second_axis(layer: LeafAxes, leaf: Leaf) -> LeafAxes:
    """What is read of one layer, for the stack of them along the second axis."""
    if layer.axes is None:
        reason = {"vector": "stacked vector", "scalar": "stacked scalar"}.get(layer.reason, layer.reason)
        return layer._replace(shape=leaf.shape, reason=reason)
    inputs, outputs, batch = (
        [a + (a > 0) for a in group] for group in (layer.axes.inputs, layer.axes.outputs, layer.axes.batch)
    )
    axes = dataclasses.replace(layer.axes, inputs=inputs, outputs=outputs, batch=sorted([*batch, 1]))
    return layer._replace(shape=leaf.shape, axes=axes, reason=f"{layer.reason}, stacked {leaf.shape[1]} along axis 1")
