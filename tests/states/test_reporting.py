"""The report says what each leaf gets through every wrapper; health and check_state refuse a strange state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import fisher_optax as fo

PARAMS: dict[str, Any] = {
    "Dense_0": {"kernel": jnp.ones((6, 10)), "bias": jnp.zeros(10)},
    "embed": {"embedding": jnp.ones((7, 6))},
    "lm_head": {"kernel": jnp.ones((6, 7))},
}


def methods(tx: Any) -> dict[str, str]:
    return {row.path: row.method for row in fo.report(tx, PARAMS).rows}


def test_every_leaf_has_a_method() -> None:
    fallback = {"Dense_0/bias": "fallback", "embed/embedding": "fallback"}
    assert methods(fo.soap(1e-3)) == {"Dense_0/kernel": "soap", "lm_head/kernel": "soap"} | fallback
    assert methods(fo.muon(1e-3)) == {"Dense_0/kernel": "muon", "lm_head/kernel": "fallback"} | fallback


@pytest.mark.parametrize("wrap", ["chain", "masked", "partition", "inject", "multisteps"])
def test_it_sees_through_wrappers(wrap: str) -> None:
    matrices = jax.tree.map(lambda x: x.ndim == 2, PARAMS)
    tx = {
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), fo.soap(1e-3)),
        "masked": lambda: optax.masked(fo.soap(1e-3), matrices),
        "partition": lambda: optax.partition(
            {"matrix": fo.soap(1e-3), "head": fo.soap(1e-3), "embedding": optax.sgd(1.0), "other": optax.sgd(1.0)},
            fo.label_params,
        ),
        "inject": lambda: optax.inject_hyperparams(fo.soap, static_args=fo.STATIC_ARGS["soap"])(1e-3),
        "multisteps": lambda: optax.MultiSteps(fo.soap(1e-3), 2),
    }[wrap]()
    found = methods(tx)
    assert found["Dense_0/kernel"] == found["lm_head/kernel"] == "soap"
    assert found["Dense_0/bias"] == ("-" if wrap in ("masked", "partition") else "fallback")


def test_asking_twice_answers_twice() -> None:
    tx = fo.soap(1e-3)
    assert fo.report(tx, PARAMS) == fo.report(tx, PARAMS)


def test_state_bytes_are_those_of_the_state() -> None:
    """All arrays but the counters; a matrix's own counters are four bytes each and not the point."""
    for tx in (fo.soap(1e-3), fo.muon(1e-3), fo.soap(1e-3, storage=fo.Storage(block_size=4))):
        held = sum(x.nbytes for x in jax.tree.leaves(tx.init(PARAMS)) if x.ndim > 1)
        held += sum(x.nbytes for x in jax.tree.leaves(tx.init(PARAMS)) if x.shape == (10,))
        reported = sum(row.state_bytes for row in fo.report(tx, PARAMS).rows)
        assert 0 <= reported - held <= 64


def test_the_table_is_readable() -> None:
    lines = str(fo.report(fo.soap(1e-3, storage=fo.Storage(block_size=4)), PARAMS)).splitlines()
    assert lines[0].split() == ["leaf", "shape", "method", "matrices", "state", "refresh", "why"]
    assert any("Dense_0/kernel" in line and "3x4" in line for line in lines)
    assert lines[-1].startswith("total")


def test_health_refuses_a_strange_state() -> None:
    with pytest.raises(ValueError, match="no state of fisher_optax"):
        fo.health(optax.adam(1e-3).init(PARAMS))
    state = fo.muon(1e-3).init(PARAMS)
    with pytest.raises(ValueError, match="version"):
        fo.health(state._replace(version=jnp.asarray(99)))


def test_check_state_names_what_does_not_fit() -> None:
    tx = fo.soap(1e-3)
    state = tx.init(PARAMS)
    fo.check_state(tx, state, PARAMS)
    with pytest.raises(ValueError, match="another optimizer"):
        fo.check_state(fo.muon(1e-3), state, PARAMS)
    with pytest.raises(ValueError, match="bfloat16"):
        fo.check_state(fo.soap(1e-3, storage=fo.Storage(factor_dtype=jnp.bfloat16)), state, PARAMS)


def test_a_factor_made_non_finite_is_survived_and_counted() -> None:
    """The step goes on in the last good basis."""
    params = {"w": jnp.eye(4) + 0.1}
    tx = fo.soap(1e-2, precondition_frequency=1)
    update = jax.jit(tx.update)
    state = tx.init(params)
    grads = [{"w": jax.random.normal(jax.random.key(i), (4, 4))} for i in range(5)]
    for g in grads[:3]:
        _, state = update(g, state, params)
    poisoned = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[0].set(jnp.nan) if "factors" in str(path) and "left" in str(path) else x, state
    )
    for g in grads[3:]:
        updates, poisoned = update(g, poisoned, params)
        assert bool(jnp.isfinite(updates["w"]).all())
        assert float(jnp.abs(updates["w"]).max()) > 0
    assert fo.health(state).failures == 0
    assert fo.health(poisoned).failures == 2
