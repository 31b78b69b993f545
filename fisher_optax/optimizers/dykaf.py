"""DyKAF: SOAP whose factors follow the nearest Kronecker product of the Fisher.

SOAP's step in the eigenbases of L and R, where ``L ⊗ R`` follows ``F ← β F + (1-β) g gᵀ`` by projector splitting
(`fo.factors.projector_splitting` has the step).

Source: Yudin et al. 2025 (arXiv 2511.06477). F is the mean outer product of mini-batch gradients, as in SOAP and
Shampoo: neither the true nor the empirical Fisher. Read honestly: on gradients that are independent draws, Shampoo's
factors divided by their trace are already optimal; DyKAF's are better where gradients drift or have structure.
"""

import functools
from typing import Any

import optax

from ..preconditioner.applications import rank1_adam
from ..preconditioner.factors import projector_splitting
from ..preconditioner.transform import Preconditioner
from ..transforms.hyperparameters import injectable, takes
from .soap import complete, direction, scale_by_soap, soap, soap_preconditioner


@injectable
@takes(scale_by_soap)
def scale_by_dykaf(
    *,
    init: str = "dominant",
    variant: str = "sequential",
    first: str = "inputs",
    rank1_second_moment: bool = False,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `dykaf`, without learning rate and decay; arguments of `scale_by_soap` and `dykaf`.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_dykaf(), optax.scale_by_learning_rate(3e-3))
    """
    return direction("dykaf", parts=_parts(init, variant, first, rank1_second_moment), **options)


@injectable
@takes(soap)
def dykaf(
    *,
    init: str = "dominant",
    variant: str = "sequential",
    first: str = "inputs",
    rank1_second_moment: bool = False,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """DyKAF (see the top of this file). Takes every argument of `soap`, with the same defaults, and:

    Args:
      init: of the factors, from the first gradient that is not zero: "dominant" (its largest singular triple, at the
        scale of ``g gᵀ``), "dominant_released" (the authors' code: the square root of that scale, which takes some 100
        steps to forget), or "identity".
      variant: "sequential" (the integrator: each side from the other's new value) or "parallel" (the authors' code).
      first: which side a sequential step updates first, "inputs" or "outputs".
      rank1_second_moment: keep ``v ≈ l rᵀ``, m + n numbers; for fine-tuning: it is worse in pre-training.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.dykaf(3e-3, weight_decay=0.1, refresh="staggered")
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    return complete("dykaf", parts=_parts(init, variant, first, rank1_second_moment), **options)


def _parts(init: str, variant: str, first: str, rank1: bool) -> Any:
    factors = functools.partial(projector_splitting, init=init, variant=variant, first=first)

    def parts(*, b1: Any, b2: Any, eps: Any, normalize_updates: bool, **options: Any) -> Preconditioner:
        if rank1 and normalize_updates:
            raise ValueError("dykaf: normalize_updates goes with the full second moment; got rank1_second_moment=True.")
        inner = rank1_adam(b1, b2, eps, options["bias_correction"], options["momentum_dtype"]) if rank1 else None
        return soap_preconditioner(
            b1=b1, b2=b2, eps=eps, normalize_updates=normalize_updates, factors=factors, inner=inner, **options
        )

    return parts
