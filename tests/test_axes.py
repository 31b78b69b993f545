"""Axes are read off real Flax modules, never guessed, and what is not read is named with a reason."""

import doctest
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fisher_optax.axes
from fisher_optax.axes import LeafAxes, MatrixAxes, label_params, resolve_axes

Tree = dict[str, Any]


def leaf(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def tree(shapes: dict[str, tuple[int, ...]]) -> Tree:
    """{"a/b": (2, 3)} as nested dictionaries of leaves."""
    out: Tree = {}
    for path, shape in shapes.items():
        *modules, name = path.split("/")
        node = out
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = leaf(*shape)
    return out


def params_of(model: nn.Module, *inputs: Any) -> Tree:
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def nnx_params(make: Callable[[nnx.Rngs], Any]) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)


def by_path(params: Any, axes: Any = None) -> dict[str, LeafAxes]:
    return {x.path: x for x in resolve_axes(params, axes)}


def groups(params: Any) -> dict[str, str]:
    """Path -> the sizes of "inputs | outputs" or "batch | inputs | outputs", for the leaves that have axes."""

    def show(shape: tuple[int, ...], axes: MatrixAxes) -> str:
        return " | ".join(" ".join(str(shape[i]) for i in g) for g in (axes.batch, axes.inputs, axes.outputs) if g)

    return {x.path: show(x.shape, x.axes) for x in resolve_axes(params) if x.axes is not None}


class MLP(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(7, use_bias=self.bias)(x)
        return nn.Dense(3, use_bias=self.bias)(nn.relu(x))


class ResNetBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Conv(8, (3, 3), use_bias=False)(x)
        y = nn.Conv(16, (3, 3), use_bias=False)(nn.relu(nn.BatchNorm(use_running_average=True)(y)))
        return nn.BatchNorm(use_running_average=True)(y) + nn.Conv(16, (1, 1), use_bias=False, name="proj")(x)


class Block(nn.Module):
    """A transformer block: width 12, 3 heads of 4, 20 hidden."""

    bias: bool = True
    norm: type[nn.Module] | None = nn.LayerNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = self.norm or (lambda: lambda x: x)
        x = x + nn.MultiHeadDotProductAttention(3, use_bias=self.bias, name="attention")(norm()(x))
        hidden = nn.Dense(20, use_bias=self.bias)(norm()(x))
        return x + nn.Dense(12, use_bias=self.bias)(nn.gelu(hidden))


class Step(nn.Module):
    """A module as the body of `nn.scan`."""

    make: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return self.make()(x), None  # type: ignore


def scanned(make: Callable[[], nn.Module], length: int) -> nn.Module:
    return nn.scan(nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=length)(make)


class Twice(nn.Module):
    """A scan of a scan, with a normalisation between the two."""

    make: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return scanned(self.make, 2)(nn.LayerNorm(name="between")(x), None)[0]  # type: ignore


class Experts(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(5, name="router")(nn.LayerNorm()(x))[..., None] * x[..., None, :]
        return nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=-2)(
            self.bias, name="experts"
        )(x)


class GPT(nn.Module):
    """Two blocks, the head tied to the embedding."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        wte = nn.Embed(11, 12, name="wte")
        x = wte(tokens) + self.param("wpe", nn.initializers.normal(), (6, 12))
        for _ in range(2):
            x = Block(bias=False)(x)
        return wte.attend(nn.LayerNorm(name="ln_f")(x))


X = leaf(2, 6, 12)
IMAGE = leaf(1, 8, 8, 5)
ATTENTION = {"query": "12 | 3 4", "key": "12 | 3 4", "value": "12 | 3 4", "out": "3 4 | 12"}
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


# Stacks


BLOCKS = {
    "biases and norms": Block,
    "biases": lambda: Block(norm=None),
    "LayerNorm": lambda: Block(bias=False),
    "RMSNorm": lambda: Block(bias=False, norm=nn.RMSNorm),
}


def without_batch(x: LeafAxes) -> Any:
    """A leaf's path, kind and axes as one layer of the stack has them."""
    if x.axes is None:
        return x.path, x.kind
    depth = len(x.axes.batch)
    assert x.axes.batch == tuple(range(depth))
    return x.path, x.kind, [i - depth for i in x.axes.inputs], [i - depth for i in x.axes.outputs]


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("length", [5, 3, 4, 12, 1])
def test_scanned_blocks_read_as_the_block_alone(make: Callable[[], nn.Module], length: int) -> None:
    """`nn.scan(nn.remat(block))` adds a batch axis and changes nothing else, also of another axis's length."""
    (stacked,) = params_of(scanned(make, length), X, None).values()
    read = resolve_axes(stacked)
    assert [without_batch(x) for x in read] == [without_batch(x) for x in resolve_axes(params_of(make(), X))]
    assert {x.axes.batch for x in read if x.axes} == {(0,)}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())
def test_scans_of_scans_read_as_the_block_alone(make: Callable[[], nn.Module]) -> None:
    params = params_of(scanned(lambda: Twice(make), 3), X, None)["Twice_0"]
    assert {x.kind for x in resolve_axes(params["between"])} == {"other"}
    whole = {"between": params["between"], **next(v for k, v in params.items() if k != "between")}
    read = [x for x in resolve_axes(whole) if x.path.startswith("Block_0")]
    alone = resolve_axes({"Block_0": params_of(make(), X)})
    assert [without_batch(x) for x in read] == [without_batch(x) for x in alone]
    assert {x.axes.batch for x in read if x.axes} == {(0, 1)}


def test_an_ensemble_of_models_is_a_stack_of_all_their_leaves() -> None:
    """A leading axis on the whole tree: embeddings and heads are stacked with the rest."""
    params = params_of(GPT(), leaf(2, 6, dtype=jnp.int32)) | {"lm_head": {"kernel": leaf(12, 11)}}
    ensemble = jax.tree.map(lambda x: leaf(4, *x.shape), params)
    assert [without_batch(x) for x in resolve_axes(ensemble)] == [without_batch(x) for x in resolve_axes(params)]
    assert {x.axes.batch for x in resolve_axes(ensemble) if x.axes} == {(0,)}


def test_a_stack_that_nothing_shows_is_ambiguous() -> None:
    """Without biases and norms (layers, in, out) could be one layer's: no kernel is read, not even query and out."""
    read = resolve_axes(params_of(scanned(lambda: Block(bias=False, norm=None), 5), X, None))
    assert len(read) == 6
    for x in read:
        assert (x.axes, x.kind) == (None, "other")
        assert x.reason.startswith(f"ambiguous {len(x.shape)}-D kernel: pass axes=")


def test_experts_without_biases_are_ambiguous_beside_a_plain_router() -> None:
    params = params_of(Experts(bias=False), X)
    assert groups(params) == {"router/kernel": "12 | 5"}
    assert "ambiguous 3-D kernel: pass axes=" in by_path(params)["experts/Dense_0/kernel"].reason


AMBIGUOUS = {
    "DenseGeneral without a bias": ({"mix/kernel": (5, 3, 4)}, "no bias and no telling name"),
    "3 inputs and (3, 4) outputs, or 3 layers": (
        {"mix/kernel": (3, 3, 4), "mix/bias": (3, 4)},
        "stacked and unstacked",
    ),
    "a bias of another shape": ({"mix/kernel": (5, 3, 4), "mix/bias": (3, 1)}, "does not fit"),
    "stacked Dense called query": ({"query/kernel": (2, 6, 5), "up/kernel": (2, 5, 7)}, "perhaps stacked"),
    "stacked vectors beside stacked matrices": ({"gain": (2, 6), "up/kernel": (2, 6, 7)}, "perhaps stacked"),
    "stacked Conv in 1-D": ({"Conv_0/kernel": (2, 3, 5, 7), "Conv_1/kernel": (2, 3, 7, 5)}, "perhaps stacked"),
    "raw weights of three axes": ({"w": (5, 3, 4)}, "no bias and no telling name"),
    "six axes": ({"conv/kernel": (2, 3, 3, 3, 4, 5)}, "no bias and no telling name"),
}


@pytest.mark.parametrize(("shapes", "doubt"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_two_readings_are_no_reading(shapes: dict[str, tuple[int, ...]], doubt: str) -> None:
    """The leaf goes to the fallback, and its reason says what is in doubt and what to do."""
    first = by_path(tree(shapes))[next(iter(shapes))]
    assert (first.axes, first.kind) == (None, "other")
    assert first.reason.startswith(f"ambiguous {len(first.shape)}-D ")
    assert "pass axes=" in first.reason
    assert doubt in first.reason


def block_truth(sizes: tuple[int, ...], bias: bool, norm: bool, dense: bool, names: str) -> dict[str, Any]:
    """Path -> (shape, number of inputs, 0 for a vector) of a block of any sizes, as Flax would make it."""
    width, heads, size, hidden = sizes
    query, *rest, out = names.split()
    split = ((heads * size,), (heads * size,)) if dense else ((heads, size), (heads, size))
    layers = {f"attention/{name}": ((width,), split[0]) for name in (query, *rest)}
    layers |= {f"attention/{out}": (split[1], (width,)), "up": ((width,), (hidden,)), "down": ((hidden,), (width,))}
    layers |= {"Conv_0": ((3, 3, width), (width,)), "Conv_1": ((3, width), (hidden,))}
    truth: dict[str, Any] = {f"{name}/kernel": (i + o, len(i)) for name, (i, o) in layers.items()}
    truth |= {f"{name}/bias": (o, 0) for name, (_, o) in layers.items() if bias}
    return truth | ({"LayerNorm_0/scale": ((width,), 0)} if norm else {})


@pytest.mark.parametrize("names", ["query key value out", "q k v proj"])
@pytest.mark.parametrize(("bias", "norm"), list(itertools.product([True, False], repeat=2)), ids=str)
def test_small_sizes_that_collide_are_never_misread(bias: bool, norm: bool, names: str) -> None:
    """Alone, stacked, stacked inside a model and stacked twice, all sizes from {1, 3, 4}: each axis right or none."""
    told = 0
    for *sizes, length, dense in itertools.product((1, 3, 4), (1, 3), (1, 4), (3, 4), (1, 3, 4), (True, False)):
        truth = block_truth(tuple(sizes), bias, norm, dense, names)
        outside = {"wte/embedding": (11, sizes[0]), "ln_f/scale": (sizes[0],), "lm_head/kernel": (sizes[0], 11)}
        for stack, around in [((), {}), ((length,), {}), ((length,), outside), ((2, length), {})]:
            params = tree({f"h/{path}": stack + shape for path, (shape, _) in truth.items()} | around)
            for path, x in by_path(params).items():
                if x.axes is None or path in around:
                    continue
                depth, inputs = len(stack), truth[path.removeprefix("h/")][1]
                every = tuple(range(len(x.shape)))
                assert inputs, x
                want = MatrixAxes(every[depth : depth + inputs], every[depth + inputs :], every[:depth])
                assert x.axes == want, (x, sizes, length)
                told += 1
    assert told > 500


# nnx and boxes


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


def test_nnx_stack_of_blocks_reads_as_the_block_alone() -> None:
    class NnxBlock(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.RMSNorm(12, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(3, 12, decode=False, use_bias=False, rngs=rngs)
            self.up = nnx.Linear(12, 20, use_bias=False, rngs=rngs)

    stack = nnx_params(lambda rngs: nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)))(jax.random.split(rngs(), 3)))
    read = resolve_axes(stack)
    assert [without_batch(x) for x in read] == [without_batch(x) for x in resolve_axes(nnx_params(NnxBlock))]
    assert {x.axes.batch for x in read if x.axes} == {(0,)}


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning], ids=lambda f: f.__name__)
def test_boxed_parameters_keep_their_names(box: Callable[..., Any]) -> None:
    model = nn.Dense(7, kernel_init=box(nn.initializers.normal(), ("in", "out")), name="head")
    params = {"head": params_of(model, leaf(2, 5))}
    assert jax.tree_util.tree_leaves_with_path(params)[1][0][-1] == jax.tree_util.GetAttrKey("value")
    assert groups(params) == {"head/kernel": "5 | 7"}
    labels = label_params(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert jax.tree.leaves(labels) == ["other", "head"]


# Kinds


KINDS = {
    "embedding": "wte wpe tok_emb pos_embedding Embed_0/embedding patch_embed/kernel embedder/input_table",
    "head": "head/kernel lm_head/kernel decoder/logits/kernel logits",
    "matrix": "w weight lora_a member/kernel subhead/kernel head/Dense_0/kernel",
    "other": "attention/bias norm/gamma ln_1/w scale",
}


@pytest.mark.parametrize(("path", "kind"), [(path, kind) for kind, paths in KINDS.items() for path in paths.split()])
def test_kinds_by_name(path: str, kind: str) -> None:
    (read,) = resolve_axes(tree({path: (5, 7)}))
    assert read.kind == kind
    assert read.axes == (None if kind == "other" else MatrixAxes())


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


# The user's axes


FUSED = {"qkv": {"kernel": leaf(12, 3, 3, 4)}, "lm_head": {"kernel": leaf(12, 11)}, "gain": leaf(12)}
FUSED_AXES = {"qkv": {"kernel": MatrixAxes(0, (-2, -1), 1)}, "lm_head": {"kernel": MatrixAxes()}, "gain": None}


@pytest.mark.parametrize("axes", [FUSED_AXES, lambda params: FUSED_AXES], ids=["tree", "function"])
def test_the_users_word_overrides_the_rules(axes: Any) -> None:
    """Also for a head, and a leaf of None goes to the fallback."""
    assert by_path(FUSED)["qkv/kernel"].axes is None
    read = by_path(FUSED, axes)
    assert read["qkv/kernel"].axes == MatrixAxes((0,), (2, 3), (1,))
    assert [x.kind for x in read.values()] == ["other", "matrix", "matrix"]
    assert label_params(FUSED, axes) == {"qkv": {"kernel": "matrix"}, "lm_head": {"kernel": "matrix"}, "gain": "other"}
    without = FUSED_AXES | {"lm_head": {"kernel": None}}
    assert by_path(FUSED, without)["lm_head/kernel"][3:] == (None, "other", "user: fallback")


def test_the_users_axes_keep_their_order() -> None:
    assert by_path({"w": leaf(2, 3, 4)}, {"w": MatrixAxes((-1, 0), 1)})["w"].axes == MatrixAxes((2, 0), (1,))


def test_the_users_axes_do_not_make_matrices_of_what_cannot_be() -> None:
    read = by_path({"w": leaf(2, 0), "z": leaf(2, 3, dtype=jnp.complex64)}, {"w": MatrixAxes(), "z": MatrixAxes()})
    assert [(x.axes, x.kind) for x in read.values()] == [(None, "other")] * 2


def test_the_users_axes_are_matched_by_path_under_a_mask() -> None:
    """`optax.masked` and `optax.partition` hide leaves: the axes of the whole tree still fit what is left."""
    seen = []

    def init(params: Any) -> optax.EmptyState:
        seen.append(by_path(params, FUSED_AXES))
        return optax.EmptyState()

    spy = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    optax.partition({"matrix": spy, "other": spy}, label_params(FUSED, FUSED_AXES)).init(FUSED)
    assert [list(read) for read in seen] == [["lm_head/kernel", "qkv/kernel"], ["gain"]]
    assert seen[0]["qkv/kernel"].axes == MatrixAxes((0,), (2, 3), (1,))
    assert resolve_axes(jax.tree.map(lambda _: optax.MaskedNode(), FUSED), FUSED_AXES) == []


def test_the_users_axes_fit_nnx_states() -> None:
    """A map over the state and a plain dictionary of the same paths say the same."""
    state = nnx_params(lambda rngs: nnx.Linear(5, 7, use_bias=False, rngs=rngs))
    for axes in (jax.tree.map(lambda _: MatrixAxes(1, 0), state), {"kernel": MatrixAxes(1, 0)}):
        assert by_path(state, axes)["kernel"].axes == MatrixAxes((1,), (0,))


def test_resolved_axes_are_axes_to_pass() -> None:
    """What the rules find, given back by path, is found again with a mask in place."""
    params = params_of(Experts(), X)
    axes = jax.tree.structure(params).unflatten([x.axes for x in resolve_axes(params)])
    assert [x.axes for x in resolve_axes(params, axes)] == [x.axes for x in resolve_axes(params)]
    del params["experts"]["Dense_0"]["bias"], params["LayerNorm_0"]
    assert by_path(params, axes)["experts/Dense_0/kernel"].axes == MatrixAxes(1, 2, 0)


# Errors


@pytest.mark.parametrize(
    ("axes", "error", "match"),
    [
        ({"a": {"kernel": None}}, ValueError, r"no entry for 'b' \(1 of 2 .* it has 'a/kernel'\).*MatrixAxes, or None"),
        ({"a": {"kernle": None}, "b": None}, ValueError, r"no entry for 'a/kernel' .* it has 'a/kernle', 'b'"),
        ({}, ValueError, r"no entry for 'a/kernel' \(2 of 2 .* it has no entries"),
        (MatrixAxes(), ValueError, r"no entry for 'a/kernel' \(2 of 2"),
        ({"a": {"kernel": (0, 1)}, "b": None}, TypeError, r"axes= at 'a/kernel/0' is 0; wanted fo.MatrixAxes or None"),
        ({"a": {"kernel": MatrixAxes(0, 2)}, "b": None}, ValueError, r"'a/kernel': .*outputs=\(2,\).* shape \(5, 7\)"),
        ({"a": {"kernel": MatrixAxes(0, 1, 2)}, "b": None}, ValueError, "must name each of its 2 axes exactly once"),
        ({"a": {"kernel": MatrixAxes(0, -2)}, "b": None}, ValueError, "must name each of its 2 axes exactly once"),
        ({"a": {"kernel": MatrixAxes(-3, 1)}, "b": None}, ValueError, "must name each of its 2 axes exactly once"),
        ({"a": {"kernel": MatrixAxes()}, "b": MatrixAxes()}, ValueError, r"axes of 'b': .* shape \(3,\).* 1 axes"),
    ],
    ids=str,
)
def test_axes_that_do_not_fit_the_tree(axes: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        resolve_axes({"a": {"kernel": leaf(5, 7)}, "b": leaf(3)}, axes)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(inputs=()), ValueError, "no inputs or no outputs"),
        (dict(outputs=[]), ValueError, "no inputs or no outputs"),
        (dict(inputs=(0, 0)), ValueError, "names an axis twice"),
        (dict(inputs=1), ValueError, "names an axis twice"),
        (dict(batch=-1, outputs=-1), ValueError, "names an axis twice"),
        (dict(inputs=0.5), TypeError, r"MatrixAxes\(inputs=0.5\): wanted an integer"),
        (dict(outputs="1"), TypeError, r"MatrixAxes\(outputs='1'\): wanted an integer"),
        (dict(batch=None), TypeError, r"MatrixAxes\(batch=None\): wanted an integer"),
    ],
    ids=str,
)
def test_matrix_axes_are_checked_when_made(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MatrixAxes(**arguments)


def test_matrix_axes_are_a_leaf_and_a_value() -> None:
    """Integers, lists and NumPy integers become tuples, equal axes are equal keys, a tree holds them whole."""
    axes = MatrixAxes([0, np.int64(1)], 2, batch=range(3, 5))
    assert axes == MatrixAxes((0, 1), (2,), (3, 4))
    assert hash(axes) == hash(MatrixAxes((0, 1), (2,), (3, 4)))
    assert jax.tree.leaves({"w": axes}) == [axes]
    assert axes.resolve("w", (2, 3, 4, 5, 6)) == axes


def test_docstring_examples() -> None:
    assert doctest.testmod(fisher_optax.axes) == doctest.TestResults(failed=0, attempted=5)
