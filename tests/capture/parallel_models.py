"""One model, split over devices by hand or run by one: what tests of data parallelism share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import fisher_optax as fo
from tests.capture.capture_models import assert_near

N, T, CLASSES = 8, 5, 4  # examples, tokens of each, classes
TOKENS = jax.random.randint(jax.random.key(0), (N, T), 0, 7)
LABELS = jax.random.randint(jax.random.key(1), (N, T), 0, CLASSES)
# Padding: all of what the first of four devices gets, and more or less of the others' share.
WEIGHTS = jnp.arange(T) < jnp.array([0, 0, 5, 2, 1, 1, 4, 3])[:, None]
BATCH = (TOKENS, LABELS, WEIGHTS)


def params() -> Any:
    shapes = {"embed": (7, 4), "conv": {"kernel": (2, 4, 5)}, "dense": {"kernel": (5, CLASSES), "bias": (CLASSES,)}}
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return structure.unflatten([jax.random.normal(jax.random.key(i), x) for i, x in enumerate(leaves)])


PARAMS = params()


def logits(p: Any, tokens: Any) -> Any:
    """An embedding, a convolution along tokens, and a dense layer with a bias."""
    x = jax.lax.conv_general_dilated(
        p["embed"][tokens], p["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(x) @ p["dense"]["kernel"] + p["dense"]["bias"]


def one_hot(labels: Any) -> Any:
    return jax.nn.one_hot(labels, CLASSES)


def own(z: Any, y: Any, w: Any = None) -> Any:
    """A loss of one's own."""
    w = jnp.ones(y.shape) if w is None else w
    return -jnp.sum(jax.nn.log_softmax(z) * one_hot(y) * w[..., None]) / jnp.maximum(w.sum(), 1)


LOSSES: dict[str, Callable[..., Any]] = {
    "softmax": fo.losses.softmax_cross_entropy,
    "gaussian": lambda z, y, w=None: fo.losses.gaussian(z, one_hot(y), w),
    "sigmoid": lambda z, y, w=None: fo.losses.sigmoid_cross_entropy(z, one_hot(y), w),
    "own": own,
}
KINDS = {
    "factors": fo.KroneckerFactors(),
    "reduce": fo.KroneckerFactors(mode="reduce"),
    "rows": fo.KroneckerFactors(max_dim=3, rank=8),
    "head": fo.KroneckerFactors(head_rows=8),
    "gram": fo.InputGram(),
    "samples": fo.LayerSamples(6),
}


def loss_of(name: str) -> Callable[..., Any]:
    return lambda p, tokens, *given: LOSSES[name](logits(p, tokens), *given)


def averaged(loss: Callable[..., Any], axis: Any = "d") -> Callable[..., Any]:
    """The mean of all devices' losses."""
    return lambda p, *batch: jax.lax.pmean(loss(p, *batch), axis)


def weighted(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The mean over all devices' examples, of which not all count."""

    def mean(p: Any, tokens: Any, labels: Any, w: Any) -> Any:
        total = jnp.sum(w)
        return jax.lax.psum(total * loss(p, tokens, labels, w), "d") / jax.lax.psum(total, "d")

    return mean


def own_by_device(p: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.pcast(x, "d", to="varying"), p)


def mesh(devices: int) -> Mesh:
    return jax.make_mesh((devices,), ("d",), (AxisType.Auto,), devices=jax.devices()[:devices])


def split(f: Any, devices: int, batch: Any, **options: Any) -> Any:
    """``f(params, *batch)`` by so many devices, of which each has its share of the batch."""
    specs = (P(), *[P("d")] * len(batch))
    return jax.jit(jax.shard_map(f, mesh=mesh(devices), in_specs=specs, out_specs=P(), **options))(PARAMS, *batch)


def by_one(loss: Any, kind: Any, *batch: Any, **options: Any) -> Any:
    key = {"fisher_key": jax.random.key(3)} if options.get("fisher") == "mc" else {}
    return jax.jit(fo.value_and_grad(loss, kind, **options))(PARAMS, *batch, **key)


def assert_same(actual: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for mine, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        if np.linalg.norm(theirs) == 0:
            assert np.linalg.norm(mine) == 0
        else:
            assert_near(mine, theirs, tolerance)
