"""Muon's application: the polar factor of the gradient."""

import math
from collections.abc import Sequence
from types import NoneType
from typing import Any

from jaxtyping import Array, Inexact

from ... import linalg
from ..contracts import Application, Moments


def orthogonal(
    polynomial: Sequence[Sequence[float]] | None = None,
    scale: str | float = 1.0,
    *,
    method: str = "auto",
    dtype: Any = None,
) -> Application:
    """``U = scale(m, n) · polar(G)``, the polar factor by a Newton-Schulz iteration.

    Args:
      polynomial: coefficients (a, b, c) of each step, default `fo.polar_express()`.
      scale: "match_rms_adamw" ``0.2 sqrt(max(m, n))``, "shape" ``sqrt(max(1, n/m))``, "unit_rms" ``sqrt(n/m)``, or a
        number.
      method: "direct", "gram", or "auto": whichever takes fewer flops for the shape.
      dtype: what the products of the iteration are rounded to, default float32 at least.

    Raises:
      ValueError: for an unknown scale or method, or a polynomial that is no sequence of triples.

    Example:
      >>> import optax, fisher_optax as fo
      >>> polar = fo.precondition(None, None, fo.applications.orthogonal(scale="shape"), fallback=optax.identity())
    """
    coefficients = linalg.polar_express() if polynomial is None else linalg.as_polynomial(polynomial)
    shape_scale(scale, 1, 1)
    if method not in ("auto", "direct", "gram"):
        raise ValueError(f"method must be 'auto', 'direct' or 'gram'; got {method!r}.")

    def update(G: Inexact[Array, "m n"], state: Any, basis: Any, **extra: Any) -> tuple[Array, Any]:
        del basis, extra
        return shape_scale(scale, *G.shape) * linalg.orthogonalize(G, coefficients, method=method, dtype=dtype), state

    nothing = Moments((), ())
    return Application(
        "orthogonal", (NoneType,), lambda G: (), update, lambda state: nothing, lambda state, moments: state
    )


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
