"""Shampoo: a negative power of the gradients' row and column covariances on each side.

    L ← b2 L + (1-b2) G Gᵀ;   R ← b2 R + (1-b2) Gᵀ G        divided by the sum of their weights; or plain sums
    m ← b1 m + G;   D = (L + ε I)^p m (R + ε I)^p
    U = D |M| / |D|,  M the step of another optimizer (grafting);   W ← W - lr (U + wd W)

Source: Gupta et al. 2018 (arXiv 1802.09568), Algorithm 1; grafting, blocks and averages as in Anil et al. 2020 (arXiv
  2002.09018); trace scaling from Morwani et al. 2024 (arXiv 2406.17748). L and R are of mini-batch mean gradients:
  neither the true nor the empirical Fisher.
"""

from typing import Any

import optax

from .._checks import in_range
from ..preconditioner.applications import power
from ..preconditioner.decompositions import inverse_root
from ..preconditioner.factors import outer_product
from ..preconditioner.precondition import preconditioner
from ..preconditioner.transform import Preconditioner
from ..transforms.decay import Mask, decayed_weights
from ..transforms.fallback import Build, with_fallback
from ..transforms.freeze import chain
from ..transforms.grafting import graft_on, magnitude_of
from ..transforms.hyperparameters import injectable, scheduled
from ..transforms.momentum import trace
from ..transforms.skip_nonfinite import skip_nonfinite

KINDS = ("matrix", "head")


@injectable
def scale_by_shampoo(
    b1: Any = 0.9,
    b2: Any = 0.99,
    eps: Any = 1e-6,
    *,
    exponent: float = -0.25,
    grafting: Any = "adam",
    accumulate: str = "mean",
    trace_scaling: bool = False,
    root: str = "eigh",
    block_size: int | None = 1024,
    precondition_frequency: int = 10,
    start_preconditioning_step: int | None = None,
    max_precond_dim: int = 10_000,
    fallback: optax.GradientTransformation | None = None,
    axes: Any = None,
    refresh: str = "every",
    sides: str = "both",
    factor_dtype: Any = None,
    factor_storage: str = "full",
    momentum_dtype: Any = None,
    mesh_axis: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `shampoo`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam(b1, b2)``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_shampoo(exponent=-0.5), optax.scale_by_learning_rate(1e-3))
    """
    grafted, method = _parts(**_common(locals()))
    fallback = _adam(b1, b2) if fallback is None else fallback
    return skip_nonfinite(with_fallback("shampoo", grafted, fallback, axes=axes, kinds=KINDS, describe=method.describe))


@injectable
def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.99,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    *,
    exponent: float = -0.25,
    grafting: Any = "adam",
    accumulate: str = "mean",
    trace_scaling: bool = False,
    root: str = "eigh",
    block_size: int | None = 1024,
    precondition_frequency: int = 10,
    start_preconditioning_step: int | None = None,
    max_precond_dim: int = 10_000,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: Any = None,
    refresh: str = "every",
    sides: str = "both",
    factor_dtype: Any = None,
    factor_storage: str = "full",
    momentum_dtype: Any = None,
    mesh_axis: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo (see the top of this file for the rule).

    Args:
      learning_rate: number or schedule; with grafting, that of the optimizer grafted.
      b1: momentum, number or schedule; not normalised.
      b2: decay of the factors; .99 remembers ten refreshes.
      eps: ε as a share of the largest eigenvalue (of a bound on it, for the iterations); no schedule. Below 1e-7,
        float32 knows eigenvalues by noise alone.
      weight_decay: decoupled, per unit of learning rate; number or schedule.
      exponent: p, from -1 to 0. -1/4 is the original, -1/2 the power that Fisher's inverse root has.
        Where one side alone is kept, exponents down to -1/4 count double: it has the power of both.
      grafting: "adam" (with b1, b2), "rmsprop", "sgd", any transformation without a rate, or None: D itself.
      accumulate: "mean" (unbiased moving average) or "sum" (the original; b2 is not used).
      trace_scaling: divide each factor by the root of its trace, so that their product has the scale of ``E[g gᵀ]``;
        for ``exponent=-1/2`` without grafting.
      root: "eigh", or matrix products alone: "newton" (exponents -1/p), "polynomial" (-1/2, -1/4, ...).
      block_size: cut longer sides into blocks of at most this, each with its own factors.
      precondition_frequency: steps between refreshes of the roots; the first call is one.
      start_preconditioning_step: earlier steps are those of the optimizer grafted (without one: of momentum), while the
        factors gather. Default: the first refresh, ``precondition_frequency``.
      max_precond_dim: a longer side gets no factor.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: a complete optimizer for what is no matrix and for embeddings, default ``optax.adamw`` with this rate,
        betas, decay and mask.
      axes: None (rules by path and shape, see `fo.report`), a tree of `fo.MatrixAxes`, or a function of params.
      refresh: "every" (all roots every k steps) or "staggered" (each step its share).
      sides: "both", or "shorter": only the shorter side of each matrix gets a factor.
      factor_dtype: storage of factors and roots, default float32.
      factor_storage: "full", or "packed": half of each symmetric factor.
      momentum_dtype: storage of m, default float32.
      mesh_axis: share the matrices and their state out over this axis of the mesh in scope, `init`'s too; a stack that
        the devices do not divide is filled up.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.shampoo(1e-3, weight_decay=0.1)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    grafted, method = _parts(**_common(locals()))
    in_range("learning_rate", learning_rate, 0)
    in_range("weight_decay", weight_decay, 0)
    after = optax.chain(decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate))
    fallback = optax.chain(_adam(b1, b2), after) if fallback is None else fallback
    return skip_nonfinite(
        with_fallback(
            "shampoo",
            lambda leaf_axes: chain(grafted(leaf_axes), after),
            fallback,
            axes=axes,
            kinds=KINDS,
            describe=method.describe,
        )
    )


def _common(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of `scale_by_shampoo` or `shampoo`, those that say what is done to a matrix."""
    others = ("learning_rate", "weight_decay", "mask", "fallback", "axes")
    return {name: value for name, value in arguments.items() if name not in others}


def _parts(
    b1: Any,
    b2: Any,
    eps: Any,
    exponent: float,
    grafting: Any,
    accumulate: str,
    trace_scaling: bool,
    root: str,
    start_preconditioning_step: int | None,
    momentum_dtype: Any,
    **options: Any,
) -> tuple[Build, Preconditioner]:
    """Shampoo with its grafting on leaves of given axes, and its preconditioner."""
    in_range("b1", b1, 0, 1)
    in_range("b2", b2, 0, 1)
    in_range("eps", eps, 0)
    if callable(eps):
        raise TypeError(
            "eps must be a number or an array: the roots count no steps. For a schedule, "
            "optax.inject_hyperparams(fo.shampoo)(..., eps=schedule)."
        )
    if accumulate not in ("mean", "sum"):
        raise ValueError(f"accumulate must be 'mean' or 'sum'; got {accumulate!r}.")
    if options["refresh"] == "adaptive":
        raise ValueError(
            "refresh must be 'every' or 'staggered'; 'adaptive' measures an eigenbasis, Shampoo has roots."
        )
    method = preconditioner(
        outer_product(b2, kind=accumulate, trace_scaling=trace_scaling),
        inverse_root(exponent, method=root, ridge=eps),
        power(b1, twice_alone=exponent >= -0.25, mu_dtype=momentum_dtype),
        **options,
    )
    start = start_preconditioning_step
    start = options["precondition_frequency"] if start is None else start
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"start_preconditioning_step must be a number of steps, 0 or more; got {start!r}.")
    if grafting is None:
        magnitude = scheduled(trace, decay=b1)
    elif grafting == "adam":
        magnitude = magnitude_of(_adam(b1, b2))
    else:
        magnitude = magnitude_of(grafting)

    def grafted(leaf_axes: list[Any]) -> optax.GradientTransformation:
        direction = method.on_matrices(leaf_axes)
        if grafting is None and start <= 1:
            return direction
        return graft_on(direction, magnitude, list(leaf_axes), rescale=grafting is not None, start=start)

    return grafted, method


def _adam(b1: Any, b2: Any) -> optax.GradientTransformation:
    return scheduled(optax.scale_by_adam, b1=b1, b2=b2)
