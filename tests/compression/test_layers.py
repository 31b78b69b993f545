"""Which layers a model has, in which order, on which inputs, streamed; and what OWL makes of them."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.compression.model import calibration
from fisher_optax.compression.model.layers import find_layers
from tests.comparisons import assert_same_bits
from tests.compression.compression_models import BATCHES, TOKENS, X, dense, mlp, moment, scanned
from tests.reference.curvature import windows

prune = functools.partial(fo.compression.prune, progress=False)
owl = functools.partial(fo.compression.owl, progress=False)


def test_layers_come_in_the_order_of_use_a_scanned_stack_step_by_step() -> None:
    """Embeddings and heads are left out unless asked for."""
    names = [layer.name for layer in find_layers(*scanned(), TOKENS)]
    steps = [f"params/blocks/{name}/kernel[{i}]" for i in range(3) for name in ("up", "down")]
    assert names == [*steps, "params/conv/kernel"]
    assert [layer.name for layer in find_layers(*scanned(), TOKENS, "params/head")] == ["params/head/kernel"]
    up = find_layers(*scanned(), TOKENS, lambda path: "up" in path)
    assert [layer.members.tolist() for layer in up] == [[0], [1], [2]]


def test_experts_of_one_product_are_one_layer() -> None:
    apply_fn = lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x] * 3), p["w"])  # noqa: E731
    (layer,) = find_layers(apply_fn, {"w": jnp.ones((3, 4, 2))}, X)
    assert (layer.name, layer.members.tolist(), layer.shape) == ("w", [0, 1, 2], (4, 2))
    _, masks, report = prune(apply_fn, {"w": jax.random.normal(jax.random.key(0), (3, 4, 2))}, [X], "wanda", 0.5)
    assert report.layers[0].removed == 12
    assert np.asarray(masks["w"]).sum((1, 2)).tolist() == [4, 4, 4]


def test_input_grams_are_those_of_the_layers_inputs() -> None:
    """Of batches of different sizes, without the input of the bias; of a convolution, its windows."""
    apply_fn, params = mlp()
    h = np.maximum(dense(params["first"], X), 0)
    for layer, x in zip(find_layers(apply_fn, params, X), (X, h), strict=True):
        np.testing.assert_allclose(calibration.input_gram(apply_fn, params, BATCHES, layer)[0], moment(x), rtol=2e-5)
    conv = nn.Conv(2, (3, 2), strides=2)
    x = jax.random.normal(jax.random.key(4), (3, 5, 4, 2))
    params = conv.init(jax.random.key(5), x)
    (layer,) = find_layers(conv.apply, params, x)
    seen = windows(x, (3, 2), (2, 2), [(1, 1), (0, 0)], (1, 1), (1, 1)).reshape(-1, 12)
    np.testing.assert_allclose(calibration.input_gram(conv.apply, params, [x], layer)[0], moment(seen), atol=1e-5)


def test_masked_positions_do_not_count() -> None:
    """Padding changes nothing, whatever is in it."""
    apply_fn, params = mlp()
    padded = jnp.concatenate([X, 1e6 * jnp.ones((9, 4))])
    masked = prune(apply_fn, params, [padded], "wanda", 0.5, mask=lambda x: jnp.arange(len(x)) < len(X))
    assert_same_bits(masked.masks, prune(apply_fn, params, [X], "wanda", 0.5).masks)
    with pytest.raises(ValueError, match="leaves no input of 'first/kernel'"):
        prune(apply_fn, params, [X], "wanda", mask=lambda x: jnp.zeros(len(x), bool))


def test_batches_are_streamed_one_pass_and_one_gram_a_layer() -> None:
    """Compiled memory for one layer's sum does not hold those of the others."""
    passes = []

    class Data:
        def __iter__(self) -> Iterator[Any]:
            passes.append(1)
            yield from BATCHES

    prune(*mlp(), Data(), "wanda", 0.5)
    assert len(passes) == 1 + 2  # the first looks at one batch's shape
    d = 256
    chain = jax.tree_util.Partial(lambda p, x: functools.reduce(jnp.matmul, p, x))
    params, x = [jnp.ones((d, d))] * 4, jnp.ones((2, d))
    layer = find_layers(chain, params, x)[3]
    lowered = calibration._input_sum.lower(chain, layer.leaf, d, None, params, x, jnp.asarray(layer.members))
    memory = lowered.compile().memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 2.5 * 4 * d * d


def test_owl_gives_more_to_layers_with_fewer_outliers_and_keeps_the_mean() -> None:
    apply_fn, params = mlp()
    shares = owl(apply_fn, params, BATCHES, 0.6, M=2.0, spread=0.1)
    h = np.maximum(dense(params["first"], X), 0)
    D = []
    for name, x in (("first", X), ("second", h)):
        A = np.abs(params[name]["kernel"]) * np.sqrt(np.diag(moment(x)))[:, None]
        D.append(np.mean(2 * A.mean() < A))
    assert D[0] != D[1]
    assert (shares["first/kernel"] - shares["second/kernel"]) * (D[0] - D[1]) < 0
    np.testing.assert_allclose((32 * shares["first/kernel"] + 48 * shares["second/kernel"]) / 80, 0.6)
    np.testing.assert_allclose(max(abs(share - 0.6) for share in shares.values()), 0.1)
    together = owl(apply_fn, params, BATCHES, 0.6, M=2.0, group=lambda path: "all")
    assert set(together.values()) == {0.6}
    report = prune(apply_fn, params, BATCHES, "wanda", shares).report
    assert [row.sparsity for row in report.layers] == pytest.approx(list(shares.values()), abs=1 / 8)


def test_owl_refuses_patterns_and_spreads_that_leave_the_range() -> None:
    with pytest.raises(ValueError, match="give a share, not '2:4'"):
        owl(*mlp(), [X], "2:4")
    with pytest.raises(ValueError, match=r"0.95 ± 0.08 does not"):
        owl(*mlp(), [X], 0.95)
