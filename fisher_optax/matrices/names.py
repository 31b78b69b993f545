"""What the whole name of a leaf or of its module says: no part of a name decides anything.

A name is read as words (``LayerNorm_0`` is "layer norm", ``lora_A`` is "lora a"), and numbers are none. A name that
frameworks write with dots or slashes (``model.layers.0.mlp.up_proj.weight``) is a path.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from .axes import LeafAxes, MatrixAxes, shapes

BIAS_BESIDE = {"kernel": "bias", "weight": "bias", "w": "b", "in_proj_weight": "in_proj_bias"}
ATTENTION_INPUTS = frozenset({"query", "key", "value", "q_proj", "k_proj", "v_proj"})
ATTENTION_OUTPUTS = frozenset({"out", "o_proj", "out_proj"})
HEADS = frozenset(
    {
        *("head", "lm_head", "cls_head", "classification_head", "output_head", "classifier", "embed_out"),
        *("logits", "logits_dense", "output_projection", "to_logits", "unembed", "unembedding", "qa_outputs"),
    }
)
ROUTERS = frozenset({"router", "gate"})  # a gate is one where experts stand beside it
EXPERTS = frozenset({"experts", "expert"})
# Stacks of experts by their own names: from the model's width into the hidden layer, and back.
EXPERTS_IN = frozenset({"gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "wi", "wi_0", "wi_1"})
EXPERTS_OUT = frozenset({"down_proj", "w2", "wo"})
STACKS = frozenset({"layers", "blocks"})
LIFTED = re.compile(r"(Scan|Vmap)[A-Z]")  # how the names of `nn.scan` and `nn.vmap` begin
# PyTorch and Equinox store these with their outputs first.
OUTPUTS_FIRST = re.compile(r"weight|in_proj_weight|weight_[ih]h(_l\d+)?")
VECTORS = frozenset({"bias", "scale", "gamma", "beta"})
# Of the einsums of Gemma: the axes of one layer that are inputs, the others being outputs.
EINSUMS = {
    "q_einsum": (3, (1,)),
    "kv_einsum": (4, (2,)),
    "qkv_einsum": (4, (2,)),
    "attn_vec_einsum": (3, (0, 1)),
}
_NORMS = frozenset({"norm", "norms", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "instancenorm", "ln", "bn"})
_CONVOLUTIONS = frozenset({"conv", "convolution"})
_TABLES = frozenset({"emb", "embed", "embedding", "embeddings", "table", "wte", "wpe"})
_OF_TABLES = frozenset(
    {
        *("tok", "token", "tokens", "word", "words", "vocab", "vocabulary", "type", "segment", "input", "inputs", "in"),
        *("pos", "position", "positions", "positional", "relative", "rel", "attention", "bias", "learned"),
    }
)


class Leaf(NamedTuple):
    """A leaf of a tree, before it is read."""

    keys: tuple[str, ...]  # its path
    names: tuple[str, ...]  # the same, where a key that is a path by itself is several
    shape: tuple[int, ...]
    dtype: Any

    @property
    def path(self) -> str:
        return "/".join(self.keys)

    @property
    def name(self) -> str:
        return self.names[-1]

    @property
    def module(self) -> str:
        return self.names[-2] if len(self.names) > 1 else ""

    @property
    def ancestors(self) -> list[tuple[str, ...]]:
        return [self.names[:i] for i in range(len(self.names))]

    @property
    def is_table(self) -> bool:
        """Whether it is looked up, by its own name; a ``weight`` has that of its module."""
        return names_table(self.name) or (self.name == "weight" and names_table(self.module))

    @property
    def is_convolution(self) -> bool:
        return not _CONVOLUTIONS.isdisjoint(words(self.module))

    @property
    def is_head(self) -> bool:
        return names_head(self.names)

    @property
    def is_normalisation(self) -> bool:
        """Whether it belongs to a module of that name: its first or its last word."""
        found = words(self.module)
        return bool(found) and not _NORMS.isdisjoint((found[0], found[-1]))

    def as_(self, kind: str, axes: MatrixAxes | None, reason: str) -> LeafAxes:
        return LeafAxes(self.path, self.shape, self.dtype, axes, kind, reason)


def split_names(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a path whose keys may be paths themselves, as in a safetensors file or in Haiku.

    >>> split_names(("model.layers.0.mlp.up_proj.weight",))
    ('model', 'layers', '0', 'mlp', 'up_proj', 'weight')
    """
    return tuple(name for key in keys for name in re.split(r"[./]", key) if name not in ("", "~")) or ("",)


def bias_name(leaf: Leaf) -> tuple[str, ...]:
    """Where the bias of a kernel would be."""
    return (*leaf.names[:-1], BIAS_BESIDE.get(leaf.name, f"{leaf.name}_bias"))


@functools.cache
def words(name: str) -> tuple[str, ...]:
    """The words of a name in small letters, without numbers.

    >>> words("RMSNorm_0"), words("conv2d_in")
    (('rms', 'norm'), ('conv', 'd', 'in'))
    """
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))


def names_table(name: str) -> bool:
    """Whether a name, as a whole, is that of a look-up table.

    >>> [name for name in ("wte", "embed_tokens", "pos_embedding", "patch_embed", "text_embedder") if names_table(name)]
    ['wte', 'embed_tokens', 'pos_embedding']
    """
    found = set(words(name))
    return bool(found & _TABLES) and found <= _TABLES | _OF_TABLES


def names_head(names: tuple[str, ...]) -> bool:
    """Whether a leaf's path is that of a head: by its own name or its module's, which may be a whole model's output."""
    return not HEADS.isdisjoint(names[-2:]) or names[:-1] == ("output",)


def lora_side(leaf: Leaf) -> str:
    """ "A" or "B" for a factor of a low-rank adapter, by its own name or a module's just around it; or ""."""
    ends = [words(name)[-2:] for name in reversed(leaf.names[-3:])]
    return next((end[1].upper() for end in ends if end in (("lora", "a"), ("lora", "b"))), "")


def described(leaf: Leaf, axes: MatrixAxes) -> str:
    """What kind of layer a matrix is, for the report."""
    inputs, outputs = len(axes.inputs), len(axes.outputs)
    first = ", outputs first" if axes.outputs < axes.inputs else ""
    if (inputs, outputs) == (1, 1):
        lora = lora_side(leaf)
        return (f"LoRA's {lora}" if lora else "Dense kernel" if leaf.name == "kernel" else "2-D leaf") + first
    if leaf.module in ATTENTION_INPUTS and (inputs, outputs) == (1, 2):
        return f"attention {leaf.module}: (in, heads x features)"
    if leaf.module in ATTENTION_OUTPUTS and (inputs, outputs) == (2, 1):
        return f"attention {leaf.module}: (heads x features, out)"
    if leaf.is_convolution:
        return f"Conv kernel{first}"
    return f"kernel: {inputs} input and {outputs} output axes{first}"


# The whole tree around a masked one, whose hidden leaves say how the others are read.


class Whole(NamedTuple):
    """A tree of parameters, and the ``axes`` that it was given."""

    params: PyTree
    axes: PyTree


_whole: contextvars.ContextVar[Whole | None] = contextvars.ContextVar("whole", default=None)


@contextlib.contextmanager
def part_of(params: PyTree, axes: PyTree) -> Iterator[None]:
    """Inside, `resolve_axes` reads every tree as a part of ``params``; of such calls in one another the outermost
    counts, since it has seen the most, unless an inner one is given axes of its own.
    """
    if (_whole.get() is not None and axes is None) or not jax.tree.leaves(params):
        yield
        return
    token = _whole.set(Whole(shapes(params), axes))
    try:
        yield
    finally:
        _whole.reset(token)


def whole_tree() -> Whole | None:
    """The tree that `part_of` was told."""
    return _whole.get()
