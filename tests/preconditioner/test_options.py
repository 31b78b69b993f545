"""`fo.Refresh` and `fo.Storage`: what each method takes of them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo


@pytest.mark.parametrize(
    ("make", "value", "known"),
    [
        (lambda word: fo.soap(refresh=word), "often", "refresh must be one of 'every', 'adaptive', 'staggered'"),
        (lambda word: fo.Refresh(transport=word), "cubed", "transport must be one of None, 'permute', 'squared'"),
        (lambda word: fo.Refresh(first_step=word), "sgd", "first_step must be one of None, 'skip', 'adam'"),
        (
            lambda word: fo.soap(refresh=fo.Refresh(decomposition=word)),
            "svd",
            "decomposition must be one of 'auto', 'qr', 'cholesky', 'eigh'",
        ),
        (lambda word: fo.Storage(sides=word), "left", "sides must be one of 'both', 'shorter'"),
    ],
)
def test_unknown_words_are_refused_with_the_known_ones(make: Any, value: str, known: str) -> None:
    with pytest.raises(ValueError, match=known) as error:
        make(value)
    assert repr(value) in str(error.value)


def test_what_a_method_does_not_take_is_refused_with_what_it_takes() -> None:
    with pytest.raises(ValueError, match=r"fo.soap takes no rank; got Storage\(rank=8\). It takes factor_dtype, "):
        fo.soap(storage=fo.Storage(rank=8))
    with pytest.raises(ValueError, match=r"fo.kfac takes no transport.*It takes when, decomposition, tolerance\."):
        fo.kfac(0.1, refresh=fo.Refresh(transport="permute"))
    with pytest.raises(ValueError, match=r"fo\.precondition takes no decomposition"):
        fo.precondition(None, None, fo.applications.orthogonal(), refresh=fo.Refresh(decomposition="eigh"))
    with pytest.raises(TypeError, match="refresh"):
        fo.soap(refresh=3)
    with pytest.raises(TypeError, match="storage"):
        fo.soap(storage="packed")


def test_an_argument_that_is_a_field_of_another_says_of_which() -> None:
    for make in (fo.soap, optax.inject_hyperparams(fo.soap)):
        with pytest.raises(
            TypeError, match=r"block_size= is a field of storage=: pass storage=fo.Storage\(block_size="
        ):
            make(block_size=128)
        with pytest.raises(TypeError, match=r"pass refresh=fo.Refresh\(decomposition="):
            make(decomposition="eigh")
        with pytest.raises(TypeError, match="unexpected keyword argument 'block_sise'"):
            make(block_sise=128)


def test_an_application_without_factors_gets_what_update_gets() -> None:
    def update(G: Any, state: Any, basis: Any, *, by: float, **extra: Any) -> tuple[Any, Any]:
        return by * G, state

    polar = fo.applications.orthogonal()
    tx = fo.precondition(None, None, polar._replace(name="scaled", update=update))
    params = {"kernel": jnp.ones((4, 3))}
    updates, _ = tx.update(params, tx.init(params), params, by=3.0)
    np.testing.assert_array_equal(updates["kernel"], 3)
    with pytest.raises(ValueError, match="precondition_frequency must be an integer of at least 1; got 0"):
        fo.precondition(None, None, polar, precondition_frequency=0)


def test_factors_of_statistics_are_for_methods_of_layers() -> None:
    """`fo.precondition` has no layers to align statistics with."""
    application = fo.applications.damped(1e-3, -1.0)
    with pytest.raises(TypeError, match=r"takes factors of gradients; 'Kronecker' ones follow .* fo.kfac, fo.ekfac"):
        fo.precondition(
            fo.factors.kronecker(0.95), fo.decompositions.with_eigenvalues(fo.decompositions.eigh()), application
        )
