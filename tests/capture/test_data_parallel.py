"""Data parallelism by hand, in `jax.shard_map`, `jax.pmap` or `jax.vmap`: the statistics are those of one device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.linalg.eigenbasis import LowRank
from fisher_optax.statistics import Logits, Samples
from tests.capture.capture_models import assert_near
from tests.capture.parallel_models import (
    BATCH,
    CLASSES,
    KINDS,
    LOSSES,
    PARAMS,
    N,
    T,
    assert_same,
    averaged,
    by_one,
    logits,
    loss_of,
    own_by_device,
    split,
    weighted,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_averaged_over_devices_gives_the_statistics_of_one(kind: str) -> None:
    """Padding is spread unevenly, so that devices count differently many examples."""
    loss = loss_of("softmax")
    per_device = lambda *args: fo.value_and_grad(weighted(loss), KINDS[kind])(*args)  # noqa: E731
    assert_same(split(per_device, 4, BATCH), by_one(loss, KINDS[kind], *BATCH))


FISHERS = [(name, fisher) for name in LOSSES for fisher in ("empirical", "true", "mc")]


@pytest.mark.parametrize(("name", "fisher"), [case for case in FISHERS if case[0] != "own" or case[1] == "empirical"])
def test_every_loss_and_fisher_counts_all_devices_examples(name: str, fisher: str) -> None:
    # Of layers whose positions feed several losses, "true" is an estimate.
    seen = (lambda stats: stats["dense"]) if fisher == "true" else (lambda stats: stats)
    options = {"fisher": fisher, **({"n_samples": 400} if fisher == "mc" else {})}
    key = {"fisher_key": jax.random.key(4)} if fisher == "mc" else {}
    per_device = lambda *args: fo.value_and_grad(averaged(loss_of(name)), **options)(*args, **key)  # noqa: E731
    actual, wanted = split(per_device, 2, BATCH[:2]), by_one(loss_of(name), None, *BATCH[:2], **options)
    assert_same(actual[:2], wanted[:2])
    assert_same(seen(actual[2]), seen(wanted[2]), 0.15 if fisher == "mc" else 1e-5)


def test_a_sum_over_devices_is_as_many_times_the_mean() -> None:
    loss = loss_of("softmax")
    summed = lambda p, *batch: jax.lax.psum(loss(p, *batch), "d")  # noqa: E731
    per_device = lambda *args: fo.value_and_grad(summed)(*args)  # noqa: E731
    assert_same(split(per_device, 2, BATCH[:2]), by_one(lambda *args: 2 * loss(*args), None, *BATCH[:2]))


def test_devices_draw_labels_of_their_own() -> None:
    """Two devices with the same examples: the gradients of labels drawn with one key differ."""
    twice = tuple(jnp.concatenate([x[:1]] * 2) for x in BATCH[:2])
    grad_fn = fo.value_and_grad(averaged(loss_of("gaussian")), fo.LayerSamples(2 * T), "mc")
    samples = split(lambda *args: grad_fn(*args, fisher_key=jax.random.key(0)), 2, twice)[2]["dense"]["kernel"]
    first, second = np.split(np.asarray(samples.inputs), 2), np.split(np.asarray(samples.gradients), 2)
    assert_near(first[0], first[1], 1e-6)
    assert abs(np.corrcoef(second[0].ravel(), second[1].ravel())[0, 1]) < 0.6


LOCAL: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "parameters that vary": (lambda f: lambda p, *batch: f(own_by_device(p), *batch), {}),
    "no types": (lambda f: f, {"check_vma": False}),
}


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("pmap", "factors"),
        *((how, kind) for how in (*LOCAL, "vmap") for kind in ("factors", "rows", "head", "samples")),
    ],
)
def test_statistics_of_each_device_are_put_together(how: str, kind: str) -> None:
    """`fo.all_reduce_statistics` of what each device's own loss gives, weighted by what each has counted."""
    # All rows, logits and samples, so that each device's choice and one device's are the same.
    chosen = {"rows": fo.KroneckerFactors(max_dim=3), "head": fo.KroneckerFactors(head_rows=999)}
    chosen = KINDS | chosen | {"samples": fo.LayerSamples()}
    loss, batch = loss_of("softmax"), tuple(x[N // 2 :] for x in BATCH)

    def per_device(p: Any, *batch: Any) -> Any:
        return fo.all_reduce_statistics(fo.value_and_grad(loss, chosen[kind])(p, *batch)[2], "d")

    if how in LOCAL:
        wrap, options = LOCAL[how]
        actual = split(wrap(per_device), 2, batch, **options)
    else:
        each = lambda *batch: per_device(PARAMS, *batch)  # noqa: E731
        halves = [x.reshape(2, -1, *x.shape[1:]) for x in batch]
        mapped = jax.jit(jax.vmap(each, axis_name="d")) if how == "vmap" else jax.pmap(each, axis_name="d")
        actual = jax.tree.map(lambda x: x[0], mapped(*halves))
    assert_same(
        jax.tree.map(plain, actual, is_leaf=held),
        jax.tree.map(plain, by_one(loss, chosen[kind], *batch)[2], is_leaf=held),
    )


def held(x: Any) -> bool:
    return isinstance(x, LowRank | Logits | Samples)


def plain(x: Any) -> Any:
    """Rows as what they stand for; logits' weights add up to 1."""
    if isinstance(x, LowRank):
        return jnp.einsum("...ri,...rj->...ij", x.rows, x.rows)
    return x._replace(weights=x.weights / x.weights.sum()) if isinstance(x, Logits) else x


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda p, x, y: fo.value_and_grad(loss_of("softmax"))(p, x, y), "Return jax.lax.pmean.loss, 'd'"),
        (lambda p, x, y: fo.value_and_grad(loss_of("softmax"), fisher="true")(p, x, y), "JAX would add up"),
        (lambda p, x, y: fo.value_and_grad(averaged(loss_of("softmax")))(own_by_device(p), x, y), "a part of the"),
        (
            lambda p, x, y: fo.value_and_grad(averaged(loss_of("softmax")), normalizer=lambda x, y: jnp.sum(y >= 0))(
                p, x, y
            ),
            r"jax.lax.psum\(normalizer, 'd'\)",
        ),
        (
            lambda p, x, y: fo.value_and_grad(
                averaged(lambda p, x: fo.losses.gaussian(logits(p, x), jnp.zeros((*x.shape, CLASSES))))
            )(p, x),
            r"jax.lax.pcast\(labels, 'd', to='varying'\)",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused_with_the_cure(f: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(f, 2, BATCH[:2])


def test_weighed_losses_need_types_that_say_what_differs() -> None:
    """A mean of devices' losses as they are needs none: each device's examples count as its own loss has it."""
    of_device = lambda loss: lambda *args: jax.lax.pmean(fo.value_and_grad(loss)(*args)[1], "d")  # noqa: E731
    split(of_device(averaged(loss_of("softmax"))), 2, BATCH, check_vma=False)
    with pytest.raises(ValueError, match="Return each device's own loss; put gradients together"):
        split(of_device(weighted(loss_of("softmax"))), 2, BATCH, check_vma=False)


def test_a_gram_of_each_devices_own_loss_needs_no_count() -> None:
    per_device = lambda *args: fo.value_and_grad(loss_of("softmax"), fo.InputGram())(*args)[2]  # noqa: E731
    assert_same(split(per_device, 2, BATCH[:2]), by_one(loss_of("softmax"), fo.InputGram(), *BATCH[:2])[2])


OPTIMIZERS = {
    "kfac": (lambda: fo.kfac(0.1), KINDS["factors"]),
    "ekfac": (lambda: fo.ekfac(0.1), fo.KroneckerFactors(squares=True)),
    "frog": (lambda: fo.frog(0.1), fo.LayerSamples()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_inside_as_on_one_device(name: str) -> None:
    make, kind = OPTIMIZERS[name]
    tx = make()

    def step(loss: Any) -> Any:
        def update(p: Any, *batch: Any) -> Any:
            state = tx.init(p)
            bases = {"bases": fo.eigenbases(state, p)} if name == "ekfac" else {}
            _, grads, stats = fo.value_and_grad(loss, kind)(p, *batch, **bases)
            return tx.update(grads, state, p, statistics=stats)[0]

        return update

    # Gradients of a softmax add up to 0 over classes, and rounding would decide the step along that direction.
    actual = split(step(averaged(loss_of("gaussian"))), 2, BATCH[:2])
    assert_same(actual, jax.jit(step(loss_of("gaussian")))(PARAMS, *BATCH[:2]), 1e-3)
