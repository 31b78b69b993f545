"""EKFAC: K-FAC with the Fisher's own diagonal in the eigenbasis."""

import optax
from jaxtyping import PyTree

from .._arguments import injectable
from ..preconditioner.applications import eigenvalue_corrected
from ..preconditioner.contracts import Refresh, Storage
from ..transforms.decay import Mask, WeightDecay
from . import _kfac

WAYS = ("auto", "eigh", "qr", "cholesky")


@injectable
def scale_by_ekfac(
    curvature_decay: optax.ScalarOrSchedule = 0.95,
    damping: optax.ScalarOrSchedule = 1e-3,
    *,
    exponent: float = -1.0,
    grafting: object = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 4096,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `ekfac`, without clipping, momentum, rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam()``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_ekfac(), optax.scale_by_learning_rate(1e-3))
    """
    options = (precondition_frequency, max_precond_dim, refresh, storage)
    application = eigenvalue_corrected(damping, exponent, curvature_decay)
    method = _kfac.captured("ekfac", curvature_decay, damping, exponent, application, *options, ways=WAYS)
    build = _kfac.direction_of("ekfac", method, grafting=grafting, squares=True)
    return _kfac.direction("ekfac", method, build, fallback, axes)


@injectable
def ekfac(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.9,
    curvature_decay: optax.ScalarOrSchedule = 0.95,
    damping: optax.ScalarOrSchedule = 1e-3,
    weight_decay: WeightDecay = 0.0,
    *,
    exponent: float = -1.0,
    grafting: object = None,
    kl_clip: optax.ScalarOrSchedule | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 4096,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """EKFAC: K-FAC with S, the moving average of the squares of each example's gradient in the eigenbasis, in the place
    of ``λ_A λ_Bᵀ``; it is carried over as squares when the basis turns.

        A ← mean of a aᵀ,  B ← mean of δ δᵀ;   S ← mean of (Q_Aᵀ ∇ℓ_i Q_B)²
        D = Q_A [(S + λ)^p ∘ Q_Aᵀ G Q_B] Q_Bᵀ,  and all else as in `fo.kfac`

    Statistics are those of ``fo.KroneckerFactors(squares=True)``, taken in the bases at hand:
    ``grad_fn(params, batch, bases=fo.eigenbases(opt_state, params))``. No side may be of low rank.

    Args:
      refresh: a `fo.Refresh` or a word for its ``when``; decomposition "auto" (the default, as in
        `fo.kfac`), "eigh", "qr" or "cholesky".
      learning_rate, momentum, curvature_decay, damping, weight_decay, exponent, grafting, kl_clip,
        precondition_frequency, max_precond_dim, storage, mask, fallback, axes: as in `fo.kfac`.

    Raises:
      ValueError, TypeError: as in `fo.kfac`; for a side longer than ``max_precond_dim`` too.

    Source: George et al. 2018 (arXiv 1806.03884).

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params, x, y = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, jnp.ones((8, 4)), jnp.ones((8, 3))
      >>> loss = lambda p: fo.losses.gaussian(x @ p["kernel"] + p["bias"], y)
      >>> tx = fo.ekfac(0.1, damping=1e-2)
      >>> state = tx.init(params)
      >>> grad_fn = fo.value_and_grad(loss, fo.KroneckerFactors(squares=True))
      >>> value, grads, stats = grad_fn(params, bases=fo.eigenbases(state, params))
      >>> updates, state = tx.update(grads, state, params, statistics=stats)
    """
    _kfac.check_numbers(learning_rate, momentum, weight_decay, kl_clip)
    options = (precondition_frequency, max_precond_dim, refresh, storage)
    application = eigenvalue_corrected(damping, exponent, curvature_decay)
    method = _kfac.captured("ekfac", curvature_decay, damping, exponent, application, *options, ways=WAYS)
    clipped = {"kl_clip": kl_clip, "learning_rate": learning_rate}
    build = _kfac.direction_of("ekfac", method, grafting=grafting, squares=True, **clipped)
    return _kfac.optimizer(
        "ekfac",
        method,
        build,
        fallback,
        axes,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        mask=mask,
    )
