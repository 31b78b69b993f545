"""What is read off compiled programs, and judged; by the compiler for the CPU, on a small tree."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compiled
from benchmarks.trees import Tree, make_params

PARAMS = make_params(Tree(3, 16))


@pytest.mark.parametrize("name", ["soap", "kfac"])
@pytest.mark.parametrize("scanned", [False, True])
def test_a_step_is_compiled_for_the_machine_at_hand(name: str, scanned: bool) -> None:
    """On a CPU, an eigh and two QR for each length of side; no copy of the state."""
    found = compiled.compiled(compiled.CONTENDERS[name], compiled.device_of("cpu"), PARAMS, scanned)
    lengths = 3
    assert found["decompositions"] == 3 * lengths
    assert 0 < found["over_state"] < 1
    assert found["compile_s"] > 0


def test_calls_and_conditionals_are_counted() -> None:
    def f(A: jax.Array, go: jax.Array) -> jax.Array:
        return jax.lax.cond(go, jnp.linalg.cholesky, lambda A: A @ A, A)

    program = jax.jit(f).lower(jnp.eye(4), jnp.asarray(True)).compile()
    found = compiled.measures(program, {}, jnp.eye(4), jnp.eye(4))
    assert (found["decompositions"], found["conditionals"], found["loops"]) == (1, 1, 0)


def test_a_bound_is_judged_turn_by_turn() -> None:
    """A slow turn is slow for both; a step whose memory or whose compilation is over its bound does not hold."""

    def turns(*seconds: float, over_state: float = 0.1) -> list[dict[str, float]]:
        return [
            {"trace_s": 0.0, "compile_s": s, "over_state": over_state, "over_parameters": 0.1, "temporaries_mb": 1.0}
            for s in seconds
        ]

    found = {"optax_muon": turns(10, 40, 10), "soap": turns(19, 76, 19), "kfac": turns(19, 76, 19, over_state=0.4)}
    rows = compiled.rows_of(found, "gpt2", "v5e")
    assert rows["soap"]["ratio"] == {"median": 1.9, "low": 1.9, "high": 1.9, "n": 3}
    assert rows["soap"]["holds"]
    assert not rows["kfac"]["holds"]
    assert not compiled.rows_of(found, "gpt2", "h200")["soap"]["holds"]
    assert "holds" not in compiled.rows_of(found, "gpt2", "cpu")["soap"]
    assert not compiled.rows_of(found, "distinct", "cpu")["soap"]["holds"]
    assert "holds" not in compiled.rows_of(found, "distinct", "v5e")["soap"]


@pytest.mark.parametrize("name", ["soap", "dykaf", "shampoo"])
def test_layers_of_distinct_shapes_share_their_decompositions(name: str) -> None:
    """Of twelve shapes: three for each of two lengths, and three of DyKAF's first pair."""
    params = compiled.layers_of_distinct_shapes()
    found = compiled.compiled(compiled.CONTENDERS[name], compiled.device_of("cpu"), params)
    assert 1 <= found["decompositions"] <= 2 * 3 + 3
