"""How many directions a matrix uses, as a whole and block by block.

With p_i = |λ_i| / Σ|λ|:

    effective rank        exp(-Σ p_i log p_i)             Roy & Vetterli 2007
    participation ratio   1 / Σ p_i²

Both are n for n equal eigenvalues and 1 for one, whatever zeros there are besides; the participation ratio is never
the larger. Of a matrix with eigenvalues below 0 they are those of its singular values.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from ..operators.operator import Operator
from .spectrum import spectrum

# How many eigenvalues of a block are looked for where none is given, and nothing cheaper than Lanczos is at hand.
BLOCK_EIGENVALUES = 100


def effective_rank(eigenvalues: ArrayLike | Sequence[ArrayLike]) -> Float[Array, "*batch"]:
    """``exp(entropy of |λ| / Σ|λ|)`` along the last axis; 0 where all are 0.

    Example:
      >>> print(effective_rank([1.0, 1.0, 1.0, 0.0]).round(4))
      3.0
    """
    p, some = _shares(eigenvalues)
    return jnp.where(some, jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p), -1)), 0)


def participation_ratio(eigenvalues: ArrayLike | Sequence[ArrayLike]) -> Float[Array, "*batch"]:
    """``(Σ|λ|)² / Σλ²`` along the last axis; 0 where all are 0.

    Example:
      >>> print(participation_ratio([3.0, 1.0]))
      1.6
    """
    p, some = _shares(eigenvalues)
    return jnp.where(some, 1 / jnp.where(some, jnp.sum(jnp.square(p), -1), 1), 0)


def _shares(eigenvalues: ArrayLike | Sequence[ArrayLike]) -> tuple[Array, Array]:
    """``|λ| / Σ|λ|``, and whether any is not 0."""
    λ = jnp.abs(jnp.asarray(eigenvalues))
    λ = λ.astype(jnp.promote_types(λ.dtype, jnp.float32))
    λ = λ / jnp.where((top := jnp.max(λ, -1, keepdims=True)) == 0, 1, top)  # their sum could overflow
    total = jnp.sum(λ, -1, keepdims=True)
    return λ / jnp.where(total == 0, 1, total), total[..., 0] != 0


class BlockSpectrum(NamedTuple):
    """The eigenvalues of one diagonal block. Where it is not ``complete`` the trace of a positive semi-definite block,
    and what is said of its capacity, is that of the eigenvalues found.
    """

    eigenvalues: Float[Array, " k"]  # descending; those that are 0 for want of rows are left out
    size: int  # parameters in the block
    rank_bound: int  # no more eigenvalues than this can differ from 0: rows of the sum, or parameters
    complete: bool  # whether all others are 0

    @property
    def trace(self) -> Array:
        """``Σλ``."""
        return jnp.sum(self.eigenvalues)

    @property
    def effective_rank(self) -> Array:
        """See `effective_rank`."""
        return effective_rank(self.eigenvalues)

    @property
    def participation(self) -> Array:
        """See `participation_ratio`."""
        return participation_ratio(self.eigenvalues)


def block_spectra(
    operator: Operator,
    blocks: Sequence[str] | None = None,
    *,
    k: int | None = None,
    iterations: int | None = None,
    key: PRNGKeyArray | None = None,
    tolerance: float | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
) -> dict[str, BlockSpectrum]:
    """The spectrum of each diagonal block.

    Exact where the operator has rows, ``A = RᵀR``: those of a block are the columns R_b, and the eigenvalues other than
    0 of ``R_bᵀ R_b`` are those of the Gram matrix ``R_b R_bᵀ``, whichever is smaller. So a Fisher from r rows shows at
    most r directions of a block (``rank_bound``), however many parameters it has. R is made once, and held. Otherwise
    by `spectrum`.

    Args:
      blocks: paths of modules or leaves, each a block of all leaves below; by default every module that has leaves of
        its own, with those alone, so that the blocks share nothing and their traces add up to the whole.
      k: how many eigenvalues of each block, the smaller of its size and 100 by default; ignored where there are rows.
      iterations, key, tolerance: as in `spectrum`, for each block.
      progress: wraps the loop over blocks, as ``tqdm.tqdm`` does.

    Raises:
      ValueError: for a path with no leaf below it, for rows that are not finite, and as `spectrum`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params = {"first": {"w": jnp.zeros(2), "b": jnp.zeros(1)}, "last": {"w": jnp.zeros(3)}}
      >>> A = fo.fisher.Operator.from_dense(jnp.diag(jnp.array([3.0, 1.0, 2.0, 5.0, 5.0, 5.0])), params)
      >>> for name, block in block_spectra(A).items():
      ...     print(f"{name}: trace {block.trace:.2f}, {block.effective_rank:.2f} of {block.size} directions")
      first: trace 6.00, 2.75 of 3 directions
      last: trace 15.00, 3.00 of 3 directions
    """
    groups = _modules(operator) if blocks is None else {path: (path,) for path in blocks}
    parts = {name: operator.block(paths) for name, paths in groups.items()}
    R = _rows(operator) if operator.has_rows else None
    found = {}
    for name in (progress or iter)(parts):
        block = parts[name]
        if R is None:
            n = min(block.size, BLOCK_EIGENVALUES if k is None else k)
            λ = spectrum(block, n, iterations=iterations, key=key, tolerance=tolerance).eigenvalues
            found[name] = BlockSpectrum(λ, block.size, block.size, n == block.size)
            continue
        λ = _gram_eigenvalues(jnp.concatenate([R[:, at] for at in _columns(operator, block.paths)], 1))
        if not jnp.all(jnp.isfinite(λ)):
            raise ValueError(f"{operator.name}: its rows are not finite in {name!r}. Look for NaN in the parameters.")
        found[name] = BlockSpectrum(λ, block.size, len(λ), True)
    return found


@jax.jit
def _rows(operator: Operator) -> Array:
    with jax.default_matmul_precision("highest"):
        return operator.rows()


def _modules(operator: Operator) -> dict[str, tuple[str, ...]]:
    """The leaves of each module, itself named by their paths less the last name; a leaf of no module is one."""
    groups: dict[str, tuple[str, ...]] = {}
    for path in operator.paths:
        name = path.rpartition("/")[0] or path
        groups[name] = (*groups.get(name, ()), path)
    return groups


def _columns(operator: Operator, paths: Sequence[str]) -> list[slice]:
    """Where these leaves are in a raveled tree."""
    at, end = {}, 0
    for path, leaf in zip(operator.paths, operator.leaves, strict=True):
        at[path] = slice(end, end := end + leaf.size)
    return [at[path] for path in paths]


@jax.jit
def _gram_eigenvalues(R: Float[Array, "r d"]) -> Float[Array, " k"]:
    """Eigenvalues of RᵀR, descending, the smaller of r and d of them."""
    R = R.astype(jnp.promote_types(R.dtype, jnp.float32))
    R = R / jnp.where((s := jnp.max(jnp.abs(R))) == 0, 1, s)  # squares of small numbers would be 0
    R = R if R.shape[0] <= R.shape[1] else R.T
    return s * s * jnp.maximum(jnp.linalg.eigvalsh(jnp.matmul(R, R.T, precision=Precision.HIGHEST))[::-1], 0)
