"""Information geometry of a log-density, and of a model: what the Fisher says about the distributions p_θ themselves.

    score             s(x) = ∂ log p_θ(x) / ∂θ                      E s = 0
    information       F = E[s sᵀ] = -E[∂² log p_θ(x) / ∂θ²]        symmetric, positive semidefinite
    of a statistic    F_T = E[s̃ s̃ᵀ], s̃ = E[s | T]                  F_T ≼ F, equal where T is sufficient
    metric            ⟨u, v⟩ = uᵀ F v                               KL(p_θ ‖ p_(θ+Δ)) = ½ ΔᵀFΔ + O(|Δ|³)
    other parameters  F_η = Jᵀ F J, J = ∂θ/∂η
    null directions   F v = 0: moving along v leaves p_θ as it is, to first order

The first three are made in `log_density`, from gradients at points. Everything else takes ``F``: a D x D array, or a
`fo.fisher.Operator`, the Fisher of a model; parameters are in the order of `jax.flatten_util.ravel_pytree`. Where all
eigenvalues are needed an operator is made dense, up to `LIMIT` parameters. An eigenvalue counts as 0 where
``λ <= tolerance λ_max``; tolerance is D times the float's epsilon by default. That compares parameters with each other:
give those of very different units comparable ones first.

Everything runs under `jax.jit` except `null_directions`. An error that depends on numbers, such as a matrix that is not
symmetric, not finite or has a negative eigenvalue, is raised outside of it only.

Source: Amari and Nagaoka 2000, "Methods of Information Geometry", chapters 2 and 4; Rao 1945 for F as a metric and a
bound.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.lax import Precision
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._arguments import in_range
from .log_density import information, promoted, score, statistic_information
from .operators.operator import Operator
from .operators.vectors import raveled, size_of

__all__ = [
    "cramer_rao_bound",
    "information",
    "inner_product",
    "jeffreys_log_prior",
    "kl_quadratic",
    "natural_gradient",
    "null_directions",
    "rank",
    "reparametrised",
    "score",
    "statistic_information",
]

Fisher = ArrayLike | Operator

# From here on an eigendecomposition takes hours, and gigabytes.
LIMIT = 20_000


def inner_product(F: Fisher, u: PyTree, v: PyTree) -> Float[Array, ""]:
    """``⟨u, v⟩_F = uᵀ F v``, the Fisher metric; u and v are trees like the parameters, or vectors of D.

    Raises:
      ValueError: where F is no symmetric matrix, or u or v do not fit it.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(fo.fisher.geometry.inner_product(jnp.diag(jnp.array([1.0, 4.0])), jnp.ones(2), jnp.ones(2)))
      5.0
    """
    F = _matrix(F)
    return jnp.vdot(_vector(F, u), _product(F, _vector(F, v)), precision=Precision.HIGHEST)


def kl_quadratic(F: Fisher, delta: PyTree) -> Float[Array, ""]:
    """``½ ΔᵀFΔ``: KL(p_θ ‖ p_(θ+Δ)) in nats, up to ``O(|Δ|³)``. Arguments and what raises are as in `inner_product`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(fo.fisher.geometry.kl_quadratic(jnp.diag(jnp.array([1.0, 4.0])), jnp.ones(2)))
      2.5
    """
    return inner_product(F, delta, delta) / 2


def natural_gradient(F: Fisher, grad: PyTree, damping: ArrayLike = 0.0, iterations: int = 1000) -> PyTree:
    """``(F + damping I)⁻¹ grad``, a tree like ``grad``, in float32 at least.

    Of an array by eigenvalues. Undamped and singular, the pseudo-inverse: the shortest solution, and the part of
    ``grad`` along null directions is dropped. Of an operator by conjugate gradients, to about the rounding of a float.

    Args:
      F: an array or an operator.
      grad: a tree like the parameters, or a vector of D.
      damping: 0 by default, the natural gradient itself. An operator needs more than 0: on a singular matrix conjugate
        gradients run away along null directions.
      iterations: at most so many products with an operator; ``√(λ_max / damping)`` times 8 are enough in float32.

    Raises:
      ValueError: as `inner_product`; for negative damping, or none with an operator; for no iterations; for a
        negative eigenvalue.

    Source: Amari 1998, "Natural gradient works efficiently in learning", theorem 1.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(fo.fisher.geometry.natural_gradient(jnp.diag(jnp.array([4.0, 0.0])), jnp.array([8.0, 1.0])))
      [2. 0.]
    """
    in_range("damping", damping, 0)
    in_range("iterations", iterations, 1)
    F = _matrix(F)
    g, unravel = raveled(F, grad)
    if isinstance(F, Operator):
        if not isinstance(damping, Tracer) and damping == 0:
            raise ValueError("an operator needs damping > 0, such as 1e-3; without, pass its entries: F.dense().")
        # Squares of a tiny or huge gradient are 0 or infinite.
        scale = jnp.max(jnp.abs(g))
        unit, tol = g / jnp.where(scale == 0, 1, scale), float(jnp.finfo(g.dtype).eps)
        matvec = lambda v: _product(F, v) + jnp.asarray(damping, v.dtype) * v  # noqa: E731
        x = scale * jax.scipy.sparse.linalg.cg(matvec, unit, tol=tol, maxiter=iterations)[0]
    else:
        λ, Q, zero = _spectrum(F, None)
        zero = zero & (damping == 0)
        inverse = jnp.where(zero, 0, 1 / jnp.where(zero, 1, jnp.maximum(λ, 0) + damping))
        coordinates = jnp.matmul(Q.T, g, precision=Precision.HIGHEST)
        x = jnp.matmul(Q, inverse * coordinates, precision=Precision.HIGHEST)
    return unravel(x.astype(g.dtype))


def jeffreys_log_prior(F: Fisher, tolerance: float | None = None) -> Float[Array, ""]:
    """``½ log det F``, the unnormalised logarithm of Jeffreys' prior; -inf where F is singular. Can be differentiated.

    Raises:
      ValueError: where F is no symmetric matrix, has a negative eigenvalue, or is an operator larger than `LIMIT`.

    Source: Jeffreys 1946, "An invariant form for the prior probability in estimation problems".

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(fo.fisher.geometry.jeffreys_log_prior(jnp.diag(jnp.array([1.0, 4.0]))).round(4))
      0.6931
    """
    λ, _, zero = _spectrum(F, tolerance)
    return jnp.where(jnp.any(zero), -jnp.inf, jnp.sum(jnp.log(jnp.where(zero, 1, λ))) / 2)


def cramer_rao_bound(
    F: Fisher, jacobian: ArrayLike | None = None, tolerance: float | None = None
) -> Float[Array, "m m"]:
    """What no covariance of an unbiased estimator is below: ``F⁻¹`` for θ itself, ``J F⁺ Jᵀ`` for m functions of it.

    Args:
      F: of all that was seen: N times the information of one of N independent samples.
      jacobian: J, m x D, the derivative of the functions; F may be singular where they do not change along its null
        directions. None: θ.

    Raises:
      ValueError: as `jeffreys_log_prior`; where a function changes along a null direction, as then there is no unbiased
        estimator (under jit, NaN); for a Jacobian of another shape.

    Source: Rao 1945; for a singular F, Stoica and Marzetta 2001, "Parameter estimation problems with singular
    information matrices".

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(fo.fisher.geometry.cramer_rao_bound(jnp.diag(jnp.array([4.0, 0.0])), jnp.array([[1.0, 0.0]])))
      [[0.25]]
    """
    λ, Q, zero = _spectrum(F, tolerance)
    J = jnp.eye(len(λ), dtype=λ.dtype) if jacobian is None else promoted(jacobian)
    if J.ndim != 2 or J.shape[1] != len(λ):
        raise ValueError(f"the Jacobian of m functions of θ is m x {len(λ)}, as F is; got {J.shape}.")
    JQ = jnp.matmul(J, Q, precision=Precision.HIGHEST)
    lost = jnp.sqrt(jnp.sum(jnp.where(zero, JQ, 0) ** 2, 1)) > _rounding(λ) * jnp.linalg.norm(J, axis=1)
    if not isinstance(lost, Tracer) and jnp.any(lost):
        raise ValueError(
            f"F has rank {len(λ) - jnp.sum(zero)} of {len(λ)}, and functions {jnp.flatnonzero(lost)} of θ change "
            "along its null directions: they have no unbiased estimator. Take fewer parameters, or pass the Jacobian "
            "of functions that are constant along null_directions(F)."
        )
    B = jnp.where(zero, 0, JQ / jnp.sqrt(jnp.where(zero, 1, λ)))
    return jnp.where(jnp.any(lost), jnp.nan, jnp.matmul(B, B.T, precision=Precision.HIGHEST))


def rank(F: Fisher, tolerance: float | None = None) -> Int[Array, ""]:
    """How many eigenvalues are not 0: the dimension, at θ, of the distributions. Raises as `jeffreys_log_prior`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(fo.fisher.geometry.rank(jnp.ones((3, 3))))
      1
    """
    return jnp.sum(~_spectrum(F, tolerance)[2])


def null_directions(F: Fisher, tolerance: float | None = None) -> Float[Array, "d k"]:
    """Orthonormal columns that span ``{v : F v = 0}``, k = D - `rank`: where the model is overparameterised.

    Not under jit, as k depends on the numbers. A column of an operator's is a tree by ``F.unravel``. Raises as
    `jeffreys_log_prior`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(abs(fo.fisher.geometry.null_directions(jnp.diag(jnp.array([1.0, 0.0])))))
      [[0.]
       [1.]]
    """
    _, Q, zero = _spectrum(F, tolerance)
    return Q[:, zero]


def reparametrised(F: Fisher, jacobian: ArrayLike) -> Float[Array, "n n"]:
    """``Jᵀ F J``, the Fisher of n parameters η with ``J = ∂θ/∂η``, D x n. With few columns, for operators of any size.

    Raises:
      ValueError: where F is no symmetric matrix, or J has not D rows.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(fo.fisher.geometry.reparametrised(jnp.eye(2), jnp.array([[3.0], [4.0]])))
      [[25.]]
    """
    F, J = _matrix(F), promoted(jacobian)
    if J.ndim != 2 or len(J) != size_of(F):
        raise ValueError(f"the Jacobian ∂θ/∂η of n new parameters is {size_of(F)} x n, as F is; got {J.shape}.")
    FJ = jax.lax.map(lambda v: _product(F, v), J.T)
    return jnp.matmul(FJ, J, precision=Precision.HIGHEST)


def _rounding(x: Array) -> np.floating:
    """What is no rounding, as a share of the largest."""
    return jnp.finfo(x.dtype).eps ** 0.5


def _matrix(F: Fisher) -> Array | Operator:
    if isinstance(F, Operator):
        return F
    A = promoted(F)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not A.size:
        raise ValueError(f"F must be a square matrix or a fo.fisher.Operator; got shape {A.shape}.")
    A, largest, skew = _symmetric(A)
    if not isinstance(A, Tracer):
        if not jnp.isfinite(largest):
            raise ValueError("F is not finite: look for points where the log-density or its gradient is not.")
        if skew > _rounding(A) * largest:
            raise ValueError(f"F must be symmetric; F - Fᵀ has entries of {skew:.2g}, F of {largest:.2g}.")
    return A


@jax.jit
def _symmetric(F: Float[Array, "d d"]) -> tuple[Float[Array, "d d"], Float[Array, ""], Float[Array, ""]]:
    """F's symmetric part, the size of F and of the rest."""
    return (F + F.T) / 2, jnp.max(jnp.abs(F)), jnp.max(jnp.abs(F - F.T))


def _vector(F: Array | Operator, v: PyTree) -> Array:
    return raveled(F, v)[0]


def _product(F: Array | Operator, v: Array) -> Array:
    if isinstance(F, Operator):
        return F.ravel(F @ F.unravel(v)).astype(v.dtype)
    return jnp.matmul(F, v, precision=Precision.HIGHEST)


def _spectrum(F: Fisher, tolerance: float | None) -> tuple[Float[Array, " d"], Float[Array, "d d"], Bool[Array, " d"]]:
    """Eigenvalues, eigenvectors as columns, and which eigenvalues count as 0."""
    if isinstance(F, Operator):
        if F.size > LIMIT:
            raise ValueError(
                f"{F.name} has {F.size} parameters, too many for all its eigenvalues (at most {LIMIT}). "
                "Take a layer, F.block(path), or a few directions, reparametrised(F, directions)."
            )
        F = jax.jit(Operator.dense)(F)
    F = _matrix(F)
    λ, Q = jnp.linalg.eigh(F)
    if not isinstance(λ, Tracer) and λ[0] < -_rounding(λ) * jnp.max(jnp.abs(λ)):
        raise ValueError(
            f"F has the eigenvalue {λ[0]:.2g}, and none of a Fisher is negative. A Hessian form over samples, or over "
            'others than those of p_θ, can have one: use form="score", or more points.'
        )
    share = len(λ) * jnp.finfo(λ.dtype).eps if tolerance is None else tolerance
    return λ, Q, λ <= share * jnp.maximum(λ[-1], 0)
