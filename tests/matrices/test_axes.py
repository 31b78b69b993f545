"""Axes and kinds are read off real Flax modules."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fisher_optax.matrices.axes import MatrixAxes
from fisher_optax.matrices.rules import label_params, resolve_axes
from tests.matrices.axes_models import (
    ATTENTION,
    GPT,
    IMAGE,
    MLP,
    Block,
    Experts,
    ResNetBlock,
    X,
    by_path,
    groups,
    leaf,
    nnx_params,
    params_of,
    tree,
)

ATTENTION_7 = {"query": "12 | 1 12", "key": "12 | 1 12", "value": "12 | 1 12", "out": "1 12 | 7"}
BLOCK = {f"attention/{name}": text for name, text in ATTENTION.items()} | {"Dense_0": "12 | 20", "Dense_1": "20 | 12"}
LINEN = {
    "MLP": (MLP(), leaf(2, 5), {"Dense_0": "5 | 7", "Dense_1": "7 | 3"}),
    "MLP without biases": (MLP(bias=False), leaf(2, 5), {"Dense_0": "5 | 7", "Dense_1": "7 | 3"}),
    "attention": (nn.MultiHeadDotProductAttention(3), X, ATTENTION),
    "attention without biases": (nn.MultiHeadDotProductAttention(3, use_bias=False), X, ATTENTION),
    "one head": (nn.MultiHeadDotProductAttention(1, use_bias=False, out_features=7), X, ATTENTION_7),
    "Conv in 1-D": (nn.Conv(7, (3,)), X, {"": "3 12 | 7"}),
    "Conv in 2-D": (nn.Conv(7, (1, 3)), IMAGE, {"": "1 3 5 | 7"}),
    "Conv in 3-D": (nn.Conv(7, (3, 2, 1)), leaf(1, 8, 8, 8, 5), {"": "3 2 1 5 | 7"}),
    "ResNet block": (ResNetBlock(), IMAGE, {"Conv_0": "3 3 5 | 8", "Conv_1": "3 3 8 | 16", "proj": "1 1 5 | 16"}),
    "DenseGeneral to heads": (nn.DenseGeneral((3, 4)), X, {"": "12 | 3 4"}),
    "DenseGeneral from heads": (nn.DenseGeneral(7, axis=(-2, -1)), X, {"": "6 12 | 7"}),
    "DenseGeneral batched": (nn.DenseGeneral(7, batch_dims=(0,)), leaf(6, 2, 12), {"": "6 | 12 | 7"}),
    "block": (Block(), X, BLOCK),
    "block without biases": (Block(bias=False), X, BLOCK),
    "block without norms": (Block(norm=None), X, BLOCK),
    "experts": (Experts(), X, {"router": "12 | 5", "experts/Dense_0": "5 | 12 | 7", "experts/Dense_1": "5 | 7 | 3"}),
}


@pytest.mark.parametrize(("model", "x", "want"), LINEN.values(), ids=LINEN.keys())
def test_linen_modules(model: nn.Module, x: Any, want: dict[str, str]) -> None:
    """Every kernel has its axes, and nothing but kernels is a matrix."""
    params = params_of(model, *[x] * (2 if isinstance(model, nn.MultiHeadDotProductAttention) else 1))
    assert groups(params) == {f"{module}/kernel".lstrip("/"): text for module, text in want.items()}
    assert {x.kind for x in resolve_axes(params) if x.axes is None} <= {"other"}


@pytest.mark.parametrize("window", [(3,), (3, 3), (2, 5), (3, 3, 3), (1, 3, 5)], ids=str)
def test_convolutions_without_biases_are_known_by_name(window: tuple[int, ...]) -> None:
    params = {"Conv_0": params_of(nn.Conv(7, window, use_bias=False), leaf(1, *[8] * len(window), 5))}
    assert groups(params) == {"Conv_0/kernel": f"{' '.join(map(str, window))} 5 | 7"}


def test_a_square_window_is_a_convolution_without_a_name() -> None:
    assert groups(tree({"stem/kernel": (3, 3, 5, 7)})) == {"stem/kernel": "3 3 5 | 7"}
    assert groups(tree({"stem/kernel": (6, 6, 5, 7)})) == {}


@pytest.mark.parametrize(
    "model", [nn.LayerNorm(), nn.RMSNorm(), nn.GroupNorm(2), nn.BatchNorm(use_running_average=True)], ids=repr
)
def test_normalisations_are_no_matrices(model: nn.Module) -> None:
    params = params_of(model, X)
    assert [x.reason for x in resolve_axes(params)] == ["vector"] * len(jax.tree.leaves(params))


def test_biases_and_normalisations_of_two_axes_are_no_matrices() -> None:
    """Biases of DenseGeneral, elementwise affine maps and the vectors of a stack are vectors all the same."""
    params = params_of(nn.DenseGeneral((3, 4)), X) | {"LayerNorm_0": params_of(nn.LayerNorm(feature_axes=(-2, -1)), X)}
    params |= tree({"affine/weight": (6, 12), "affine/bias": (6, 12)})
    assert list(groups(params)) == ["kernel"]
    stack = by_path(tree({"w": (5, 4, 3), "b": (5, 3), "gain": (5, 4), "temperature": (5, 1)}))
    assert stack["w"].axes == MatrixAxes(1, 2, 0)
    assert {path: x.reason for path, x in stack.items() if path != "w"} == dict.fromkeys(
        ["b", "gain", "temperature"], "stacked vector"
    )


def test_a_square_weight_has_its_outputs_first_and_an_embedding_its_tokens() -> None:
    """As PyTorch and Equinox store both; a stack changes nothing."""
    params = tree({"lin/weight": (6, 6), "lm_head/weight": (6, 6), "embed/weight": (6, 6), "kernel": (6, 6)})
    params |= {"layers": tree({"mix/weight": (3, 6, 6), "mix/bias": (3, 6)})}
    assert {path: x.axes for path, x in by_path(params).items() if x.axes} == {
        "lin/weight": MatrixAxes(1, 0),
        "lm_head/weight": MatrixAxes(1, 0),
        "embed/weight": MatrixAxes(0, 1),
        "kernel": MatrixAxes(0, 1),
        "layers/mix/weight": MatrixAxes(2, 1, 0),
    }


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 12, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(12, 12, rngs=rngs), nnx.Linear(12, 7, use_bias=False, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
        self.conv = nnx.Conv(12, 5, (3,), use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.lora = nnx.LoRALinear(12, 7, lora_rank=2, rngs=rngs)
        self.value = nnx.Param(jnp.zeros((12, 3)))
        self.experts = nnx.vmap(lambda key: nnx.Linear(12, 7, rngs=nnx.Rngs(key)))(jax.random.split(rngs(), 4))
        self.lm_head = nnx.Linear(12, 11, rngs=rngs)


NNX = {
    "embed/embedding": "11 | 12",
    "blocks/0/kernel": "12 | 12",
    "blocks/1/kernel": "12 | 7",
    **{f"attention/{name}/kernel": text for name, text in ATTENTION.items()},
    "conv/kernel": "3 12 | 5",
    "lora/kernel": "12 | 7",
    "lora/lora/lora_a": "12 | 2",
    "lora/lora/lora_b": "2 | 7",
    "value": "12 | 3",
    "experts/kernel": "4 | 12 | 7",
    "lm_head/kernel": "12 | 11",
}


@pytest.mark.parametrize("form", [lambda state: state, nnx.to_pure_dict], ids=["State", "dict"])
def test_nnx_modules(form: Callable[[nnx.State], Any]) -> None:
    """A Param's box adds nothing to a path, an attribute called value does, and a list's index is a name."""
    params = form(nnx_params(Model))
    assert groups(params) == NNX
    read = by_path(params)
    assert {path for path, x in read.items() if x.kind == "embedding"} == {"embed/embedding"}
    assert {path for path, x in read.items() if x.kind == "head"} == {"lm_head/kernel"}


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning], ids=lambda f: f.__name__)
def test_boxed_parameters_keep_their_names(box: Callable[..., Any]) -> None:
    model = nn.Dense(7, kernel_init=box(nn.initializers.normal(), ("in", "out")), name="head")
    params = {"head": params_of(model, leaf(2, 5))}
    assert jax.tree_util.tree_leaves_with_path(params)[1][0][-1] == jax.tree_util.GetAttrKey("value")
    assert groups(params) == {"head/kernel": "5 | 7"}
    labels = label_params(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert jax.tree.leaves(labels) == ["other", "head"]


KINDS = {
    "embedding": "wte wpe tok_emb pos_embedding Embed_0/embedding node_net/embedding embedder/input_table wte/weight "
    "embed_tokens/weight model.embed_tokens.weight word_embeddings/weight token_embedder/embedding embed/embeddings",
    "head": "head/kernel lm_head/kernel decoder/logits/kernel logits logits_dense/kernel output_projection/kernel "
    "unembed/kernel lm_head/weight model.lm_head.weight output/kernel output.weight",
    "matrix": "w weight lora_a member/kernel subhead/kernel head/Dense_0/kernel patch_embed/kernel "
    "text_embedder/up/kernel time_embed/Dense_0/kernel time_embed/weight PerceiverEmbedding_0/mlp/kernel "
    "node_embedding_net/w embed/kernel attention/output/kernel output/dense/kernel "
    "normalizing_flow/weight normalizing_flow/layer_0/weight prenorm_attention/w_q logits_scale_net/kernel gate/kernel",
    "other": "attention/bias norm/gamma ln_1/w scale router/kernel",
}


@pytest.mark.parametrize(("path", "kind"), [(path, kind) for kind, paths in KINDS.items() for path in paths.split()])
def test_kinds_by_name(path: str, kind: str) -> None:
    """A whole name says what a leaf is, and a part of one nothing."""
    (read,) = resolve_axes(tree({path: (5, 7)}))
    assert read.kind == kind
    outputs_first = kind != "embedding" and path.endswith("weight")
    axes = MatrixAxes(1, 0) if outputs_first else MatrixAxes()
    assert read.axes == (None if kind == "other" and "router" not in path else axes)


def test_a_layer_called_as_a_table_is_known_by_its_bias() -> None:
    read = by_path(tree({"embedding/weight": (7, 5), "embedding/bias": (7,), "embed/kernel": (5, 7)}))
    assert [x.kind for x in read.values()] == ["matrix", "other", "matrix"]


def test_a_matrix_in_a_normalisation_is_ambiguous() -> None:
    """By its module's name it is a vector of two axes, by its shape a matrix: a stack around it or a bias tells."""
    (read,) = resolve_axes(tree({"spectral_norm/weight": (5, 7)}))
    assert (read.axes, read.is_ambiguous) == (None, True)
    elementwise = by_path(tree({"norm/weight": (6, 12), "norm/bias": (6, 12)}))
    assert {x.reason for x in elementwise.values()} == {"bias or normalisation"}
    stack = by_path(tree({"layers/norm/weight": (2, 6), "layers/mix/weight": (2, 7, 6)}))
    assert stack["layers/norm/weight"].reason == "stacked vector"


def test_an_embedding_of_three_axes_is_an_embedding_without_axes() -> None:
    (read,) = resolve_axes(tree({"pos_embedding": (1, 6, 12)}))
    assert (read.kind, read.axes) == ("embedding", None)
    assert "ambiguous 3-D" in read.reason


def test_gpt_with_a_tied_head() -> None:
    read = by_path(params_of(GPT(), leaf(2, 6, dtype=jnp.int32)))
    assert {path for path, x in read.items() if x.kind == "embedding"} == {"wte/embedding", "wpe"}
    assert sum(x.kind == "matrix" for x in read.values()) == 2 * 6
    assert {x.reason for x in read.values() if x.kind == "other"} == {"vector"}
    assert read["Block_1/attention/query/kernel"].reason == "attention query: (in, heads x features)"
    assert read["Block_1/attention/out/kernel"].reason == "attention out: (heads x features, out)"
    assert read["Block_1/Dense_0/kernel"].reason == "Dense kernel"


NO_MATRIX = {
    "scalar": (leaf(), "scalar"),
    "vector": (leaf(5), "vector"),
    "empty": (leaf(5, 0), "empty"),
    "complex": (leaf(5, 7, dtype=jnp.complex64), "complex64, not real floating point"),
    "integers": (leaf(5, 7, dtype=jnp.int8), "int8, not real floating point"),
    "a Python number": (0.5, "scalar"),
}


@pytest.mark.parametrize(("value", "reason"), NO_MATRIX.values(), ids=NO_MATRIX.keys())
@pytest.mark.parametrize("name", ["kernel", "wte", "logits"])
def test_leaves_that_cannot_be_matrices(name: str, value: Any, reason: str) -> None:
    (read,) = resolve_axes({name: value})
    assert (read.axes, read.kind, read.reason) == (None, "other", reason)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)], ids=str)
def test_size_one_axes_are_axes(shape: tuple[int, ...]) -> None:
    assert by_path(tree({"kernel": shape}))["kernel"].axes == MatrixAxes()


def test_arrays_read_as_their_shapes() -> None:
    shapes = params_of(Block(), X)
    arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    assert resolve_axes(arrays) == resolve_axes(shapes)
    assert resolve_axes(jax.tree.map(jnp.asarray, arrays)) == resolve_axes(shapes)


def test_one_entry_a_leaf_in_the_order_of_the_leaves() -> None:
    params = {"b": leaf(3, 4), "hidden": optax.MaskedNode(), "a": [leaf(2), None, leaf(4, 5, dtype=jnp.bfloat16)]}
    read = resolve_axes(params)
    assert [x.path for x in read] == ["a/0", "a/2", "b"]
    assert [(x.shape, x.dtype) for x in read] == [(x.shape, x.dtype) for x in jax.tree.leaves(params)]
    assert resolve_axes({}) == []
    assert resolve_axes(leaf(3, 4))[0].axes == MatrixAxes()


def test_label_params_is_made_for_partition() -> None:
    params = jax.tree.map(lambda x: jnp.ones(x.shape), params_of(GPT(), leaf(2, 6, dtype=jnp.int32)))
    scales = {"matrix": 2.0, "embedding": 3.0, "head": 5.0, "other": 7.0}
    tx = optax.partition({kind: optax.scale(c) for kind, c in scales.items()}, label_params)
    updates, _ = tx.update(params, tx.init(params), params)
    for x, update in zip(resolve_axes(params), jax.tree.leaves(updates), strict=True):
        np.testing.assert_array_equal(update, scales[x.kind])
