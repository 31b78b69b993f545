"""What the benchmarks of factors, Fisher tools and compression measure is what they say."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.speed import compression_speed
from benchmarks.tools import kronecker_error, merging, pruning
from experiments import fisher_simulations
from experiments import kronecker_error as experiment
from tests.benchmarks.made_up_results import lookup
from tests.reference import softmax_head as oracle

rng = functools.partial(np.random.default_rng, 0)


def cell(tables: dict[str, Any], path: str) -> Any:
    return lookup({"name": "made up", "tables": tables}, path)


def test_the_nearest_kronecker_product_is_found_where_there_is_one() -> None:
    """Also when no term is small: against a least-squares fit from many starts."""
    A, B = (X @ X.T for X in (rng().normal(size=(3, 3)), rng().normal(size=(2, 2))))
    F = np.kron(A, B)
    assert experiment.measures(F, *experiment.nearest(F, 3, 2)) == pytest.approx((0, 0), abs=1e-12)
    assert experiment.measures(F, 2 * A, B) == pytest.approx((1, 0), abs=1e-12)
    F = F + np.kron(B[:1, :1] * np.eye(3), np.eye(2))
    least = experiment.measures(F, *experiment.nearest(F, 3, 2))[0]
    for seed in range(20):
        L, R = np.random.default_rng(seed).normal(size=(3, 3)), np.eye(2)
        for _ in range(50):
            R = np.einsum("ij,ikjl->kl", L, F.reshape(3, 2, 3, 2)) / np.sum(L**2)
            L = np.einsum("kl,ikjl->ij", R, F.reshape(3, 2, 3, 2)) / np.sum(R**2)
        assert np.linalg.norm(F - np.kron(L, R)) / np.linalg.norm(F) >= least - 1e-9


def test_what_is_off_the_diagonal_is_a_share_of_squares() -> None:
    F = np.array([[3.0, 1.0], [1.0, 3.0]])
    assert experiment.measures(F, np.diag([1.0, 2.0]), np.eye(1))[1] == pytest.approx(2 / 20)
    assert experiment.measures(F, F, np.eye(1))[1] == pytest.approx(0)


def test_dykaf_gains_over_shampoo_seed_by_seed() -> None:
    """Medians decide since when it is nearer; the gain is that of the last step."""
    ours = [[(0.9, 0.5), (0.2, 0.4)], [(0.9, 0.5), (0.3, 0.4)], [(0.9, 0.5), (0.9, 0.4)]]
    theirs = [[(0.8, 0.5), (0.4, 0.8)]] * 3
    found = kronecker_error.gain({"dykaf": ours, "shampoo_trace": theirs})
    assert found["lower"] == {"median": pytest.approx(0.25), "low": pytest.approx(-1.25), "high": 0.5, "n": 3}
    assert found["lower_off"]["median"] == pytest.approx(0.5)
    assert found["first"] == 2 * experiment.EVERY


def test_numpys_sparsegpt_is_ours_and_both_ways_to_choose_are_one() -> None:
    """What is timed against each other does the same, over several blocks of inputs."""
    found = compression_speed.sparsegpt(1, (160, 6))
    assert found["other_masks"] == 0
    assert found["difference"] < 1e-5
    assert [len(times) for times in found["seconds"].values()] == [1, 1, 1]
    assert compression_speed.selection(1, (16, 8))["bits"]["same"] == "yes"


def test_the_share_of_time_is_of_the_faster_numpy() -> None:
    seconds = {"ours": [0.2, 0.1, 0.3], "numpy": [0.8, 0.9, 0.7], "numpy_threads": [0.5, 0.4, 0.6]}
    given = {"seconds": seconds, "trace_s": 1.0, "compile_s": 2.0, "other_masks": 0, "difference": 1e-7}
    rows = compression_speed.sparsegpt_rows(given)
    assert rows["ours"]["share"] == pytest.approx(0.4)
    assert rows["ours"]["ms"]["high"] == pytest.approx(300)


def test_the_other_ways_to_solve_with_a_head_are_right_where_rounding_is_no_matter() -> None:
    """Otherwise their errors would say nothing of the methods."""
    P, Y, λ = oracle.softmax(rng().normal(size=(4, 12))), rng().normal(size=(12, 2)), 0.5
    Y -= Y.mean(0)
    wanted = oracle.solve(oracle.laplacian(P, np.ones(4)), Y, λ)
    for solve in (fisher_simulations.as_it_stands, fisher_simulations.deflated):
        found = solve(jnp.asarray(P, jnp.float32), jnp.asarray(Y, jnp.float32), λ)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_simulated_truth_is_the_mean_of_what_is_drawn() -> None:
    """With every text its own draw, intervals that are right hold it in about 95 % of cases; the two others do not."""
    found = fisher_simulations.coverage(1500)
    assert found["texts"] == pytest.approx(0.95, abs=0.02)
    assert found["tokens"] < 0.5
    assert found["one_draw"] > 0.99


def row(method: str, variant: str, draw: int, perplexity: float) -> dict[str, Any]:
    return {
        "method": method, "variant": variant, "draw": draw, "sparsity": "0.5", "perplexity": perplexity,
        "error": 10 * perplexity,
    }  # fmt: skip


def test_pruning_compares_draw_by_draw() -> None:
    """Magnitude, which sees no data, has one draw for all."""
    rows = [row("magnitude", "given", 0, 8.0)]
    rows += [row("wanda", "given", i, x) for i, x in enumerate((4.0, 6.0, 7.0))]
    rows += [row("wanda", "pruned", i, x) for i, x in enumerate((8.0, 9.0, 7.0))]
    found = pruning.tables({"perplexity": 3.0, "parameters": 100, "steps": 10}, rows)
    assert cell(found, "given/wanda/50%") == 6.0
    assert found["order"]["rows"]["wanda"]["50%"] == {"median": 0.75, "low": 0.5, "high": 0.875, "n": 3}
    assert found["sequential_share"]["rows"]["wanda"]["50%"] == {"median": 1.5, "low": 1.0, "high": 2.0, "n": 3}
    assert "magnitude" not in found["sequential_share"]["rows"]
    assert "owl" not in found
    assert cell(found, "model/dense/perplexity") == 3.0


def test_merging_compares_seed_by_seed() -> None:
    """Accuracy on both tasks is their mean; differences are in points."""

    def seed(fisher: float, average: float) -> dict[str, Any]:
        of = lambda x: {  # noqa: E731
            "number": 0.5, "test": [x - 0.1, x + 0.1], "at one half": [x, x - 0.2], "numbers": [0.5], "path": [[x, x]],
        }  # fmt: skip
        return {"methods": {**dict.fromkeys(merging.NAMES.values(), of(0.5)), merging.FISHER: of(fisher),
                            merging.PLAIN: of(average)}}  # fmt: skip

    seeds = [seed(0.8, 0.6), seed(0.5, 0.7), seed(0.9, 0.6)]
    found = merging.tables({"classes": seeds})
    assert cell(found, "both/fisher/classes") == pytest.approx(0.8)
    assert cell(found, "classes/average/half/low") == pytest.approx(0.5)
    gain = found["classes_gain"]["rows"]["fisher_over_average"]
    assert gain["gain"] == {"median": pytest.approx(20), "low": pytest.approx(-20), "high": pytest.approx(30), "n": 3}
    assert (gain["better"], gain["worse"]) == (2, 1)
