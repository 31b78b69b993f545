"""Muon: momentum, orthogonalised."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .._arguments import in_range, injectable, whole
from ..matrices.axes import MatrixAxes
from ..matrices.rules import resolve_axes
from ..transforms.decay import Mask, WeightDecay, check_decay, stages
from ..transforms.fallback import Build, is_matrix, with_fallback
from ..transforms.momentum import with_momentum
from ..transforms.per_matrix import describe_matrices, per_matrix, polar
from ..transforms.skip_nonfinite import Freezable, chain, skip_nonfinite

KINDS = ("matrix",)  # the author leaves embeddings and heads to Adam
DTYPES = jnp.inexact  # of the matrices that `axes` may name: a complex one has a polar factor too, a unitary one


@injectable
def scale_by_muon(
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    *,
    scale: str | float = "match_rms_adamw",
    polynomial: Sequence[Sequence[float]] | None = None,
    momentum_dtype: DTypeLike | None = None,
    method: str = "auto",
    dtype: DTypeLike | None = None,
    max_stack: int = 256,
    mesh_axis: str | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `muon`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam()``.

    Example (NorMuon with cautious decay, as a plain chain):
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_muon(), fo.scale_by_normuon(), fo.add_cautious_decay(0.1),
      ...                  optax.scale_by_learning_rate(1e-2))
    """
    in_range("beta", beta, 0, 1)
    orthogonalized = _orthogonalized(scale, polynomial, method, dtype, max_stack, mesh_axis)
    fallback = optax.scale_by_adam() if fallback is None else fallback

    def build(matrices: list[MatrixAxes]) -> Freezable:
        return with_momentum(orthogonalized(matrices), beta, nesterov, momentum_dtype)

    return _on_matrices(build, fallback, axes)


@injectable
def muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    weight_decay: WeightDecay = 0.0,
    *,
    scale: str | float = "match_rms_adamw",
    polynomial: Sequence[Sequence[float]] | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
    momentum_dtype: DTypeLike | None = None,
    method: str = "auto",
    dtype: DTypeLike | None = None,
    max_stack: int = 256,
    mesh_axis: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon: momentum, orthogonalised.

        m ← β m + G;   u = β m + G if nesterov else m
        W ← W - lr (scale(m, n) · polar(u) + wd W)

    The polar factor comes from a Newton-Schulz iteration.

    Args:
      learning_rate: number or schedule. With the default scale, AdamW's rates are a good start.
      beta: momentum, number or schedule.
      nesterov: look one step ahead.
      weight_decay: per unit of learning rate, number or schedule; or an `fo.Decay`.
      scale: "match_rms_adamw" ``0.2 sqrt(max(m, n))`` (Moonlight: an update as large as AdamW's), "shape"
        ``sqrt(max(1, out/in))`` (Jordan), "unit_rms" ``sqrt(out/in)``, or a number.
      polynomial: `fo.polar_express` ``(steps=5)`` by default, `fo.jordan`, `fo.you`, or any sequence of (a, b, c).
      mask: which parameters decay, as in `optax.adamw`.
      fallback: a complete optimizer for what is no matrix, and for embeddings and heads; default ``optax.adamw`` with
        this rate, decay and mask.
      axes: None (rules by path and shape, see `fo.report`; an `fo.AxesWarning` names what they leave open), "strict"
        (the same, as an error), "out_in" (the rules for a tree that stores outputs first), a tree of `fo.MatrixAxes`,
        e.g. from `fo.infer_axes`, or a function of params. Complex leaves that it names get the unitary polar factor;
        the rules leave them to the fallback.
      momentum_dtype: storage of the momentum, default float32 at least.
      method: "direct", "gram", or "auto", as in `fo.linalg.orthogonalize`.
      dtype: what the iteration runs in, default float32 at least.
      max_stack: at most so many matrices of one shape are iterated as one batch.
      mesh_axis: share the iterations out over this axis of the mesh in scope.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), Moonlight's scale from Liu et al. 2025 (arXiv
      2502.16982), the default polynomials from Amsel et al. 2025 (arXiv 2505.16932), Gram iterations from Zhang et al.
      2026.

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> params = {"Dense_0": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
      >>> tx = fo.muon(1e-2, weight_decay=0.1)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    check_decay(learning_rate, weight_decay)
    in_range("beta", beta, 0, 1)
    orthogonalized = _orthogonalized(scale, polynomial, method, dtype, max_stack, mesh_axis)
    after = stages(learning_rate, weight_decay, mask)

    def build(matrices: list[MatrixAxes]) -> Freezable:
        return chain(with_momentum(orthogonalized(matrices), beta, nesterov, momentum_dtype), *after)

    fallback = optax.chain(optax.scale_by_adam(), *after) if fallback is None else fallback
    return _on_matrices(build, fallback, axes)


def _orthogonalized(
    scale: str | float,
    polynomial: Sequence[Sequence[float]] | None,
    method: str,
    dtype: DTypeLike | None,
    max_stack: int,
    mesh_axis: str | None,
) -> Build:
    """The polar factor of every matrix, of their axes."""
    whole("max_stack", max_stack, 1)
    tx = polar(polynomial, scale, method=method, dtype=dtype)
    return lambda matrices: per_matrix(tx, matrices, max_stack=max_stack, mesh_axis=mesh_axis, batched=True)


def _on_matrices(
    build: Build, fallback: optax.GradientTransformation, axes: PyTree
) -> optax.GradientTransformationExtraArgs:
    # An orthogonalised gradient may be as large as its dtype allows; the fallback takes squares.
    return skip_nonfinite(
        with_fallback("muon", build, fallback, axes=axes, kinds=KINDS, describe=describe_matrices, dtypes=DTYPES),
        lambda tree: [not is_matrix(leaf, KINDS) for leaf in resolve_axes(tree, axes, DTYPES, KINDS)],
    )
