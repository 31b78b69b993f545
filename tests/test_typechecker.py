"""Functions that are defined anew share a check, and each is checked."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from jax import Array
from jaxtyping import Float, TypeCheckError, jaxtyped

from tests.typechecker import check, checked


def define(row: int, whole: bool = False) -> Callable[..., Any]:
    @jaxtyped(typechecker=check)
    def of(x: Float[Array, "m m"], scale: float = row) -> Float[Array, " m"]:
        return scale * (x if whole else x[row])

    return of


def test_equal_signatures_share_a_check_and_nothing_else() -> None:
    x = jnp.arange(4.0).reshape(2, 2)
    assert define(1)(x).tolist() == [2.0, 3.0]
    before = len(checked)
    assert define(0)(x, 2).tolist() == [0.0, 2.0]  # an int is a float
    assert len(checked) == before


@pytest.mark.parametrize("shape", [(2, 3), (2,)])
def test_what_does_not_fit_is_refused_by_each(shape: tuple[int, ...]) -> None:
    for of in (define(0), define(1)):
        with pytest.raises(TypeCheckError, match="parameters"):
            of(jnp.ones(shape))
    with pytest.raises(TypeCheckError, match="return value"):
        define(0, whole=True)(jnp.ones((2, 2)), 1.0)
