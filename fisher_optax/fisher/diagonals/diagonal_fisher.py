"""The mean of squared gradients with its uncertainty: a running mean that merges, decays and knows its error.

With squares x_i of independent examples and weights w_i (tokens in the example), W = Σ w_i:

    add       δ = x - mean;  mean += δ w / W';  m2 += w δ (x - mean')
    merge     δ = b.mean - a.mean;  mean = a.mean + δ b.w / W;  m2 = a.m2 + b.m2 + δ² a.w b.w / W
    variance  m2 / (W - Σ w² / W)          n_eff = W² / Σ w²          standard error  sqrt(variance / n_eff)

An example, not a token, is one independent draw: tokens of one text go together, and counting them as draws gives
intervals far too short. Sources: Welford 1962; Chan, Golub and LeVeque 1983 for merging; Kish 1965 for n_eff.
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from ...capture.program.jaxprs import varying_as


class DiagonalFisher(NamedTuple):
    """What `diagonal` returns: importances as trees, and how sure they are.

    All is arrays: it may be saved with Orbax, handed to `jit`, and sent between devices.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> fisher = fo.fisher.DiagonalFisher.zeros(jnp.zeros(2)).update(jnp.array([[1.0, 0.0], [3.0, 0.0]]), jnp.ones(2))
      >>> print(fisher.mean, fisher.standard_error(), fisher.n_eff)
      [2. 0.] [1. 0.] 2.0
    """

    mean: PyTree  # tree of float32, shaped like the groups
    m2: PyTree  # Σ w (x - mean)²
    w: Float[Array, ""]  # Σ w: tokens
    w2: Float[Array, ""]  # Σ w²
    n: Int[Array, ""]  # examples
    skipped: Int[Array, ""]  # examples left out: not finite, or with a label that is no class
    batches: Int[Array, ""]  # batches read

    @classmethod
    def zeros(cls, like: PyTree) -> "DiagonalFisher":
        """Nothing seen yet, of groups shaped like ``like``."""
        float_like = lambda x: jnp.zeros(jnp.shape(x), jnp.promote_types(jnp.result_type(x), jnp.float32))  # noqa: E731
        mean, m2 = (jax.tree.map(float_like, like) for _ in range(2))
        # A buffer each, so that all may be donated.
        return cls(mean, m2, *(jnp.zeros([]) for _ in range(2)), *(jnp.zeros([], jnp.int32) for _ in range(3)))

    def update(self, x: PyTree, w: Float[Array, " b"]) -> "DiagonalFisher":
        """With the squares of ``b`` more examples, stacked in front; one that is not finite is skipped and counted, one
        of weight 0 left out.

        Raises:
          ValueError: for groups of other names or shapes.
        """
        _require_shapes(self.mean, jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), x))
        finite = _finite(x, w)
        keep = finite & (w > 0)
        n, skipped = jnp.sum(keep, dtype=jnp.int32), jnp.sum(~finite, dtype=jnp.int32)
        # One after the other: reductions over the stack would make arrays of its size.
        start = jax.tree.map(lambda s: varying_as(s, *jax.tree.leaves(x), w), self)
        state, _ = jax.lax.scan(_add, start, (x, jnp.where(keep, w, 0).astype(self.w.dtype)))
        return state._replace(n=self.n + n, skipped=self.skipped + skipped)

    def merge(self, other: "DiagonalFisher") -> "DiagonalFisher":
        """Of the examples of both, as if seen by one.

        Raises:
          ValueError: for groups of other names or shapes.
        """
        require_alike(self, other)
        W = self.w + other.w
        share = other.w / jnp.where(W > 0, W, 1)

        def mean(a: Array, b: Array) -> Array:
            return a + (b - a) * share.astype(a.dtype)

        def m2(a: Array, b: Array, mean_a: Array, mean_b: Array) -> Array:
            return a + b + jnp.square(mean_b - mean_a) * (self.w * share).astype(a.dtype)

        return DiagonalFisher(
            jax.tree.map(mean, self.mean, other.mean),
            jax.tree.map(m2, self.m2, other.m2, self.mean, other.mean),
            W,
            self.w2 + other.w2,
            self.n + other.n,
            self.skipped + other.skipped,
            self.batches + other.batches,
        )

    def all_reduce(self, axis: Hashable) -> "DiagonalFisher":
        """`merge` over the devices of a mapped axis, inside `jax.shard_map`, `jax.pmap` or `jax.vmap`."""
        total = lambda x: jax.lax.psum(x, axis)  # noqa: E731
        W = total(self.w)
        share = self.w / jnp.where(W > 0, W, 1)
        mean = jax.tree.map(lambda m: total(m * share.astype(m.dtype)), self.mean)
        spread = lambda m2, m, all_m: total(m2 + self.w.astype(m.dtype) * jnp.square(m - all_m))  # noqa: E731
        m2 = jax.tree.map(spread, self.m2, self.mean, mean)
        counts = (total(x) for x in (self.w2, self.n, self.skipped, self.batches))
        return DiagonalFisher(mean, m2, W, *counts)

    def decay(self, γ: ArrayLike) -> "DiagonalFisher":
        """Weigh all that was seen by γ: before each `update`, a moving average that corrects its own start.

        Raises:
          ValueError: for a number outside of (0, 1].
        """
        if isinstance(γ, int | float) and not 0 < γ <= 1:
            raise ValueError(f"decay takes a factor in (0, 1]; got {γ!r}.")
        m2 = jax.tree.map(lambda x: γ * x, self.m2)
        return self._replace(m2=m2, w=γ * self.w, w2=jnp.square(γ) * self.w2)

    @property
    def n_eff(self) -> Float[Array, ""]:
        """How many examples of equal weight tell as much."""
        return jnp.square(self.w) / jnp.where(self.w2 > 0, self.w2, 1)

    def variance(self) -> PyTree:
        """Of one example's squares, by group; infinite (unknown) where fewer than two examples were seen."""
        dof = self.w - self.w2 / jnp.where(self.w > 0, self.w, 1)
        # Equal weights leave W (n - 1) / n; what one example leaves is rounding.
        known = dof > 1e-6 * self.w
        return jax.tree.map(lambda x: jnp.where(known, x / jnp.where(known, dof, 1).astype(x.dtype), jnp.inf), self.m2)

    def standard_error(self) -> PyTree:
        """Of the mean, by group."""
        n = jnp.maximum(self.n_eff, 1)
        return jax.tree.map(lambda v: jnp.sqrt(v / n.astype(v.dtype)), self.variance())

    def confidence_interval(self, level: float = 0.95) -> tuple[PyTree, PyTree]:
        """Lower and upper end by group, by Student's t with ``n_eff - 1`` degrees of freedom; never below 0. Not under
        `jit`.

        Squares are skewed, so that with few examples the true level is somewhat lower.

        Raises:
          ValueError: for a level outside of (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, as 0.95; got {level!r}.")
        n = float(self.n_eff)
        t = float(scipy.special.stdtrit(n - 1, (1 + level) / 2)) if n > 1.0001 else np.inf
        half = jax.tree.map(lambda s: jnp.where(jnp.isfinite(s), s * t, jnp.inf), self.standard_error())
        lower = jax.tree.map(lambda m, h: jnp.maximum(m - h, 0), self.mean, half)
        return lower, jax.tree.map(jnp.add, self.mean, half)


def _add(state: DiagonalFisher, example: tuple[PyTree, Array]) -> tuple[DiagonalFisher, None]:
    """With one more example, of weight 0 if it is not to count."""
    x, w = example
    W = state.w + w
    share = w / jnp.where(W > 0, W, 1)
    δ = jax.tree.map(lambda x, m: jnp.where(w > 0, x - m, 0), x, state.mean)
    mean = jax.tree.map(lambda m, d: m + share.astype(m.dtype) * d, state.mean, δ)
    # x - mean' = δ (1 - share)
    m2 = jax.tree.map(lambda q, d: q + (w * (1 - share)).astype(q.dtype) * jnp.square(d), state.m2, δ)
    return state._replace(mean=mean, m2=m2, w=W, w2=state.w2 + jnp.square(w)), None


def _finite(x: PyTree, w: Array) -> Bool[Array, " b"]:
    """Which of the stacked examples have finite squares throughout."""
    each = (jnp.all(jnp.isfinite(leaf.reshape(len(leaf), -1)), 1) for leaf in jax.tree.leaves(x))
    return jnp.stack([jnp.isfinite(w), *each]).all(0)


def require_alike(a: DiagonalFisher, b: DiagonalFisher) -> None:
    """Raises ``ValueError`` for two that are not of the same groups."""
    _require_shapes(a.mean, b.mean)


def _require_shapes(*trees: PyTree) -> None:
    first, second = (jax.tree.map(jnp.shape, tree) for tree in trees)
    if jax.tree.flatten(first) != jax.tree.flatten(second):  # a module is equal to itself alone
        raise ValueError(
            f"two Fishers of different groups: {_shown(first)} and {_shown(second)}. Take both with the same groups= "
            "and parameters."
        )


def _shown(shapes: PyTree) -> str:
    text = str(shapes)
    return text if len(text) < 160 else f"{text[:157]}..."
