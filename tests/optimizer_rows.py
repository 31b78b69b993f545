"""Every optimizer as one row.

A law never asks which optimizer it has: what differs between two optimizers is a field of the row.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import pytest

import fisher_optax as fo
from tests.grouped import grouped
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
    keeps_norms: bool = False  # so that a minimum elsewhere is out of reach
    joined: bool = False  # a kernel and its bias are one matrix
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


def muon_on_spheres(learning_rate: Any = 0.02) -> optax.GradientTransformationExtraArgs:
    """With all that measures steps against weights, before it."""
    before = (fo.scale_by_muon(), fo.radial_brake(), fo.update_floor(0.1), fo.relative_update())
    return optax.chain(*before, fo.hyperball(learning_rate))


def in_groups(learning_rate: Any = 0.02) -> optax.GradientTransformationExtraArgs:
    """Muon on the matrices, and Adam at another rate on the rest."""
    rules = [(fo.kind("matrix"), fo.scale_by_muon(), 1.0, 0.1), (".*", optax.scale_by_adam(), 0.5)]
    return fo.groups(learning_rate, rules, allow_unused=True)


def soap_row(name: str, tolerance: float = SINGLE_PRECISION, **options: Any) -> Row:
    options = {"learning_rate": 0.01, "precondition_frequency": 2, "weight_decay": 0.1} | grouped(**options)
    scheduled, undecayed = ("learning_rate", "weight_decay", "b1", "b2", "eps"), {"weight_decay": 0.0}
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
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "precondition_frequency": 2} | grouped(**options)
    scheduled, undecayed = ("learning_rate", "weight_decay", "b1", "b2"), {"weight_decay": 0.0}
    return Row(
        name, fo.shampoo, options, static_args="shampoo", scheduled=scheduled, undecayed=undecayed, tolerance=tolerance
    )


def kfac_row(make: Callable[..., Any], name: str, tolerance: float = SINGLE_PRECISION, **options: Any) -> Row:
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "precondition_frequency": 2} | grouped(**options)
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


def newton_row(make: Callable[..., Any], name: str, tolerance: float = SINGLE_PRECISION, **options: Any) -> Row:
    options = {"learning_rate": 0.02, "weight_decay": 0.1, "precondition_frequency": 2} | grouped(**options)
    scheduled = ("learning_rate", "weight_decay", "beta", "damping", "curvature_decay")
    return Row(
        name,
        fed(make, factors),
        options,
        static_args=make.__name__,
        scheduled=scheduled,
        undecayed={"weight_decay": 0.0},
        tolerance=tolerance,
    )


def frog_row(make: Callable[..., Any], name: str, **options: Any) -> Row:
    # Six samples leave directions to the damping alone: more of it, or rounding shows.
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "damping": 0.1} | options
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
    soap_row("soap-adaptive-packed", refresh="adaptive", adaptive_tolerance=0.01, packed=True),
    soap_row(
        "soap-staggered-bf16",
        refresh="staggered",
        factor_dtype=jnp.bfloat16,
        momentum_dtype=jnp.bfloat16,
        tolerance=HALF_PRECISION,
    ),
    soap_row("soap-adam-first-squared", first_step="adam", transport="squared"),
    soap_row("soap-before-every-step", before_step=True, precondition_frequency=1),
    soap_row("soap-blocks-cholesky", block_size=4, decomposition="cholesky"),
    soap_row("soap-one-sided-eigh-normalized", sides="shorter", decomposition="eigh", normalize_updates=True),
    muon_row("muon"),
    muon_row("muon-jordan", polynomial=fo.jordan(5), scale="shape", nesterov=False),
    muon_row(
        "muon-you-bf16", polynomial=fo.you(), scale="unit_rms", momentum_dtype=jnp.bfloat16, tolerance=HALF_PRECISION
    ),
    muon_row("muon-own-cubic", polynomial=((1.5, -0.5, 0.0),) * 12, scale=0.2),
    shampoo_row("shampoo"),
    shampoo_row("shampoo-newton-blocks-packed", root="newton", block_size=4, packed=True),
    shampoo_row(
        "shampoo-half-polynomial-sgd", exponent=-0.5, root="polynomial", grafting="sgd", accumulate="sum"
    )._replace(scale_free=False),
    shampoo_row(
        "shampoo-traced-staggered",
        exponent=-0.5,
        grafting=None,
        accumulate="scaled_mean",
        refresh="staggered",
        start_preconditioning_step=0,
    ),
    # From the dominant triple, factors have rank one after the first call, and a basis that depends on rounding.
    like_soap(fo.dykaf, "dykaf", init="identity"),
    like_soap(fo.dykaf, "dykaf-parallel-rank1", variant="parallel", init="identity", rank1_second_moment=True),
    like_soap(fo.dykaf, "dykaf-one-sided-adaptive", sides="shorter", refresh="adaptive", transport="squared"),
    like_soap(fo.kl_soap, "kl_soap"),
    like_soap(fo.kl_shampoo, "kl_shampoo"),
    # A matrix of signs is often singular, so that its polar factor magnifies rounding.
    like_soap(fo.soap_muon, "soap_muon", tolerance=1e-3),
    like_soap(fo.kl_soap_muon, "kl_soap_muon", tolerance=1e-3),
    Row(
        "scale_by_soap",
        fo.scale_by_soap,
        {"precondition_frequency": 2},
        rate_after=0.01,
        static_args="scale_by_soap",
        scheduled=("b1", "eps"),
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
    kfac_row(fo.kfac, "kfac-inverse-packed-clipped", decomposition="inverse", packed=True, kl_clip=0.1),
    kfac_row(
        fo.kfac, "kfac-half-grafted-staggered", exponent=-0.5, grafting="adam", decomposition="qr", refresh="staggered"
    ),
    kfac_row(fo.ekfac, "ekfac", damping=0.1),  # some squares of one example are zero up to rounding
    like_soap(fo.kfac_soap, "kfac_soap")._replace(make=fed(fo.kfac_soap, factors), joined=True),
    newton_row(fo.newton_muon, "newton_muon", damping=0.2),
    newton_row(
        fo.newton_muon,
        "newton_muon-sandwich-staggered-packed",
        form="sandwich",
        damping=1e-3,
        refresh="staggered",
        packed=True,
    ),
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
    Row(
        "hyperball",
        muon_on_spheres,
        {"learning_rate": 0.02},
        scheduled=("learning_rate",),
        takes_axes=False,
        any_scale=True,
        one_guard=False,
        keeps_norms=True,
    ),
    Row("groups", in_groups, {"learning_rate": 0.02}, scheduled=("learning_rate",), takes_axes=False),
    # Adam's first direction is a matrix of signs: often singular, so that its polar factor magnifies rounding.
    Row(
        "soap-then-orthogonal", soap_then_orthogonal, rate_after=0.02, takes_axes=False, one_guard=False, tolerance=1e-3
    ),
)


# Laws that options of a method cannot break run on its first row alone.
FIRST = {row.static_args: row.name for row in reversed(ROWS) if row.static_args}
FACTORIES = tuple(row for row in ROWS if FIRST.get(row.static_args, row.name) == row.name)
METHODS = tuple(row for row in FACTORIES if not row.name.startswith("scale_by_"))  # of which the others are a part
# What a framework or a mesh does with all methods in the same way is seen on these.
SOME = tuple(row for row in METHODS if row.name in ("soap", "muon", "kfac", "frog"))
# One of each kind of state.
STATES = tuple(row for row in METHODS if row in SOME or row.name in ("shampoo", "ekfac", "normuon"))
# Whatever depends on the shapes of a state.
OTHER_SHAPES = {"block_size", "factor_storage", "factor_dtype", "sides", "rank1_second_moment"}
SHAPES = tuple(row for row in ROWS if row in METHODS or OTHER_SHAPES & row.options.keys())


def each(rows: Iterable[Row] = ROWS) -> Any:
    """Run a test once a row."""
    return pytest.mark.parametrize("row", list(rows), ids=lambda row: row.name)
