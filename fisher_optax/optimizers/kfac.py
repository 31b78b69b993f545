"""K-FAC: natural gradient with one Kronecker product a layer, of statistics that capture takes in the backward pass.

    A ← mean of a aᵀ,  B ← mean of δ δᵀ             moving averages; the bias is the weight of an input that is always 1
    D = (A ⊗ B + λ I)^p G                           p = -1: natural gradient; -1/2: Adam's power, more robust
        or (A + π sqrt(λ) I)⁻¹ G (B + sqrt(λ)/π I)⁻¹, π² = (tr A / d_A) / (tr B / d_B)
    U = D |M| / |D|                                 only with grafting, M the step of another optimizer
    U ← ν U,  ν = min(1, sqrt(c / (lr² Σ <U, G>)))  only with KL clipping, over all layers
    m ← μ m + U;   W ← W - lr (m + wd W)
EKFAC puts the Fisher's measured diagonal in the eigenbasis in the place of the eigenvalues of A ⊗ B.

Sources: Martens and Grosse 2015 (arXiv 1503.05671); convolutions: Grosse and Martens 2016 (arXiv 1602.01407); EKFAC:
  George et al. 2018 (arXiv 1806.03884); KL clipping: Ba et al. 2017 (distributed K-FAC), as in kfac-jax.
"""

from typing import Any

import optax

from .._checks import in_range
from ..capture.to_optimizer import layer_axes, on_layers
from ..matrices.layers import Layer
from ..preconditioner.applications import damped, eigenvalue_corrected
from ..preconditioner.decompositions import cholesky_inverse, eigh, inverse_root, orthogonal_iteration, with_eigenvalues
from ..preconditioner.factors import kronecker, tikhonov
from ..preconditioner.precondition import preconditioner
from ..preconditioner.transform import Preconditioner
from ..statistics import LayerFactors
from ..transforms.decay import Mask, decayed_weights
from ..transforms.fallback import layers_with_fallback
from ..transforms.freeze import chain
from ..transforms.grafting import graft_on, magnitude_of
from ..transforms.hyperparameters import injectable, scheduled, takes
from ..transforms.kl_clip import once_seen
from ..transforms.momentum import frozen_trace
from ..transforms.skip_nonfinite import skip_nonfinite
from ._sides import same_shapes, whole_sides
from .kfac_head import apart, check_head, describing, for_heads, is_head

KINDS = ("matrix", "head")
DECOMPOSITIONS = ("eigh", "qr", "inverse")


@injectable
def scale_by_kfac(
    curvature_decay: Any = 0.95,
    damping: Any = 1e-3,
    *,
    exponent: float = -1.0,
    decomposition: str = "eigh",
    grafting: Any = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 4096,
    rank: int = 256,
    block_size: int | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: Any = None,
    refresh: str = "every",
    adaptive_tolerance: float = 0.01,
    factor_dtype: Any = None,
    factor_storage: str = "full",
    mesh_axis: str | None = None,
    head: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction D or U of `kfac`, without clipping, momentum, rate and decay; ``fallback`` is a direction too,
    default ``optax.scale_by_adam()``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_kfac(exponent=-0.5), optax.scale_by_learning_rate(1e-3))
    """
    return _direction("kfac", **locals())


@injectable
def kfac(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.9,
    curvature_decay: Any = 0.95,
    damping: Any = 1e-3,
    weight_decay: Any = 0.0,
    *,
    exponent: float = -1.0,
    decomposition: str = "eigh",
    grafting: Any = None,
    kl_clip: Any = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 4096,
    rank: int = 256,
    block_size: int | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: Any = None,
    refresh: str = "every",
    adaptive_tolerance: float = 0.01,
    factor_dtype: Any = None,
    factor_storage: str = "full",
    mesh_axis: str | None = None,
    head: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC (see the top of this file for the rule).

    ``update(grads, state, params, statistics=stats)`` with the statistics of `fo.value_and_grad`; with
    ``statistics=None`` curvature stays as it is, and until there was some, layers do not move.

    Args:
      learning_rate: number or schedule.
      momentum: μ, of the preconditioned steps; number or schedule.
      curvature_decay: decay of A and B per update with statistics, number or schedule; .95 remembers two refreshes.
      damping: λ, in units of the Fisher; number or schedule.
      weight_decay: decoupled, per unit of learning rate; number or schedule.
      exponent: p, from -1 to 0.
      decomposition: "eigh", or "qr" (a step of orthogonal iteration, cheaper, follows slowly), both with exact damping
        at four products a step; "inverse": factored damping, two products, and a Cholesky factorisation a refresh.
      grafting: None (D itself), "adam", "rmsprop", "sgd" or any transformation without a rate.
      kl_clip: c, number or schedule: at most so much change of the model's outputs a step, in nats; 1e-3 is common.
      precondition_frequency: steps between refreshes; the first call is one.
      max_precond_dim: a longer side is kept as ``rank`` rows, which stand for its strongest directions; both as in
        `fo.KroneckerFactors` (``max_dim``, ``rank``). Its other directions are damped alone. A 4096-wide side costs
        seconds of eigh on a CPU: there, smaller is better.
      rank: how many rows.
      block_size: cut longer sides into blocks of at most this, each with its share of the factor.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: a complete optimizer for what is no matrix (biases go with their kernels) and for embeddings, default
        ``optax.adamw`` with this rate, decay and mask.
      axes: None (rules by path and shape, see `fo.report`), a tree of `fo.MatrixAxes`, e.g. from `fo.infer_axes`, or a
        function of params.
      refresh: "every", "adaptive" (eigenbases with off-diagonality above ``adaptive_tolerance``) or "staggered" (each
        step its share).
      factor_dtype: storage of factors and bases, default float32.
      factor_storage: "full", or "packed": half of each symmetric factor.
      mesh_axis: share the matrices and their state out over this axis of the mesh in scope, `init`'s too; a stack that
        the devices do not divide is filled up.
      head: how the right side of the layer named head, lm_head or logits is treated. None: as any other's. "true": it
        is the softmax's own Fisher, exact for ``rank`` tokens, whatever labels the others' statistics are of, and every
        word is in it; "empirical": that of the data's labels. Both are solved, never formed, for any vocabulary, with
        exponent -1 and factored damping (`kfac_head`), and need ``fo.KroneckerFactors(head_rows=rank)``.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind; in `update`, without
        ``statistics``, or with those of another kind, shape or axes: where the program uses a layer in another way than
        the rules read it, pass ``axes=fo.infer_axes(...)``.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params, x, y = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, jnp.ones((8, 4)), jnp.ones((8, 3))
      >>> loss = lambda p: fo.losses.gaussian(x @ p["kernel"] + p["bias"], y)
      >>> tx = fo.kfac(0.1, damping=1e-2)
      >>> value, grads, stats = fo.value_and_grad(loss)(params)
      >>> updates, state = tx.update(grads, tx.init(params), params, statistics=stats)
    """
    return _complete("kfac", **locals())


@injectable
@takes(scale_by_kfac)
def scale_by_ekfac(**options: Any) -> optax.GradientTransformationExtraArgs:
    """The direction of `ekfac`, in `scale_by_kfac`'s arguments."""
    return _direction("ekfac", **options)


@injectable
@takes(kfac)
def ekfac(**options: Any) -> optax.GradientTransformationExtraArgs:
    """EKFAC, in `kfac`'s arguments: S, the moving average of the squares of each example's gradient in the eigenbasis,
    takes the place of ``λ_A λ_Bᵀ``, and is carried over as squares when the basis turns.

    Statistics are those of ``fo.KroneckerFactors(squares=True)``, taken in the bases at hand:
    ``grad_fn(params, batch, bases=fo.eigenbases(opt_state, params))``. Not for "inverse" or sides of low rank.

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
    return _complete("ekfac", **options)


def _direction(
    name: str, fallback: Any, axes: Any, grafting: Any, head: str | None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    method = _preconditioner(name, **options)
    of_heads = for_heads(name, head, grafting, **options)
    magnitude = None if grafting is None else magnitude_of(grafting)
    fallback = optax.scale_by_adam() if fallback is None else fallback

    def build(layers: list[Layer]) -> optax.GradientTransformation:
        return _on_layers(name, method, of_heads, magnitude, None, 0.0, layers)

    routed = layers_with_fallback(
        name, build, fallback, axes=axes, kinds=KINDS, describe=describing(method.describe, of_heads)
    )
    return skip_nonfinite(routed)


def _complete(
    name: str,
    learning_rate: Any,
    momentum: Any,
    weight_decay: Any,
    grafting: Any,
    kl_clip: Any,
    mask: Mask,
    fallback: Any,
    axes: Any,
    head: str | None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    method = _preconditioner(name, **options)
    of_heads = for_heads(name, head, grafting, **options)
    in_range("learning_rate", learning_rate, 0)
    in_range("momentum", momentum, 0, 1)
    in_range("weight_decay", weight_decay, 0)
    in_range("kl_clip", 0.0 if kl_clip is None else kl_clip, 0)
    magnitude = None if grafting is None else magnitude_of(grafting)
    after = optax.chain(decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate))

    def build(layers: list[Layer]) -> optax.GradientTransformation:
        direction = _on_layers(name, method, of_heads, magnitude, kl_clip, learning_rate, layers)
        return chain(direction, scheduled(frozen_trace, decay=momentum), after)

    fallback = optax.chain(optax.scale_by_adam(), after) if fallback is None else fallback
    routed = layers_with_fallback(
        name, build, fallback, axes=axes, kinds=KINDS, describe=describing(method.describe, of_heads)
    )
    return skip_nonfinite(routed)


def _preconditioner(
    name: str,
    curvature_decay: Any,
    damping: Any,
    exponent: float,
    decomposition: str,
    rank: int,
    **options: Any,
) -> Preconditioner:
    """The cell: factors, decomposition, application."""
    in_range("curvature_decay", curvature_decay, 0, 1)
    in_range("damping", damping, 0)
    if decomposition not in DECOMPOSITIONS:
        raise ValueError(f"decomposition must be one of {', '.join(map(repr, DECOMPOSITIONS))}; got {decomposition!r}.")
    if not -1 <= exponent <= 0:
        raise ValueError(f"exponent must lie between -1 and 0; got {exponent!r}.")
    if decomposition == "inverse" and (name == "ekfac" or options["refresh"] == "adaptive"):
        what = "fo.ekfac" if name == "ekfac" else "refresh='adaptive'"
        raise ValueError(f"{what} needs an eigenbasis: decomposition must be 'eigh' or 'qr'; got 'inverse'.")
    rule = kronecker(curvature_decay, rank=rank)
    if name == "ekfac":
        application = eigenvalue_corrected(damping, exponent, curvature_decay)
    else:
        application = damped(damping, exponent)
    if decomposition == "inverse":
        decompose = cholesky_inverse() if exponent == -1 else inverse_root(exponent, ridge=0.0)
        rule = rule._replace(read=tikhonov(damping))
    else:
        decompose = with_eigenvalues(eigh() if decomposition == "eigh" else orthogonal_iteration())
    return preconditioner(rule, decompose, application, transport="squared", first_step="adam", **options)


def _on_layers(
    name: str, method: Preconditioner, of_heads: Any, magnitude: Any, clip: Any, learning_rate: Any, layers: list[Layer]
) -> optax.GradientTransformationExtraArgs:
    """The direction of a tree of layers: preconditioned, then grafted, then clipped."""
    axes = layer_axes(layers)
    heads = [i for i, layer in enumerate(layers) if of_heads and is_head(layer.path)]
    inner = method.on_matrices([a for i, a in enumerate(axes) if i not in heads])
    if of_heads and heads:
        inner = apart(heads, of_heads[1], inner)
    if magnitude is not None:
        inner = graft_on(inner, magnitude, list(axes))
    squares = name == "ekfac"

    def check(layer: Layer, given: Any, shape: tuple[int, ...]) -> None:
        if of_heads and is_head(layer.path):
            check_head(name, of_heads[0], layer, given, shape)
        else:
            same_shapes(name, method.storage, squares, layer, given, shape)

    return on_layers(
        once_seen(inner, clip, learning_rate),
        layers,
        method=name,
        wants=LayerFactors,
        check=check,
        check_shape=lambda *given: whole_sides(name, method.storage, *given) if squares else None,
    )
