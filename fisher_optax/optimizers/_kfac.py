"""What K-FAC and EKFAC share: layers with their statistics, preconditioned, grafted and clipped; momentum, decay."""

import dataclasses
from collections.abc import Callable

import optax
from jaxtyping import PyTree

from .._arguments import in_range, one_of
from ..capture.to_optimizer import layer_axes, on_layers, unused_statistics
from ..linalg.eigenbasis import LowRank
from ..matrices.layout import Layer
from ..preconditioner.contracts import Application, Decomposition, FactorRule, Refresh, Storage, refresh_of, storage_of
from ..preconditioner.decompositions import cholesky_inverse, eigh, inverse_root, orthogonal_iteration, with_eigenvalues
from ..preconditioner.factors import tikhonov
from ..preconditioner.precondition import preconditioner
from ..preconditioner.step import Store
from ..preconditioner.transform import Preconditioner
from ..statistics import LayerFactors, Logits
from ..transforms.decay import Mask, decayed_weights, scheduled
from ..transforms.fallback import layers_with_fallback
from ..transforms.grafting import frozen_trace, graft_on, magnitude_of, once_seen
from ..transforms.skip_nonfinite import Freezable, chain, skip_nonfinite
from ._reached import OfReached, reached_factors, where_reached
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
    method = preconditioner(
        factors,
        decomposition,
        where_reached(application),
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        refresh=dataclasses.replace(options, transport="squared", first_step="adam"),
        storage=stored,
    )
    return OfReached.of(method)


def _parts(
    decay: optax.ScalarOrSchedule, damping: optax.ScalarOrSchedule, exponent: float, way: str | None, rank: int
) -> tuple[FactorRule, Decomposition]:
    factors = reached_factors(decay, rank)
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
        for layer in layers if squares else [layers[i] for i in heads]:
            _require_whole(name, layer)
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
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
    of_heads: ForHeads | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`direction` with momentum, decay and rate; ``fallback`` is complete, by default AdamW."""
    after = optax.chain(decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate))

    def built(layers: list[Layer]) -> Freezable:
        return chain(build(layers), scheduled(frozen_trace, decay=momentum), after)

    rest = optax.chain(optax.scale_by_adam(), after) if fallback is None else fallback
    return direction(name, method, built, rest, axes, of_heads)


def check_numbers(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    kl_clip: optax.ScalarOrSchedule | None,
) -> None:
    """A ValueError for what is out of range."""
    in_range("learning_rate", learning_rate, 0)
    in_range("momentum", momentum, 0, 1)
    in_range("weight_decay", weight_decay, 0)
    in_range("kl_clip", 0.0 if kl_clip is None else kl_clip, 0)


# Which sides of a layer's statistics a preconditioner must have whole.


def _require_whole(method: str, layer: Layer) -> None:
    """A ValueError for a layer that is divided."""
    if layer.axes.parts:
        why = (
            "its squares are in bases of whole layers" if method == "ekfac" else "a softmax's Fisher is of whole heads"
        )
        raise ValueError(
            f"fo.{method}: axes of {layer.path!r} are {layer.axes}, but {why}: leave parts= out, or take fo.kfac "
            "without head=."
        )


def whole_sides(method: str, storage: Store, layer: Layer, shape: tuple[int, ...]) -> None:
    """A ValueError unless both sides of a matrix of that shape have a basis."""
    *_, m, n = shape
    if not all(storage.wanted(m, n)):
        raise ValueError(
            f"fo.{method}: {layer.path!r} is {m} x {n}, longer than max_precond_dim={storage.max_dim}, and a side of "
            "low rank has no whole basis: raise max_precond_dim, or leave the layer to the fallback by axes=."
        )


def same_shapes(
    method: str, storage: Store, squares: bool, layer: Layer, statistics: LayerFactors, shape: tuple[int, ...]
) -> None:
    """A ValueError unless the statistics are of a matrix of that shape, each side kept as the optimizer keeps it."""
    *batch, m, n = shape
    if squares and statistics.squares is None:
        raise ValueError(
            f"fo.{method}: statistics of {layer.path!r} have no squares: use fo.KroneckerFactors(squares=True) and "
            "grad_fn(..., bases=fo.eigenbases(opt_state, params))."
        )
    if isinstance(statistics.right, Logits):
        raise ValueError(
            f"fo.{method}: the right statistics of {layer.path!r} are logits, which fo.kfac(head=...) takes of a layer "
            "called head, lm_head or logits: call it so and pass head=, or leave head_rows= out of fo.KroneckerFactors."
        )
    for name, side, d, whole in zip(
        ("left", "right"), (statistics.left, statistics.right), (m, n), storage.wanted(m, n), strict=True
    ):
        size = getattr(side, "shape", ())
        divided = dict(layer_axes([layer])[0].parts).keys()
        if not whole and len(batch) + (name == "right") in divided:
            raise ValueError(
                f"fo.{method}: {layer.path!r} is {m} x {n}, longer than max_precond_dim={storage.max_dim}; a side of "
                "low rank has no parts: raise max_precond_dim, or leave parts= of its axes out."
            )
        have = "nothing" if side is None else f"{side.rows.shape} rows" if isinstance(side, LowRank) else f"{size}"
        fits = isinstance(side, LowRank) if not whole else size[-2:] == (d, d)
        if not fits:
            wanted = f"a {d} x {d} matrix" if whole else f"rows of a side longer than {storage.max_dim}"
            raise ValueError(
                f"fo.{method}: the {name} statistics of {layer.path!r} are {have}; wanted {wanted}. Give the optimizer "
                "and fo.KroneckerFactors the same max_precond_dim=max_dim and rank; axes=fo.infer_axes(loss_fn, "
                "params, batch) leaves to the fallback what is only looked up."
            )
