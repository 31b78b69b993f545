"""Shampoo: a negative power of the gradients' row and column covariances on each side."""

import dataclasses

import optax
from jaxtyping import PyTree

from .._arguments import in_range, injectable, one_of, whole
from ..matrices.axes import MatrixAxes
from ..preconditioner.applications import power
from ..preconditioner.contracts import Refresh, Storage, refresh_of, storage_of
from ..preconditioner.decompositions import inverse_root
from ..preconditioner.factors import outer_product
from ..preconditioner.precondition import FACTORS, preconditioner
from ..preconditioner.transform import Preconditioner
from ..transforms.decay import Mask, WeightDecay, check_decay, scheduled, stages
from ..transforms.fallback import Build, with_fallback
from ..transforms.grafting import graft_on, magnitude_of, trace
from ..transforms.skip_nonfinite import Freezable, chain, skip_nonfinite

KINDS = ("matrix", "head")
ACCUMULATE = {
    "mean": {"kind": "mean"},
    "sum": {"kind": "sum"},
    "scaled_mean": {"kind": "mean", "trace_scaling": True},
}
BLOCK_SIZE = 1024


@injectable
def scale_by_shampoo(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.99,
    eps: optax.ScalarOrSchedule = 1e-6,
    *,
    exponent: float = -0.25,
    grafting: object = "adam",
    accumulate: str = "mean",
    precondition_frequency: int = 10,
    start_preconditioning_step: int | None = None,
    max_precond_dim: int = 10_000,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `shampoo`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam(b1, b2)``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_shampoo(exponent=-0.5), optax.scale_by_learning_rate(1e-3))
    """
    options = (precondition_frequency, max_precond_dim, refresh, storage)
    method = _preconditioner(b1, b2, eps, exponent, accumulate, *options)
    grafted = _grafted(method, b1, b2, grafting, start_preconditioning_step)
    rest = _adam(b1, b2) if fallback is None else fallback
    return skip_nonfinite(with_fallback("shampoo", grafted, rest, axes=axes, kinds=KINDS, describe=method.describe))


@injectable
def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.99,
    eps: optax.ScalarOrSchedule = 1e-6,
    weight_decay: WeightDecay = 0.0,
    *,
    exponent: float = -0.25,
    grafting: object = "adam",
    accumulate: str = "mean",
    precondition_frequency: int = 10,
    start_preconditioning_step: int | None = None,
    max_precond_dim: int = 10_000,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo: a negative power of the gradients' row and column covariances on each side.

        L ← b2 L + (1-b2) G Gᵀ;   R ← b2 R + (1-b2) Gᵀ G        divided by the sum of their weights; or plain sums
        m ← b1 m + G;   D = (L + ε I)^p m (R + ε I)^p
        U = D |M| / |D|,  M the step of another optimizer (grafting);   W ← W - lr (U + wd W)

    L and R are of mini-batch mean gradients: neither the true nor the empirical Fisher.

    Args:
      learning_rate: number or schedule; with grafting, that of the optimizer grafted.
      b1: momentum, number or schedule; not normalised.
      b2: decay of the factors; .99 remembers ten refreshes.
      eps: ε as a share of the largest eigenvalue (of a bound on it, for the iterations); no schedule. Below 1e-7,
        float32 knows eigenvalues by noise alone.
      weight_decay: per unit of learning rate, number or schedule; or an `fo.Decay`.
      exponent: p, from -1 to 0. -1/4 is the original, -1/2 the power that Fisher's inverse root has.
        Where one side alone is kept, exponents down to -1/4 count double: it has the power of both.
      grafting: "adam" (with b1, b2), "rmsprop", "sgd", any transformation without a rate, or None: D itself.
      accumulate: "mean" (unbiased moving average), "sum" (the original; b2 is not used), or "scaled_mean": the mean
        divided by the root of its trace, so that ``L ⊗ R`` has the scale of ``E[g gᵀ]``; for ``exponent=-1/2`` without
        grafting.
      precondition_frequency: steps between refreshes of the roots; the first call is one.
      start_preconditioning_step: earlier steps are those of the optimizer grafted (without one: of momentum), while the
        factors gather. Default: the first refresh, ``precondition_frequency``.
      max_precond_dim: a longer side gets no factor.
      refresh: a `fo.Refresh` or a word for its ``when``, "every" or "staggered"; roots by "eigh", or
        matrix products alone: "newton" (exponents -1/p) or "polynomial" (-1/2, -1/4, ...); "auto", the default, is
        "eigh" on a CPU and "newton" on a TPU or GPU, where eigh is slow to compile or to run. There is nothing to
        transport.
      storage: a `fo.Storage`, without ``rank``; blocks of 1024 by default.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: a complete optimizer for what is no matrix and for embeddings, default ``optax.adamw`` with this rate,
        betas, decay and mask.
      axes: None (rules by path and shape, see `fo.report`; an `fo.AxesWarning` names what they leave open), "strict"
        (the same, as an error), "out_in" (the rules for a tree that stores outputs first), a tree of `fo.MatrixAxes`,
        e.g. from `fo.infer_axes`, or a function of params.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Sources: Gupta et al. 2018 (arXiv 1802.09568), Algorithm 1; grafting, blocks and averages as in Anil et al. 2020
      (arXiv 2002.09018); trace scaling from Morwani et al. 2024 (arXiv 2406.17748).

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.shampoo(1e-3, weight_decay=0.1)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    check_decay(learning_rate, weight_decay)
    options = (precondition_frequency, max_precond_dim, refresh, storage)
    method = _preconditioner(b1, b2, eps, exponent, accumulate, *options)
    grafted = _grafted(method, b1, b2, grafting, start_preconditioning_step)
    after = optax.chain(*stages(learning_rate, weight_decay, mask))
    rest = optax.chain(_adam(b1, b2), after) if fallback is None else fallback

    def build(leaf_axes: list[MatrixAxes]) -> Freezable:
        return chain(grafted(leaf_axes), after)

    return skip_nonfinite(with_fallback("shampoo", build, rest, axes=axes, kinds=KINDS, describe=method.describe))


def _preconditioner(
    b1: optax.ScalarOrSchedule,
    b2: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule,
    exponent: float,
    accumulate: str,
    precondition_frequency: int,
    max_precond_dim: int,
    refresh: Refresh | str,
    storage: Storage | None,
) -> Preconditioner:
    """Outer products x inverse roots x a power on each side of the momentum."""
    in_range("b1", b1, 0, 1)
    in_range("b2", b2, 0, 1)
    in_range("eps", eps, 0)
    if callable(eps):
        raise TypeError(
            "eps must be a number or an array: the roots count no steps. For a schedule, "
            "optax.inject_hyperparams(fo.shampoo)(..., eps=schedule)."
        )
    one_of("accumulate", accumulate, tuple(ACCUMULATE))
    options = refresh_of("shampoo", refresh, {"decomposition": "auto"})
    if options.when == "adaptive":
        raise ValueError(
            "refresh must be 'every' or 'staggered'; 'adaptive' measures an eigenbasis, Shampoo has roots."
        )
    storage = storage_of("shampoo", storage, (*FACTORS, "momentum_dtype"))
    storage = storage if storage.block_size is not None else dataclasses.replace(storage, block_size=BLOCK_SIZE)
    return preconditioner(
        outer_product(b2, **ACCUMULATE[accumulate]),
        inverse_root(exponent, method=options.decomposition or "auto", ridge=eps),
        power(b1, twice_alone=exponent >= -0.25, mu_dtype=storage.momentum_dtype),
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        refresh=options,
        storage=storage,
    )


def _grafted(
    method: Preconditioner, b1: optax.ScalarOrSchedule, b2: optax.ScalarOrSchedule, grafting: object, start: int | None
) -> Build:
    """``method`` with the size of another optimizer's step, and that optimizer's step before ``start``."""
    start = method.policy.frequency if start is None else start
    whole("start_preconditioning_step", start, 0)
    if grafting is None:
        magnitude = scheduled(trace, decay=b1)
    elif grafting == "adam":
        magnitude = magnitude_of(_adam(b1, b2))
    else:
        magnitude = magnitude_of(grafting)

    def build(leaf_axes: list[MatrixAxes]) -> Freezable:
        direction = method.on_matrices(leaf_axes)
        if grafting is None and start <= 1:
            return direction
        return graft_on(direction, magnitude, list(leaf_axes), rescale=grafting is not None, start=start)

    return build


def _adam(b1: optax.ScalarOrSchedule, b2: optax.ScalarOrSchedule) -> Freezable:
    return scheduled(optax.scale_by_adam, b1=b1, b2=b2)
