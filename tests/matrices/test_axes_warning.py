"""A matrix that a method leaves to its fallback is named, once; a word makes it an error."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import fisher_optax as fo

METHODS = {
    "soap": fo.soap,
    "muon": fo.muon,
    "shampoo": fo.shampoo,
    "kl_soap": fo.kl_soap,
    "dykaf": fo.dykaf,
    "kfac": fo.kfac,
    "ekfac": fo.ekfac,
    "kfac_soap": fo.kfac_soap,
    "frog": fo.frog,
}
MIXED = {"mixed": jnp.ones((2, 3, 4)), "dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}
MEANT = {"mixed": fo.MatrixAxes(1, 2, 0), "dense": {"kernel": fo.MatrixAxes(), "bias": None}}


def warned(f: Any, *args: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        f(*args, **options)
    assert all(issubclass(x.category, fo.AxesWarning) for x in found)
    return [str(x.message) for x in found]


@pytest.mark.parametrize("name", METHODS)
def test_init_names_what_is_ambiguous_once_with_its_share_and_the_cure(name: str) -> None:
    tx = METHODS[name](1e-3)
    (message,) = warned(jax.eval_shape, tx.init, MIXED)
    assert message.startswith(
        f"{name}: the fallback (AdamW unless you pass one) takes 1 leaf (44% of the parameters) that may be matrices"
    )
    assert "inputs: 'mixed' of shape (2, 3, 4)" in message
    assert "axes=fo.infer_axes(loss_fn, params, batch)" in message
    with pytest.warns(fo.AxesWarning) as found:
        jax.eval_shape(METHODS[name](1e-3).init, MIXED)
    assert found[0].filename == __file__
    assert warned(jax.eval_shape, tx.init, MIXED) == []


def test_what_is_meant_for_the_fallback_goes_there_without_a_word() -> None:
    """By its kind, or because somebody said so."""
    model = {
        "wte": {"embedding": jnp.ones((9, 4))},
        "norm": {"scale": jnp.ones((3, 4))},
        "lm_head": {"kernel": jnp.ones((4, 9)), "bias": jnp.zeros(9)},
        "dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)},
        "nothing": jnp.zeros((0, 2, 2)),
        "cls": jnp.zeros((1, 1, 8)),
        "temperature": jnp.ones((3, 1, 1)),
        "count": jnp.zeros((2, 2, 2), jnp.int32),
    }
    for make in (fo.soap, fo.muon):
        assert warned(jax.eval_shape, make(1e-3).init, model) == []
    for axes in (MEANT, {**MEANT, "mixed": None}, lambda params: MEANT):
        assert warned(jax.eval_shape, fo.soap(1e-3, axes=axes).init, MIXED) == []
    jax.eval_shape(fo.soap(1e-3, axes="strict").init, model)


HEADS = {"lm_head": jnp.ones((2, 3, 4)), "logits/w": jnp.ones((2, 3, 4)), "dense": {"kernel": jnp.ones((4, 6))}}


@pytest.mark.parametrize(("name", "takes"), [("muon", False), ("frog", False), ("soap", True), ("kfac", True)])
def test_an_ambiguous_head_is_named_where_the_method_takes_heads(name: str, takes: bool) -> None:
    found = warned(jax.eval_shape, METHODS[name](1e-3).init, HEADS)
    assert ["takes 2 leaves" in x for x in found] == [True] * takes
    strict = METHODS[name](1e-3, axes="strict")
    if takes:
        with pytest.raises(ValueError, match="axes='strict', and 2 leaves"):
            jax.eval_shape(strict.init, HEADS)
    else:
        jax.eval_shape(strict.init, HEADS)


def test_what_is_made_anew_at_every_step_warns_once() -> None:
    """`optax.inject_hyperparams` does so; with a filter that makes errors of warnings, each is one."""
    params = {"mixed": jnp.ones((2, 3, 4)), "dense": {"scale": jnp.ones((3, 4))}, "up": {"kernel": jnp.ones((4, 3))}}
    loss = lambda p, x: fo.losses.gaussian(x @ p["up"]["kernel"] @ p["dense"]["scale"], x)  # noqa: E731
    _, grads, stats = fo.value_and_grad(loss)(params, jnp.ones((2, 4)))
    inject = optax.inject_hyperparams(fo.scale_by_kfac)

    def train() -> None:
        tx = inject(damping=0.1)
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(grads, state, params, statistics=stats)

    first, second = warned(train)
    assert "may be matrices" in first
    assert "as statistics= shows" in second
    for _ in range(2):
        with pytest.raises(fo.AxesWarning):
            fo.soap(1e-3).init(params)


def test_a_word_makes_it_an_error() -> None:
    with pytest.raises(ValueError, match=r"axes='strict', and 1 leaf \(44% of the parameters\) .*'mixed' of shape"):
        fo.soap(1e-3, axes="strict").init(MIXED)
    with pytest.raises(ValueError, match=r"axes= must be None, 'strict', .*; got 'strct'"):
        fo.kfac(1e-3, axes="strct").init(MIXED)


@pytest.mark.parametrize(("make", "kind"), [(fo.kfac, fo.KroneckerFactors()), (fo.frog, fo.LayerSamples(4))])
def test_statistics_of_what_goes_to_the_fallback_by_its_name_are_named_at_the_trace(make: Any, kind: Any) -> None:
    """A matrix called scale is read as a normalisation's, until the program is asked."""
    params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}, "gate": {"scale": jnp.ones((4, 2))}}

    def loss(p: Any, x: jax.Array) -> jax.Array:
        return fo.losses.gaussian((x @ p["dense"]["kernel"] + p["dense"]["bias"]) @ p["gate"]["scale"], x[:, :2])

    x = jnp.linspace(0.1, 1, 15).reshape(5, 3)
    _, grads, stats = fo.value_and_grad(loss, kind)(params, x)
    tx = make(1e-3)
    state = tx.init(params)
    update = functools.partial(jax.eval_shape, lambda g, s, stats: tx.update(g, s, params, statistics=stats))
    (message,) = warned(update, grads, state, stats)
    assert message.startswith(
        f"{make.__name__}: the fallback (AdamW unless you pass one) takes 1 leaf (33% of the parameters) that the "
    )
    assert "'gate/scale' of shape (4, 2)" in message
    assert warned(update, grads, state, stats) == []
    inferred = make(1e-3, axes=fo.infer_axes(loss, params, x, statistics=kind))
    step = lambda stats: inferred.update(grads, inferred.init(params), params, statistics=stats)  # noqa: E731
    assert warned(jax.eval_shape, step, stats) == []


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (fo.scale_by_normuon, "normuon: the fallback (which changes nothing) takes 1 leaf"),
        (fo.update_floor, "update_floor: the fallback (which changes nothing) takes 1 leaf"),
        (lambda: fo.hyperball(0.1), "hyperball: the fallback (the plain step unless you pass one) takes 1 leaf"),
    ],
)
def test_a_warning_says_what_the_fallback_is(make: Any, told: str) -> None:
    with pytest.warns(fo.AxesWarning) as found:
        make().init({"mixed": jnp.ones((2, 3, 4))})
    assert str(found[0].message).startswith(told)
