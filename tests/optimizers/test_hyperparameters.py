"""`optax.inject_hyperparams` takes every factory as it is: what is no hyperparameter stays what it was given as."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import fisher_optax as fo
from fisher_optax._arguments import TRACED, Fixed
from tests.comparisons import assert_close, assert_same_bits
from tests.optimizers_table import standard_gradients, standard_params

PARAMS, GRADS = standard_params(), standard_gradients()[0]


def axes_of(params: Any) -> Any:
    return jax.tree.map(lambda _: None, params) | {"conv": {"kernel": fo.MatrixAxes((0, 1, 2), 3)}}


def matrices_only(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def a_step(tx: Any, state: Any = None) -> Any:
    return jax.jit(tx.update)(GRADS, tx.init(PARAMS) if state is None else state, PARAMS)[0]


def wrapped(name: str, **options: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    return getattr(fo.compression, name), {"tx": optax.sgd(0.1), **options}


FROM_THE_START = {"refresh": fo.Refresh(first_step="adam")}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "soap": (fo.soap, {"max_precond_dim": 6, "axes": axes_of, "mask": matrices_only} | FROM_THE_START),
    "muon": (fo.muon, {"learning_rate": 0.1, "scale": 0.3, "mask": matrices_only, "weight_decay": 0.1}),
    "shampoo": (
        fo.shampoo,
        {"learning_rate": 0.1, "exponent": -0.5, "storage": fo.Storage(momentum_dtype=jnp.bfloat16)},
    ),
    "dykaf": (
        fo.dykaf,
        {"rank1_second_moment": True, "storage": fo.Storage(block_size=3), "init": "identity"} | FROM_THE_START,
    ),
    "normuon": (fo.scale_by_normuon, {"b2": 0.9, "axes": axes_of}),
    "decay-after-step": (fo.add_decay_after_step, {"learning_rate": 0.1, "mask": matrices_only}),
    "cautious-decay": (fo.add_cautious_decay, {"weight_decay": 0.2, "mask": matrices_only}),
    "graft": (fo.graft, {"direction": optax.sgd(0.1), "magnitude": "adam", "axes": axes_of}),
    "keep-masks": wrapped("keep_masks", masks=jax.tree.map(lambda x: x > 0, PARAMS)),
    "movement": wrapped("movement", sparsity=0.5, score_learning_rate=0.1, prune=matrices_only),
    "gradual": wrapped("gradual", sparsity=fo.compression.cubic_schedule(0.5, 0, 3), every=1, prune=matrices_only),
}


@pytest.mark.parametrize("name", CALLS)
def test_periods_sizes_and_functions_are_not_traced(name: str) -> None:
    factory, options = CALLS[name]
    injected: Any = optax.inject_hyperparams(factory)(**options)
    assert injected.init(PARAMS).hyperparams.keys() <= set(TRACED)
    assert_close(a_step(injected), a_step(factory(**options)), 1e-4)


def test_partial_and_nested_factories_are_taken_too() -> None:
    wanted = a_step(fo.soap(0.1, b1=0.8, max_precond_dim=6, refresh=fo.Refresh(first_step="adam")))
    some = functools.partial(fo.soap, max_precond_dim=6, **FROM_THE_START)
    twice = optax.inject_hyperparams(optax.inject_hyperparams(some))
    assert_close(a_step(optax.inject_hyperparams(some)(0.1, b1=0.8)), wanted, 1e-6)
    assert_close(a_step(twice(0.1, b1=0.8)), wanted, 1e-6)


@pytest.mark.parametrize(
    "make", [fo.scale_by_normuon, functools.partial(fo.dykaf, rank1_second_moment=True), fo.kl_shampoo]
)
def test_schedules_of_eps_and_b2_give_the_numbers_they_are(make: Callable[..., Any]) -> None:
    """Different ones at the first call and the second."""
    numbers = {"b2": (0.9, 0.5), "eps": (1e-3, 0.5)}
    schedules = {name: optax.piecewise_constant_schedule(a, {1: b / a}) for name, (a, b) in numbers.items()}
    options = {} if make is fo.scale_by_normuon else FROM_THE_START
    tx, injected = make(**schedules, **options), optax.inject_hyperparams(make)(**schedules, **options)
    states = [x.init(PARAMS) for x in (tx, injected)]
    updates = [jax.jit(x.update) for x in (tx, injected)]
    for _ in range(2):
        steps = [update(GRADS, state, PARAMS) for update, state in zip(updates, states, strict=True)]
        states = [state for _, state in steps]
        assert_close(steps[0][0], steps[1][0], 1e-6)


def test_a_schedule_where_no_steps_are_counted_is_refused_with_the_way() -> None:
    schedule = optax.constant_schedule(1e-6)
    with pytest.raises(TypeError, match=r"optax.inject_hyperparams\(fo.shampoo\)"):
        fo.shampoo(0.1, eps=schedule)
    assert_close(a_step(optax.inject_hyperparams(fo.shampoo)(0.1, eps=schedule)), a_step(fo.shampoo(0.1)), 1e-5)


@pytest.mark.parametrize("name", sorted(fo.STATIC_ARGS))
def test_signatures_are_those_in_the_source(name: str) -> None:
    factory = getattr(fo, name)
    assert str(inspect.signature(factory)) == str(inspect.signature(factory.__wrapped__))
    for parameter in inspect.signature(factory).parameters.values():
        assert not isinstance(parameter.default, Fixed)


@pytest.mark.parametrize("make", [fo.muon, fo.shampoo])
def test_no_parameters_are_needed_where_nothing_decays(make: Any) -> None:
    tx = make(0.1)
    assert_same_bits(jax.jit(tx.update)(GRADS, tx.init(PARAMS))[0], a_step(tx))
