"""What is read off compiled programs, and judged; by the compiler for the CPU, on a small tree."""

import jax
import jax.numpy as jnp
import pytest

import fisher_optax as fo
from benchmarks.speed import compiled
from benchmarks.trees import Tree, hidden, make_params

PARAMS = make_params(Tree(3, 16))
AXES = jax.tree.map(lambda x: fo.MatrixAxes(0, 1) if x else None, hidden(PARAMS))


@pytest.mark.parametrize("name", ["soap", "kfac"])
def test_a_step_is_compiled_for_the_machine_at_hand(name: str) -> None:
    """On a CPU, an eigh and two QR for each length of side; no copy of the state."""
    found = compiled.compiled(compiled.CONTENDERS[name], compiled.device_of("cpu"), PARAMS, AXES)
    lengths = 3
    assert found["decompositions"] == 3 * lengths
    assert 0 < found["over_state"] < 1
    assert found["compile"] > 0


def test_calls_and_conditionals_are_counted() -> None:
    def f(A: jax.Array, go: jax.Array) -> jax.Array:
        return jax.lax.cond(go, jnp.linalg.cholesky, lambda A: A @ A, A)

    program = jax.jit(f).lower(jnp.eye(4), jnp.asarray(True)).compile()
    found = compiled.measures(program, jnp.eye(4), jnp.eye(4))
    assert (found["decompositions"], found["conditionals"], found["loops"]) == (1, 1, 0)


def test_a_bound_is_judged_turn_by_turn() -> None:
    """A slow turn is slow for both; a step whose memory or whose compilation is over its bound does not hold."""

    def turns(*seconds: float, over_state: float = 0.1) -> list[dict[str, float]]:
        return [
            {"compile": s, "over_state": over_state, "over_parameters": 0.1, "temporaries_mb": 1.0} for s in seconds
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
    tree = compiled.params_and_axes(compiled.DISTINCT)
    found = compiled.compiled(compiled.CONTENDERS[name], compiled.device_of("cpu"), *tree)
    assert 1 <= found["decompositions"] <= 2 * 3 + 3


def test_scanned_layers_are_matrices_of_one_leaf() -> None:
    params, axes = compiled.params_and_axes("small_scanned")
    assert params["blocks"]["mlp"]["up"]["kernel"].shape == (6, 384, 1536)
    assert axes["blocks"]["mlp"]["up"]["kernel"] == fo.MatrixAxes(1, 2, 0)
    statistics = compiled.statistics_of(params, axes, squares=False)["blocks"]["mlp"]["up"]["kernel"]
    assert (statistics.left.shape, statistics.right.shape) == ((6, 384, 384), (6, 1536, 1536))
