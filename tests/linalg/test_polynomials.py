"""The Newton-Schulz polynomials against what was published of them, and scaling over a type's whole range."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax.linalg import as_polynomial, jordan, polar_express, unit_frobenius, unit_scale, you
from tests.reference.newton_schulz import PUBLISHED_POLAR_EXPRESS, scalar


def test_polar_express_reproduces_the_published_digits() -> None:
    np.testing.assert_allclose(polar_express(3, safety=1.0), PUBLISHED_POLAR_EXPRESS, rtol=1e-13)


def test_safety_shrinks_the_argument_of_all_but_the_last_quintic() -> None:
    plain, safe = polar_express(4, safety=1.0), polar_express(4, safety=1.05)
    x = np.linspace(0, 1, 7)
    for raw, damped in zip(plain[:-1], safe[:-1], strict=True):
        np.testing.assert_allclose(scalar(x, [damped]), scalar(x / 1.05, [raw]), atol=1e-14)
    assert safe[-1] == plain[-1]


def test_each_quintic_of_polar_express_equioscillates_on_what_the_last_left() -> None:
    """Recentred, the first quintic's extreme errors on [max(lower, cushion), 1] have one size and alternate in sign."""
    a, b, c = polar_express(1, safety=1.0)[0]
    x = np.linspace(0.02407327424182761, 1, 200_001)
    y = scalar(x, [(a, b, c)])
    turning = np.flatnonzero(np.diff(np.sign(np.diff(y)))) + 1
    extremes = y[[0, *turning, -1]]
    assert len(extremes) == 4
    np.testing.assert_allclose(extremes[::2], extremes[0], rtol=1e-6)
    np.testing.assert_allclose(extremes[1::2], extremes[1], rtol=1e-6)
    assert extremes[0] < extremes[1]


@pytest.mark.parametrize(
    ("polynomial", "lower", "least", "most"),
    [
        (jordan(5), 1e-2, 0.682, 1.134),
        (you(), 1e-2, 0.978, 1.032),
        (polar_express(5), 1e-2, 0.876, 1.124),
        (polar_express(8), 1e-2, 1.0, 1.0),
        (jordan(5), 1e-3, 0.471, None),
        (you(), 1e-3, 0.475, None),
        (polar_express(5), 1e-3, 0.852, None),
        (polar_express(8), 1e-3, 1.0, 1.0),
    ],
)
def test_range_of_the_composed_map(polynomial: Any, lower: float, least: float, most: float | None) -> None:
    """The least and the greatest image of [lower, 1], to the third decimal."""
    y = scalar(np.geomspace(lower, 1, 200_001), polynomial)
    np.testing.assert_allclose(y.min(), least, atol=6e-4)
    if most is not None:
        np.testing.assert_allclose(y.max(), most, atol=6e-4)


def test_polynomials_are_checked() -> None:
    assert as_polynomial(np.array(you())) == you()
    for bad in ([], [()], [(1.0, 2.0)], [(1.0, 2.0, float("nan"))], [(1.0, 2.0, 3.0, 4.0)]):
        with pytest.raises(ValueError, match=re.escape("wanted a sequence of (a, b, c)")):
            as_polynomial(bad)
    for steps in (0, -1):
        for make in (polar_express, jordan):
            with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
                make(steps)
    for options in ({"lower": 0.0}, {"lower": 1.0}, {"cushion": 1.0}, {"safety": 0.99}):
        with pytest.raises(ValueError, match="lower must lie in"):
            polar_express(5, **options)


def test_scaling_is_by_a_power_of_two_a_matrix() -> None:
    """Into [2, 4) wherever the largest entry is a normal number, and no digit is lost, of subnormal entries neither."""
    X = (
        np.random.default_rng(0).standard_normal((4, 4, 5)) * np.array([1.0, 3e-38, 3e37, 1e-40])[:, None, None]
    ).astype(np.float32)
    Y = np.asarray(unit_scale(jnp.asarray(X)), np.float64)
    ratio = Y / X.astype(np.float64)
    np.testing.assert_array_equal(ratio, np.broadcast_to(ratio[:, :1, :1], X.shape))
    np.testing.assert_array_equal(np.log2(ratio) % 1, 0)
    top = np.abs(Y).max(axis=(1, 2))
    assert ((top[:3] >= 2) & (top[:3] < 4)).all()
    np.testing.assert_allclose(np.linalg.norm(unit_frobenius(jnp.asarray(X)), axis=(1, 2)), 1, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_scaling_of_doubles() -> None:
    X = np.random.default_rng(0).standard_normal((3, 4, 5)) * np.array([1e-300, 1e300, 1e-310])[:, None, None]
    np.testing.assert_allclose(np.linalg.norm(unit_frobenius(jnp.asarray(X)), axis=(1, 2)), 1, rtol=1e-12)
