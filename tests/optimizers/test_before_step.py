"""Bases that are renewed before the step, from factors that hold its gradient; test_soap and test_kl have the rule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo

ROTATED = (fo.scale_by_soap, fo.scale_by_kl_soap, fo.scale_by_dykaf)


def directions(make: Any, gradients: list[np.ndarray], **options: Any) -> list[np.ndarray]:
    tx = make(precondition_frequency=1, **options)
    W = {"kernel": jnp.zeros(gradients[0].shape)}
    state, update, found = tx.init(W), jax.jit(tx.update), []
    for G in gradients:
        U, state = update({"kernel": jnp.asarray(G)}, state, W)
        found.append(np.asarray(U["kernel"]))
    return found


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(6, 6), (6, 4), (4, 6)], ids=str)
def test_the_first_step_is_the_polar_factor(shape: tuple[int, ...]) -> None:
    """In its own basis a gradient is diagonal, and Adam's first step is its signs."""
    G = np.random.default_rng(0).normal(size=shape)
    (U,) = directions(fo.scale_by_soap, [G], refresh=fo.Refresh(before_step=True))
    left, _, right = np.linalg.svd(G, full_matrices=False)
    np.testing.assert_allclose(U, left @ right, atol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", ROTATED, ids=lambda make: make.__name__)
def test_a_spike_is_one_entry_of_a_basis_that_knows_it(make: Any) -> None:
    """A gradient of rank one, a thousand times as large as those before it. Bases of earlier gradients, though renewed
    at every step, spread it over all entries: they step in one direction, each as far as any, and from then on its
    squares hold all of them back.
    """
    rng = np.random.default_rng(0)
    small = [rng.normal(size=(16, 16)) for _ in range(23)]
    gradients = [*small[:20], 1000 * np.outer(rng.normal(size=16), rng.normal(size=16)), *small[20:]]
    for transport in ("permute", "squared"):
        after, before = (
            directions(make, gradients, refresh=fo.Refresh(before_step=step, transport=transport))
            for step in (False, True)
        )
        usual = np.linalg.norm(before[19], 2)
        assert np.linalg.norm(after[20], 2) > 2 * usual
        assert np.linalg.norm(before[20], 2) < 1.2 * usual
        assert np.linalg.norm(after[-1]) < 0.6 * np.linalg.norm(after[19])
        assert np.linalg.norm(before[-1]) > 0.8 * np.linalg.norm(before[19])


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(ValueError, match=r"fo\.soap: with before_step=True .* leave out first_step='skip'"):
        fo.soap(refresh=fo.Refresh(before_step=True, first_step="skip"))
    for method in (fo.shampoo, fo.kfac, fo.soap_muon):
        with pytest.raises(ValueError, match="takes no before_step"):
            method(0.1, refresh=fo.Refresh(before_step=True))
