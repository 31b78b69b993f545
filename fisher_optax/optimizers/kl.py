"""KL-Shampoo and KL-SOAP: preconditioners in the eigenbases of the factors nearest in Kullback-Leibler divergence."""

import optax
from jaxtyping import PyTree

from .._arguments import injectable
from ..preconditioner.applications import inverse_root_of_eigenvalues
from ..preconditioner.contracts import Refresh, Storage, storage_of
from ..preconditioner.factors import kullback_leibler
from ..preconditioner.precondition import direction, optimizer, scheduled_adam
from ..preconditioner.transform import Preconditioner
from ..transforms.decay import Mask, WeightDecay
from .soap import STORAGE, adam_in_bases, check_moments, decay_of, in_bases_of


@injectable
def scale_by_kl_soap(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.98,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    init: str = "gradient",
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    bias_correction: bool = True,
    normalize_updates: bool = False,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `kl_soap`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam(b1, b2, eps)``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_kl_soap(), optax.scale_by_learning_rate(3e-3))
    """
    method = adam_in_bases(
        "kl_soap",
        kullback_leibler(decay_of(shampoo_beta, b2), init=init),
        b1,
        b2,
        eps,
        bias_correction,
        normalize_updates,
        precondition_frequency,
        max_precond_dim,
        refresh,
        storage,
    )
    return direction("kl_soap", method, fallback, axes, adam=scheduled_adam(b1, b2, eps))


@injectable
def kl_soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.98,
    eps: optax.ScalarOrSchedule = 1e-8,
    weight_decay: WeightDecay = 0.01,
    *,
    init: str = "gradient",
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    bias_correction: bool = True,
    normalize_updates: bool = False,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """KL-SOAP: SOAP's step in the eigenbases of the factors nearest in Kullback-Leibler divergence.

        g = Q_Lᵀ G Q_R;   U = Q_L Adam(g) Q_Rᵀ;   W ← W - lr U;   W ← W - lr wd W

    Args:
      b1, b2: the authors' .9 and .98; ``b2`` (or ``shampoo_beta``) is the decay of factors and eigenvalues too.
      init: of the factors, "gradient" (``s I`` each, s² the mean square of the first gradient that is not zero) or
        "identity" (the paper's). `fo.factors.kullback_leibler` says why, and has the factors' rule.
      learning_rate, eps, weight_decay, shampoo_beta, precondition_frequency, max_precond_dim, bias_correction,
        normalize_updates, refresh, storage, mask, fallback, axes: as in `fo.soap`.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Source: Lin et al. 2025 (arXiv 2509.03378).

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.kl_soap(3e-3)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    method = adam_in_bases(
        "kl_soap",
        kullback_leibler(decay_of(shampoo_beta, b2), init=init),
        b1,
        b2,
        eps,
        bias_correction,
        normalize_updates,
        precondition_frequency,
        max_precond_dim,
        refresh,
        storage,
    )
    return optimizer(
        "kl_soap",
        method,
        fallback,
        axes,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        adam=scheduled_adam(b1, b2, eps),
    )


@injectable
def scale_by_kl_shampoo(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.98,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    init: str = "gradient",
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    bias_correction: bool = True,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `kl_shampoo`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam(b1, b2, eps)``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_kl_shampoo(), optax.scale_by_learning_rate(3e-3))
    """
    parts = (shampoo_beta, bias_correction, precondition_frequency, max_precond_dim, refresh, storage)
    method = _kl_shampoo(b1, b2, eps, init, *parts)
    return direction("kl_shampoo", method, fallback, axes, adam=scheduled_adam(b1, b2, eps))


@injectable
def kl_shampoo(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.98,
    eps: optax.ScalarOrSchedule = 1e-8,
    weight_decay: WeightDecay = 0.01,
    *,
    init: str = "gradient",
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    bias_correction: bool = True,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """KL-Shampoo: the root of the factors nearest in Kullback-Leibler divergence, in the basis of the last refresh.

        g = Q_Lᵀ G Q_R;   m ← b1 m + (1-b1) g;   U = Q_L [m / (sqrt(λ_L λ_Rᵀ) + eps)] Q_Rᵀ;   λ the factors' eigenvalues
        W ← W - lr U;   W ← W - lr wd W

    There is no v, and so no ``transport`` of it.

    Args:
      b1, b2: the authors' .9 and .98; ``b2`` (or ``shampoo_beta``) is the decay of factors and eigenvalues too.
      init: of the factors, "gradient" (``s I`` each, s² the mean square of the first gradient that is not zero) or
        "identity" (the paper's). `fo.factors.kullback_leibler` says why, and has the factors' rule.
      learning_rate, eps, weight_decay, shampoo_beta, precondition_frequency, max_precond_dim, bias_correction,
        refresh, storage, mask, fallback, axes: as in `fo.soap`.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Source: Lin et al. 2025 (arXiv 2509.03378).

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.kl_shampoo(3e-3)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    parts = (shampoo_beta, bias_correction, precondition_frequency, max_precond_dim, refresh, storage)
    method = _kl_shampoo(b1, b2, eps, init, *parts)
    return optimizer(
        "kl_shampoo",
        method,
        fallback,
        axes,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        adam=scheduled_adam(b1, b2, eps),
    )


def _kl_shampoo(
    b1: optax.ScalarOrSchedule,
    b2: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule,
    init: str,
    shampoo_beta: optax.ScalarOrSchedule | None,
    bias_correction: bool,
    precondition_frequency: int,
    max_precond_dim: int,
    refresh: Refresh | str,
    storage: Storage | None,
) -> Preconditioner:
    """Factors nearest in divergence x orthogonal iteration x the root of their eigenvalues."""
    check_moments(b1, b2, eps)
    storage = storage_of("kl_shampoo", storage, STORAGE)
    factors = kullback_leibler(decay_of(shampoo_beta, b2), init=init)
    roots = inverse_root_of_eigenvalues(b1, eps, bias_correction, storage.momentum_dtype)
    what = (precondition_frequency, max_precond_dim, refresh, storage)
    return in_bases_of("kl_shampoo", factors, roots, *what, transports=False)
