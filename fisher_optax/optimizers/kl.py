"""KL-Shampoo and KL-SOAP: preconditioners in the eigenbases of the factors nearest in Kullback-Leibler divergence.

    KL-Shampoo   U = Q_L [m / (sqrt(λ_L λ_Rᵀ) + eps)] Q_Rᵀ       m, λ in the basis of the last refresh
    KL-SOAP      SOAP's step in the same bases: Adam's v in place of λ_L λ_Rᵀ

`fo.factors.kullback_leibler` has the factors, and says how they start and why: not as in the paper, at the identity,
unless ``init="identity"``. Source: Lin et al. 2025 (arXiv 2509.03378).
"""

import functools
from collections.abc import Callable
from typing import Any

import optax

from ..preconditioner.applications import inverse_root_of_eigenvalues
from ..preconditioner.factors import kullback_leibler
from ..preconditioner.transform import Preconditioner
from ..transforms.hyperparameters import injectable, takes
from .soap import complete, direction, scale_by_soap, soap, soap_preconditioner

BETAS = {"b1": 0.9, "b2": 0.98}  # the authors'


@injectable
@takes(scale_by_soap, **BETAS)
def scale_by_kl_soap(*, init: str = "gradient", **options: Any) -> optax.GradientTransformationExtraArgs:
    """The direction of `kl_soap`, without learning rate and decay; arguments of `scale_by_soap`.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_kl_soap(), optax.scale_by_learning_rate(3e-3))
    """
    return direction("kl_soap", parts=_kl_soap(init), **options)


@injectable
@takes(soap, **BETAS)
def kl_soap(*, init: str = "gradient", **options: Any) -> optax.GradientTransformationExtraArgs:
    """KL-SOAP (see the top of this file). Takes the arguments of `soap`; the betas are the authors', (.9, .98).

    Args:
      init: of the factors, "gradient" (``s I`` each, s² the mean square of the first gradient that is not zero) or
        "identity" (the paper's).

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.kl_soap(3e-3)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    return complete("kl_soap", parts=_kl_soap(init), **options)


@injectable
@takes(scale_by_soap, **BETAS)
def scale_by_kl_shampoo(*, init: str = "gradient", **options: Any) -> optax.GradientTransformationExtraArgs:
    """The direction of `kl_shampoo`, without learning rate and decay; arguments of `scale_by_soap`.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_kl_shampoo(), optax.scale_by_learning_rate(3e-3))
    """
    return direction("kl_shampoo", parts=_kl_shampoo(init), **options)


@injectable
@takes(soap, **BETAS)
def kl_shampoo(*, init: str = "gradient", **options: Any) -> optax.GradientTransformationExtraArgs:
    """KL-Shampoo (see the top of this file). Takes the arguments of `soap`, which mean the same: ``b2`` (or
    ``shampoo_beta``) is the decay of factors and eigenvalues, there is no v, and so no ``transport`` of it. ``init`` is
    that of `kl_soap`.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind; with
        ``normalize_updates`` or ``transport="squared"``, which are about Adam in the basis.

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.kl_shampoo(3e-3)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    return complete("kl_shampoo", parts=_kl_shampoo(init), **options)


def _kl_soap(init: str) -> Callable[..., Preconditioner]:
    return functools.partial(soap_preconditioner, factors=functools.partial(kullback_leibler, init=init))


def _kl_shampoo(init: str) -> Callable[..., Preconditioner]:
    def parts(*, b1: Any, eps: Any, **options: Any) -> Preconditioner:
        if options["normalize_updates"] or options["transport"] != "permute":
            raise ValueError("kl_shampoo has no Adam in its basis: leave normalize_updates and transport alone.")
        application = inverse_root_of_eigenvalues(b1, eps, options["bias_correction"], options["momentum_dtype"])
        return _kl_soap(init)(b1=b1, eps=eps, application=application, **options)

    return parts
