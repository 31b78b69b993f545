"""Muon's application: the polar factor of the gradient."""

from collections.abc import Sequence
from types import NoneType

from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, PyTree

from ...transforms.per_matrix import polar
from ..contracts import Application, Moments


def orthogonal(
    polynomial: Sequence[Sequence[float]] | None = None,
    scale: str | float = 1.0,
    *,
    method: str = "auto",
    dtype: DTypeLike | None = None,
) -> Application:
    """``U = scale(m, n) · polar(G)``, the polar factor by a Newton-Schulz iteration.

    Args:
      polynomial: coefficients (a, b, c) of each step, default `fo.polar_express()`.
      scale: "match_rms_adamw" ``0.2 sqrt(max(m, n))``, "shape" ``sqrt(max(1, n/m))``, "unit_rms" ``sqrt(n/m)``, or a
        number.
      method: "direct", "gram", or "auto", as in `fo.linalg.orthogonalize`.
      dtype: what the products of the iteration are rounded to, default float32 at least.

    Raises:
      ValueError: for an unknown scale or method, or a polynomial that is no sequence of triples.

    Example:
      >>> import optax, fisher_optax as fo
      >>> polar = fo.precondition(None, None, fo.applications.orthogonal(scale="shape"), fallback=optax.identity())
    """
    tx = polar(polynomial, scale, method=method, dtype=dtype)

    def update(G: Inexact[Array, "m n"], state: PyTree, basis: PyTree, **extra: PyTree) -> tuple[Array, PyTree]:
        del basis, extra
        stepped: tuple[PyTree, PyTree] = tx.update(G, state)
        return stepped

    nothing = Moments((), ())
    return Application("orthogonal", (NoneType,), tx.init, update, lambda state: nothing, lambda state, moments: state)
