"""What is made of the statistics of experts: K-FAC's steps, pruning; and what experts cannot have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import RaggedDotDimensionNumbers

import fisher_optax as fo
from tests.capture.capture_models import TIGHT, assert_near, unseen
from tests.capture.expert_models import PARAMS, ROWS, SIZES, E, H, M, N, X, drawn, experts, loss, routed

pytestmark = pytest.mark.usefixtures("x64")


def test_axes_and_steps_of_kfac_are_those_of_each_expert() -> None:
    """Of a mixture of experts, and of its experts as layers of their own."""
    shapes = {"router": (M, E), "up": (E, M, H), "down": (E, H, N)}
    params = {name: jnp.asarray(drawn(*shape)) for name, shape in shapes.items()}
    tokens = jnp.asarray(drawn(30, M))
    plain = lambda p, x: routed(p, x, unseen)  # noqa: E731
    axes = fo.infer_axes(plain, params, tokens)
    assert axes == {"router": None, "up": fo.MatrixAxes(1, 2, 0), "down": fo.MatrixAxes(1, 2, 0)}
    _, grads, stats = jax.jit(fo.value_and_grad(plain))(params, tokens)
    together = fo.kfac(1.0, axes=axes)
    updates = jax.jit(together.update)(grads, together.init(params), params, statistics=stats)[0]
    names = [(key, e) for key in PARAMS for e in range(E)]
    apart, gradients = ({f"{key}{e}": tree[key][e] for key, e in names} for tree in (params, grads))
    sides = {
        f"{key}{e}": fo.statistics.LayerFactors(stats[key].left[e], stats[key].right[e], None, stats[key].weight[e])
        for key, e in names
    }
    alone = fo.kfac(1.0, axes={"w": fo.MatrixAxes(0, 1)})
    update = jax.jit(alone.update)
    for key, e in names:
        w, g, s = (tree[f"{key}{e}"] for tree in (apart, gradients, sides))
        wanted = update({"w": g}, alone.init({"w": w}), {"w": w}, statistics={"w": s})[0]["w"]
        np.testing.assert_allclose(updates[key][e], wanted, rtol=1e-9, atol=1e-12)


def test_the_fishers_blocks_are_those_of_each_expert() -> None:
    """K-FAC's approximation of the true Fisher, as an operator."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    program = lambda p, x: loss(experts, p, x, jnp.asarray(SIZES), unseen)  # noqa: E731
    stats = fo.value_and_grad(program, fisher="true")(params, jnp.asarray(X))[2]
    v = {key: jnp.asarray(drawn(*W.shape, 2)[..., 0]) for key, W in PARAMS.items()}
    found = fo.fisher.approximate("kfac", program, params, jnp.asarray(X)).matvec(v)
    for key, s in stats.items():
        assert_near(found[key], s.left @ v[key] @ s.right)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_are_pruned_as_on_their_tokens(method: str) -> None:
    """Second moments expert by expert, of one batch or two; then each matrix as the method alone prunes it."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    batches = [(X, SIZES), (2 * X[:6], np.array([1, 0, 2, 3]))]
    apply_fn = lambda p, batch: jnp.argmax(experts(jnp.asarray(batch[0]), p["up"], batch[1]), -1)  # noqa: E731
    rows: list[list[Any]] = [[] for _ in range(E)]
    for x, sizes in batches:
        for e, end in enumerate(np.cumsum(sizes)):
            rows[e].append(x[end - sizes[e] : end])
    with pytest.warns(UserWarning, match=r"'up': no input has reached \[1\]"):
        pruned, masks, report = fo.compression.prune(
            apply_fn, {"up": params["up"]}, batches, method, 1 / 3, progress=False
        )
    for e in range(E):
        a = np.concatenate(rows[e])
        moment = a.T @ a / len(a) if len(a) else np.eye(M)
        wanted = getattr(fo.compression, method)(params["up"][e], jnp.asarray(moment), 1 / 3)
        np.testing.assert_allclose(pruned["up"][e], wanted.weights, rtol=TIGHT, atol=TIGHT)
        assert (masks["up"][e] == wanted.mask).all()
    assert report.layers[0].removed == E * H  # one of three inputs of each output


NOT_TAKEN: dict[str, Any] = {
    "as rows": lambda W, x: jax.lax.ragged_dot(W, jnp.ones((2, 3, 2)), jnp.array([2, 3])),
    "of groups of inputs": lambda W, x: jax.lax.ragged_dot_general(
        x[:, :5].T, W, jnp.array([2, 3]), RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    ),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_other_ragged_products_name_what_is_taken(name: str) -> None:
    W, x = jnp.asarray(drawn(5, 3)), jnp.asarray(drawn(5, 6))
    program = lambda p, x: jnp.sum(NOT_TAKEN[name](p["w"], x)) + jnp.sum(x @ p["v"])  # noqa: E731
    params = {"w": W, "v": jnp.ones((6, 2))}
    with pytest.raises(
        ValueError, match=r"'w' \(ragged_dot_general\): of ragged products, jax.lax.ragged_dot\(rows.*no group_offset"
    ):
        fo.value_and_grad(program, strict=True)(params, x)
    assert fo.infer_axes(program, params, x)["w"] is None


class MeanInputs(fo.StatisticsKind):
    """Written without a thought of experts."""

    def collect(self, plan: Any, site: Any, tapped: Any) -> Any:
        return {"sum": tapped.x.reshape(-1, site.m).sum(0)}

    def finish(self, plan: Any, slots: Any, normalizer: Any) -> Any:
        return slots[0]["sum"]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (fo.LayerSamples(), "samples do not stack; use fo.KroneckerFactors"),
        (fo.KroneckerFactors(mode="reduce"), "use mode='expand'"),
        (fo.KroneckerFactors(max_dim=4), "raise max_dim"),
        (MeanInputs(), "this kind does not tell apart"),
    ],
)
def test_what_experts_cannot_have_names_the_cure(kind: Any, why: str) -> None:
    params = {**jax.tree.map(jnp.asarray, PARAMS), "dense": jnp.eye(M)}
    program = lambda p: loss(experts, p, jnp.asarray(X) @ p["dense"], SIZES, unseen)  # noqa: E731
    (row,) = (row for row in fo.report(program, params, statistics=kind).rows if row.path == "up")
    assert why in row.reason


def test_a_mask_of_positions_does_not_reach_experts() -> None:
    params = jax.tree.map(jnp.asarray, PARAMS)
    program = lambda p, x: loss(experts, p, x, SIZES, unseen)  # noqa: E731
    with pytest.warns(UserWarning, match="mask= does not reach 'down', 'up'.*in no entry of group_sizes"):
        stats = fo.value_and_grad(program, mask=lambda x: jnp.arange(ROWS) < 4)(params, jnp.asarray(X))[2]
    assert stats["up"].weight.tolist() == SIZES.tolist()
