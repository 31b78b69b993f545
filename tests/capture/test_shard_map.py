"""`jax.shard_map` of other forms: several axes, split parameters, loops inside, and one that is in the loss."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fisher_optax as fo
from tests.capture.capture_models import assert_near
from tests.capture.parallel_models import (
    BATCH,
    KINDS,
    LABELS,
    PARAMS,
    N,
    assert_same,
    averaged,
    by_one,
    logits,
    loss_of,
    mesh,
    own_by_device,
    split,
)


@pytest.mark.parametrize(("data", "manual"), [("a", {"a"}), ("a", {"a", "b"}), (("a", "b"), {"a", "b"})])
def test_two_axes_of_a_mesh(data: Any, manual: set[str]) -> None:
    """Both of the data, one of nothing, or one left to the compiler."""
    grid = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    for kind in (KINDS["rows"], KINDS["samples"]):
        per_device = lambda *args, kind=kind: fo.value_and_grad(averaged(loss_of("softmax"), data), kind)(*args)  # noqa: E731
        specs = (P(), P(data), P(data))
        f = jax.jit(jax.shard_map(per_device, mesh=grid, in_specs=specs, out_specs=P(), axis_names=manual))
        assert_same(f(PARAMS, *BATCH[:2]), by_one(loss_of("softmax"), kind, *BATCH[:2]))


def test_parameters_split_over_another_axis_keep_their_own_statistics() -> None:
    grid = jax.make_mesh((2, 2), ("d", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    p = {"up": jax.random.normal(jax.random.key(0), (3, 4)), "down": jax.random.normal(jax.random.key(1), (4, 2))}
    x, y = jax.random.normal(jax.random.key(2), (N, 3)), jax.random.normal(jax.random.key(3), (N, 2))

    def loss(p: Any, x: Any, y: Any, add: Any = lambda z: z) -> Any:
        return fo.losses.gaussian(add(jnp.tanh(x @ p["up"]) @ p["down"]), y)

    def per_device(p: Any, x: Any, y: Any) -> Any:
        by_columns = lambda p, x, y: jax.lax.pmean(loss(p, x, y, lambda z: jax.lax.psum(z, "model")), "d")  # noqa: E731
        stats = fo.value_and_grad(by_columns, fisher="true")(p, x, y)[2]
        return stats["up"].right[None], stats["down"].left[None], stats["up"].left[None], stats["down"].right[None]

    specs = {"up": P(None, "model"), "down": P("model")}
    f = jax.shard_map(per_device, mesh=grid, in_specs=(specs, P("d"), P("d")), out_specs=P("model"))
    wanted = jax.jit(fo.value_and_grad(loss, fisher="true"))(p, x, y)[2]
    actual = jax.jit(f)(p, x, y)
    for device, here in enumerate((slice(0, 2), slice(2, 4))):
        for mine, theirs in zip(actual[:2], (wanted["up"].right, wanted["down"].left), strict=True):
            assert_near(mine[device], theirs[here, here], 1e-5)
        for mine, theirs in zip(actual[2:], (wanted["up"].left, wanted["down"].right), strict=True):
            assert_near(mine[device], theirs, 1e-5)


@pytest.mark.parametrize("kind", ["rows", "samples"])
def test_a_shard_map_in_the_loss_chooses_among_all_devices_examples(kind: str) -> None:
    def loss(p: Any, tokens: Any, labels: Any, check_vma: bool = True) -> Any:
        return fo.losses.softmax_cross_entropy(
            jax.shard_map(logits, mesh=mesh(2), in_specs=(P(), P("d")), out_specs=P("d"), check_vma=check_vma)(
                p, tokens
            ),
            labels,
        )

    assert_same(by_one(loss, KINDS[kind], *BATCH[:2]), by_one(loss_of("softmax"), KINDS[kind], *BATCH[:2]))
    with pytest.raises(ValueError, match="shard_map with check_vma=False"):
        by_one(lambda *args: loss(*args, check_vma=False), KINDS[kind], *BATCH[:2])


def test_logits_do_not_leave_a_shard_map_in_the_loss() -> None:
    def loss(p: Any, tokens: Any, labels: Any) -> Any:
        return jax.shard_map(averaged(loss_of("softmax")), mesh=mesh(2), in_specs=(P(), P("d"), P("d")), out_specs=P())(
            p, tokens, labels
        )

    with pytest.raises(ValueError, match="inside a shard_map, where its examples cannot be counted"):
        by_one(loss, None, *BATCH[:2])
    with pytest.raises(ValueError, match="inside a remat or shard_map"):
        by_one(loss, KINDS["head"], *BATCH[:2], normalizer=LABELS.size)


def test_micro_batches_in_a_loop_on_every_device() -> None:
    grad_fn = fo.value_and_grad(averaged(loss_of("softmax")))

    def per_device(p: Any, *batch: Any) -> Any:
        micro = [x.reshape(2, -1, *x.shape[1:]) for x in batch]
        first = grad_fn(p, *(x[0] for x in micro))[2]
        add = lambda so_far, batch: (fo.accumulate_statistics(so_far, grad_fn(p, *batch)[2]), None)  # noqa: E731
        return jax.lax.scan(add, first, [x[1:] for x in micro])[0]

    assert_same(split(per_device, 2, BATCH[:2]), by_one(loss_of("softmax"), None, *BATCH[:2])[2])


FISHERS = [{"fisher": name} for name in ("true", "empirical", "ggn")]


@pytest.mark.parametrize("options", FISHERS, ids=lambda options: options["fisher"])
def test_a_fisher_operator_counts_all_devices_examples(options: Any) -> None:
    """With parameters that are the same on all devices, and with each device's own."""
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), PARAMS)
    loss = loss_of("softmax")
    product = lambda loss, p, *batch: fo.fisher.operator(loss, p, *batch, **options) @ v  # noqa: E731

    def of_its_own(p: Any, *batch: Any) -> Any:
        F = fo.fisher.operator(loss, own_by_device(p), *batch, **options)
        return jax.lax.pmean(F @ own_by_device(v), "d")

    wanted = jax.jit(lambda *batch: product(loss, PARAMS, *batch))(*BATCH[:2])
    assert_same(split(lambda p, *batch: product(averaged(loss), p, *batch), 2, BATCH[:2]), wanted)
    assert_same(split(of_its_own, 2, BATCH[:2]), wanted)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda p, *batch: fo.fisher.operator(loss_of("softmax"), p, *batch) @ p, "JAX would add up"),
        (lambda p, *batch: fo.fisher.operator(averaged(loss_of("softmax")), p, *batch).rows(), "gradients of one"),
        (
            lambda p, *batch: fo.fisher.approximate("diagonal", averaged(loss_of("softmax")), p, *batch) @ p,
            "gradients of one",
        ),
    ],
)
def test_what_mixes_devices_in_a_fisher_is_refused(f: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(f, 2, BATCH[:2])
