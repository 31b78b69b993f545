"""Factors x decomposition x application. Every named optimizer is one call of it and a chain around.

At call t, for each matrix G of the gradient tree:

    U    ← application(G)   in bases made of earlier gradients: a gradient never chooses its own basis
    L, R ← factors(G)
    Q    ← decomposition(L, R)   where the refresh policy says so; moments held in the old basis are carried into the
    new one
"""

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any

import optax
from jaxtyping import PyTree

from .._arguments import whole
from ..matrices.axes import MatrixAxes
from ..matrices.layout import Layer
from ..transforms.decay import Decay, Mask, WeightDecay, check_decay, decayed_step, scheduled, stages
from ..transforms.fallback import with_fallback
from ..transforms.per_matrix import describe_matrices, per_matrix
from ..transforms.skip_nonfinite import Freezable, chain, skip_first_call, skip_nonfinite
from .contracts import Application, Decomposition, Eigenpairs, FactorRule, Refresh, Storage, refresh_of, storage_of
from .refresh import Policy
from .step import Store
from .transform import Preconditioner

# What of `fo.Storage` is about factors and bases, whatever is done with them.
FACTORS = ("factor_dtype", "packed", "sides", "block_size", "mesh_axis")
# What the SOAP authors do of `fo.Refresh`.
AUTHORS: dict[str, str | float] = {"transport": "permute", "first_step": "skip", "before_step": False}


def precondition(
    factors: FactorRule | None,
    decomposition: Decomposition | None,
    application: Application,
    *,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    max_stack: int = 256,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
    kinds: tuple[str, ...] = ("matrix", "head"),
) -> optax.GradientTransformationExtraArgs:
    """Precondition matrix gradients with any combination of factors, decomposition and application.

    Args:
      factors: how Kronecker factors follow the gradients, e.g. ``fo.factors.outer_product(0.95)``; None for an
        application that needs none.
      decomposition: what turns factors into bases, e.g. ``fo.decompositions.orthogonal_iteration()``; None likewise.
      application: what is done with them, e.g. ``fo.in_eigenbasis(optax.scale_by_lion())`` or
        ``fo.applications.orthogonal()``.
      precondition_frequency: steps between refreshes.
      max_precond_dim: a longer side has no factor.
      refresh: when bases are renewed; all of `fo.Refresh` but ``decomposition``.
      storage: what is kept; all of `fo.Storage` but ``momentum_dtype`` and ``rank``, which belong to the parts.
      max_stack: at most so many matrices of one shape go in one batch.
      fallback: a direction for the leaves that are no matrices, default ``optax.scale_by_adam()``.
      axes: which axes of each leaf are inputs, outputs and batch. None: rules by Flax path and shape, see `fo.report`;
        "strict": an error where they leave something open; "out_in": the rules for a tree that stores outputs first;
        else a tree of `fo.MatrixAxes` (None at a leaf: fallback), or a function of params that makes one.
      kinds: what the method takes of "matrix", "head" and "embedding" (see `fo.label_params`).

    Raises:
      TypeError: where the application does not accept what the decomposition returns, and for factors of statistics.
      ValueError: for an option out of range.

    Example (SOAP with Lion inside):
      >>> import optax, fisher_optax as fo
      >>> lion = fo.in_eigenbasis(optax.scale_by_lion())
      >>> tx = fo.precondition(fo.factors.outer_product(0.95), fo.decompositions.orthogonal_iteration(), lion)
    """
    options = refresh_of("precondition", refresh, {"tolerance": 0.01, **AUTHORS})
    storage = storage_of("precondition", storage, FACTORS)
    rest = optax.scale_by_adam() if fallback is None else fallback
    check_cell(factors, decomposition, application)
    if factors is not None and factors.of_statistics:
        raise TypeError(
            f"fo.precondition takes factors of gradients; {factors.name!r} ones follow the statistics of layers, which "
            "fo.kfac, fo.ekfac, fo.kfac_soap and fo.newton_muon take: update(grads, state, params, statistics=stats)."
        )
    _check_numbers(precondition_frequency, max_precond_dim, max_stack)
    if factors is None or decomposition is None:
        return skip_nonfinite(_alone(application, storage, max_stack, rest, axes, kinds))
    method = preconditioner(
        factors,
        decomposition,
        application,
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        refresh=options,
        storage=storage,
        max_stack=max_stack,
    )
    return skip_nonfinite(method.directions(application.name, rest, axes, kinds))


def _alone(
    application: Application,
    storage: Storage,
    max_stack: int,
    fallback: optax.GradientTransformation,
    axes: PyTree,
    kinds: tuple[str, ...],
) -> Freezable:
    """An application that needs no factors, on matrices, and ``fallback`` on the rest."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, PyTree]:
        del params
        return application.update(updates, state, (), **extra)

    init: Any = application.init
    tx, size = optax.GradientTransformationExtraArgs(init, update), storage.block_size or None

    def build(matrices: list[MatrixAxes]) -> Freezable:
        return per_matrix(tx, matrices, block_size=size, max_stack=max_stack, mesh_axis=storage.mesh_axis)

    describe = functools.partial(describe_matrices, block_size=size)
    return with_fallback(application.name, build, fallback, axes=axes, kinds=kinds, describe=describe)


def preconditioner(
    factors: FactorRule,
    decomposition: Decomposition,
    application: Application,
    *,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    refresh: Refresh,
    storage: Storage,
    max_stack: int = 256,
) -> Preconditioner:
    """A checked `Preconditioner`, from complete options (`refresh_of`)."""
    check_cell(factors, decomposition, application)
    _check_numbers(precondition_frequency, max_precond_dim, max_stack)
    store = Store(storage.factor_dtype, storage.packed, storage.sides, max_precond_dim, storage.block_size or None)
    if refresh.before_step:
        application = application._replace(sees_itself=True)
    skip_first = refresh.first_step == "skip" and not application.sees_itself
    policy = Policy(refresh, precondition_frequency)
    return Preconditioner(factors, decomposition, application, store, policy, skip_first, max_stack, storage.mesh_axis)


def _check_numbers(precondition_frequency: int, max_precond_dim: int, max_stack: int) -> None:
    whole("precondition_frequency", precondition_frequency, 1)
    whole("max_precond_dim", max_precond_dim, 0)
    whole("max_stack", max_stack, 1)


def check_cell(factors: FactorRule | None, decomposition: Decomposition | None, application: Application) -> None:
    """A TypeError unless the three fit together."""
    returned = NoneType if decomposition is None else decomposition.returns
    if returned not in application.accepts:
        wanted = " or ".join(
            "no decomposition" if t is NoneType else f"a decomposition that returns {t.__name__}"
            for t in application.accepts
        )
        found = "none" if decomposition is None else f"{decomposition.name!r}, which returns {returned.__name__}"
        raise TypeError(f"application {application.name!r} needs {wanted}; the decomposition given is {found}.")
    if (factors is None) != (decomposition is None):
        found = f"factors={factors and factors.name!r}, decomposition={decomposition and decomposition.name!r}"
        raise TypeError(f"factors and decomposition go together: give both, or None for both; got {found}.")
    if factors is not None and factors.track is not None and returned is not Eigenpairs:
        raise TypeError(
            f"factors {factors.name!r} need a decomposition that returns Eigenpairs: "
            "wrap it in fo.decompositions.with_eigenvalues."
        )


# What turns a preconditioner into an optimizer: rate, decay, mask, fallback, alike for SOAP and its relatives.


KINDS = ("matrix", "head")
# Of the matrices' axes, or of layers.
OnMatrices = Callable[[list[MatrixAxes]], Freezable] | Callable[[list[Layer]], Freezable]


def scheduled_adam(b1: optax.ScalarOrSchedule, b2: optax.ScalarOrSchedule, eps: optax.ScalarOrSchedule) -> Freezable:
    """Optax's Adam, of numbers or schedules."""
    return scheduled(optax.scale_by_adam, b1=b1, b2=b2, eps=eps)


def direction(
    name: str,
    method: Preconditioner,
    fallback: optax.GradientTransformation | None,
    axes: PyTree,
    *,
    adam: optax.GradientTransformation,
    route: Callable[..., Freezable] = with_fallback,
    on_matrices: OnMatrices | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> optax.GradientTransformationExtraArgs:
    """``method`` on matrices, and on the rest ``fallback``, a direction; by default ``adam``.

    Args:
      route: `with_fallback`, or `layers_with_fallback` where a matrix takes its bias along.
      on_matrices: ``method.on_matrices``, or what stands for it on layers.
      kinds: of the leaves that are matrices to the method.
    """
    build, rest = on_matrices or method.on_matrices, method.with_first(adam if fallback is None else fallback)
    return skip_nonfinite(route(name, build, rest, axes=axes, kinds=kinds, describe=method.describe))


def optimizer(
    name: str,
    method: Preconditioner,
    fallback: optax.GradientTransformation | None,
    axes: PyTree,
    *,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: WeightDecay,
    mask: Mask,
    adam: optax.GradientTransformation,
    route: Callable[..., Freezable] = with_fallback,
    on_matrices: OnMatrices | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> optax.GradientTransformationExtraArgs:
    """`direction` with rate and decay after the step; ``fallback`` is complete, by default AdamW made of ``adam``."""
    check_decay(learning_rate, weight_decay)
    own = weight_decay if isinstance(weight_decay, Decay) else Decay(weight_decay, "after")
    skips = method.policy.options.first_step == "skip"
    build = on_matrices or method.on_matrices

    def built(matrices: list[Any]) -> Freezable:
        decay = decayed_step(learning_rate, own, mask, lambda updates: True)
        decay = skip_first_call(decay, freeze=False) if skips else decay
        return chain(build(matrices), optax.scale_by_learning_rate(learning_rate), decay)

    if fallback is None:
        # AdamW, whose Adam waits with the matrices while its schedules count calls, as theirs do.
        rest = optax.chain(*stages(learning_rate, weight_decay, mask))
        rest = skip_first_call(rest, freeze=False) if skips else rest
        fallback = chain(method.with_first(adam), rest)
    else:
        fallback = method.with_first(fallback)
    return skip_nonfinite(route(name, built, fallback, axes=axes, kinds=kinds, describe=method.describe))
