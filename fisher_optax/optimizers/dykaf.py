"""DyKAF: SOAP whose factors follow the nearest Kronecker product of the Fisher."""

import optax
from jaxtyping import PyTree

from .._arguments import injectable, one_of
from ..preconditioner.applications import adam, in_eigenbasis, rank1_adam
from ..preconditioner.contracts import Refresh, Storage, storage_of
from ..preconditioner.factors import projector_splitting
from ..preconditioner.precondition import direction, optimizer, scheduled_adam
from ..preconditioner.transform import Preconditioner
from ..transforms.decay import Mask, WeightDecay
from .soap import STORAGE, check_moments, decay_of, in_bases_of

VARIANTS = {
    "inputs_first": {"variant": "sequential", "first": "inputs"},
    "outputs_first": {"variant": "sequential", "first": "outputs"},
    "parallel": {"variant": "parallel"},
}


@injectable
def scale_by_dykaf(
    b1: optax.ScalarOrSchedule = 0.95,
    b2: optax.ScalarOrSchedule = 0.95,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    init: str = "dominant",
    variant: str = "inputs_first",
    rank1_second_moment: bool = False,
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `dykaf`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam(b1, b2, eps)``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_dykaf(), optax.scale_by_learning_rate(3e-3))
    """
    parts = (shampoo_beta, precondition_frequency, max_precond_dim, refresh, storage)
    method = _preconditioner(b1, b2, eps, init, variant, rank1_second_moment, *parts)
    return direction("dykaf", method, fallback, axes, adam=scheduled_adam(b1, b2, eps))


@injectable
def dykaf(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: optax.ScalarOrSchedule = 0.95,
    b2: optax.ScalarOrSchedule = 0.95,
    eps: optax.ScalarOrSchedule = 1e-8,
    weight_decay: WeightDecay = 0.01,
    *,
    init: str = "dominant",
    variant: str = "inputs_first",
    rank1_second_moment: bool = False,
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """DyKAF: SOAP's step in the eigenbases of L and R, where ``L ⊗ R`` follows ``F ← βs F + (1-βs) g gᵀ``, g = vec G.

        L, R ← one step of projector splitting       `fo.factors.projector_splitting` has it
        g = Q_Lᵀ G Q_R;   U = Q_L Adam(g) Q_Rᵀ;   W ← W - lr U;   W ← W - lr wd W

    F is the mean outer product of mini-batch gradients, as in SOAP and Shampoo: neither the true nor the empirical
    Fisher. Read honestly: on gradients that are independent draws, Shampoo's factors divided by their trace are already
    optimal; DyKAF's are better where gradients drift or have structure.

    Args:
      init: of the factors, from the first gradient that is not zero: "dominant" (its largest singular triple, at the
        scale of ``g gᵀ``), "dominant_released" (the authors' code: the square root of that scale, which takes some 100
        steps to forget), or "identity".
      variant: "inputs_first" or "outputs_first" (the integrator: each side from the other's new value, this one before
        the other), or "parallel" (the authors' code).
      rank1_second_moment: keep ``v ≈ l rᵀ``, m + n numbers; for fine-tuning: it is worse in pre-training.
      learning_rate, b1, b2, eps, weight_decay, shampoo_beta, precondition_frequency, max_precond_dim, refresh, storage,
        mask, fallback, axes: as in `fo.soap`, whose other options `fo.precondition` has with these factors.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Source: Yudin et al. 2025 (arXiv 2511.06477).

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.dykaf(3e-3, weight_decay=0.1, refresh="staggered")
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    parts = (shampoo_beta, precondition_frequency, max_precond_dim, refresh, storage)
    method = _preconditioner(b1, b2, eps, init, variant, rank1_second_moment, *parts)
    return optimizer(
        "dykaf",
        method,
        fallback,
        axes,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        adam=scheduled_adam(b1, b2, eps),
    )


def _preconditioner(
    b1: optax.ScalarOrSchedule,
    b2: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule,
    init: str,
    variant: str,
    rank1: bool,
    shampoo_beta: optax.ScalarOrSchedule | None,
    precondition_frequency: int,
    max_precond_dim: int,
    refresh: Refresh | str,
    storage: Storage | None,
) -> Preconditioner:
    """Projector splitting x orthogonal iteration x Adam in the eigenbasis, its second moment whole or of rank one."""
    check_moments(b1, b2, eps)
    storage = storage_of("dykaf", storage, STORAGE)
    one_of("variant", variant, tuple(VARIANTS))
    factors = projector_splitting(decay_of(shampoo_beta, b2), init=init, **VARIANTS[variant])
    inner = (rank1_adam if rank1 else adam)(b1, b2, eps, True, storage.momentum_dtype)
    # The moment of rank one starts at eps everywhere.
    application = in_eigenbasis(inner)._replace(ignores_zeros=not rank1)
    return in_bases_of("dykaf", factors, application, precondition_frequency, max_precond_dim, refresh, storage)
