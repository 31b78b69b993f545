"""What is done with importances: where two tasks differ beyond doubt, and a penalty that keeps what matters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, PyTree

from .diagonal_fisher import DiagonalFisher, require_alike


class ImportanceShift(NamedTuple):
    """What `importance_shift` returns: trees like the groups, as NumPy arrays."""

    difference: PyTree  # of the shares of the trace, second minus first
    ratio: PyTree  # second over first; NaN where both are 0
    effect: PyTree  # the difference in standard deviations of one example
    z: PyTree  # ... in standard errors (Welch)
    p: PyTree  # two-sided
    significant: PyTree  # at the false-discovery rate asked for


def importance_shift(first: DiagonalFisher, second: DiagonalFisher, rate: float = 0.05) -> ImportanceShift:
    """Which groups matter more, or less, in the second task than in the first.

    Importances are taken as shares of their trace, so that a task with larger gradients throughout shows no shift; the
    trace counts as known. Each group gets Welch's test, with ``n_eff - 1`` degrees of freedom a side, and all of them
    together Benjamini and Hochberg's threshold: of those called significant, a share ``rate`` at most is expected to be
    chance. Groups without any spread in either task, mostly zeros, have p = 1 where they agree and 0 where not.

    Raises:
      ValueError: for Fishers of different groups, fewer than two examples in one of them, a trace of 0, or a rate
        outside of (0, 1).

    Sources: Welch 1947; Benjamini and Hochberg 1995.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> zeros, w = fo.fisher.DiagonalFisher.zeros(jnp.zeros(2)), jnp.ones(4)
      >>> a = zeros.update(jnp.array([[1.0, 2.0], [1.1, 2.1], [0.9, 2.0], [1.0, 1.9]]), w)
      >>> b = zeros.update(jnp.array([[2.0, 1.0], [2.1, 1.1], [1.9, 1.0], [2.0, 0.9]]), w)
      >>> fo.fisher.importance_shift(a, b).significant
      array([ True,  True])
    """
    from scipy import stats  # slow to import: a third of the time of the whole package

    if not 0 < rate < 1:
        raise ValueError(f"rate must lie between 0 and 1, as 0.05; got {rate!r}.")
    require_alike(first, second)
    sides = [_shares(fisher, name) for fisher, name in ((first, "first"), (second, "second"))]
    (m1, v1, n1), (m2, v2, n2) = sides
    e1, e2 = v1 / n1, v2 / n2
    error = np.sqrt(e1 + e2)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(error > 0, (m2 - m1) / error, np.where(m1 == m2, 0, np.sign(m2 - m1) * np.inf))
        dof = (e1 + e2) ** 2 / (e1**2 / (n1 - 1) + e2**2 / (n2 - 1))
        p = np.where(error > 0, 2 * scipy.special.stdtr(np.where(error > 0, dof, 1), -np.abs(z)), m1 == m2)
        spread = np.sqrt((v1 + v2) / 2)
        effect = np.where(spread > 0, (m2 - m1) / spread, z)
        ratio = m2 / m1
    significant = stats.false_discovery_control(p) <= rate
    back = _unraveled(first.mean)
    return ImportanceShift(*map(back, (m2 - m1, ratio, effect, z, p, significant)))


def _shares(fisher: DiagonalFisher, name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Means and variances of the shares of the trace, in float64, and n_eff."""
    n = float(fisher.n_eff)
    if n < 1.0001:
        raise ValueError(f"the {name} Fisher has {int(fisher.n)} examples: a test needs the spread of two at least.")
    flat = lambda tree: np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])  # noqa: E731
    mean, variance = flat(fisher.mean), flat(fisher.variance())
    trace = mean.sum()
    if not trace > 0:
        raise ValueError(f"the {name} Fisher has trace {trace}: nothing has any importance there.")
    return mean / trace, variance / trace**2, n


def _unraveled(like: PyTree) -> Callable[[np.ndarray], PyTree]:
    """From a vector back to the tree."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    return lambda x: structure.unflatten(
        [part.reshape(y.shape) for part, y in zip(np.split(x, ends), leaves, strict=True)]
    )


def ewc_penalty(
    fisher: DiagonalFisher | PyTree, params: PyTree, strength: float = 1.0
) -> Callable[[PyTree], Float[Array, ""]]:
    """``θ -> strength / 2 Σ F_jj (θ_j - θ*_j)²``, for the loss of the next task: elastic weight consolidation.

    Args:
      fisher: a `DiagonalFisher` by parameter, or its mean; what is None there is not held.
      params: θ*, where it was taken.
      strength: how many of the new task's terms the old one counts for. With N_old examples then, the Bayesian choice
        is N_old for a loss that is a sum over examples, and N_old / N_new for their mean over N_new.

    Raises:
      ValueError: for a Fisher that has not the parameters' shapes, as one of groups.

    Source: Kirkpatrick et al. 2017 (arXiv 1612.00796), equation 3.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> penalty = fo.fisher.ewc_penalty({"w": jnp.array([1.0, 3.0])}, {"w": jnp.zeros(2)}, strength=10.0)
      >>> float(penalty({"w": jnp.ones(2)}))
      20.0
    """
    F, start = (fisher.mean if isinstance(fisher, DiagonalFisher) else fisher), jax.tree.map(jnp.asarray, params)
    none = lambda x: x is None  # noqa: E731
    try:
        fits = jax.tree.all(jax.tree.map(lambda f, x: f is None or jnp.shape(f) == x.shape, F, start, is_leaf=none))
    except ValueError:  # another structure
        fits = False
    if not fits:
        found, wanted = ([jnp.shape(x) for x in jax.tree.leaves(tree)][:4] for tree in (F, start))
        raise ValueError(
            f"ewc_penalty needs a Fisher by parameter, with shapes {wanted}; got {found}. Take it by "
            "fo.fisher.diagonal(..., groups=None)."
        )

    def penalty(params: PyTree) -> Float[Array, ""]:
        """Of the parameters that are trained."""
        term = lambda f, x, at: jnp.zeros([]) if f is None else jnp.sum(f * jnp.square(x - at))  # noqa: E731
        terms = jax.tree.leaves(jax.tree.map(term, F, params, start, is_leaf=none))
        return strength / 2 * sum(terms, jnp.zeros([]))

    return penalty
