"""How far to prune at which step, and which leaves: what optimizers that prune share."""

from collections.abc import Callable, Container
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from ..._arguments import value_at
from ...matrices.axes import LeafAxes, MatrixAxes, how_many, listed, made, path_names
from ...matrices.blocks import from_matrices, matrix_shapes, to_matrices
from ...matrices.rules import ambiguous_among, is_told
from ...transforms.fallback import warned_once
from ..leaf_axes import leaf_axes
from ..matrix.masks import SCOPES, Pattern, Sparsity, as_sparsity, check_pattern, global_masks, mask

LATE = 2**31 - 1  # of any schedule, the last step
SAY_AXES = (
    "Pass axes=fo.infer_axes(loss_fn, params, batch), which reads them off the program, or axes= with a fo.MatrixAxes "
    "for each, and None for what is not to be pruned."
)


def cubic_schedule(final: float, begin: int, end: int, initial: float = 0.0) -> Callable[[ArrayLike], Array]:
    """``s(t) = s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))³`` from step t0 to t1; s_i before, s_f after.

    Much is pruned first, while what is left can make up for it, and little in the end.

    Args:
      final, initial: s_f and s_i.
      begin, end: t0 and t1, in steps.

    Raises:
      ValueError: for an end that is not after the beginning.

    Source: Zhu and Gupta 2017 (arXiv 1710.01878), equation 1.

    Example:
      >>> import fisher_optax as fo
      >>> s = fo.compression.cubic_schedule(0.8, begin=10, end=30)
      >>> [round(float(s(t)), 3) for t in (0, 10, 20, 30, 40)]
      [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    if not begin < end:
        raise ValueError(f"cubic_schedule: end must come after begin; got begin={begin!r}, end={end!r}.")

    def schedule(count: ArrayLike) -> Array:
        left = 1 - jnp.clip((count - begin) / (end - begin), 0, 1)
        return final + (initial - final) * left**3

    return schedule


def by_path(name: str, tree: PyTree, params: PyTree) -> list[PyTree]:
    """What ``tree`` has for each leaf of ``params``; None in it, or `optax.MaskedNode`, stands for all that is below.

    Raises ``ValueError`` for leaves that it lacks, or has beyond those of ``params``.
    """
    empty = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731

    def flat(tree: PyTree) -> dict[tuple[str, ...], PyTree]:
        pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=empty)[0]
        return {path_names(path): None if empty(x) else x for path, x in pairs}

    def covered(names: tuple[str, ...], others: Container[tuple[str, ...]]) -> bool:
        return any(names[:i] in others for i in range(1, len(names) + 1))

    entries, known = flat(tree), flat(params)
    nothing = {names for names, x in entries.items() if x is None}
    leaves = [names for names, x in known.items() if x is not None]
    missing = [names for names in leaves if names not in entries and not covered(names, nothing)]
    beyond = [names for names in entries if leaves and names not in nothing and not covered(names, known)]
    for wrong, text in ((missing, "nothing at"), (beyond, "an entry at")):
        if wrong:
            place = "/".join(wrong[0])
            raise ValueError(
                f"{name} has {text} {place!r}, unlike the parameters ({len(wrong)} such). Give it every leaf of theirs "
                "under its own path, and None where there is nothing to say."
            )
    return [entries.get(names) for names in leaves]


class Pruning(NamedTuple):
    """Which leaves are pruned, and how far."""

    name: str  # of the wrapper
    sparsity: Sparsity | optax.Schedule  # a share, a `Pattern`, or a schedule of shares
    scope: str
    prune: PyTree
    axes: PyTree
    by_blocks: bool = False  # whether what is next to what among an output's inputs matters to its method

    def checked(self) -> "Pruning":
        """With the sparsity read. Raises as `as_sparsity`, and ``ValueError`` for an unknown scope."""
        if self.scope not in (*SCOPES, "global"):
            wanted = ", ".join(map(repr, (*SCOPES, "global")))
            raise ValueError(f"{self.name}: scope must be one of {wanted}; got {self.scope!r}.")
        if callable(self.sparsity):
            last = self.sparsity(LATE)
            as_sparsity(last if isinstance(last, Tracer) else np.asarray(last))
            return self
        sparsity = as_sparsity(self.sparsity)
        if isinstance(sparsity, Pattern) and self.scope == "global":
            raise ValueError(f"{self.name}: a pattern is by output; got {self.sparsity!r} with scope 'global'.")
        return self._replace(sparsity=sparsity)

    def axes_of(self, params: PyTree) -> PyTree:
        """A tree like ``params``: the `MatrixAxes` of what is pruned, None elsewhere.

        Raises ``ValueError`` for a leaf to be pruned that is no matrix, that a pattern does not fit, or, where outputs
        are pruned each by itself, whose inputs are known by the order of its axes alone.
        """
        leaves = self.read(params)
        if self.prune is None:
            chosen: list[PyTree] = [leaf.kind == "matrix" for leaf in leaves]
        else:
            chosen = by_path("prune", made(self.prune, params), params)
        pruned = [leaf for leaf, goes in zip(leaves, chosen, strict=True) if goes]
        for leaf in pruned:
            if leaf.axes is None:
                raise ValueError(
                    f"{self.name}: {leaf.path!r} of shape {leaf.shape} is no matrix ({leaf.reason}): leave it out of "
                    "prune=, or say by axes= how it is one."
                )
            if isinstance(self.sparsity, Pattern):
                for m in {shape[-2] for shape in matrix_shapes(leaf.shape, leaf.axes)}:
                    check_pattern(self.sparsity, m)
        by_output = isinstance(self.sparsity, Pattern) or self.scope == "output" or self.by_blocks
        if by_output and (untold := [leaf for leaf in pruned if not is_told(leaf)]):
            raise ValueError(
                f"{self.name}: which axis of {how_many(untold, leaves)} is the input is not known, and each output is "
                f"pruned along it: {listed(untold)}. {SAY_AXES}"
            )
        read = [leaf.axes if goes else None for leaf, goes in zip(leaves, chosen, strict=True)]
        return jax.tree.structure(params).unflatten(read)

    def read(self, params: PyTree) -> list[LeafAxes]:
        """What each leaf is."""
        return leaf_axes(params, self.axes)

    def share(self, count: Array) -> Float[Array, ""]:
        """Of the weights that are gone after so many steps."""
        s = self.sparsity.share if isinstance(self.sparsity, Pattern) else value_at(self.sparsity, count)
        return jnp.asarray(s, jnp.float32)

    def masks(self, scores: PyTree, share: Array) -> PyTree:
        """For a tree of matrices of scores, None where nothing is pruned."""
        constant = self.sparsity if isinstance(self.sparsity, float | Pattern) else None
        return _chosen(scores, share, constant, self.scope)


def unread_warning(pruning: Pruning) -> Callable[[PyTree], None]:
    """Warns, once, of leaves that nobody has chosen and that may be matrices: they are not pruned."""
    once = warned_once()

    def warn(params: PyTree) -> None:
        leaves = pruning.read(params)
        ambiguous = ambiguous_among(leaves, ("matrix",))
        if pruning.prune is not None or not ambiguous:
            return
        once(
            f"{pruning.name}: {how_many(ambiguous, leaves)} may be matrices, and are not pruned: {listed(ambiguous)}. "
            f"{SAY_AXES}"
        )

    return warn


# Traced also where steps are not, so that a scheduled share removes as many weights here as there.
@partial(jax.jit, static_argnames=("constant", "scope"))
def _chosen(scores: PyTree, share: Array, constant: float | Pattern | None, scope: str) -> PyTree:
    sparsity = share if constant is None else constant
    if scope == "global":
        return global_masks(scores, sparsity)
    return jax.tree.map(lambda s: mask(s, sparsity, scope), scores)


def as_matrices(leaves: PyTree, axes: PyTree) -> PyTree:
    """The leaves that have axes as ``(*batch, inputs, outputs)``, in float32 at least, a tuple of these where they are
    divided; None for the others.
    """

    def as_matrix(x: Array, axes: MatrixAxes | None) -> PyTree:
        if axes is None:
            return None
        matrices = to_matrices(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axes)
        return matrices if axes.parts else matrices[0]

    return jax.tree.map(as_matrix, leaves, axes)


def as_leaves(matrices: PyTree, like: PyTree, axes: PyTree) -> PyTree:
    """The leaves again, shaped as in ``like``: the inverse of `as_matrices`."""

    def as_leaf(x: Array, A: MatrixAxes | None, M: PyTree) -> Array | None:
        return None if A is None else from_matrices(M if A.parts else (M,), x.shape, A)

    return jax.tree.map(as_leaf, like, axes, matrices)
