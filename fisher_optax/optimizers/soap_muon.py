"""SOAP-Muon: Muon's step of a momentum that SOAP has scaled."""

from collections.abc import Sequence

import optax
from jaxtyping import PyTree

from .._arguments import injectable
from ..preconditioner.applications import scaled_polar
from ..preconditioner.contracts import FactorRule, Products, Refresh, Storage, products_of, storage_of
from ..preconditioner.factors import kullback_leibler, outer_product
from ..preconditioner.precondition import direction, optimizer
from ..preconditioner.transform import Preconditioner
from ..transforms.decay import Mask, WeightDecay
from .soap import STORAGE, check_moments, decay_of, in_bases_of

KINDS = ("matrix",)  # as Muon: embeddings and heads are Adam's


@injectable
def scale_by_soap_muon(
    b1: optax.ScalarOrSchedule = 0.95,
    b2: optax.ScalarOrSchedule = 0.9,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    scale: str | float = "match_rms_adamw",
    polynomial: Sequence[Sequence[float]] | None = None,
    precondition_frequency: int = 1,
    max_precond_dim: int = 10_000,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    products: Products | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `soap_muon`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam()``.

    Example (the end of the record: no step shrinks below a share of its weights, and none makes them larger):
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_soap_muon(scale="shape"), fo.radial_brake(), fo.update_floor(),
      ...                  fo.pinned_step(0.0375, cautious_decay=0.025))
    """
    products = products_of(products)
    factors = outer_product(decay_of(shampoo_beta, b2), precision=products.factors)
    what = (precondition_frequency, max_precond_dim, refresh, storage, products)
    method = _orthogonalised("soap_muon", factors, b1, b2, eps, scale, polynomial, *what)
    return direction("soap_muon", method, fallback, axes, adam=optax.scale_by_adam(), kinds=KINDS)


@injectable
def soap_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.95,
    b2: optax.ScalarOrSchedule = 0.9,
    eps: optax.ScalarOrSchedule = 1e-8,
    weight_decay: WeightDecay = 0.0,
    *,
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    scale: str | float = "match_rms_adamw",
    polynomial: Sequence[Sequence[float]] | None = None,
    precondition_frequency: int = 1,
    max_precond_dim: int = 10_000,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    products: Products | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP-Muon: momentum, its entries made of like size in the eigenbasis of Shampoo's factors, then orthogonalised.

        m ← b1 m + (1-b1) G;   u = b1 m + (1-b1) G;   H = Q_Lᵀ u Q_R;   v ← b2 v + (1-b2) H²
        W ← W - lr scale(m, n) · polar(Q_L [H / max(sqrt(v), eps)] Q_Rᵀ);   W ← W - lr wd W
        L ← βs L + (1-βs) G Gᵀ;   R ← βs R + (1-βs) Gᵀ G
        every k steps   Q_L ← qr(L Q_L),   Q_R ← qr(R Q_R)

    The factors see the gradient, v the momentum. The first step is Muon's, and starts the bases; as long as gradients
    have one direction, all steps are. The chain of momentum, `scale_by_soap` and a polar factor is another method: its
    factors and its v both see the momentum, and its first call does nothing. What is exactly singular has no polar
    factor of its own: a Newton-Schulz iteration leaves zeros there.

    Args:
      learning_rate: number or schedule. With the default scale, AdamW's rates are a good start.
      b1: momentum, number or schedule.
      b2: decay of v, number or schedule.
      eps: the least ``sqrt(v)``, in units of the gradient; number or schedule.
      weight_decay: after the step, per unit of learning rate, number or schedule; or an `fo.Decay`.
      shampoo_beta: βs, decay of the factors; None: ``b2``.
      scale: "match_rms_adamw", "shape" (the record's), "unit_rms", or a number, as in `muon`.
      polynomial: of the Newton-Schulz iteration, as in `muon`.
      precondition_frequency: steps between refreshes of a basis; 1 is the record's.
      max_precond_dim: a longer side is left unrotated.
      refresh: as in `soap`, without ``first_step``, which is "adam".
      storage: what is kept, a `fo.Storage`, without ``rank``.
      products: how exactly an accelerator multiplies, a `fo.Products`; None: in float32.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: a complete optimizer for what is no matrix, and for embeddings and heads; default ``optax.adamw`` with
        this rate, decay and mask.
      axes: as in `muon`, for real leaves.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Source: the optimizer track of modded-nanogpt, records 14 and 44 to 46, but for the gate of records 45 and 46, of
      which its author does not know whether it helps.

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.soap_muon(3e-3, weight_decay=0.1)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    products = products_of(products)
    factors = outer_product(decay_of(shampoo_beta, b2), precision=products.factors)
    what = (precondition_frequency, max_precond_dim, refresh, storage, products)
    method = _orthogonalised("soap_muon", factors, b1, b2, eps, scale, polynomial, *what)
    return optimizer(
        "soap_muon",
        method,
        fallback,
        axes,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        adam=optax.scale_by_adam(),
        kinds=KINDS,
    )


@injectable
def kl_soap_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.95,
    b2: optax.ScalarOrSchedule = 0.9,
    eps: optax.ScalarOrSchedule = 1e-8,
    weight_decay: WeightDecay = 0.0,
    *,
    init: str = "gradient",
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    scale: str | float = "match_rms_adamw",
    polynomial: Sequence[Sequence[float]] | None = None,
    precondition_frequency: int = 1,
    max_precond_dim: int = 10_000,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """`soap_muon` in the eigenbases of `kl_soap`'s factors.

    Args:
      init: as in `kl_soap`.
      learning_rate, b1, b2, eps, weight_decay, shampoo_beta, scale, polynomial, precondition_frequency,
        max_precond_dim, refresh, storage, mask, fallback, axes: as in `soap_muon`.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Sources: `soap_muon`'s and `kl_soap`'s.

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.kl_soap_muon(3e-3)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    factors = kullback_leibler(decay_of(shampoo_beta, b2), init=init)
    what = (precondition_frequency, max_precond_dim, refresh, storage, Products())
    method = _orthogonalised("kl_soap_muon", factors, b1, b2, eps, scale, polynomial, *what)
    return optimizer(
        "kl_soap_muon",
        method,
        fallback,
        axes,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        adam=optax.scale_by_adam(),
        kinds=KINDS,
    )


def _orthogonalised(
    name: str,
    factors: FactorRule,
    b1: optax.ScalarOrSchedule,
    b2: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule,
    scale: str | float,
    polynomial: Sequence[Sequence[float]] | None,
    precondition_frequency: int,
    max_precond_dim: int,
    refresh: Refresh | str,
    storage: Storage | None,
    products: Products,
) -> Preconditioner:
    """These factors x orthogonal iteration x the polar factor of what was scaled in their bases."""
    check_moments(b1, b2, eps)
    storage = storage_of(name, storage, STORAGE)
    application = scaled_polar(
        b1,
        b2,
        eps,
        scale=scale,
        polynomial=polynomial,
        momentum_dtype=storage.momentum_dtype,
        precision=products.rotations,
    )
    what = (precondition_frequency, max_precond_dim, refresh, storage)
    return in_bases_of(name, factors, application, *what, skips=False, basis_precision=products.basis)
