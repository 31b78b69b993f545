"""Fused kernels: every method prunes a part of one as it prunes a leaf that is this part."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.compression.model.layers import find_layers
from tests.comparisons import assert_same_bits

prune = functools.partial(fo.compression.prune, progress=False)
D, LAYERS, SIZES = 6, 2, (6, 3, 3)  # queries, keys and values of two groups
CUTS = np.cumsum(SIZES)[:-1].tolist()
AXES = {
    "qkv": fo.MatrixAxes(1, 2, 0, parts={2: SIZES}),
    "out": fo.MatrixAxes(1, 2, 0, parts={1: SIZES}),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"qkv": normal(0, LAYERS, D, 12), "out": normal(1, LAYERS, 12, D)}
X = normal(2, 30, D)
BATCHES = [X[:20], X[20:]]


def fused(params: Any, x: Any) -> Any:
    def step(x: Any, p: Any) -> Any:
        return x + jnp.tanh(x @ p["qkv"]) @ p["out"], ()

    return jax.lax.scan(step, x, params)[0]


def apart(params: Any) -> dict[str, jax.Array]:
    """Leaves in the order of use: their names are "0/k", ... ."""
    qkv = {
        f"{i}/{k}": w for i in range(LAYERS) for k, w in zip("qkv", jnp.split(params["qkv"][i], CUTS, 1), strict=True)
    }
    out = {f"{i}/o{k}": w for i in range(LAYERS) for k, w in enumerate(jnp.split(params["out"][i], CUTS, 0))}
    return qkv | out


def separate(params: Any, x: Any) -> Any:
    for i in range(LAYERS):
        z = [jnp.tanh(x @ params[f"{i}/{k}"]) for k in "qkv"]
        x = x + sum(z[k] @ params[f"{i}/o{k}"] for k in range(3))
    return x


def loss_of(apply_fn: Any) -> Any:
    return lambda params, x: jnp.mean(jnp.square(apply_fn(params, x[None])))


CASES = {
    "magnitude": dict(method="magnitude"),
    "magnitude, 1:3": dict(method="magnitude", sparsity="1:3"),
    "magnitude over all": dict(method="magnitude", scope="global"),
    "wanda": dict(method="wanda"),
    "wanda over all": dict(method="wanda", scope="global", sequential=False),
    "sparsegpt": dict(method="sparsegpt"),
    "sparsegpt, 1:3": dict(method="sparsegpt", sparsity="1:3", sequential=False),
    "obs": dict(method="obs"),
    "obert": dict(method="obert", block=4),
    "fisher": dict(method="fisher"),
}
# Where weights are ranked by output in groups that parts do not cut, or over all layers, parts are pruned as the whole.
ALIKE = ("magnitude, 1:3", "magnitude over all", "wanda over all")


@pytest.mark.parametrize("name", CASES)
def test_parts_are_pruned_as_leaves_of_their_own(name: str) -> None:
    """Parts of outputs on the whole layer's inputs, parts of inputs on their own, in a stack that a loop runs over."""
    options = {"sparsity": 0.5, **CASES[name]}
    known = [{}, {}]
    if options["method"] == "obert":
        known = [{"loss_fn": loss_of(fused)}, {"loss_fn": loss_of(separate)}]
    if options["method"] == "fisher":
        known = [{"fisher": jax.tree.map(jnp.cosh, x)} for x in (PARAMS, apart(PARAMS))]
    whole = prune(fused, PARAMS, BATCHES, axes=AXES, **options, **known[0])
    each = prune(separate, apart(PARAMS), BATCHES, **options, **known[1])
    assert jax.tree.map(jnp.shape, whole.params) == jax.tree.map(jnp.shape, PARAMS)
    assert_same_bits(apart(whole.masks), each.masks)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), apart(whole.params), each.params)
    rows = zip(whole.report.layers, each.report.layers, strict=True)
    for part, leaf in rows:
        assert (part.shape, part.size, part.removed, part.dead) == (leaf.shape, leaf.size, leaf.removed, leaf.dead)
        np.testing.assert_allclose(part.error, leaf.error, rtol=1e-3)
    if name not in ALIKE:
        undivided = prune(fused, PARAMS, BATCHES, **options, **known[0])
        assert any(np.any(whole.masks[k] != undivided.masks[k]) for k in PARAMS)


def test_parts_have_names_and_shares_of_their_own() -> None:
    names = [
        f"{k}[{i}, {span}]"
        for i in range(LAYERS)
        for k, spans in (("qkv", (":, 0:6", ":, 6:9", ":, 9:12")), ("out", ("0:6, :", "6:9, :", "9:12, :")))
        for span in spans
    ]
    shares = {name: 1 / 3 if name.startswith("qkv") else 2 / 3 for name in names}
    _, _, report = prune(fused, PARAMS, BATCHES, "wanda", shares, axes=AXES, scope="matrix")
    assert [row.name for row in report.layers] == names
    np.testing.assert_allclose([row.sparsity for row in report.layers], list(shares.values()))
    assert "qkv[0, :, 6:9]   6x3" in str(report)
    with pytest.raises(ValueError, match=r"sparsity= lacks 'out\[0, 0:6, :\]'"):
        prune(fused, PARAMS, BATCHES, "wanda", {names[0]: 0.5}, axes=AXES)
    with pytest.raises(ValueError, match=r"'out\[0, 6:9, :\]': 2:6 needs inputs in groups of 6; this kernel has 3"):
        prune(fused, PARAMS, BATCHES, "wanda", "2:6", axes=AXES)


def test_owl_gives_each_part_a_share() -> None:
    whole = fo.compression.owl(fused, PARAMS, BATCHES, 0.5, M=1.5, axes=AXES, progress=False)
    each = fo.compression.owl(separate, apart(PARAMS), BATCHES, 0.5, M=1.5, progress=False)
    np.testing.assert_allclose(list(whole.values()), list(each.values()), rtol=1e-5)
    assert len(set(whole.values())) > 4
    shares = prune(fused, PARAMS, BATCHES, "magnitude", whole, axes=AXES).report.layers
    np.testing.assert_allclose([row.sparsity for row in shares], list(whole.values()), atol=1 / 9)


def test_parts_share_one_pass_over_the_data() -> None:
    class Counted:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter(BATCHES)

    batches = Counted()
    layers = find_layers(fused, PARAMS, X)
    prune(fused, PARAMS, batches, "wanda", axes=AXES)
    assert batches.passes == len(layers) + 1  # and a look at the first
    assert len(layers) == 2 * LAYERS


def test_names_and_shapes_are_enough_to_divide_a_kernel() -> None:
    """Without data, all steps of a stack go together, each part of each by itself."""
    whole = prune(fused, PARAMS, [], "magnitude", axes=AXES)
    each = prune(separate, apart(PARAMS), BATCHES, "magnitude")
    assert_same_bits(apart(whole.masks), each.masks)
    names = [row.name for row in whole.report.layers]
    assert names[:2] == ["out[:, 0:6, :]", "out[:, 6:9, :]"]
    assert [row.matrices for row in whole.report.layers] == [LAYERS] * 6
    assert "2 of 6x6" in str(whole.report)


def test_heads_are_matrices_of_their_own() -> None:
    """Two axes of outputs, of which one is divided."""
    W, heads = normal(3, D, 4, 3), fo.MatrixAxes(0, (1, 2), parts={1: 4})
    model = lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"])  # noqa: E731
    pruned, _, report = prune(model, {"w": W}, BATCHES, "obs", 0.5, axes={"w": heads})
    alone = [prune(lambda p, x: x @ p["w"], {"w": W[:, h]}, BATCHES, "obs", 0.5).params["w"] for h in range(4)]
    np.testing.assert_allclose(pruned["w"], jnp.stack(alone, 1), rtol=1e-4, atol=1e-5)
    assert [row.name for row in report.layers] == [f"w[:, {h}:{h + 1}, :]" for h in range(4)]


def test_gates_of_ragged_experts_are_divided_too() -> None:
    sizes, W = jnp.array([5, 0, 15]), normal(4, 3, D, 8)
    ragged = lambda p, x: jax.lax.ragged_dot(x, p, sizes)  # noqa: E731
    divided = {"w": fo.MatrixAxes(1, 2, 0, parts={2: 2})}
    with pytest.warns(UserWarning, match=r"'w\[:, :, 0:4\]': no input has reached \[1\]"):
        _, masks, report = prune(lambda p, x: ragged(p["w"], x), {"w": W}, [X[:20]], "wanda", axes=divided)
    with pytest.warns(UserWarning, match="no input"):
        each = prune(lambda p, x: ragged(p["gate"], x) * ragged(p["up"], x), _gates(W), [X[:20]], "wanda").masks
    assert_same_bits(masks["w"], jnp.concatenate([each["gate"], each["up"]], 2))
    assert [(row.shape, row.matrices) for row in report.layers] == [((D, 4), 3)] * 2


def _gates(W: jax.Array) -> dict[str, jax.Array]:
    return {"gate": W[..., :4], "up": W[..., 4:]}


def test_axes_read_off_the_program_divide_experts_that_share_their_input() -> None:
    """Which `infer_axes` has as a stack, and the program as outputs; they stay one layer."""
    params = {"up": normal(5, 3, D, 4), "down": normal(6, 3, 4, D)}

    def experts(p: Any, x: Any) -> Any:
        return jnp.einsum("ebf,efd->ebd", jnp.tanh(jnp.einsum("bd,edf->ebf", x, p["up"])), p["down"])

    loss = lambda p, x: jnp.sum(experts(p, x))  # noqa: E731
    axes = fo.infer_axes(loss, params, X)
    assert (axes["up"].batch, fo.report(loss, params, X).rows[1].axes.batch) == ((0,), ())
    _, masks, report = prune(experts, params, BATCHES, "sparsegpt", axes=axes, sequential=False)
    for e in range(3):
        alone = prune(lambda p, x: x @ p, params["up"][e], BATCHES, "sparsegpt")
        assert_same_bits(masks["up"][e], alone.masks)
    first = report.layers[0]
    assert (first.name, first.matrices, first.shape) == ("up", 3, (D, 4))


def test_what_axes_leave_out_is_listed_and_what_does_not_fit_is_said() -> None:
    only = AXES | {"out": None}
    for batches in (BATCHES, []):
        _, masks, report = prune(fused, PARAMS, batches, "magnitude", axes=lambda params: only)
        assert [(x.name, x.reason, x.is_meant) for x in report.left] == [("out", "left out by axes=", True)]
        assert masks["out"] is None
    with pytest.raises(ValueError, match="layers='out' is no layer of this model: 'out' is left out by axes="):
        prune(fused, PARAMS, BATCHES, layers="out", axes=only)
    turned = AXES | {"qkv": fo.MatrixAxes(2, 1, 0)}
    with pytest.raises(ValueError, match=r"axes= has MatrixAxes\(inputs=\(2,\).*'qkv'.*the program.*inputs=\(1,\)"):
        prune(fused, PARAMS, BATCHES, axes=turned)
    with pytest.raises(ValueError, match="axes='out_in' is about names, and with a batch the program shows"):
        prune(fused, PARAMS, BATCHES, axes="out_in")
    with pytest.raises(ValueError, match="axes= has no entry for 'out'"):
        prune(fused, PARAMS, BATCHES, axes={"qkv": AXES["qkv"]})
    with pytest.raises(ValueError, match="divides axis 2, whose length is 12"):
        prune(fused, PARAMS, BATCHES, axes=AXES | {"qkv": fo.MatrixAxes(1, 2, 0, parts={2: 5})})
