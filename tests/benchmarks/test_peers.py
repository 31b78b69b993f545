"""Peers run as released or say why not; plain SOAP, their stand-in, is the package's SOAP."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from experiments import optimizers, peers, train_gpt
from experiments.gpt_config import Config, make_model
from experiments.kfac_jax import batch
from experiments.soap_plain import scale_by_soap_plain

CONFIG = Config(steps=3, eval_every=3, eval_batches=1, layers=1, width=16, heads=1, context=8, batch=2, warmup=0)
PARAMS = {"layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}, "wte": {"embedding": jnp.ones((8, 4))}}


def test_plain_soap_is_the_packages_soap(x64: None) -> None:
    """Over three refreshes, on shapes whose first factors leave no choice of eigenvectors but signs."""
    rng = np.random.default_rng(0)
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in (("a", (5, 5)), ("b", (5, 4)), ("c", (3, 4)))}
    plain, ours = (
        scale_by_soap_plain(every=3),
        fo.scale_by_soap(precondition_frequency=3, storage=fo.Storage(factor_dtype=jnp.float64)),
    )
    states = [plain.init(params), ours.init(params)]
    steps = [jax.jit(plain.update), jax.jit(ours.update)]
    for t in range(12):
        grads = jax.tree.map(lambda W, t=t: jnp.asarray((1 + t) * rng.normal(size=W.shape)), params)
        (mine, states[0]), (wanted, states[1]) = (
            step(grads, state, params) for step, state in zip(steps, states, strict=True)
        )
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
            assert (np.abs(b).max() > 0.1) == (t > 0)


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_steps_on_this_jax_or_says_what_is_missing(name: str) -> None:
    """Its algorithm is traced whole, in silence, and its updates are those of the parameters."""
    methods, absent = peers.methods()
    if name in absent:
        assert "is not installed" in absent[name]
        return
    tx = optimizers.scheduled(methods[name], CONFIG, 1e-3, 0, 10)
    updates, _ = jax.eval_shape(lambda: tx.update(PARAMS, tx.init(PARAMS), PARAMS))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


def test_a_peer_that_does_not_import_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it or something it needs is missing, or it fails in any other way."""

    def missing(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'gone'", name="gone")

    def broken(*_: Any) -> Any:
        raise AttributeError("jax.tree_map is gone")

    monkeypatch.setattr(peers, "PEERS", {"a": peers.Peer("A", missing, 1.0), "b": peers.Peer("B", broken, 1.0)})
    found, absent = peers.methods()
    reasons = {"a": "gone is not installed", "b": "does not import: AttributeError: jax.tree_map is gone"}
    assert (found, absent) == ({}, peers.ABSENT | reasons)


def test_only_hidden_kernels_go_to_a_peer() -> None:
    tx = peers.on_hidden(optax.scale(2.0), optax.scale(3.0))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    wanted = jax.tree.map(lambda x: 3 * x, PARAMS)
    wanted["layer"]["kernel"] = 2 * PARAMS["layer"]["kernel"]
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, updates, wanted)))


def test_a_loop_starts_with_the_types_it_goes_on_with() -> None:
    """A truth value is carried on as a float, as it was when the peer was written."""
    after = peers.promoting_while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] / 2.0), (0, True))
    assert float(after[1]) == 0.125


def test_kfac_jax_is_given_the_batches_of_the_others() -> None:
    """The loss of the first step is that of the same windows."""
    config, text = dataclasses.replace(CONFIG, optimizer="adamw").resolve(), jnp.arange(400) % 7
    model, run_key = make_model(config, 7), jax.random.key(3)
    params, program = train_gpt.initial_params(model, run_key), train_gpt.program_of(config)
    expected = train_gpt.mean_loss(model, params, batch(config, text, run_key, 0))
    state = train_gpt.State(params, train_gpt.initial_moments(program, params), jnp.int32(0), run_key)
    _, loss = train_gpt.advance(program, model, state, text, jnp.int32(1), jnp.float32(1e-3))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
