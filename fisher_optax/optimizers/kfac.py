"""K-FAC: natural gradient with one Kronecker product a layer, of statistics that capture takes in the backward pass."""

import optax
from jaxtyping import PyTree

from .._arguments import injectable
from ..preconditioner.applications import damped
from ..preconditioner.contracts import Refresh, Storage, storage_of
from ..transforms.decay import Mask, WeightDecay
from . import _kfac
from .kfac_head import for_heads

WAYS = ("auto", "eigh", "qr", "cholesky", "inverse")


@injectable
def scale_by_kfac(
    curvature_decay: optax.ScalarOrSchedule = 0.95,
    damping: optax.ScalarOrSchedule = 1e-3,
    *,
    exponent: float = -1.0,
    grafting: object = None,
    head: str | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 4096,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction D or U of `kfac`, without clipping, momentum, rate and decay; ``fallback`` is a direction too,
    default ``optax.scale_by_adam()``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_kfac(exponent=-0.5), optax.scale_by_learning_rate(1e-3))
    """
    options = (precondition_frequency, max_precond_dim, refresh, storage)
    application = damped(damping, exponent)
    method = _kfac.captured("kfac", curvature_decay, damping, exponent, application, *options, ways=WAYS)
    rank = storage_of("kfac", storage, _kfac.STORAGE).rank
    of_heads = for_heads(head, grafting, exponent, curvature_decay, damping, rank)
    build = _kfac.direction_of("kfac", method, grafting=grafting, of_heads=of_heads)
    return _kfac.direction("kfac", method, build, fallback, axes, of_heads)


@injectable
def kfac(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.9,
    curvature_decay: optax.ScalarOrSchedule = 0.95,
    damping: optax.ScalarOrSchedule = 1e-3,
    weight_decay: WeightDecay = 0.0,
    *,
    exponent: float = -1.0,
    grafting: object = None,
    kl_clip: optax.ScalarOrSchedule | None = None,
    head: str | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 4096,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC: natural gradient with one Kronecker product a layer.

        A ← mean of a aᵀ,  B ← mean of δ δᵀ         moving averages; the bias is the weight of an input that is always 1
        D = (A ⊗ B + λ I)^p G                       p = -1: natural gradient; -1/2: Adam's power, more robust
            or (A + π sqrt(λ) I)⁻¹ G (B + sqrt(λ)/π I)⁻¹, π² = (tr A / d_A) / (tr B / d_B)
        U = D |M| / |D|                             only with grafting, M the step of another optimizer
        U ← ν U,  ν = min(1, sqrt(c / (lr² Σ <U, G>)))   only with KL clipping, over all layers
        m ← μ m + U;   W ← W - lr (m + wd W)

    ``update(grads, state, params, statistics=stats)`` with the statistics of `fo.value_and_grad`; with
    ``statistics=None`` curvature stays as it is, and until there was some, layers do not move. So it is for a matrix
    whose B is zero, as no gradient has reached it, as for an expert without rows: A, B and their weights stay.

    Args:
      learning_rate: number or schedule.
      momentum: μ, of the preconditioned steps; number or schedule.
      curvature_decay: decay of A and B per update with statistics, number or schedule; .95 remembers two refreshes.
      damping: λ, in units of the Fisher; number or schedule.
      weight_decay: per unit of learning rate, number or schedule; or an `fo.Decay`.
      exponent: p, from -1 to 0.
      grafting: None (D itself), "adam", "rmsprop", "sgd" or any transformation without a rate.
      kl_clip: c, number or schedule: at most so much change of the model's outputs a step, in nats; 1e-3 is common.
      head: how the right side of the layer named head, lm_head or logits is treated. None: as any other's. "true": it
        is the softmax's own Fisher, exact for ``storage.rank`` tokens, whatever labels the others' statistics are of,
        and every word is in it; "empirical": that of the data's labels. Both are solved, never formed, for any
        vocabulary, with exponent -1 and factored damping (`kfac_head`), and need
        ``fo.KroneckerFactors(head_rows=rank)``.
      precondition_frequency: steps between refreshes; the first call is one.
      max_precond_dim: a longer side is kept as ``storage.rank`` rows, which stand for its strongest directions; both as
        in `fo.KroneckerFactors` (``max_dim``, ``rank``). Its other directions are damped alone. A 4096-wide side costs
        seconds of eigh on a CPU: there, smaller is better.
      refresh: a `fo.Refresh` or a word for its ``when``; its decomposition is "eigh", "qr" (a step of
        orthogonal iteration, cheaper, follows slowly) or "cholesky" (the same by products alone), all with exact
        damping at four products a step; "inverse": factored damping, two products, and a Cholesky factorisation a
        refresh; "auto", the default: "eigh" on a CPU, and on a TPU or GPU, where that is slow, four rounds of
        "cholesky", which leave eigenvectors of close eigenvalues mixed (`fo.decompositions.eigh`). Squares are carried
        along exactly, and the first call makes a step: it takes no ``transport`` and no ``first_step``.
      storage: a `fo.Storage`, without ``momentum_dtype`` and ``sides``.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: a complete optimizer for what is no matrix (biases go with their kernels) and for embeddings, default
        ``optax.adamw`` with this rate, decay and mask.
      axes: None (rules by path and shape, see `fo.report`; an `fo.AxesWarning` names what they leave open, and layers
        that have statistics which they leave to the fallback), "strict" (an error where they leave something open),
        "out_in" (the rules for a tree that stores outputs first), a tree of `fo.MatrixAxes`, e.g. from
        `fo.infer_axes`, or a function of params.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind; in `update`, without
        ``statistics``, or with those of another kind, shape or axes: where the program uses a layer in another way than
        the rules read it, pass ``axes=fo.infer_axes(...)``.

    Sources: Martens and Grosse 2015 (arXiv 1503.05671); convolutions: Grosse and Martens 2016 (arXiv 1602.01407); KL
      clipping: Ba et al. 2017 (distributed K-FAC), as in kfac-jax.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params, x, y = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, jnp.ones((8, 4)), jnp.ones((8, 3))
      >>> loss = lambda p: fo.losses.gaussian(x @ p["kernel"] + p["bias"], y)
      >>> tx = fo.kfac(0.1, damping=1e-2)
      >>> value, grads, stats = fo.value_and_grad(loss)(params)
      >>> updates, state = tx.update(grads, tx.init(params), params, statistics=stats)
    """
    _kfac.check_numbers(learning_rate, momentum, weight_decay, kl_clip)
    options = (precondition_frequency, max_precond_dim, refresh, storage)
    application = damped(damping, exponent)
    method = _kfac.captured("kfac", curvature_decay, damping, exponent, application, *options, ways=WAYS)
    rank = storage_of("kfac", storage, _kfac.STORAGE).rank
    of_heads = for_heads(head, grafting, exponent, curvature_decay, damping, rank)
    clipped = {"kl_clip": kl_clip, "learning_rate": learning_rate}
    build = _kfac.direction_of("kfac", method, grafting=grafting, of_heads=of_heads, **clipped)
    return _kfac.optimizer(
        "kfac",
        method,
        build,
        fallback,
        axes,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        mask=mask,
        of_heads=of_heads,
    )
