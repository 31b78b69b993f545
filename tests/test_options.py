"""`fo.Refresh` and `fo.Storage`: what each method takes of them."""

from typing import Any

import pytest

import fisher_optax as fo


@pytest.mark.parametrize(
    ("make", "value", "known"),
    [
        (lambda word: fo.soap(refresh=word), "often", "refresh must be one of 'every', 'adaptive', 'staggered'"),
        (lambda word: fo.Refresh(transport=word), "cubed", "transport must be one of None, 'permute', 'squared'"),
        (lambda word: fo.Refresh(first_step=word), "sgd", "first_step must be one of None, 'skip', 'adam'"),
        (
            lambda word: fo.soap(refresh=fo.Refresh(by=word)),
            "svd",
            "refresh.by must be one of 'qr', 'cholesky', 'eigh'",
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
    with pytest.raises(ValueError, match=r"fo.kfac takes no transport.*It takes when, by, tolerance\."):
        fo.kfac(0.1, refresh=fo.Refresh(transport="permute"))
    with pytest.raises(ValueError, match=r"fo\.precondition takes no by"):
        fo.precondition(None, None, fo.applications.orthogonal(), refresh=fo.Refresh(by="eigh"))
    with pytest.raises(TypeError, match="refresh"):
        fo.soap(refresh=3)
    with pytest.raises(TypeError, match="storage"):
        fo.soap(storage="packed")
