"""The polar factor with a root of the inputs' moment before it, or around it."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from ... import linalg
from ..._arguments import in_range, one_of
from ...transforms.momentum import with_momentum
from ...transforms.per_matrix import polar, shape_scale
from ..contracts import Application, InverseRoot, Moments

FORMS = ("newton", "sandwich")
Matrix = Float[Array, "m n"]
Root = Float[Array, "m m"] | None


def rooted_polar(
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    *,
    form: str = "newton",
    scale: str | float = 1.0,
    polynomial: Sequence[Sequence[float]] | None = None,
    momentum_dtype: DTypeLike | None = None,
) -> Application:
    """Muon's step, with a root S of the left factor.

        newton     u = momentum of S G;   U = scale(m, n) · polar(u)
        sandwich   u = momentum of G;     D = S polar(S u);   U = scale(m, n) · D sqrt(min(m, n)) / |D|

    A side without a factor has ``S = I``, which makes Muon of both.

    Args:
      beta: momentum, number or schedule.
      nesterov: look one step ahead.
      form: "newton", for the inverse, or "sandwich", for its square root.
      scale, polynomial: as in `fo.applications.orthogonal`.
      momentum_dtype: storage of the momentum; float32 at least by default.

    Raises:
      ValueError: for an argument out of range, or an unknown word.
    """
    in_range("beta", beta, 0, 1)
    one_of("form", form, FORMS)
    shape_scale(scale, 1, 1)
    orthogonalized = polar(polynomial, scale)
    unscaled = polar(polynomial)

    def sandwiched(S: Root, u: PyTree, params: PyTree) -> Matrix:
        del params
        # Of any size its dtype can hold, since the step has no scale.
        D = _times(S, _polar(unscaled, _times(S, _relative(u, jnp.max(jnp.abs(u))))))
        m, n = D.shape
        return shape_scale(scale, m, n) * min(m, n) ** 0.5 * _relative(D, jnp.linalg.norm(D))

    def momentum(S: Root) -> optax.GradientTransformationExtraArgs:
        inner = orthogonalized if form == "newton" else optax.stateless(functools.partial(sandwiched, S))
        return with_momentum(inner, beta, nesterov, momentum_dtype)

    def update(G: Matrix, state: PyTree, basis: InverseRoot, **extra: PyTree) -> tuple[Matrix, PyTree]:
        del extra
        S = None if basis.left is None else basis.left.astype(G.dtype)
        stepped: tuple[PyTree, PyTree] = momentum(S).update(_times(S, G) if form == "newton" else G, state)
        return stepped

    nothing = Moments((), ())
    return Application(
        f"{form} polar",
        (InverseRoot,),
        momentum(None).init,
        update,
        lambda state: nothing,
        lambda state, moments: state,
        sees_itself=True,
    )


def _polar(tx: optax.GradientTransformation, X: Matrix) -> Matrix:
    stepped: tuple[PyTree, PyTree] = tx.update(X, optax.EmptyState())
    return stepped[0]


def _times(S: Root, X: Matrix) -> Matrix:
    return X if S is None else linalg.into_basis(S, X, None)


def _relative(X: Matrix, size: Array) -> Matrix:
    """``X / size``; what is nothing stays."""
    return X / jnp.where(size == 0, 1, size)
