"""Which axes of a parameter are inputs, outputs and batch of a matrix: the rules by Flax path and shape.

The canonical matrix of a leaf is ``in x out``, as Flax stores kernels (``y = x W``); every leaf is a batch of such
matrices or none at all. Nothing is guessed: a leaf for which two readings fit is no matrix, and its reason says so.

A reading rests on the bias beside a kernel, whose axes are the kernel's last (Dense, DenseGeneral, attention, Conv); on
the stack around it (``nn.scan``, ``nnx.vmap``: one shared axis in front of every leaf below a module, shown by
normalisation vectors of two axes and by biases that repeat their kernel's first axis); and on the module's name. A
square ``weight``, whose shape says nothing, is read with its outputs first, as PyTorch and Equinox store it, but for an
embedding, whose rows are tokens there too. It matters where sides differ: to statistics, which know better and say so,
and to what is kept for each output.
"""

import collections
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .axes import AMBIGUOUS, GIVEN, INFERRED, LeafAxes, MatrixAxes, how_many, listed, made, path_names

BIAS_BESIDE = {"kernel": "bias", "weight": "bias", "w": "b"}
SMALLEST_RANK = {"kernel": 2, "embedding": 2, "bias": 1, "scale": 1}  # of one layer, unstacked
ATTENTION_INPUTS = frozenset({"query", "key", "value", "q_proj", "k_proj", "v_proj"})
ATTENTION_OUTPUTS = frozenset({"out", "o_proj", "out_proj"})
HEADS = frozenset({"head", "lm_head", "logits"})
CONVOLUTION = re.compile("conv", re.IGNORECASE)
NORMALISATION = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
EMBEDDING = re.compile(r"embed|(^|_)emb(_|$)|^(wte|wpe)$", re.IGNORECASE)


class Leaf(NamedTuple):
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any

    @property
    def name(self) -> str:
        return self.names[-1]

    @property
    def module(self) -> str:
        return self.names[-2] if len(self.names) > 1 else ""

    @property
    def ancestors(self) -> list[tuple[str, ...]]:
        return [self.names[:i] for i in range(len(self.names))]

    def as_(self, kind: str, axes: MatrixAxes | None, reason: str) -> LeafAxes:
        return LeafAxes("/".join(self.names), self.shape, self.dtype, axes, kind, reason)


def no_matrix(leaf: Leaf, dtypes: DTypeLike = jnp.floating) -> LeafAxes | None:
    """The verdict on a leaf that is no matrix of these dtypes whatever its name, or None."""
    if not jnp.issubdtype(leaf.dtype, dtypes):
        return leaf.as_("other", None, f"{leaf.dtype}, not real floating point")
    small = "empty" if 0 in leaf.shape else {0: "scalar", 1: "vector"}.get(len(leaf.shape))
    return leaf.as_("other", None, small) if small else None


class Rules:
    """The rules, for leaves that are seen together."""

    def __init__(self, leaves: list[Leaf]):
        self.shapes = {leaf.names: leaf.shape for leaf in leaves}
        self.below: dict[tuple[str, ...], list[Leaf]] = collections.defaultdict(list)
        for leaf in leaves:
            for module in leaf.ancestors:
                self.below[module].append(leaf)
        self.stacked = {module: self._stacked_axes(module) for module in self.below}

    def read(self, leaf: Leaf) -> LeafAxes:
        if settled := no_matrix(leaf):
            return settled
        bias, fits = self._bias_of(leaf)
        # Otherwise the nearest module that shows a stack decides: no module shows more axes than one inside it.
        depth = max(fits) if len(fits) == 1 else max(self.stacked[module] for module in leaf.ancestors)
        rank = len(leaf.shape) - depth
        if self._is_vector(leaf) or rank < 2:
            return leaf.as_("other", None, ("stacked scalar", "stacked vector", "bias or normalisation")[min(rank, 2)])
        if bias:
            # Neighbours show at least ``depth`` stacked axes; where the bias fits more as well, those may be true.
            inputs = len(leaf.shape) - len(bias) if depth == max(fits, default=-1) else 0
            doubt = "its bias fits stacked and unstacked" if fits else "its bias does not fit"
        else:
            inputs, doubt = self._inputs_by_name(leaf, depth)
        return _verdict(leaf, depth, inputs, doubt)

    def _inputs_by_name(self, leaf: Leaf, depth: int) -> tuple[int, str]:
        """How many axes are inputs for a leaf without a bias, or 0 and what is in doubt."""
        if self._may_be_stacked(leaf, depth):
            return 0, "perhaps stacked"
        kernel, window, rank = leaf.name == "kernel", leaf.shape[depth:-2], len(leaf.shape) - depth
        if kernel and 2 < rank < 6 and CONVOLUTION.search(leaf.module):
            return rank - 1, ""
        if rank == 2 or (kernel and rank == 3 and leaf.module in ATTENTION_INPUTS):
            return 1, ""
        if kernel and rank == 3 and leaf.module in ATTENTION_OUTPUTS:
            return 2, ""
        if kernel and rank == 4 and window[0] == window[1] in (1, 2, 3, 4, 5, 7):
            return 3, ""
        return 0, "no bias and no telling name"

    def _bias_of(self, leaf: Leaf) -> tuple[tuple[int, ...], set[int]]:
        """The bias beside a kernel, and how many stacked axes would leave a bias that is the kernel's last axes."""
        bias = self.shapes.get((*leaf.names[:-1], BIAS_BESIDE.get(leaf.name, "/")), ())
        inputs = len(leaf.shape) - len(bias)
        fits = (k for k in range(len(bias)) if leaf.shape[:k] == bias[:k] and leaf.shape[inputs + k :] == bias[k:])
        return bias, set(fits) if inputs > 0 else set()

    def _stacked_axes(self, module: tuple[str, ...]) -> int:
        """The leading axes that stack all of a module: shared by every leaf below, and shown by every witness."""
        witnesses = []
        for leaf in self.below[module]:
            if self._is_vector(leaf) and (leaf.name == "scale" or NORMALISATION.search(leaf.module)):
                witnesses.append(len(leaf.shape) - 1)
            fits = self._bias_of(leaf)[1]
            witnesses += fits if len(fits) == 1 else ()
        return max((k for k in range(1, min(witnesses, default=0) + 1) if self._share(module, k)), default=0)

    def _share(self, module: tuple[str, ...], depth: int) -> bool:
        """Whether the first axes are the same for every leaf of the module and leave enough for one layer."""
        shared = self.below[module][0].shape[:depth]
        ranks = ((leaf, len(leaf.shape) - depth) for leaf in self.below[module])
        return all(leaf.shape[:depth] == shared and rank >= SMALLEST_RANK.get(leaf.name, 0) for leaf, rank in ranks)

    def _may_be_stacked(self, leaf: Leaf, depth: int) -> bool:
        """Whether one more stacked axis explains some module as well, and nothing else explains that axis."""
        return any(
            len(self.below[module]) > 1
            and self._share(module, depth + 1)
            and not all(_first_axis_explained(x, depth) for x in self.below[module])
            for module in leaf.ancestors
        )

    def _is_vector(self, leaf: Leaf) -> bool:
        """Whether one layer's share of the leaf acts as a vector however many axes it has."""
        if leaf.name in ("kernel", "embedding"):
            return False
        beside_w = leaf.name == "b" and (*leaf.names[:-1], "w") in self.shapes
        elementwise = self._bias_of(leaf)[0] == leaf.shape
        return leaf.name in ("bias", "scale") or beside_w or elementwise or bool(NORMALISATION.search(leaf.module))


def _first_axis_explained(leaf: Leaf, depth: int) -> bool:
    """Whether a shared first axis is no sign of a stack: one layer's inputs, or the window of a convolution."""
    square = CONVOLUTION.search(leaf.module) is not None and len(set(leaf.shape[depth:-2])) == 1
    return len(leaf.shape) < depth + 3 or leaf.module in ATTENTION_INPUTS or square


def _verdict(leaf: Leaf, depth: int, inputs: int, doubt: str) -> LeafAxes:
    """The leaf as ``depth`` batch axes, then ``inputs`` input axes, then outputs; without inputs, ambiguous."""
    embedding = any(EMBEDDING.search(name) for name in leaf.names)
    if not inputs:
        noun = leaf.name if leaf.name in ("kernel", "embedding") else "leaf"
        reason = f"{AMBIGUOUS} {len(leaf.shape)}-D {noun}: pass axes= ({doubt})"
        return leaf.as_("embedding" if embedding else "other", None, reason)
    every = tuple(range(len(leaf.shape)))
    axes = MatrixAxes(every[depth : depth + inputs], every[depth + inputs :], every[:depth])
    if not embedding and _is_outputs_first(leaf, depth):
        axes = MatrixAxes(every[-1:], every[-2:-1], every[:depth])
    stack = f", stacked {' x '.join(map(str, leaf.shape[:depth]))}" if depth else ""
    if embedding:
        return leaf.as_("embedding", axes, f"embedding{stack}")
    reason = _layer(leaf, axes) + stack
    if leaf.name in HEADS or leaf.module in HEADS:
        return leaf.as_("head", axes, f"head: {reason}")
    return leaf.as_("matrix", axes, reason)


def _is_outputs_first(leaf: Leaf, depth: int) -> bool:
    """Whether only a name says which axis is which: a square ``weight``, as PyTorch and Equinox store it."""
    return leaf.name == "weight" and len(leaf.shape) == depth + 2 and leaf.shape[-1] == leaf.shape[-2]


def _layer(leaf: Leaf, axes: MatrixAxes) -> str:
    inputs, outputs = len(axes.inputs), len(axes.outputs)
    if (inputs, outputs) == (1, 1):
        first = ", outputs first by its name" if axes.outputs < axes.inputs else ""
        return "Dense kernel" if leaf.name == "kernel" else f"2-D leaf{first}"
    if leaf.module in ATTENTION_INPUTS and (inputs, outputs) == (1, 2):
        return f"attention {leaf.module}: (in, heads x features)"
    if leaf.module in ATTENTION_OUTPUTS and (inputs, outputs) == (2, 1):
        return f"attention {leaf.module}: (heads x features, out)"
    return "Conv kernel" if CONVOLUTION.search(leaf.module) else f"kernel: {inputs} input and {outputs} output axes"


# Which axes of each parameter are inputs, outputs and batch of a matrix: by rules, or as the user says.


def resolve_axes(params: PyTree, axes: PyTree = None, dtypes: DTypeLike = jnp.floating) -> list[LeafAxes]:
    """One ``LeafAxes`` per leaf of ``params``, in the order of ``jax.tree.leaves``.

    Args:
      params: arrays or ``ShapeDtypeStruct``, as a Flax dictionary, an ``nnx.State`` or any pytree. Boxes
        (``nn.Partitioned``, ``nnx.Param``) add nothing to a path; ``None`` and ``optax.MaskedNode`` are no leaves.
      axes: ``None``, the rules by path and shape; or a tree with ``MatrixAxes`` or ``None`` (fallback) for every leaf,
        matched by path, so that it may hold more than a masked ``params``; or a function from params to such a tree.
        A ``MatrixAxes`` given here makes the leaf a matrix, embeddings and heads included. ``"strict"``: the rules,
        and a ValueError where a leaf is ambiguous.
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
    if axes is None or isinstance(axes, str):
        read = list(map(Rules(leaves).read, leaves))
        if axes is not None:
            _refuse_ambiguous(axes, read)
    else:
        read = _read_given(made(axes, params), leaves, dtypes)
    shapes = {leaf.path: leaf.shape for leaf in read if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return [leaf._replace(bias=_bias_path(leaf, shapes)) for leaf in read]


def _refuse_ambiguous(axes: str, leaves: list[LeafAxes]) -> None:
    if axes != "strict":
        raise ValueError(
            f"axes= must be None, 'strict', a tree of fo.MatrixAxes or a function of params; got {axes!r}."
        )
    if ambiguous := [leaf for leaf in leaves if leaf.is_ambiguous]:
        raise ValueError(
            f"axes='strict', and {how_many(ambiguous, leaves)} may be read in more ways than one: "
            f"{listed(ambiguous)}. {INFERRED}."
        )


def _bias_path(leaf: LeafAxes, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The path of a matrix's bias: the one its axes name, or the one beside it, if it is there and of that shape."""
    if leaf.axes is None:
        return None
    module, _, name = leaf.path.rpartition("/")
    path = leaf.axes.bias or "/".join(filter(None, (module, BIAS_BESIDE.get(name, "/"))))
    shape = tuple(leaf.shape[a] for a in leaf.axes.batch + leaf.axes.outputs)
    return path if shapes.get(path) == shape else None


def label_params(params: PyTree, axes: PyTree = None) -> PyTree:
    """A tree like ``params`` that says what each leaf is, made for ``optax.partition``.

    ``"embedding"``: below a name with "embed", wte or wpe; ``"head"``: a matrix of head, lm_head, logits; ``"matrix"``:
    any other; ``"other"``: vectors and whatever is ambiguous. ``axes`` and what raises are as in ``resolve_axes``. Of
    parameters that could be called (Equinox, nnx) hand this function to ``optax.partition``, which calls such a tree.

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
    missing = ["/".join(leaf.names) for leaf in leaves if leaf.names not in entries]
    if missing:
        raise ValueError(
            f"axes= has no entry for {missing[0]!r} ({len(missing)} of {len(leaves)} leaves are missing; it has "
            f"{', '.join(repr('/'.join(names)) for names in list(entries)[:4]) or 'no entries'}). Give every leaf of "
            "the parameters a fo.MatrixAxes, or None for the fallback, under the leaf's own path."
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
            "matrix" if axes else "other", axes, GIVEN if axes else f"{GIVEN}: fallback"
        )

    return [read(leaf, entries[leaf.names]) for leaf in leaves]
