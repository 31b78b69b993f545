"""Factors x decomposition x application. Every named optimizer is one call of it and a chain around.

At call t, for each matrix G of the gradient tree:

    U    ← application(G)   in bases made of earlier gradients: a gradient never chooses its own basis
    L, R ← factors(G)
    Q    ← decomposition(L, R)   where the refresh policy says so; moments held in the old basis are carried into the
    new one
"""

from types import NoneType
from typing import Any

import optax

from ..transforms.skip_nonfinite import skip_nonfinite
from .contracts import Application, Decomposition, Eigenpairs, FactorRule
from .refresh import Policy
from .storage import Storage
from .transform import Preconditioner


def precondition(
    factors: FactorRule | None,
    decomposition: Decomposition | None,
    application: Application,
    *,
    axes: Any = None,
    fallback: optax.GradientTransformation | None = None,
    kinds: tuple[str, ...] = ("matrix", "head"),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Precondition matrix gradients with any combination of factors, decomposition and application.

    Args:
      factors: how Kronecker factors follow the gradients, e.g. ``fo.factors.outer_product(0.95)``; None for an
        application that needs none.
      decomposition: what turns factors into bases, e.g. ``fo.decompositions.orthogonal_iteration()``; None likewise.
      application: what is done with them, e.g. ``fo.in_eigenbasis(optax.scale_by_lion())`` or
        ``fo.applications.orthogonal()``.
      axes: which axes of each leaf are inputs, outputs and batch. None: rules by Flax path and shape, see `fo.report`;
        else a tree of `fo.MatrixAxes`
        (None at a leaf: fallback), or a function of params that makes one.
      fallback: a direction for the leaves that are no matrices, default ``optax.scale_by_adam()``.
      kinds: what the method takes of "matrix", "head" and "embedding" (see `fo.label_params`).
      **options: those of `fo.soap` from ``precondition_frequency`` on: when bases are renewed, and what is kept.

    Raises:
      TypeError: where the application does not accept what the decomposition returns.
      ValueError: for an option out of range.

    Example (SOAP with Lion inside):
      >>> import optax, fisher_optax as fo
      >>> lion = fo.in_eigenbasis(optax.scale_by_lion())
      >>> tx = fo.precondition(fo.factors.outer_product(0.95), fo.decompositions.orthogonal_iteration(), lion)
    """
    fallback = optax.scale_by_adam() if fallback is None else fallback
    return skip_nonfinite(
        preconditioner(factors, decomposition, application, **options).directions(
            application.name, fallback, axes, kinds
        )
    )


def preconditioner(
    factors: FactorRule | None,
    decomposition: Decomposition | None,
    application: Application,
    *,
    precondition_frequency: int = 10,
    refresh: str = "every",
    adaptive_tolerance: float = 0.01,
    transport: str = "permute",
    first_step: str = "skip",
    max_precond_dim: int = 10_000,
    block_size: int | None = None,
    sides: str = "both",
    factor_dtype: Any = None,
    factor_storage: str = "full",
    max_stack: int = 256,
    mesh_axis: str | None = None,
) -> Preconditioner:
    """A checked `Preconditioner`."""
    check_cell(factors, decomposition, application)
    for name, value, known in (
        ("first_step", first_step, ("skip", "adam")),
        ("factor_storage", factor_storage, ("full", "packed")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
    storage = Storage(factor_dtype, factor_storage == "packed", sides, max_precond_dim, block_size).check()
    policy = Policy(refresh, precondition_frequency, adaptive_tolerance, transport).check()
    skip_first = first_step == "skip" and not application.sees_itself
    return Preconditioner(factors, decomposition, application, storage, policy, skip_first, max_stack, mesh_axis)


def check_cell(factors: FactorRule | None, decomposition: Decomposition | None, application: Application) -> None:
    """A TypeError unless the three fit together."""
    returned = NoneType if decomposition is None else decomposition.returns
    if returned not in application.accepts:
        wanted = " or ".join(
            "no decomposition" if t is NoneType else f"a decomposition that returns {t.__name__}"
            for t in application.accepts
        )
        given = "none" if decomposition is None else f"{decomposition.name!r}, which returns {returned.__name__}"
        raise TypeError(f"application {application.name!r} needs {wanted}; the decomposition given is {given}.")
    if (factors is None) != (decomposition is None):
        given = f"factors={factors and factors.name!r}, decomposition={decomposition and decomposition.name!r}"
        raise TypeError(f"factors and decomposition go together: give both, or None for both; got {given}.")
    if factors is not None and factors.track is not None and returned is not Eigenpairs:
        raise TypeError(
            f"factors {factors.name!r} need a decomposition that returns Eigenpairs: "
            "wrap it in fo.decompositions.with_eigenvalues."
        )
