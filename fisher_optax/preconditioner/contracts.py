"""What travels between the parts: Kronecker factors, what a decomposition makes of them; and three contracts.

All three act on one matrix gradient ``G: (m, n)``, ``m`` inputs by ``n`` outputs. What is of its left (input) and
right (output) side comes in pairs, None where there is none. In a state, matrices are stacked along a leading axis.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._arguments import in_range, one_of, whole
from ..statistics import LayerFactors

PRECISIONS = ("highest", "high", "default")  # of products on an accelerator

Factor = Float[Array, "d d"] | None  # of a matrix's side; None: it has none


class Kronecker(NamedTuple):
    """Running factors of ``F ≈ left ⊗ right`` for one matrix (row-major ``vec``)."""

    left: PyTree  # (*stack, m, m), `LowRank`, or None
    right: PyTree  # (*stack, n, n), `LowRank`, or None
    seen: PyTree = ()  # what a rule counts: calls, or the sum of its weights


class Eigenbasis(NamedTuple):
    """Orthonormal eigenvectors of the two factors, as columns, by descending eigenvalue."""

    left: Float[Array, "*stack m m"] | None
    right: Float[Array, "*stack n n"] | None


class Eigenpairs(NamedTuple):
    """An `Eigenbasis` with the eigenvalues of its columns; of `LowRank`, only the columns whose values are not 0."""

    left: Float[Array, "*stack m j"] | None
    right: Float[Array, "*stack n k"] | None
    left_values: Float[Array, "*stack j"] | None
    right_values: Float[Array, "*stack k"] | None


class InverseRoot(NamedTuple):
    """A negative power of each factor."""

    left: Float[Array, "*stack m m"] | None
    right: Float[Array, "*stack n n"] | None


Basis = Eigenbasis | Eigenpairs | InverseRoot


class Refreshed(NamedTuple):
    """What a decomposition makes of one factor."""

    value: Float[Array, "d d"]
    order: Int[Array, " d"]  # column j of `value` continues column order[j] of the old basis


class FactorRule(NamedTuple):
    """How a pair of Kronecker factors follows the gradients.

    ``init(m, n, left, right, dtype)`` makes the start for an ``m x n`` matrix; ``left`` and ``right`` say which sides
    are wanted. ``update(G, factors, basis)`` sees both factors and the current basis, since some rules read the other
    side. ``track(G, factors, basis)`` follows the eigenvalues of `Eigenpairs` between two decompositions; a rule that
    has it needs them. ``read(factors)`` is what is decomposed. With ``of_statistics`` both get, in the place of G, the
    layer's `LayerFactors`, and are not called where there are none. ``overwrite(statistics, factors, accept)`` is
    ``update`` in place and only where ``accept``, for factors that are kept as they come. ``begins(statistics,
    factors)`` says which of a stack get their first statistics: their bases are made anew. ``ignores_zeros``: rows and
    columns of zeros in G change nothing else, so that near shapes may share a stack.
    """

    name: str
    init: Callable[[int, int, bool, bool, DTypeLike], Kronecker]
    update: Callable[[PyTree, Kronecker, PyTree], Kronecker]
    track: Callable[[PyTree, Kronecker, PyTree], PyTree] | None = None
    read: Callable[[Kronecker], Kronecker] = lambda factors: factors
    of_statistics: bool = False
    overwrite: Callable[[PyTree, Kronecker, Bool[Array, ""] | None], Kronecker] | None = None
    begins: Callable[[PyTree, Kronecker], Bool[Array, " N"]] | None = None
    ignores_zeros: bool = False


class Decomposition(NamedTuple):
    """What turns a factor ``A: (d, d)`` into a basis or a root; one that is not finite is never used.

    ``renew(A, old, first, tolerance)`` may be iterative but for the first, and keeps ``old`` where that is off by no
    more than ``tolerance`` (None: never).
    """

    name: str
    returns: type
    renew: Callable[[Array, Array, Bool[Array, ""], float | None], Refreshed]


class Moments(NamedTuple):
    """What an application holds in the basis, and must be carried over when the basis turns."""

    linear: tuple[Array, ...]  # transform like the gradient
    quadratic: tuple[Array, ...]  # transform like its square
    left: tuple[Array, ...] = ()  # ... like the sums of its square over columns,
    right: tuple[Array, ...] = ()  # ... or over rows


class Application(NamedTuple):
    """What is done to one matrix gradient with the basis (or roots) at hand.

    ``accepts`` lists what a decomposition may return for it; ``NoneType`` stands for no decomposition at all.
    ``observe(state, statistics, basis)`` takes in the layer's `LayerFactors`, in the basis they were seen in.
    ``ignores_zeros`` as in `FactorRule`.
    """

    name: str
    accepts: tuple[type, ...]
    init: Callable[[Array], PyTree]
    update: Callable[..., tuple[Array, PyTree]]  # (G, state, basis, **extra) -> (direction, state)
    moments: Callable[[PyTree], Moments]
    with_moments: Callable[[PyTree, Moments], PyTree]
    sees_itself: bool = False  # whether a gradient acts on itself, through factors that hold it already
    observe: Callable[[PyTree, LayerFactors, PyTree], PyTree] | None = None
    precision: str = "highest"  # of rotations: of gradients, and of moments when a basis turns
    ignores_zeros: bool = False


class MatrixState(NamedTuple):
    """What is kept of a matrix; in the state, of all matrices of one shape along a leading axis."""

    factors: Kronecker
    basis: Basis
    application: PyTree  # the application's own state


class Due(NamedTuple):
    """The matrices of a stack that something is to be done with."""

    places: Int[Array, " N"]  # theirs come first
    count: Int[Array, ""]


WHEN = ("every", "adaptive", "staggered")


@dataclasses.dataclass(frozen=True)
class Refresh:
    """When and how bases or roots are renewed; ``refresh="staggered"`` stands for ``fo.Refresh("staggered")``. Each
    method says which of these it takes, and what its defaults are.

    Args:
      when: "every" (all of them every ``precondition_frequency`` steps), "adaptive" (of those, the bases with
        off-diagonality above ``tolerance``), or "staggered" (each step its share, so that no step is slow).
      decomposition: of eigenbases "qr" (one step of orthogonal iteration), "cholesky" (the same by products alone),
        "eigh" or "auto" (by the platform that a program is compiled for); of K-FAC's factors "inverse" too; of
        Shampoo's roots "eigh", "newton", "polynomial" or "auto".
      tolerance: τ in ``|B - diag B| > τ |B|``, ``B = Qᵀ L Q``, for "adaptive".
      transport: of second moments when a basis turns: "permute" (the SOAP authors': follow the columns' new order) or
        "squared" (``(C∘C) v (C∘C)ᵀ``, ``C = Q_newᵀ Q_old``).
      first_step: "skip" (the SOAP authors': the first call only sets factors and basis) or "adam" (it steps at once, in
        the identity basis).
      before_step: renew before the step, from factors that hold its gradient already; the authors do it after it, so
        that a gradient never chooses its own basis. The first call then steps too.

    None stands for the method's default.

    Raises:
      ValueError: at construction, for an unknown word or a tolerance below 0.

    Source: "adaptive": Eschenhagen et al. 2025 (arXiv 2506.03595); ``before_step``: Khona et al. 2026 (2607.20548).

    Example:
      >>> import fisher_optax as fo
      >>> tx = fo.soap(3e-3, refresh=fo.Refresh("adaptive", tolerance=0.05, decomposition="eigh"))
    """

    when: str = "every"
    decomposition: str | None = None
    tolerance: float = 0.01
    transport: str | None = None
    first_step: str | None = None
    before_step: bool = False

    def __post_init__(self) -> None:
        one_of("refresh", self.when, WHEN)
        one_of("transport", self.transport, (None, "permute", "squared"))
        one_of("first_step", self.first_step, (None, "skip", "adam"))
        in_range("tolerance", self.tolerance, 0)


@dataclasses.dataclass(frozen=True)
class Storage:
    """What is kept between steps of each matrix, how, and where. Each method says which of these it takes.

    Args:
      factor_dtype: of factors and bases, default float32 (arithmetic is float32 in any case).
      packed: keep half of each symmetric factor.
      momentum_dtype: of m, default float32.
      sides: "both", or "shorter": only the shorter side of each matrix gets a factor, at a quarter of the state.
      block_size: cut longer sides into blocks of at most this, each with its own factors; 0: never. Default: 0, for
        Shampoo 1024.
      rank: of a side longer than ``max_precond_dim`` in K-FAC, how many rows stand for its factor.
      mesh_axis: share the matrices and their state out over this axis of the mesh in scope, `init`'s too; a stack that
        the devices do not divide is filled up.

    Raises:
      ValueError: at construction, for a word or number that is none of these.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> tx = fo.soap(3e-3, storage=fo.Storage(factor_dtype=jnp.bfloat16, sides="shorter"))
    """

    factor_dtype: DTypeLike | None = None
    packed: bool = False
    momentum_dtype: DTypeLike | None = None
    sides: str = "both"
    block_size: int | None = None
    rank: int = 256
    mesh_axis: str | None = None

    def __post_init__(self) -> None:
        one_of("sides", self.sides, ("both", "shorter"))
        whole("block_size", self.block_size or 0, 0)
        whole("rank", self.rank, 1)


@dataclasses.dataclass(frozen=True)
class Products:
    """How exactly an accelerator multiplies: "highest" (float32), "high" (two parts of bfloat16 each, or TF32) or
    "default" (bfloat16 on a TPU, TF32 on a GPU). A CPU multiplies in float32 whatever is asked for. `fo.soap` takes it;
    with `fo.precondition`, factors, decomposition and application each take a ``precision``. Other methods multiply in
    float32.

    Args:
      factors: of ``G Gᵀ`` and ``Gᵀ G``.
      rotations: of gradients into bases and back, and of moments when a basis turns.
      basis: of ``L Q`` and ``R Q`` at a refresh; what makes their columns orthogonal is always in float32.

    "highest" is the default of each; docs/choosing.md says what the others cost in loss, with rounding emulated.

    Raises:
      ValueError: at construction, for another word.

    Example:
      >>> import fisher_optax as fo
      >>> tx = fo.soap(3e-3, products=fo.Products(rotations="high"))
    """

    factors: str = "highest"
    rotations: str = "highest"
    basis: str = "highest"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            one_of(field.name, getattr(self, field.name), PRECISIONS)


def refresh_of(method: str, refresh: Refresh | str, takes: Mapping[str, str | float]) -> Refresh:
    """``refresh``, or what a word stands for; ``takes`` has what a method takes beside ``when``, with its defaults."""
    if isinstance(refresh, str):
        refresh = Refresh(refresh)
    if not isinstance(refresh, Refresh):
        raise TypeError(f"refresh must be a fo.Refresh or one of {', '.join(map(repr, WHEN))}; got {refresh!r}.")
    _only(method, refresh, {"when", *takes})
    if refresh.before_step and refresh.first_step == "skip":
        raise ValueError(f"fo.{method}: with before_step=True the first call has a basis; leave out first_step='skip'.")
    if refresh.before_step and "first_step" in takes:
        takes = {**takes, "first_step": "adam"}
    return dataclasses.replace(
        refresh, **{name: default for name, default in takes.items() if getattr(refresh, name) is None}
    )


def storage_of(method: str, storage: Storage | None, takes: tuple[str, ...]) -> Storage:
    """``storage``, where it asks for no more than these fields; None: the defaults."""
    storage = Storage() if storage is None else storage
    if not isinstance(storage, Storage):
        raise TypeError(f"storage must be a fo.Storage; got {storage!r}.")
    _only(method, storage, set(takes))
    return storage


def products_of(products: Products | None) -> Products:
    """``products``; None: float32."""
    if not isinstance(products, Products | None):
        raise TypeError(f"products must be a fo.Products; got {products!r}.")
    return Products() if products is None else products


def _only(method: str, options: Refresh | Storage, takes: set[str]) -> None:
    """A ValueError where fields that a method does not take are not at their defaults."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in takes and value != field.default:
            raise ValueError(
                f"fo.{method} takes no {field.name}; got {type(options).__name__}({field.name}={value!r}). "
                f"It takes {', '.join(f.name for f in dataclasses.fields(options) if f.name in takes)}."
            )
