"""Stacks of experts as Hugging Face's models store them, gate and up in one: by the rules, and by the program."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fisher_optax as fo
from fisher_optax.matrices.axes import MatrixAxes
from fisher_optax.matrices.rules import resolve_axes
from tests.matrices.axes_models import by_path, leaf

D, F, E = 12, 20, 5  # width, hidden, experts
INTO, OUT_OF = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
# Experts as Hugging Face's models have them beside a router (experts, width): shapes, and whether outputs come first.
FUSED: dict[str, tuple[dict[str, tuple[int, ...]], bool | None]] = {
    "outputs first": ({INTO: (E, 2 * F, D), OUT_OF: (E, D, F)}, True),
    "inputs first": ({INTO: (E, D, 2 * F), OUT_OF: (E, F, D)}, False),
    "inputs first, biases": (
        {INTO: (E, D, 2 * F), f"{INTO}_bias": (E, 2 * F), OUT_OF: (E, F, D), f"{OUT_OF}_bias": (E, D)},
        False,
    ),
    "hidden as wide as the model": ({INTO: (E, 2 * D, D), OUT_OF: (E, D, D)}, True),
    "square": ({INTO: (E, D, D), OUT_OF: (E, D, D // 2)}, True),
    "as many experts as wide": ({INTO: (D, 2 * F, D), OUT_OF: (D, D, F)}, True),
    "nothing tells": ({INTO.replace("gate_up", "up"): (E, D, D), OUT_OF: (E, D, D)}, None),
}


@pytest.mark.parametrize("gate", ["gate.weight", "router.weight", "router.classifier.weight"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_among_weights_are_read_by_the_widths_around_them(name: str, gate: str) -> None:
    shapes, order = FUSED[name]
    gate, experts = f"model.layers.0.mlp.{gate}", next(iter(shapes.values()))[0]
    params = {path: leaf(*shape) for path, shape in shapes.items()}
    params |= {gate: leaf(experts, D), "model.layers.0.self_attn.q_proj.weight": leaf(D, D)}
    read = by_path(params)
    assert (read[gate].kind, read[gate].reason.split(":")[0]) == ("other", "router")
    wanted = None if order is None else MatrixAxes(2, 1, 0) if order else MatrixAxes(1, 2, 0)
    for path in shapes:
        if not path.endswith("bias"):
            assert read[path].axes == wanted, path
            assert read[path].is_ambiguous == (order is None)
    if order is not False:
        told = {x.path: x.axes for x in resolve_axes(params, "out_in")}
        assert all(told[path] == MatrixAxes(2, 1, 0) for path in shapes)


def test_the_program_reads_fused_experts_as_out_in_does() -> None:
    """Rows sorted by expert, each weight transposed on its way, gate and up cut apart afterwards; K-FAC's factors."""
    prefix, (up, down) = "model.layers.0.mlp.", (INTO, OUT_OF)
    params = {f"{prefix}gate.weight": leaf(E, D), up: leaf(E, 2 * F, D), down: leaf(E, D, F)}

    def loss(p: Any, x: Any) -> Any:
        gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p[f"{prefix}gate.weight"].T), 2)
        order, sizes = jnp.argsort(chosen.reshape(-1)), jnp.bincount(chosen.reshape(-1), length=E)
        fused = jax.lax.ragged_dot(x[order // 2], p[up].swapaxes(1, 2), sizes)
        h = jax.nn.silu(fused[:, :F]) * fused[:, F:]
        y = jax.lax.ragged_dot(h, p[down].mT, sizes) * gates.reshape(-1, 1)[order]
        return fo.losses.gaussian(y, 1 + jnp.zeros_like(y))

    x = jax.ShapeDtypeStruct((9, D), jnp.float32)
    axes = fo.infer_axes(loss, params, x, statistics=fo.KroneckerFactors())
    by_rule = {read.path: read.axes for read in resolve_axes(params, "out_in")}
    assert axes == by_rule | {f"{prefix}gate.weight": None}
    assert axes[up] == axes[down] == MatrixAxes(2, 1, 0)
    _, grads, stats = jax.eval_shape(fo.value_and_grad(loss), params, x)
    for given in ("out_in", None, axes):
        tx = fo.kfac(0.1, axes=given)
        jax.eval_shape(lambda p, g, s, tx=tx: tx.update(g, tx.init(p), p, statistics=s), params, grads, stats)
        taken = {row.path for row in fo.report(tx, params).rows if row.method == "kfac"}
        assert taken == {up, down}
