"""What K-FAC and EKFAC share: layers with their statistics, preconditioned, grafted and clipped; momentum, decay."""

import dataclasses
from collections.abc import Callable

import optax
from jaxtyping import PyTree

from .._arguments import in_range, one_of
from .._xla import select
from ..capture.to_optimizer import (
    layer_axes,
    on_layers,
    require_whole,
    same_shapes,
    unused_statistics,
    whole_sides,
)
from ..matrices.layout import Layer
from ..preconditioner.contracts import (
    Application,
    Decomposition,
    FactorRule,
    Refresh,
    Storage,
    refresh_of,
    storage_of,
)
from ..preconditioner.decompositions import cholesky_inverse, eigh, inverse_root, orthogonal_iteration, with_eigenvalues
from ..preconditioner.factors import kronecker, tikhonov
from ..preconditioner.factors.kronecker import is_reached
from ..preconditioner.precondition import preconditioner
from ..preconditioner.transform import Preconditioner
from ..statistics import LayerFactors
from ..transforms.decay import Mask, WeightDecay, check_decay, scheduled, stages
from ..transforms.fallback import layers_with_fallback
from ..transforms.grafting import frozen_trace, graft_on, magnitude_of, once_seen
from ..transforms.skip_nonfinite import Freezable, chain, skip_nonfinite
from .kfac_head import ForHeads, apart, check_head, describing, is_head

KINDS = ("matrix", "head")
STORAGE = ("factor_dtype", "packed", "block_size", "rank", "mesh_axis")
Build = Callable[[list[Layer]], Freezable]


def captured(
    name: str,
    curvature_decay: optax.ScalarOrSchedule,
    damping: optax.ScalarOrSchedule,
    exponent: float,
    application: Application,
    precondition_frequency: int,
    max_precond_dim: int,
    refresh: Refresh | str,
    storage: Storage | None,
    ways: tuple[str, ...],
) -> Preconditioner:
    """Captured factors x one of the ``ways`` to decompose them x the application."""
    in_range("curvature_decay", curvature_decay, 0, 1)
    in_range("damping", damping, 0)
    if not -1 <= exponent <= 0:
        raise ValueError(f"exponent must lie between -1 and 0; got {exponent!r}.")
    options = refresh_of(name, refresh, {"decomposition": "auto", "tolerance": 0.01})
    one_of("decomposition", options.decomposition, ways)
    if options.decomposition == "inverse" and options.when == "adaptive":
        bases = ", ".join(repr(way) for way in ways if way != "inverse")
        raise ValueError(f"refresh='adaptive' needs an eigenbasis: decomposition must be {bases}; got 'inverse'.")
    stored = storage_of(name, storage, STORAGE)
    factors, decomposition = _parts(curvature_decay, damping, exponent, options.decomposition, stored.rank)
    return preconditioner(
        factors,
        decomposition,
        where_reached(application),
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        refresh=dataclasses.replace(options, transport="squared", first_step="adam"),
        storage=stored,
    )


def _parts(
    decay: optax.ScalarOrSchedule, damping: optax.ScalarOrSchedule, exponent: float, way: str | None, rank: int
) -> tuple[FactorRule, Decomposition]:
    factors = kronecker(decay, rank=rank)
    if way == "inverse":
        root = cholesky_inverse() if exponent == -1 else inverse_root(exponent, ridge=0.0)
        return factors._replace(read=tikhonov(damping)), root
    full = {"auto": lambda: eigh("auto"), "eigh": eigh}
    return factors, with_eigenvalues(full[way]() if way in full else orthogonal_iteration(way or "auto"))


def direction_of(
    name: str,
    method: Preconditioner,
    *,
    grafting: object = None,
    of_heads: ForHeads | None = None,
    squares: bool = False,
    kl_clip: optax.ScalarOrSchedule | None = None,
    learning_rate: optax.ScalarOrSchedule = 0.0,
) -> Build:
    """The direction of a tree of layers: preconditioned, then grafted, then clipped.

    Args:
      of_heads: what heads get, if not what all layers get.
      squares: whether statistics hold squares, in whole bases.
      kl_clip, learning_rate: of the clipping, if any.
    """
    magnitude = None if grafting is None else magnitude_of(grafting)

    def check(layer: Layer, statistics: LayerFactors, shape: tuple[int, ...]) -> None:
        if of_heads and is_head(layer.path):
            check_head(name, of_heads.fisher, layer, statistics, shape)
        else:
            same_shapes(name, method.storage, squares, layer, statistics, shape)

    def build(layers: list[Layer]) -> Freezable:
        axes = layer_axes(layers)
        heads = [i for i, layer in enumerate(layers) if of_heads and is_head(layer.path)]
        for i in heads:
            require_whole(name, layers[i])
        inner = method.on_matrices([a for i, a in enumerate(axes) if i not in heads])
        if of_heads and heads:
            inner = apart(heads, of_heads.transformation, inner)
        if magnitude is not None:
            inner = graft_on(inner, magnitude, list(axes))
        return on_layers(
            once_seen(inner, kl_clip, learning_rate),
            layers,
            method=name,
            wants=LayerFactors,
            check=check,
            check_shape=lambda layer, shape: whole_sides(name, method.storage, layer, shape) if squares else None,
        )

    return build


def direction(
    name: str,
    method: Preconditioner,
    build: Build,
    fallback: optax.GradientTransformation | None,
    axes: PyTree,
    of_heads: ForHeads | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``build`` on layers, and ``fallback``, a direction, on the rest; by default Adam."""
    rest = optax.scale_by_adam() if fallback is None else fallback
    describe = describing(method.describe, of_heads)
    return skip_nonfinite(
        layers_with_fallback(name, build, rest, axes=axes, kinds=KINDS, describe=describe, unused=unused_statistics)
    )


def optimizer(
    name: str,
    method: Preconditioner,
    build: Build,
    fallback: optax.GradientTransformation | None,
    axes: PyTree,
    *,
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule,
    weight_decay: WeightDecay,
    mask: Mask,
    of_heads: ForHeads | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`direction` with momentum, decay and rate; ``fallback`` is complete, by default AdamW."""
    after = optax.chain(*stages(learning_rate, weight_decay, mask))

    def built(layers: list[Layer]) -> Freezable:
        return chain(build(layers), scheduled(frozen_trace, decay=momentum), after)

    rest = optax.chain(optax.scale_by_adam(), after) if fallback is None else fallback
    return direction(name, method, built, rest, axes, of_heads)


def check_numbers(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule,
    weight_decay: WeightDecay,
    kl_clip: optax.ScalarOrSchedule | None,
) -> None:
    """A ValueError for what is out of range."""
    check_decay(learning_rate, weight_decay)
    in_range("momentum", momentum, 0, 1)
    in_range("kl_clip", 0.0 if kl_clip is None else kl_clip, 0)


def where_reached(application: Application) -> Application:
    """The application, whose own averages of statistics are of the matrices that a gradient has reached."""
    observe = application.observe
    if observe is None:
        return application

    def observed(state: PyTree, statistics: LayerFactors, basis: PyTree) -> PyTree:
        return select(is_reached(statistics.right), observe(state, statistics, basis), state)

    return application._replace(observe=observed)
