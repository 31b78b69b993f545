"""The polar factor of a matrix, as a step: what Muon does to one."""

import math
from collections.abc import Sequence
from typing import Any

import optax
from jaxtyping import Array, Inexact

from .. import linalg


def polar(
    polynomial: Sequence[Sequence[float]] | None = None,
    scale: str | float = 1.0,
    *,
    method: str = "auto",
    dtype: Any = None,
) -> optax.GradientTransformation:
    """``U = scale(m, n) · polar(G)`` of one matrix, by a Newton-Schulz iteration; `fo.applications.orthogonal` has the
    arguments, and what they raise.
    """
    coefficients = linalg.polar_express() if polynomial is None else linalg.as_polynomial(polynomial)
    shape_scale(scale, 1, 1)
    if method not in ("auto", "direct", "gram"):
        raise ValueError(f"method must be 'auto', 'direct' or 'gram'; got {method!r}.")

    def factor(G: Inexact[Array, "m n"]) -> Array:
        return shape_scale(scale, *G.shape) * linalg.orthogonalize(G, coefficients, method=method, dtype=dtype)

    def step(updates: Any, params: Any) -> Any:
        del params
        return factor(updates)

    return optax.stateless(step)


def shape_scale(scale: str | float, m: int, n: int) -> Any:
    """The factor in front of the polar factor of an ``m x n`` (in x out) matrix."""
    if not isinstance(scale, str):
        return scale
    scales = {
        "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
        "shape": math.sqrt(max(1.0, n / m)),
        "unit_rms": math.sqrt(n / m),
    }
    if scale not in scales:
        raise ValueError(f"scale must be a number or one of {', '.join(map(repr, scales))}; got {scale!r}.")
    return scales[scale]
