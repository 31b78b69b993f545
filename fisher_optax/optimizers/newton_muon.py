"""Newton-Muon and its sandwich: Muon's step, preconditioned by the moment of each layer's inputs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import optax
from jaxtyping import PyTree

from .._arguments import in_range, injectable, one_of
from ..capture.to_optimizer import layer_axes, on_layers, unused_statistics, whole_left
from ..matrices.layout import Layer
from ..preconditioner.applications.rooted_polar import FORMS, rooted_polar
from ..preconditioner.contracts import Refresh, Storage, refresh_of, storage_of
from ..preconditioner.decompositions import cholesky_inverse, inverse_root
from ..preconditioner.factors import inputs
from ..preconditioner.precondition import preconditioner
from ..preconditioner.transform import Preconditioner
from ..statistics import LayerFactors
from ..transforms.decay import Mask, WeightDecay, check_decay, stages
from ..transforms.fallback import layers_with_fallback
from ..transforms.skip_nonfinite import Freezable, chain, skip_nonfinite

KINDS = ("matrix",)  # as Muon
STORAGE = ("factor_dtype", "packed", "momentum_dtype", "mesh_axis")
DAMPING = {"newton": 0.2, "sandwich": 1e-3}  # the authors'


@injectable
def scale_by_newton_muon(
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    curvature_decay: optax.ScalarOrSchedule = 0.95,
    damping: optax.ScalarOrSchedule | None = None,
    *,
    form: str = "newton",
    scale: str | float = "match_rms_adamw",
    polynomial: Sequence[Sequence[float]] | None = None,
    precondition_frequency: int = 32,
    max_precond_dim: int = 4096,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `newton_muon`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam()``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_newton_muon(scale="shape"), optax.scale_by_learning_rate(0.02))
    """
    what = (precondition_frequency, max_precond_dim, refresh, storage)
    method = _method(beta, nesterov, curvature_decay, damping, form, scale, polynomial, *what)
    fallback = optax.scale_by_adam() if fallback is None else fallback
    return _on_matrices(method, _on_layers(method), fallback, axes)


@injectable
def newton_muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    curvature_decay: optax.ScalarOrSchedule = 0.95,
    damping: optax.ScalarOrSchedule | None = None,
    weight_decay: WeightDecay = 0.0,
    *,
    form: str = "newton",
    scale: str | float = "match_rms_adamw",
    polynomial: Sequence[Sequence[float]] | None = None,
    precondition_frequency: int = 32,
    max_precond_dim: int = 4096,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """Newton-Muon: Muon with the inverse of its inputs' moment before it, or the square root of that around it.

        A ← mean of a aᵀ over the layer's inputs     moving average, weighted by tokens
        every k steps   S ← (A + γ tr(A)/m I)^p      p = -1: newton; p = -1/2: sandwich
        newton     m ← β m + S G;   u = β m + S G if nesterov else m;   U = polar(u)
        sandwich   m ← β m + G;     u = β m + G if nesterov else m;     D = S polar(S u),  U = D sqrt(min(m, n)) / |D|
        W ← W - lr (scale(m, n) · U + wd W)

    ``update(grads, state, params, statistics=stats)`` takes the statistics of `fo.value_and_grad` with `fo.InputGram`,
    which needs no output gradients; those of `fo.KroneckerFactors` do too. With ``statistics=None`` the root stays, and
    the momentum goes on. Until there were statistics, the step is Muon's; so it is where inputs are white. A call in
    which no token reached a matrix, as an expert's, leaves its A as it is. Biases go to the fallback: A is of the
    kernel's inputs alone.

    Args:
      learning_rate: number or schedule. With the default scale, AdamW's rates are a good start.
      beta: momentum, number or schedule.
      nesterov: look one step ahead.
      curvature_decay: decay of A per update with statistics, number or schedule.
      damping: γ, relative to A's mean eigenvalue, number or schedule; None: .2 for "newton", 1e-3 for "sandwich", their
        authors'.
      weight_decay: per unit of learning rate, number or schedule; or an `fo.Decay`.
      form: "newton" (the paper's), or "sandwich" (levanter's), which without damping does not depend on how inputs are
        written: any invertible change of them changes no output.
      scale: "match_rms_adamw", "shape", "unit_rms", or a number, as in `muon`.
      polynomial: of the Newton-Schulz iteration, as in `muon`.
      precondition_frequency: steps between new roots; 32 is Newton-Muon's, levanter has 1. The first statistics of a
        matrix make one at once.
      max_precond_dim: a matrix with more inputs gets Muon's step.
      refresh: "every", "staggered", or a `fo.Refresh` of these: roots of one length are made by the same way.
      storage: a `fo.Storage`, without ``sides``, ``block_size`` and ``rank``. Factors in bfloat16 may need more
        damping: where rounding makes one indefinite the old root stays, which `fo.health` counts.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: a complete optimizer for what is no matrix, and for embeddings and heads; default ``optax.adamw`` with
        this rate, decay and mask.
      axes: as in `kfac`.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind; in `update`, without
        ``statistics``, or with those of another kind, shape or axes: where the program uses a layer in another way than
        the rules read it, pass ``axes=fo.infer_axes(...)``.

    Sources: arXiv 2604.01472, Algorithm 1, but for its start at ``1e-3 I``, which depends on the inputs' unit; the
      sandwich is that of levanter's activation-aware Muon.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params, x = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, jnp.ones((8, 4))
      >>> loss = lambda p: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2)
      >>> tx = fo.newton_muon(1e-2)
      >>> value, grads, stats = fo.value_and_grad(loss, statistics=fo.InputGram())(params)
      >>> updates, state = tx.update(grads, tx.init(params), params, statistics=stats)
    """
    check_decay(learning_rate, weight_decay)
    what = (precondition_frequency, max_precond_dim, refresh, storage)
    method = _method(beta, nesterov, curvature_decay, damping, form, scale, polynomial, *what)
    after, on = stages(learning_rate, weight_decay, mask), _on_layers(method)

    def build(layers: list[Layer]) -> Freezable:
        return chain(on(layers), *after)

    fallback = optax.chain(optax.scale_by_adam(), *after) if fallback is None else fallback
    return _on_matrices(method, build, fallback, axes)


def _method(
    beta: optax.ScalarOrSchedule,
    nesterov: bool,
    curvature_decay: optax.ScalarOrSchedule,
    damping: optax.ScalarOrSchedule | None,
    form: str,
    scale: str | float,
    polynomial: Sequence[Sequence[float]] | None,
    precondition_frequency: int,
    max_precond_dim: int,
    refresh: Refresh | str,
    storage: Storage | None,
) -> Preconditioner:
    """The inputs' moments x a root x the polar factor with that."""
    one_of("form", form, FORMS)
    damping = DAMPING[form] if damping is None else damping
    in_range("curvature_decay", curvature_decay, 0, 1)
    in_range("damping", damping, 0)
    options = refresh_of("newton_muon", refresh, {})
    if options.when == "adaptive":
        raise ValueError("refresh='adaptive' needs an eigenbasis, and fo.newton_muon has roots; use 'every'.")
    stored = storage_of("newton_muon", storage, STORAGE)
    dtype = stored.momentum_dtype
    method = preconditioner(
        inputs(curvature_decay, damping),
        cholesky_inverse() if form == "newton" else inverse_root(-0.5, ridge=0.0),
        rooted_polar(beta, nesterov, form=form, scale=scale, polynomial=polynomial, momentum_dtype=dtype),
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        refresh=dataclasses.replace(options, transport="permute", first_step="adam"),
        storage=stored,
    )
    return dataclasses.replace(method, storage=method.storage._replace(sides="left"))


def _on_layers(method: Preconditioner) -> Callable[[list[Layer]], Freezable]:
    def build(layers: list[Layer]) -> Freezable:
        inner = method.on_matrices(layer_axes(layers))

        def update(updates: PyTree, state: PyTree, *args: PyTree, statistics: PyTree = None, **extra: PyTree) -> PyTree:
            if statistics is not None:
                # Of a side without a factor, whatever was captured is left out.
                sides = zip(layers, updates, statistics, strict=True)
                statistics = [_left_alone(s, method.storage.wanted(*G.shape[-2:])[0]) for _, G, s in sides]
            return inner.update(updates, state, *args, statistics=statistics, **extra)

        return on_layers(
            Freezable(inner.init, update),
            layers,
            method="newton_muon",
            wants=LayerFactors,
            check=functools.partial(whole_left, "newton_muon", method.storage),
            kind="InputGram",
        )

    return build


def _left_alone(statistics: LayerFactors, wanted: bool) -> LayerFactors:
    return LayerFactors(statistics.left if wanted else None, None, None, statistics.weight)


def _on_matrices(
    method: Preconditioner,
    build: Callable[[list[Layer]], Freezable],
    fallback: optax.GradientTransformation,
    axes: PyTree,
) -> optax.GradientTransformationExtraArgs:
    return skip_nonfinite(
        layers_with_fallback(
            "newton_muon",
            build,
            fallback,
            axes=axes,
            kinds=KINDS,
            describe=method.describe,
            unused=unused_statistics,
            with_bias=False,
        )
    )
