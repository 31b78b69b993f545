"""Trees as other frameworks and published models store them: outputs first, dotted names, experts, adapters."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.matrices.axes import MatrixAxes
from fisher_optax.matrices.rules import resolve_axes
from tests.matrices.axes_models import Block, Experts, X, by_path, leaf, params_of, scanned, tree

LLAMA = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.self_attn.k_proj.weight": (2, 6),
    "model.layers.0.mlp.gate_proj.weight": (8, 6),
    "model.layers.0.mlp.down_proj.weight": (6, 8),
    "model.norm.weight": (6,),
    "lm_head.weight": (11, 6),
}
# PyTorch's module of this model stores (inputs, outputs), as its biases tell.
GPT2 = {
    "wte.weight": (11, 6),
    "wpe.weight": (4, 6),
    "h.0.attn.c_attn.weight": (6, 18),
    "h.0.attn.c_attn.bias": (18,),
    "h.0.attn.c_proj.weight": (6, 6),
    "h.0.attn.c_proj.bias": (6,),
    "h.0.ln_1.weight": (6,),
}


def flat(shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    """One dictionary of dotted names, as a safetensors file has it."""
    return {path: leaf(*shape) for path, shape in shapes.items()}


def nested(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return tree({path.replace(".", "/"): shape for path, shape in shapes.items()})


@pytest.mark.parametrize("form", [flat, nested], ids=["flat", "nested"])
def test_a_bias_free_llama_has_its_outputs_first(form: Any) -> None:
    read = {path.replace("/", "."): x for path, x in by_path(form(LLAMA)).items()}
    assert {path for path, x in read.items() if x.kind == "matrix"} == {p for p in LLAMA if "proj" in p}
    assert {x.axes for x in read.values() if x.kind in ("matrix", "head")} == {MatrixAxes(1, 0)}
    assert [path for path, x in read.items() if x.kind == "head"] == ["lm_head.weight"]
    assert read["model.embed_tokens.weight"].kind == "embedding"
    assert read["model.embed_tokens.weight"].axes == MatrixAxes(0, 1)


@pytest.mark.parametrize("form", [flat, nested], ids=["flat", "nested"])
def test_biases_tell_that_a_tree_has_its_inputs_first(form: Any) -> None:
    """Of a square weight the neighbours' biases tell too; of one without a bias, as a head's, nothing does."""
    read = {path.replace("/", "."): x for path, x in by_path(form(GPT2)).items()}
    matrices = {path: x for path, x in read.items() if x.kind == "matrix"}
    assert {path: x.axes for path, x in matrices.items()} == {p: MatrixAxes() for p in GPT2 if "c_" in p and "w" in p}
    biases = {x.bias.replace("/", ".") for x in matrices.values() if x.bias}
    assert biases == {"h.0.attn.c_attn.bias", "h.0.attn.c_proj.bias"}
    assert {path for path, x in read.items() if x.kind == "embedding"} == {"wte.weight", "wpe.weight"}
    other = by_path(form(GPT2 | {"proj.weight": (5, 6)}))
    (doubt,) = [x for x in other.values() if x.is_ambiguous]
    assert "its outputs may come first or last" in doubt.reason


OUTPUTS_FIRST = {
    "a linear layer": ({"weight": (7, 5), "bias": (7,)}, MatrixAxes(1, 0)),
    "without a bias": ({"weight": (7, 5)}, MatrixAxes(1, 0)),
    "a stack": ({"weight": (3, 7, 5), "bias": (3, 7)}, MatrixAxes(2, 1, 0)),
    "a convolution of PyTorch": ({"weight": (7, 5, 3, 3), "bias": (7,)}, MatrixAxes((1, 2, 3), 0)),
    "a convolution of Equinox": ({"weight": (7, 5, 3), "bias": (7, 1)}, MatrixAxes((1, 2), 0)),
    "a stack of these": ({"weight": (2, 7, 5, 3), "bias": (2, 7, 1)}, MatrixAxes((2, 3), 1, 0)),
    "a square window without a bias": ({"weight": (7, 5, 3, 3)}, MatrixAxes((1, 2, 3), 0)),
    "fused projections": ({"in_proj_weight": (18, 6), "in_proj_bias": (18,)}, MatrixAxes(1, 0)),
    "a recurrent cell": ({"weight_ih": (18, 5), "bias": (18,)}, MatrixAxes(1, 0)),
}


@pytest.mark.parametrize(("shapes", "axes"), OUTPUTS_FIRST.values(), ids=OUTPUTS_FIRST.keys())
def test_what_is_called_weight_has_its_outputs_first(shapes: dict[str, tuple[int, ...]], axes: MatrixAxes) -> None:
    read = by_path(tree({f"layer/{name}": shape for name, shape in shapes.items()}))
    name, bias = [*shapes, None][:2]
    assert read[f"layer/{name}"].axes == axes
    joins = bias is not None and shapes[bias][-1] != 1 and name != "weight_ih"
    assert read[f"layer/{name}"].bias == (f"layer/{bias}" if joins else None)


@pytest.mark.parametrize("names", [("kernel", "bias"), ("w", "b"), ("weight", "bias"), ("mixer", "mixer_bias")])
def test_one_word_says_that_all_matrices_have_their_outputs_first(names: tuple[str, str]) -> None:
    """Whatever they are called, and but for tables; a bias that fits inputs first alone is a doubt."""
    kernel, bias = names
    shapes = {f"up/{kernel}": (7, 5), f"up/{bias}": (7,), f"square/{kernel}": (6, 6), f"conv/{kernel}": (7, 5, 3, 3)}
    read = by_path(
        tree(shapes | {"wte/embedding": (11, 5), f"wrong/{kernel}": (5, 7), f"wrong/{bias}": (7,)}), "out_in"
    )
    assert (read[f"up/{kernel}"].axes, read[f"up/{kernel}"].bias) == (MatrixAxes(1, 0), f"up/{bias}")
    assert read[f"square/{kernel}"].axes == MatrixAxes(1, 0)
    assert read[f"conv/{kernel}"].axes == MatrixAxes((1, 2, 3), 0)
    assert read["wte/embedding"].axes == MatrixAxes(0, 1)
    assert read[f"wrong/{kernel}"].is_ambiguous


def test_a_layout_of_another_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"axes= must be None, 'strict', 'out_in', a tree .*; got 'in_out'"):
        resolve_axes({"w": leaf(2, 3)}, "in_out")


@pytest.mark.parametrize("axes", [None, "out_in"])
def test_a_step_on_outputs_first_is_the_step_on_the_transpose(axes: str | None) -> None:
    """Muon's scale by shape and K-FAC's factors tell the two apart."""
    rng = np.random.default_rng(0)
    W, b = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), jnp.zeros(3)
    x = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    flax, torch = {"kernel": W, "bias": b}, {"weight": W.T, "bias": b}
    if axes:
        flax, torch = {"kernel": W, "bias": b}, {"kernel": W.T, "bias": b}
    losses = [
        lambda p: fo.losses.gaussian(x @ p["kernel"] + p["bias"], x[:, :3]),
        lambda p: fo.losses.gaussian(x @ next(v for k, v in p.items() if k != "bias").T + p["bias"], x[:, :3]),
    ]
    for make in (lambda axes: fo.muon(1.0, scale="shape", axes=axes), lambda axes: fo.kfac(1.0, axes=axes)):
        steps = []
        for params, loss, layout in ((flax, losses[0], None), (torch, losses[1], axes)):
            tx = make(layout)
            _, grads, stats = fo.value_and_grad(loss)(params)
            steps.append(tx.update(grads, tx.init(params), params, statistics=stats)[0])
        np.testing.assert_allclose(steps[0].pop("bias"), steps[1].pop("bias"), rtol=1e-4, atol=1e-6)
        (ours,), (theirs,) = steps[0].values(), steps[1].values()
        np.testing.assert_allclose(ours, theirs.T, rtol=1e-4, atol=1e-6)


D, H, F, E, N, K = 12, 4, 20, 5, 3, 2  # width, head, hidden, experts, heads, keys' heads
EINSUMS = {
    "attn/q_einsum/w": ((N, D, H), MatrixAxes(1, (0, 2))),
    "attn/kv_einsum/w": ((2, K, D, H), MatrixAxes(2, (0, 1, 3))),
    "attn/attn_vec_einsum/w": ((N, H, D), MatrixAxes((0, 1), 2)),
    "mlp/gating_einsum": ((2, D, F), MatrixAxes(1, (0, 2))),
    "mlp/linear": ((F, D), MatrixAxes(0, 1)),
    "tunix/q_proj/w": ((D, N, H), MatrixAxes(0, (1, 2))),
    "tunix/k_proj/w": ((D, K, H), MatrixAxes(0, (1, 2))),
    "tunix/o_proj/w": ((N, H, D), MatrixAxes((0, 1), 2)),
    "hidden_first/gating_einsum/w": ((2, F, D), MatrixAxes(2, (0, 1))),
    "hidden_first/linear/w": ((F, D), MatrixAxes(0, 1)),
}


@pytest.mark.parametrize("around", ["layer_0", "layers"])
def test_einsums_of_gemma_are_known_by_name(around: str) -> None:
    """Also where norms show that they are stacked."""
    stack = (7,) if around == "layers" else ()
    shapes = {f"{around}/{path}": stack + shape for path, (shape, _) in EINSUMS.items()}
    read = by_path(tree(shapes | {f"{around}/norm/scale": (*stack, D), "embedder/input_embedding": (11, D)}))
    for path, (_, axes) in EINSUMS.items():
        groups = ([a + len(stack) for a in group] for group in (axes.inputs, axes.outputs))
        assert read[f"{around}/{path}"].axes == MatrixAxes(*groups, batch=range(len(stack))), path
    assert read["embedder/input_embedding"].kind == "embedding"


def test_a_gating_einsum_without_the_layer_after_it_is_ambiguous() -> None:
    assert by_path(tree({"mlp/gating_einsum": (2, D, F)}))["mlp/gating_einsum"].is_ambiguous
    square = by_path(tree({"mlp/gating_einsum": (2, D, D), "mlp/linear": (D, D)}))
    assert square["mlp/gating_einsum"].is_ambiguous


EXPERTS = {
    "by their module's name": ({"experts/wi": (E, D, F), "experts/wo": (E, F, D)}, "router/kernel"),
    "by a router beside them": ({"wi_0": (E, D, F), "wi_1": (E, D, F), "wo": (E, F, D)}, "gate/kernel"),
    "by a router's own leaf": ({"gate_proj": (E, D, F), "down_proj": (E, F, D)}, "router"),
}


@pytest.mark.parametrize("length", [None, 7])
@pytest.mark.parametrize(("shapes", "router"), EXPERTS.values(), ids=EXPERTS.keys())
def test_experts_are_a_batch_and_their_router_goes_to_the_fallback(
    shapes: dict[str, tuple[int, ...]], router: str, length: int | None
) -> None:
    """Also in a stack along the second axis, as MaxText makes it."""
    shapes = {f"moe/{path}": shape for path, shape in shapes.items()} | {f"moe/{router}": (D, E), "norm/scale": (D,)}
    if length:
        shapes = {f"layers/{path}": (*s[:1], length, *s[1:]) for path, s in shapes.items()}
    read = by_path(tree(shapes))
    for path, x in read.items():
        if "norm" in path:
            continue
        if path.endswith(router):
            assert (x.kind, x.axes and x.axes.inputs, x.is_ambiguous) == ("other", (0,), False)
        else:
            assert x.axes == (MatrixAxes(2, 3, (0, 1)) if length else MatrixAxes(1, 2, 0)), path


def test_a_gate_without_experts_is_a_layer() -> None:
    """As in a gated layer, of any sizes."""
    read = by_path(tree({"mlp/gate/kernel": (D, F), "mlp/up/kernel": (D, F), "mlp/down/kernel": (F, D)}))
    assert {x.kind for x in read.values()} == {"matrix"}


ADAPTERS = {
    "q/lora_a": ((D, 2), MatrixAxes(), "LoRA's A"),
    "q/w_lora_b": ((2, D), MatrixAxes(), "LoRA's B"),
    "q/lora_A/weight": ((2, D), MatrixAxes(1, 0), "LoRA's A, outputs first"),
    "q.lora_B.default.weight": ((D, 2), MatrixAxes(1, 0), "LoRA's B, outputs first"),
}


@pytest.mark.parametrize(("path", "row"), ADAPTERS.items(), ids=ADAPTERS.keys())
def test_the_factors_of_an_adapter_are_matrices_of_their_own(path: str, row: tuple[Any, ...]) -> None:
    (x,) = resolve_axes({path: leaf(*row[0])} if "." in path else tree({path: row[0]}))
    assert (x.axes, x.kind, x.reason) == (row[1], "matrix", row[2])


def test_a_bias_stacked_along_another_axis_is_no_row_of_its_kernel() -> None:
    """Of one length with the outputs, it would be taken the wrong way round."""
    params = tree({"mix/kernel": (6, 3, 3), "mix/bias": (3, 3), "norm/scale": (6, 3), "back/kernel": (3, 3, 6)})
    read = by_path(params)
    assert read["mix/kernel"].axes == MatrixAxes(0, 2, 1)
    assert read["mix/kernel"].bias is None


MODELS: dict[str, tuple[Any, ...]] = {
    f"{'biases' if bias else 'none'}, {length} along {axis}": (
        scanned(lambda b=bias: Block(bias=b), length, axis),
        None,
    )
    for bias, length, axis in itertools.product([True, False], [5, 12], [0, 1])
} | {"experts": (Experts(),), "experts without biases": (Experts(bias=False),)}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_the_rules_read_what_the_program_does(model: tuple[Any, ...]) -> None:
    """Axes and biases as `fo.infer_axes` finds them, layers being as many as outputs, too; no axes of a router."""
    module, *more = model
    params = params_of(module, X, *more)

    def loss(p: Any, x: jax.Array) -> jax.Array:
        return sum(jnp.sum(out**2) for out in jax.tree.leaves(module.apply({"params": p}, x, *more)))

    inferred = resolve_axes(params, fo.infer_axes(loss, params, X))
    for ours, theirs in zip(resolve_axes(params), inferred, strict=True):
        if ours.reason.startswith("router"):
            assert (ours.kind, theirs.kind, theirs.axes) == ("other", "other", None)
            continue
        axes = lambda x: x.axes and (x.axes.inputs, x.axes.outputs, x.axes.batch)  # noqa: E731
        assert (axes(ours), ours.bias) == (axes(theirs), theirs.bias), ours.path
