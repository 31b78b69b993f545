"""Stacks are read where something shows them, and a leaf with two readings is none, with a reason."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx

from fisher_optax.matrices.axes import LeafAxes, MatrixAxes
from fisher_optax.matrices.rules import resolve_axes
from tests.matrices.axes_models import (
    GPT,
    Block,
    Experts,
    Twice,
    X,
    by_path,
    groups,
    leaf,
    nnx_params,
    params_of,
    scanned,
    tree,
)

BLOCKS = {
    "biases and norms": Block,
    "biases": lambda: Block(norm=None),
    "LayerNorm": lambda: Block(bias=False),
    "RMSNorm": lambda: Block(bias=False, norm=nn.RMSNorm),
}


def without_stack(x: LeafAxes) -> Any:
    """A leaf's path, kind and axes as one layer of the stack has them."""
    if x.axes is None:
        return x.path, x.kind
    layer = [a for a in range(len(x.shape)) if a not in x.axes.batch]
    return x.path, x.kind, [layer.index(a) for a in x.axes.inputs], [layer.index(a) for a in x.axes.outputs]


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize(("length", "axis"), [(5, 0), (3, 0), (4, 0), (12, 0), (1, 0), (5, 1), (2, 1)])
def test_scanned_blocks_read_as_the_block_alone(make: Callable[[], nn.Module], length: int, axis: int) -> None:
    """`nn.scan(nn.remat(block))` adds a batch axis and changes nothing else, also of another axis's length."""
    (stacked,) = params_of(scanned(make, length, axis), X, None).values()
    read = resolve_axes(stacked)
    assert [without_stack(x) for x in read] == [without_stack(x) for x in resolve_axes(params_of(make(), X))]
    assert {x.axes.batch for x in read if x.axes} == {(axis,)}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())
def test_scans_of_scans_read_as_the_block_alone(make: Callable[[], nn.Module]) -> None:
    params = params_of(scanned(lambda: Twice(make), 3), X, None)["Twice_0"]
    assert {x.kind for x in resolve_axes(params["between"])} == {"other"}
    whole = {"between": params["between"], **next(v for k, v in params.items() if k != "between")}
    read = [x for x in resolve_axes(whole) if x.path.startswith("Block_0")]
    alone = resolve_axes({"Block_0": params_of(make(), X)})
    assert [without_stack(x) for x in read] == [without_stack(x) for x in alone]
    assert {x.axes.batch for x in read if x.axes} == {(0, 1)}


def test_an_ensemble_of_models_is_a_stack_of_all_their_leaves() -> None:
    """A leading axis on the whole tree: embeddings and heads are stacked with the rest."""
    params = params_of(GPT(), leaf(2, 6, dtype=jnp.int32)) | {"lm_head": {"kernel": leaf(12, 11)}}
    ensemble = jax.tree.map(lambda x: leaf(4, *x.shape), params)
    assert [without_stack(x) for x in resolve_axes(ensemble)] == [without_stack(x) for x in resolve_axes(params)]
    assert {x.axes.batch for x in resolve_axes(ensemble) if x.axes} == {(0,)}


def test_a_stack_that_nothing_shows_is_ambiguous() -> None:
    """Without biases and norms (layers, in, out) could be one layer's: no kernel is read, not even query and out."""
    (stack,) = params_of(scanned(lambda: Block(bias=False, norm=None), 5), X, None).values()
    read = resolve_axes(stack)
    assert len(read) == 6
    for x in read:
        assert (x.axes, x.kind) == (None, "other")
        assert x.reason.startswith(f"ambiguous {len(x.shape)}-D kernel: pass axes=")


@pytest.mark.parametrize("name", ["ScanCheckpointStep_0", "layers", "blocks"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_is_shown_by_its_modules_name(name: str, axis: int) -> None:
    """What `nn.scan` and MaxText call one is one, along the axis that all of it shares, without biases and norms."""
    make = lambda: Block(bias=False, norm=None)  # noqa: E731
    (stack,) = params_of(scanned(make, 5, axis), X, None).values()
    read = [x for x in resolve_axes({name: stack, "head": leaf(12, 11)}) if x.kind != "head"]
    assert [x.axes.batch for x in read if x.axes] == [(axis,)] * 6
    assert [without_stack(x) for x in read] == [without_stack(x) for x in resolve_axes({name: params_of(make(), X)})]


def test_experts_without_biases_are_known_by_their_modules_name() -> None:
    params = params_of(Experts(bias=False), X)
    assert groups(params) == {
        "router/kernel": "12 | 5",
        "experts/Dense_0/kernel": "5 | 12 | 7",
        "experts/Dense_1/kernel": "5 | 7 | 3",
    }
    assert by_path(params)["router/kernel"].kind == "other"
    params["heads"] = params.pop("experts")
    assert "ambiguous 3-D kernel: pass axes=" in by_path(params)["heads/Dense_0/kernel"].reason


TOLD_BY_NEIGHBOURS = {
    "a normalisation by another name": ({"ln_1/weight": (2, 6), "mix/kernel": (2, 6, 7)}, {"mix/kernel": "2 | 6 | 7"}),
    "a normalisation without scale": (
        {"norm/bias": (2, 6), "mix/kernel": (2, 6, 7), "back/kernel": (2, 7, 6)},
        {"mix/kernel": "2 | 6 | 7", "back/kernel": "2 | 7 | 6"},
    ),
    "layers along the second axis": (
        {"norm/scale": (6, 2), "mix/kernel": (6, 2, 7), "back/kernel": (7, 2, 6)},
        {"mix/kernel": "2 | 6 | 7", "back/kernel": "2 | 7 | 6"},
    ),
    "a bias with its layers along the second axis": (
        {"mix/kernel": (6, 2, 7), "mix/bias": (7, 2)},
        {"mix/kernel": "2 | 6 | 7"},
    ),
    "experts that hold a plain normalisation": (
        {"kernel": (5, 6, 7), "bias": (5, 7), "norm/scale": (6,)},
        {"kernel": "5 | 6 | 7"},
    ),
    "experts beside a plain normalisation of the same size": (
        {"kernel": (5, 6, 7), "bias": (5, 7), "norm/weight": (5,), "mix/kernel": (5, 3, 4)},
        {"kernel": "5 | 6 | 7"},
    ),
    "experts beside a router of the same size": (
        {"kernel": (5, 6, 7), "bias": (5, 7), "router/kernel": (5, 3), "mix/kernel": (5, 3, 4)},
        {"kernel": "5 | 6 | 7", "router/kernel": "5 | 3"},
    ),
    "inputs of attention, alone": (
        {"query/kernel": (12, 3, 4), "key/kernel": (12, 2, 4)},
        {"query/kernel": "12 | 3 4", "key/kernel": "12 | 2 4"},
    ),
    "convolutions, alone": (
        {"Conv_0/kernel": (3, 3, 5, 7), "Conv_1/kernel": (3, 3, 7, 9)},
        {"Conv_0/kernel": "3 3 5 | 7", "Conv_1/kernel": "3 3 7 | 9"},
    ),
    "plain functions": ({"w": (5, 3, 4), "b": (3, 4), "head": (12, 2)}, {"w": "5 | 3 4", "head": "12 | 2"}),
}


@pytest.mark.parametrize(("shapes", "want"), TOLD_BY_NEIGHBOURS.values(), ids=TOLD_BY_NEIGHBOURS.keys())
def test_what_neighbours_tell(shapes: dict[str, tuple[int, ...]], want: dict[str, str]) -> None:
    assert groups(tree(shapes)) == want


AMBIGUOUS = {
    "DenseGeneral without a bias": ({"mix/kernel": (5, 3, 4)}, "no bias and no telling name"),
    "3 inputs and (3, 4) outputs, or 3 layers": (
        {"mix/kernel": (3, 3, 4), "mix/bias": (3, 4)},
        "stacked and unstacked",
    ),
    "a bias of another shape": ({"mix/kernel": (5, 3, 4), "mix/bias": (3, 1)}, "does not fit"),
    "a bias of the kernel's shape": ({"mix/kernel": (5, 3, 4), "mix/bias": (5, 3, 4)}, "does not fit"),
    "a kernel with its outputs first": ({"kernel": (7, 5), "bias": (7,)}, "does not fit"),
    "layers along the first axis or the second": (
        {"mix/kernel": (6, 2, 6), "norm/scale": (6, 2)},
        "along its first axis or its second",
    ),
    "layers along the second axis or the first": (
        {"mix/kernel": (2, 6, 6), "norm/scale": (2, 6)},
        "along its first axis or its second",
    ),
    "vectors stacked along the second axis": (
        {"gain": (6, 2), "up/kernel": (5, 2, 7), "o/kernel": (7, 2, 5)},
        "stacked",
    ),
    "heads of their own length, or layers": (
        {"q/kernel": (6, 3, 3), "q/bias": (3, 3), "k/kernel": (5, 3, 3), "k/bias": (3, 3)},
        "fits",
    ),
    "query of four axes": ({"query/kernel": (2, 6, 3, 4)}, "no bias and no telling name"),
    "out of four axes": ({"out/kernel": (2, 3, 4, 6)}, "no bias and no telling name"),
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


def inserted(shape: tuple[int, ...], length: int, at: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with stacked axes of these lengths: in front of it, or one behind its first."""
    return shape[: at[0]] + (2, length)[-len(at) :] + shape[at[0] :]


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """For a million calls of what other tests call with its types checked, which takes four times as long."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("names", ["query key value out", "q k v proj"])
@pytest.mark.parametrize(
    ("bias", "norm", "module"),
    [*itertools.product([True, False], [True, False], ["h"]), (False, False, "layers")],
    ids=str,
)
def test_small_sizes_that_collide_are_never_misread(bias: bool, norm: bool, module: str, names: str) -> None:
    """Alone, stacked along either axis, inside a model and twice, all sizes from {1, 3, 4}: each axis right or none."""
    told = dict.fromkeys([(), (0,), (0, 1), (1,)], 0)
    for *sizes, length, dense in itertools.product((3, 4), (1, 3), (1, 4), (3,), (1, 3, 4), (True, False)):
        truth = block_truth(tuple(sizes), bias, norm, dense, names)
        outside = {"wte/embedding": (11, sizes[0]), "ln_f/scale": (sizes[0],), "lm_head/kernel": (sizes[0], 11)}
        for stack, around in [((), {}), ((0,), {}), ((0,), outside), ((0, 1), {}), ((1,), {}), ((1,), outside)]:
            stacked = {p: inserted(shape, length, stack) if stack else shape for p, (shape, _) in truth.items()}
            params = tree({f"{module}/{path}": shape for path, shape in stacked.items()} | around)
            for path, x in by_path(params).items():
                if x.axes is None or path in around:
                    continue
                inputs = truth[path.removeprefix(f"{module}/")][1]
                every = [a for a in range(len(x.shape)) if a not in stack]
                assert inputs, x
                assert x.axes == MatrixAxes(every[:inputs], every[inputs:], stack), (x, sizes, length)
                told[stack] += 1
    shown = told if bias or norm else [(), (0,), (1,)] if module == "layers" else [()]
    assert min(told[stack] for stack in shown) > 30, told


def test_nnx_stack_of_blocks_reads_as_the_block_alone() -> None:
    class NnxBlock(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.RMSNorm(12, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(3, 12, decode=False, use_bias=False, rngs=rngs)
            self.up = nnx.Linear(12, 20, use_bias=False, rngs=rngs)

    stack = nnx_params(lambda rngs: nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)))(jax.random.split(rngs(), 3)))
    read = resolve_axes(stack)
    assert [without_stack(x) for x in read] == [without_stack(x) for x in resolve_axes(nnx_params(NnxBlock))]
    assert {x.axes.batch for x in read if x.axes} == {(0,)}
