"""Spectra of blocks against dense eigenvalues, and how many directions they are said to use."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisher_optax as fo
from fisher_optax.fisher.operators.operator import Operator, RowRule
from fisher_optax.fisher.spectra.capacity import block_spectra, effective_rank, participation_ratio
from fisher_optax.fisher.spectra.spectrum import spectrum

RNG = np.random.default_rng(0)
SPECTRA = np.stack([0.6 ** np.arange(50), np.pad([3.0, 2.0, 1.0], (0, 47)), -np.pad([3.0, 2.0, 1.0], (0, 47))])


def params() -> dict[str, Any]:
    """A module with leaves of its own and another inside, and a leaf of no module."""
    attention = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(3)}
    return {"head": jnp.zeros(2), "tower": {"attention": attention, "scale": jnp.zeros(5)}}


PLACES = {"head": range(2), "tower/attention": range(2, 17), "tower": range(17, 22)}
CALLS = []


@dataclasses.dataclass(frozen=True)
class Sum(RowRule):
    """Of outer products of the rows it is given."""

    def product(self, data: Any, v: Any) -> Any:
        flat, unravel = ravel_pytree(v)
        return unravel(data.T @ (data @ flat))

    def rows(self, data: Any) -> Any:
        CALLS.append(data.shape)
        return data


@pytest.mark.usefixtures("x64")
def test_blocks_are_those_of_the_dense_matrix() -> None:
    """Modules by default, with the leaves that are theirs alone; no more eigenvalues than rows; rows asked for once.

    A block asked for by its path holds all leaves below.
    """
    R = RNG.standard_normal((4, 22))
    A, CALLS[:] = R.T @ R, []
    rule = Operator.on("sum", Sum(), jnp.asarray(R), params())
    by_rows = block_spectra(rule)
    assert CALLS == [(4, 22)]
    assert set(by_rows) == set(PLACES)
    for name, places in PLACES.items():
        exact = np.linalg.eigvalsh(A[np.ix_(places, places)])[::-1]
        few = by_rows[name]
        assert (few.size, few.rank_bound, few.complete) == (len(places), min(4, len(places)), True)
        np.testing.assert_allclose(few.eigenvalues, exact[: few.rank_bound], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(few.participation, exact.sum() ** 2 / (exact**2).sum(), rtol=1e-10)
    np.testing.assert_allclose(sum(block.trace for block in by_rows.values()), np.trace(A))
    both = [block_spectra(of, ["tower"], k=5)["tower"] for of in (Operator.from_dense(jnp.asarray(A), params()), rule)]
    np.testing.assert_allclose(both[0].eigenvalues[:4], both[1].eigenvalues, rtol=1e-12)
    assert [(b.size, b.rank_bound, b.complete) for b in both] == [(20, 20, False), (20, 4, True)]


@pytest.mark.usefixtures("x64")
def test_the_fisher_of_a_model() -> None:
    """Of softmax regression: rows, products and dense entries agree, and adding to all logits alike changes nothing."""
    x, y = jnp.asarray(RNG.standard_normal((30, 3))), jnp.arange(30) % 4
    W = {"kernel": jnp.asarray(RNG.standard_normal((3, 4)))}
    F = fo.fisher.operator(lambda p, x, y: fo.losses.softmax_cross_entropy(x @ p["kernel"], y), W, x, y)
    exact = np.linalg.eigvalsh(np.asarray(F.dense()))[::-1]
    assert (np.abs(exact[9:]) < 1e-15).all()
    np.testing.assert_allclose(spectrum(F, 12).eigenvalues, exact, rtol=0, atol=1e-12)
    np.testing.assert_allclose(block_spectra(F)["kernel"].eigenvalues, exact, rtol=0, atol=1e-12)


def test_rows_that_are_not_finite_are_named() -> None:
    R = np.ones((4, 22), np.float32)
    R[0, 18] = np.inf
    with pytest.raises(ValueError, match=r"sum: its rows are not finite in 'tower'"):
        block_spectra(Operator.on("sum", Sum(), jnp.asarray(R), params()))


@pytest.mark.parametrize("measure", [effective_rank, participation_ratio])
def test_capacity(measure: Callable[[Any], Any]) -> None:
    """D of the identity, 1 of rank 1, 0 of nothing, whatever the scale; the same under jit and along a batch."""
    np.testing.assert_allclose(measure(np.full(50, 1e-30)), 50, rtol=1e-5)
    np.testing.assert_allclose(measure(np.full(50, 1e30)), 50, rtol=1e-5)
    np.testing.assert_allclose(measure(1e30 * np.eye(50)[3]), 1, rtol=1e-6)
    assert measure(np.zeros(50)) == 0
    np.testing.assert_allclose(jax.jit(measure)(SPECTRA), [measure(x) for x in SPECTRA], rtol=1e-6)
    assert measure(SPECTRA[1]) == measure(SPECTRA[2])


def test_capacity_by_hand() -> None:
    np.testing.assert_allclose(effective_rank([3, 1]), 4 / 3**0.75, rtol=1e-6)
    np.testing.assert_allclose(participation_ratio([3, 1]), 1.6, rtol=1e-6)
