"""Every optimizer as one row, and what the laws run it on.

A law never asks which optimizer it has: what differs between two optimizers is a field of the row.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.standins import factors, fed, samples

NOTHING: Mapping[str, Any] = MappingProxyType({})


SINGLE_PRECISION, HALF_PRECISION = 2e-5, 2e-2


class Row(NamedTuple):
    """One optimizer under test: ``make(**options)``, followed by a rate where it is a bare direction."""

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    options: Mapping[str, Any] = NOTHING
    rate_after: float | None = None  # the rate of the stage after a bare direction; None: `make` takes learning_rate
    update_kwargs: Mapping[str, Any] = NOTHING  # what `update` needs beyond gradients, state and parameters
    static_args: str | None = None  # its key in fo.STATIC_ARGS; None: not a factory of hyperparameters
    scheduled: tuple[str, ...] = ()  # numeric options that may be schedules
    undecayed: Mapping[str, Any] = NOTHING  # options that turn weight decay off
    takes_axes: bool = True
    any_scale: bool = False  # a matrix's direction is the same for gradients of any size its dtype can hold
    scale_free: bool = True  # large gradients move parameters as small ones do
    one_guard: bool = True  # a bad step is skipped by one guard, not by each stage of a chain
    tolerance: float = SINGLE_PRECISION  # of the update's norm, between two ways to compute it
    joined: bool = False  # a kernel and its bias are one matrix
    variant: bool = False  # of a method that has another row, for the laws that depend on options
    descent: tuple[float, int] = (0.1, 1000)  # first rate (falling linearly to 0) and steps of the convergence tests


def build(row: Row, wrap: Callable[[Any], Any] = lambda make: make, **overrides: Any) -> Any:
    """The row's complete optimizer; ``wrap`` is applied to its factory, ``learning_rate`` reaches the right stage."""
    options = {**row.options, **overrides}
    if row.rate_after is None:
        return wrap(row.make)(**options)
    rate = options.pop("learning_rate", row.rate_after)
    return optax.chain(wrap(row.make)(**options), optax.scale_by_learning_rate(rate))


def lion_in_soaps_basis() -> optax.GradientTransformationExtraArgs:
    """An optimizer without a name: Lion run inside SOAP's eigenbasis."""
    factors, basis = fo.factors.outer_product(0.95), fo.decompositions.orthogonal_iteration()
    return fo.precondition(factors, basis, fo.in_eigenbasis(optax.scale_by_lion()))


def soap_then_orthogonal() -> optax.GradientTransformationExtraArgs:
    """SOAP's direction, then its polar factor: a chain whose second stage keeps nothing from step to step."""
    orthogonalise = fo.scale_by_muon(beta=0.0, nesterov=False, fallback=optax.identity())
    return optax.chain(fo.scale_by_soap(precondition_frequency=2), orthogonalise)


def muon_with_adams_size() -> optax.GradientTransformationExtraArgs:
    return fo.graft(fo.scale_by_muon(), "adam")


def normuon(weight_decay: float = 0.1) -> optax.GradientTransformationExtraArgs:
    return optax.chain(fo.scale_by_muon(), fo.scale_by_normuon(), fo.add_cautious_decay(weight_decay))


def soap_row(name: str, tolerance: float = SINGLE_PRECISION, **options: Any) -> Row:
    options = {"learning_rate": 0.01, "precondition_frequency": 2, "weight_decay": 0.1} | options
    scheduled, undecayed = ("learning_rate", "weight_decay", "b1", "b2"), {"weight_decay": 0.0}
    return Row(
        name, fo.soap, options, static_args="soap", scheduled=scheduled, undecayed=undecayed, tolerance=tolerance
    )


def muon_row(name: str, tolerance: float = SINGLE_PRECISION, **options: Any) -> Row:
    options = {"learning_rate": 0.02, "weight_decay": 0.1} | options
    scheduled, undecayed = ("learning_rate", "weight_decay", "beta"), {"weight_decay": 0.0}
    return Row(
        name,
        fo.muon,
        options,
        static_args="muon",
        scheduled=scheduled,
        undecayed=undecayed,
        any_scale=True,
        tolerance=tolerance,
    )


def like_soap(make: Callable[..., Any], name: str, tolerance: float = SINGLE_PRECISION, **options: Any) -> Row:
    """A row of an optimizer that takes SOAP's arguments."""
    return soap_row(name, tolerance, **options)._replace(make=make, static_args=make.__name__)


def shampoo_row(name: str, tolerance: float = SINGLE_PRECISION, **options: Any) -> Row:
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "precondition_frequency": 2} | options
    scheduled, undecayed = ("learning_rate", "weight_decay", "b1", "b2"), {"weight_decay": 0.0}
    return Row(
        name, fo.shampoo, options, static_args="shampoo", scheduled=scheduled, undecayed=undecayed, tolerance=tolerance
    )


def kfac_row(make: Callable[..., Any], name: str, tolerance: float = SINGLE_PRECISION, **options: Any) -> Row:
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "precondition_frequency": 2} | options
    scheduled = ("learning_rate", "weight_decay", "momentum", "damping", "curvature_decay")
    return Row(
        name,
        fed(make, factors, with_bases=make is fo.ekfac),
        options,
        static_args=make.__name__,
        scheduled=scheduled,
        undecayed={"weight_decay": 0.0},
        tolerance=tolerance,
        joined=True,
        scale_free=False,  # damping is in units of the Fisher
    )


def frog_row(make: Callable[..., Any], name: str, **options: Any) -> Row:
    options = {"learning_rate": 0.01, "weight_decay": 0.1} | options
    scheduled = ("learning_rate", "weight_decay", "momentum", "damping")
    return Row(
        name,
        fed(make, samples),
        options,
        static_args=make.__name__,
        scheduled=scheduled,
        undecayed={"weight_decay": 0.0},
        joined=True,
        tolerance=1e-4,  # of conjugate gradients
    )


ROWS = (
    soap_row("soap"),
    soap_row("soap-adaptive-packed", refresh="adaptive", adaptive_tolerance=0.01, factor_storage="packed"),
    soap_row(
        "soap-staggered-bf16",
        refresh="staggered",
        factor_dtype=jnp.bfloat16,
        momentum_dtype=jnp.bfloat16,
        tolerance=HALF_PRECISION,
    ),
    soap_row("soap-adam-first-squared", first_step="adam", transport="squared"),
    soap_row("soap-blocks-cholesky", block_size=4, decomposition="cholesky"),
    soap_row("soap-one-sided-eigh-normalized", sides="shorter", decomposition="eigh", normalize_updates=True),
    muon_row("muon"),
    muon_row("muon-jordan", polynomial=fo.jordan(5), scale="shape", nesterov=False),
    muon_row(
        "muon-you-bf16", polynomial=fo.you(), scale="unit_rms", momentum_dtype=jnp.bfloat16, tolerance=HALF_PRECISION
    ),
    muon_row("muon-own-cubic", polynomial=((1.5, -0.5, 0.0),) * 12, scale=0.2),
    shampoo_row("shampoo"),
    shampoo_row("shampoo-newton-blocks-packed", root="newton", block_size=4, factor_storage="packed"),
    shampoo_row(
        "shampoo-half-polynomial-sgd", exponent=-0.5, root="polynomial", grafting="sgd", accumulate="sum"
    )._replace(scale_free=False),
    shampoo_row(
        "shampoo-traced-staggered",
        exponent=-0.5,
        grafting=None,
        trace_scaling=True,
        refresh="staggered",
        start_preconditioning_step=0,
    ),
    # From the dominant triple, factors have rank one after the first call, and a basis that depends on rounding.
    like_soap(fo.dykaf, "dykaf", init="identity"),
    like_soap(fo.dykaf, "dykaf-parallel-rank1", variant="parallel", init="identity", rank1_second_moment=True),
    like_soap(fo.dykaf, "dykaf-one-sided-adaptive", sides="shorter", refresh="adaptive", transport="squared"),
    # Their factors start at the identity, however large the gradients are.
    like_soap(fo.kl_soap, "kl_soap")._replace(scale_free=False),
    like_soap(fo.kl_shampoo, "kl_shampoo")._replace(scale_free=False),
    Row(
        "scale_by_soap",
        fo.scale_by_soap,
        {"precondition_frequency": 2},
        rate_after=0.01,
        static_args="scale_by_soap",
        scheduled=("b1",),
    ),
    Row(
        "scale_by_muon",
        fo.scale_by_muon,
        rate_after=0.02,
        static_args="scale_by_muon",
        scheduled=("beta",),
        any_scale=True,
    ),
    Row(
        "scale_by_shampoo",
        fo.scale_by_shampoo,
        {"precondition_frequency": 2},
        rate_after=0.01,
        static_args="scale_by_shampoo",
        scheduled=("b1",),
    ),
    kfac_row(fo.kfac, "kfac"),
    kfac_row(fo.kfac, "kfac-inverse-packed-clipped", decomposition="inverse", factor_storage="packed", kl_clip=0.1),
    kfac_row(
        fo.kfac, "kfac-half-grafted-staggered", exponent=-0.5, grafting="adam", decomposition="qr", refresh="staggered"
    ),
    kfac_row(fo.ekfac, "ekfac"),
    like_soap(fo.kfac_soap, "kfac_soap")._replace(make=fed(fo.kfac_soap, factors), joined=True),
    frog_row(fo.frog, "frog"),
    # Its size is that of momentum over the output gradients, here of one gradient that vanishes at the minimum.
    frog_row(fo.kfrog, "kfrog", momentum=0.0),
    Row("graft", muon_with_adams_size, rate_after=0.02, takes_axes=False),
    Row("lion-in-basis", lion_in_soaps_basis, rate_after=0.01, takes_axes=False),
    Row(
        "normuon",
        normuon,
        rate_after=0.02,
        undecayed={"weight_decay": 0.0},
        takes_axes=False,
        any_scale=True,
        one_guard=False,
    ),
    # Adam's first direction is a matrix of signs: often singular, so that its polar factor magnifies rounding.
    Row(
        "soap-then-orthogonal", soap_then_orthogonal, rate_after=0.02, takes_axes=False, one_guard=False, tolerance=1e-3
    ),
)


FIRST = {row.make: row.name for row in reversed(ROWS) if row.static_args}
ROWS = tuple(row._replace(variant=FIRST.get(row.make, row.name) != row.name) for row in ROWS)
METHODS = tuple(row for row in ROWS if not row.variant)


def each(rows: Iterable[Row] = ROWS) -> Any:
    """Run a test once a row."""
    return pytest.mark.parametrize("row", list(rows), ids=lambda row: row.name)


STEPS = 6


def standard_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    """A small model's parameters by Flax's names.

    Matrices are square: the factor of a longer side is singular at first, and the basis of its null space depends on
    rounding, so that two correct computations need not agree.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "conv": {"kernel": normal(2, 2, 2, 8)},
        "dense": {"bias": normal(4), "kernel": normal(4, 4)},
        "embed": {"embedding": normal(4, 4)},
        "head": {"kernel": normal(4, 4)},
        "norm": {"scale": normal(4)},
        "temperature": normal(),
    }


def standard_gradients(seed: int = 1, steps: int = STEPS, dtype: Any = jnp.float32) -> list[Any]:
    """Gradients for `standard_params` whose factors have full rank and well-separated eigenvalues."""
    rng = np.random.default_rng(seed)

    def leaf(x: jax.Array) -> list[jax.Array]:
        n = x.shape[-1] if x.ndim >= 2 else x.size
        if x.ndim < 2:
            return [jnp.asarray(g, dtype) for g in rng.normal(size=(steps, *x.shape))]
        U, V = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
        core = np.diag(np.linspace(1, 3, n)) @ (np.eye(n) + 0.1 * rng.normal(size=(steps, n, n)))
        return [jnp.asarray(g.reshape(x.shape), dtype) for g in U @ core @ V.T]

    leaves, treedef = jax.tree.flatten(standard_params())
    return [treedef.unflatten(step) for step in zip(*map(leaf, leaves), strict=True)]


def matrices_of(tree: Any) -> Any:
    """The leaves of the standard tree that every row treats as matrices."""
    return {"conv": {"kernel": tree["conv"]["kernel"]}, "dense": {"kernel": tree["dense"]["kernel"]}}


class Point(NamedTuple):
    """A run after one step."""

    updates: Any
    state: Any
    params: Any


class Compiled(NamedTuple):
    """A row's optimizer, compiled once for the standard parameters and shared by the tests."""

    tx: optax.GradientTransformationExtraArgs
    init: Callable[[Any], Any]
    update: Callable[..., Any]  # (grads, state, params), with an argument no optimizer knows
    traces: list[None]  # one entry each time `update` was traced


def updater(tx: optax.GradientTransformationExtraArgs, **extra: Any) -> Callable[..., Any]:
    """``tx.update`` as a function of gradients, state and parameters alone."""
    return lambda grads, state, params: tx.update(grads, state, params, **extra)


@functools.cache
def _compiled(name: str) -> Compiled:
    row = next(row for row in ROWS if row.name == name)
    tx, traces = build(row), []

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> Any:
        traces.append(None)
        return tx.update(grads, state, params, **row.update_kwargs, stranger=jnp.ones(3))

    return Compiled(tx, jax.jit(tx.init), update, traces)


@functools.cache
def _trajectory(name: str) -> tuple[Point, ...]:
    c = _compiled(name)
    params = standard_params()
    return tuple(run(c.update, c.tx.init(params), params, standard_gradients()))


def compiled(row: Row) -> Compiled:
    return _compiled(row.name)


def trajectory(row: Row) -> tuple[Point, ...]:
    """The row's run over `standard_gradients`, under jit."""
    return _trajectory(row.name)


def run(update: Callable[..., Any], state: Any, params: Any, gradients: list[Any]) -> list[Point]:
    points = []
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        points.append(Point(updates, state, params))
    return points
