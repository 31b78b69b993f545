"""FROG and K-FROG: natural gradients by a few steps of conjugate gradients on this step's sampled examples."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, PyTree

from .._arguments import in_range, injectable, value_at
from ..capture.to_optimizer import HOW, KINDS, layer_axes, on_layers, unused_statistics
from ..matrices.axes import MatrixAxes
from ..matrices.layout import Layer
from ..preconditioner.applications.conjugate_gradient import (
    Solve,
    check_samples,
    frog_direction,
    in_parts,
    kfrog_direction,
)
from ..statistics import Samples
from ..transforms.decay import Mask, WeightDecay, check_decay, stages
from ..transforms.fallback import layers_with_fallback
from ..transforms.momentum import MomentumState
from ..transforms.momentum import momentum as weighted_mean
from ..transforms.skip_nonfinite import Freezable, chain, counted, skip_nonfinite

Direction = Callable[[list[MatrixAxes]], Freezable]  # of matrices with these axes
SOLVES: dict[str, Solve] = {"frog": frog_direction, "kfrog": kfrog_direction}
LAYERS = ("matrix",)  # the author leaves the last classifier out
SOURCE = HOW.format(kind=KINDS[Samples])


class FrogState(NamedTuple):
    """State of FROG's direction."""

    count: Int[Array, ""]  # calls so far, for a schedule of damping
    momentum: MomentumState


@injectable
def scale_by_frog(
    momentum: optax.ScalarOrSchedule = 0.9,
    damping: optax.ScalarOrSchedule = 1e-4,
    iterations: int = 4,
    *,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `frog`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam()``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_frog(damping=1e-3), optax.scale_by_learning_rate(1e-2))
    """
    direction = _direction("frog", momentum, damping, iterations, momentum_dtype)
    return _scale_by("frog", direction, fallback, axes)


@injectable
def scale_by_kfrog(
    momentum: optax.ScalarOrSchedule = 0.9,
    damping: optax.ScalarOrSchedule = 1e-4,
    iterations: int = 4,
    *,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `kfrog`, as `scale_by_frog` is that of `frog`.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_kfrog(), optax.scale_by_learning_rate(1e-3))
    """
    direction = _direction("kfrog", momentum, damping, iterations, momentum_dtype)
    return _scale_by("kfrog", direction, fallback, axes)


@injectable
def frog(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.9,
    damping: optax.ScalarOrSchedule = 1e-4,
    iterations: int = 4,
    weight_decay: WeightDecay = 0.0,
    *,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """FROG: natural gradients by a few steps of conjugate gradients on this step's sampled examples.

        M ← μ M + G
        Z = F⁻¹ M, about: k steps of conjugate gradients, a Fisher F for each output
        W ← (1 - lr wd) W - lr Z

    A step is of about one size whatever the gradient's and the loss's. A layer's bias is the last row of its matrix.
    Samples come from ``update(grads, state, params, statistics=...)``; nothing of them is kept.
    `fo.applications.conjugate_gradient` says what F is, and how Z is scaled.

    Args:
      learning_rate: number or schedule.
      momentum: μ, number or schedule.
      damping: τ, number above 0 or schedule, in units of the mean eigenvalue of each output's Fisher. The author's
        range is 1e-6 to 1e-2; what the samples do not span is divided by τ alone.
      iterations: k, 3 to 5; it regularises too, as directions of small eigenvalues come last.
      weight_decay: per unit of learning rate, number or schedule; or an `fo.Decay`.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: a complete optimizer for what is no matrix, and for embeddings and heads; default ``optax.adamw`` with
        this rate, decay and mask.
      axes: None (rules by path and shape, see `fo.report`; an `fo.AxesWarning` names what they leave open), "strict"
        (the same, as an error), "out_in" (the rules for a tree that stores outputs first), a tree of `fo.MatrixAxes`,
        e.g. from `fo.infer_axes`, or a function of params.
      momentum_dtype: storage of M, default float32 at least.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind; in `update`, without
        ``statistics`` of every layer, or with some that do not fit it or are of other axes; then pass
        ``axes=fo.infer_axes(..., statistics=fo.LayerSamples())``.

    Source: FROG: Fisher row-wise preconditioning, technical overview
      (fullfix.github.io/notes/2026/01/25/frog-optimizer).

    Example (16 to 64 samples of a batch are usual):
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params, x, y = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, jnp.ones((8, 4)), jnp.ones((8, 3))
      >>> loss = lambda p: fo.losses.gaussian(x @ p["kernel"] + p["bias"], y)
      >>> tx = fo.frog(1e-2)
      >>> value, grads, stats = fo.value_and_grad(loss, fo.LayerSamples(4))(params)
      >>> updates, state = tx.update(grads, tx.init(params), params, statistics=stats)
    """
    direction = _direction("frog", momentum, damping, iterations, momentum_dtype)
    return _complete("frog", direction, learning_rate, weight_decay, mask, fallback, axes)


@injectable
def kfrog(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.9,
    damping: optax.ScalarOrSchedule = 1e-4,
    iterations: int = 4,
    weight_decay: WeightDecay = 0.0,
    *,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FROG, FROG's forerunner: cheaper, since one Fisher of the inputs serves all outputs.

        M ← μ M + G;   Z = F⁻¹ M, about: k steps of conjugate gradients, one F;   W ← (1 - lr wd) W - lr Z

    Its step grows with M, and so with ``1 / (1 - momentum)``.

    Args:
      damping: ε, number above 0 or schedule, in units of the inputs' squares: the default is for normalised inputs.
      learning_rate, momentum, iterations, weight_decay, mask, fallback, axes, momentum_dtype: as in `frog`.

    Raises:
      ValueError, TypeError: as in `frog`.

    Source: FROG: Fisher row-wise preconditioning, technical overview
      (fullfix.github.io/notes/2026/01/25/frog-optimizer).

    Example (used as `frog` is):
      >>> import fisher_optax as fo
      >>> tx = fo.kfrog(1e-3, weight_decay=1e-2)
    """
    direction = _direction("kfrog", momentum, damping, iterations, momentum_dtype)
    return _complete("kfrog", direction, learning_rate, weight_decay, mask, fallback, axes)


def _scale_by(
    method: str, direction: Direction, fallback: optax.GradientTransformation | None, axes: PyTree
) -> optax.GradientTransformationExtraArgs:
    def build(layers: list[Layer]) -> Freezable:
        return _on_samples(direction, method, layers)

    rest = optax.scale_by_adam() if fallback is None else fallback
    return skip_nonfinite(layers_with_fallback(method, build, rest, axes=axes, kinds=LAYERS, unused=unused_statistics))


def _complete(
    method: str,
    direction: Direction,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: WeightDecay,
    mask: Mask,
    fallback: optax.GradientTransformation | None,
    axes: PyTree,
) -> optax.GradientTransformationExtraArgs:
    check_decay(learning_rate, weight_decay)
    after = stages(learning_rate, weight_decay, mask)

    def build(layers: list[Layer]) -> Freezable:
        return chain(_on_samples(direction, method, layers), *after)

    rest = optax.chain(optax.scale_by_adam(), *after) if fallback is None else fallback
    return skip_nonfinite(layers_with_fallback(method, build, rest, axes=axes, kinds=LAYERS, unused=unused_statistics))


def _on_samples(direction: Direction, method: str, layers: list[Layer]) -> Freezable:
    def check(layer: Layer, samples: Samples, shape: tuple[int, ...]) -> None:
        check_samples(layer.path, samples, shape, bias=layer.bias is not None)
        if samples.window is not None and any(a in layer.axes.inputs for a, _ in layer.axes.parts):
            raise ValueError(
                f"fo.{method}: axes of {layer.path!r} are {layer.axes}, which divide the inputs of a convolution; "
                "samples have these as images, so divide outputs alone."
            )

    return on_layers(direction(layer_axes(layers)), layers, method=method, wants=Samples, check=check)


def _direction(
    method: str,
    momentum: optax.ScalarOrSchedule,
    damping: optax.ScalarOrSchedule,
    iterations: int,
    momentum_dtype: DTypeLike | None,
) -> Direction:
    """Z of lists of matrices with these axes, and their samples."""
    in_range("momentum", momentum, 0, 1)
    in_range("damping", damping, 0)
    if isinstance(damping, int | float) and damping == 0:
        raise ValueError("damping must be above 0, since samples need not span all inputs; got 0. Try 1e-6.")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a number of steps, 1 or more; got {iterations!r}.")
    average = weighted_mean(momentum, momentum_dtype)

    def init(params: PyTree) -> FrogState:
        return FrogState(jnp.zeros([], jnp.int32), cast(MomentumState, average.init(params)))

    def update(
        axes: list[MatrixAxes],
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        accept: Bool[Array, ""] | None = None,
        statistics: Sequence[Samples] | None = None,
        **extra: PyTree,
    ) -> tuple[list[Array], FrogState]:
        del params, extra
        if statistics is None and updates:
            raise ValueError(
                f"fo.{method} keeps no curvature between steps, so that statistics=None leaves it none: {SOURCE}."
            )
        means, averaged = cast(
            tuple[list[Array], MomentumState], average.update(updates, state.momentum, accept=accept)
        )
        τ = value_at(damping, state.count)
        Z = [
            in_parts(SOLVES[method], averaged.weight.astype(m.dtype) * m, samples, own, τ, iterations)
            for m, samples, own in zip(means, statistics or (), axes, strict=True)
        ]
        return Z, FrogState(counted(accept, state.count), averaged)

    return lambda axes: Freezable(init, functools.partial(update, axes))
