"""NorMuon: every output neuron gets an update of like size."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from .._arguments import in_range, injectable
from ..matrices.axes import MatrixAxes, Typed
from ..matrices.blocks import from_matrices, matrix_shapes, to_matrices
from .decay import scheduled
from .fallback import UNCHANGED, with_fallback
from .skip_nonfinite import skip_nonfinite


class NorMuonState(NamedTuple):
    """State of `scale_by_normuon`: for each matrix leaf, the mean square of every output neuron's update."""

    nu: PyTree


@injectable
def scale_by_normuon(
    b2: optax.ScalarOrSchedule = 0.95, eps: optax.ScalarOrSchedule = 1e-8, *, axes: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    """NorMuon's second half, after `scale_by_muon`: give every output neuron an update of like size.

        v ← b2 v + (1-b2) mean_in(O²);   O' = O / (sqrt(v) + eps);   U = O' |O| / |O'|

    Args:
      b2: decay of v, number or schedule.
      eps: against division by zero, in units of O; number or schedule.
      axes: as in `muon`.

    Source: Li et al. 2025 (arXiv 2510.05491), Algorithm 1.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_muon(), fo.scale_by_normuon(), optax.scale_by_learning_rate(1e-2))
    """
    in_range("b2", b2, 0, 1)
    in_range("eps", eps, 0)

    def build(leaf_axes: list[MatrixAxes]) -> optax.GradientTransformation:
        return scheduled(functools.partial(_per_neuron, leaf_axes), b2=b2, eps=eps)

    return skip_nonfinite(
        with_fallback(
            "normuon", build, optax.identity(), axes=axes, kinds=("matrix",), dtypes=jnp.inexact, otherwise=UNCHANGED
        )
    )


def _per_neuron(leaf_axes: list[MatrixAxes], b2: ArrayLike, eps: ArrayLike) -> optax.GradientTransformation:
    """`scale_by_normuon` on leaves of given axes."""

    def init(params: PyTree) -> NorMuonState:
        leaves, treedef = jax.tree.flatten(params)
        return NorMuonState(treedef.unflatten([_moments(x, a) for x, a in zip(leaves, leaf_axes, strict=True)]))

    def neuron(O: Array, v: Array) -> tuple[Array, Array]:
        new: Any = (b2 * v + (1 - b2) * jnp.mean((O * O.conj()).real, -2, keepdims=True)).astype(v.dtype)
        scaled: Any = O / (jnp.sqrt(new) + eps)
        size, new_size = (jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) for y in (O, scaled))
        return jnp.where(new_size > 0, scaled * size / jnp.where(new_size > 0, new_size, 1), 0), new

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, NorMuonState]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        out, nu = [], []
        for x, vs, a in zip(leaves, treedef.flatten_up_to(state.nu), leaf_axes, strict=True):
            matrices = to_matrices(x.astype(jnp.promote_types(x.dtype, jnp.float32)), a)
            results = [neuron(O, v) for O, v in zip(matrices, vs if a.parts else (vs,), strict=True)]
            out.append(from_matrices(tuple(O for O, _ in results), x.shape, a))
            nu.append(tuple(v for _, v in results) if a.parts else results[0][1])
        return treedef.unflatten(out), NorMuonState(treedef.unflatten(nu))

    return optax.GradientTransformation(init, update)


def _moments(x: Typed, axes: MatrixAxes) -> PyTree:
    """Zeros for each output neuron; several arrays where a leaf is divided."""
    dtype = jnp.finfo(jnp.promote_types(x.dtype, jnp.float32)).dtype
    zeros = tuple(jnp.zeros((*s[:-2], 1, s[-1]), dtype) for s in matrix_shapes(x.shape, axes))
    return zeros if axes.parts else zeros[0]
