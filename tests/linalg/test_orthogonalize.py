"""Orthogonalisation against float64 references: both iterations, every scale, accuracy and flops."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.flops import count_matmul_flops
from fisher_optax._xla import PLATFORMS
from fisher_optax.linalg import direct_flops, gram_flops, jordan, orthogonalize, polar_express, restart_steps, you
from tests.reference.newton_schulz import (
    direct,
    on_singular_values,
    with_singular_values,
)

POLYNOMIALS = {"polar5": polar_express(5), "polar8": polar_express(8), "jordan": jordan(5), "you": you()}
SHAPES = {
    "wide": (5, 12),
    "tall": (12, 5),
    "square": (7, 7),
    "batched wide": (2, 3, 4, 9),
    "batched tall": (3, 9, 4),
    "size one": (1, 1),
    "row": (1, 6),
    "column": (6, 1),
}
METHODS = ("direct", "gram", "auto")
compiled = jax.jit(orthogonalize, static_argnames=("polynomial", "method", "restarts", "dtype"))


def random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def each(f: Any, X: np.ndarray, *args: Any) -> np.ndarray:
    """``f`` of every matrix of a batch."""
    return np.stack([f(M, *args) for M in X.reshape(-1, *X.shape[-2:])]).reshape(X.shape)


# --- the iterations ---


@functools.partial(jax.jit, static_argnums=(1, 2))
def of_all_shapes(X: Any, polynomial: Any, method: str) -> Any:
    """One program: to compile a small one takes longer than to compile what is in it."""
    return {name: orthogonalize(x, polynomial, method=method) for name, x in X.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("polynomial", POLYNOMIALS.values(), ids=POLYNOMIALS)
@pytest.mark.usefixtures("x64")
def test_equals_the_reference(polynomial: Any, method: str) -> None:
    """Both iterations apply the polynomial to the singular values, to 1e-10 in float64, and keep shape and dtype."""
    inputs = {name: random(shape) for name, shape in SHAPES.items()}
    outputs = of_all_shapes(inputs, polynomial, method)
    for name, X in inputs.items():
        Y = outputs[name]
        assert (Y.shape, Y.dtype) == (X.shape, np.float64)
        np.testing.assert_allclose(Y, each(direct, X, polynomial), atol=1e-10, err_msg=name)
        np.testing.assert_allclose(Y, each(on_singular_values, X, polynomial), atol=1e-10, err_msg=name)


@pytest.mark.parametrize("blocked", [False, True], ids=["whole", "blocked"])
@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 12, 5)], ids=["wide", "stack of tall"])
@pytest.mark.usefixtures("x64")
def test_complex_matrices(shape: tuple[int, ...], method: str, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their singular values go through the polynomial, at any scale; in blocks too."""
    if blocked:
        monkeypatch.setitem(PLATFORMS, "cpu", PLATFORMS["cpu"]._replace(symmetric_blocks=1))
    X = random(shape) + 1j * random(shape, 1)
    Y = orthogonalize(jnp.asarray(1e-200 * X), you(), method=method)
    assert (Y.shape, Y.dtype) == (X.shape, np.complex128)
    np.testing.assert_allclose(Y, each(on_singular_values, X, you()), atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 16), (16, 6), (5, 5)])
@pytest.mark.usefixtures("x64")
def test_rank_one_and_zero(shape: tuple[int, int], method: str) -> None:
    rank_one = np.outer(random((shape[0],)), random((shape[1],), 1))
    Y = orthogonalize(jnp.stack([jnp.asarray(rank_one), jnp.zeros(shape)]), method=method)
    np.testing.assert_allclose(Y[0], on_singular_values(rank_one, polar_express(5)), atol=1e-9)
    assert not np.any(Y[1])


@pytest.mark.parametrize("restarts", [(), (2,), (1, 2, 3, 4)])
@pytest.mark.parametrize("polynomial", [polar_express(5), jordan(5), you()], ids=["polar5", "jordan", "you"])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
@pytest.mark.usefixtures("x64")
def test_gram_equals_direct(shape: tuple[int, int], polynomial: Any, restarts: tuple[int, ...]) -> None:
    """To 1e-12 in float64 for well-conditioned matrices, wherever it restarts."""
    X = jnp.asarray(with_singular_values(np.linspace(0.5, 1, 24), *shape))
    Y = orthogonalize(X, polynomial, method="gram", restarts=restarts)
    np.testing.assert_allclose(Y, orthogonalize(X, polynomial, method="direct"), atol=1e-12)


@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (jnp.float16, (6e4, 1e-4, 1e-7)),
        (jnp.bfloat16, (3e38, 1e-37, 1e-38)),
        (jnp.float32, (3e38, 1e-30, 1e-37, 1e-38, 1e-42)),
    ],
)
def test_any_scale(dtype: Any, scales: tuple[float, ...], method: str) -> None:
    """Norms neither overflow nor vanish, subnormal entries included: the result is that of the rounded input."""
    for scale in scales:
        X = random((4, 9))
        X = jnp.asarray(X * (scale / np.abs(X).max()), dtype)
        Y = compiled(X, method=method)
        assert Y.dtype == dtype
        wanted = on_singular_values(np.asarray(X).astype(np.float64), polar_express(5))
        np.testing.assert_allclose(np.asarray(Y, np.float64), wanted, atol=2e-3 if dtype != jnp.float32 else 1e-4)


def test_a_value_that_is_not_finite_spoils_its_own_matrix_only() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        X = random((2, 4, 9)).astype(np.float32)
        X[0, 1, 2] = bad
        for method in ("direct", "gram"):
            Y = compiled(X, method=method)
            assert not np.isfinite(Y[0]).any()
            np.testing.assert_array_equal(Y[1], compiled(X[::-1], method=method)[0])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 3)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert orthogonalize(jnp.zeros(shape)).shape == shape


def test_transforms_agree() -> None:
    """Batched, mapped, vmapped and one by one; jitted."""
    X = jnp.asarray(random((3, 4, 9)), jnp.float32)
    one_by_one = jnp.stack([orthogonalize(M) for M in X])
    for stacked in (orthogonalize, jax.vmap(orthogonalize), lambda X: jax.lax.map(orthogonalize, X)):
        np.testing.assert_allclose(jax.jit(stacked)(X), one_by_one, atol=2e-5)


# --- accuracy in float32 and below ---

SPECTRA = {
    "rank one": np.r_[1.0, np.zeros(63)],
    "half rank": np.r_[np.ones(32), np.zeros(32)],
    "to 1e-6": np.geomspace(1, 1e-6, 64),
    "one and 1e-6": np.r_[1.0, np.full(63, 1e-6)],
    "one and 1e-4": np.r_[1.0, np.full(63, 1e-4)],
    "one and 1e-3": np.r_[1.0, np.full(63, 1e-3)],
}


def error(spectrum: np.ndarray, polynomial: Any, **options: Any) -> float:
    """Spectral norm of the distance from exact arithmetic, for a 64 x 160 matrix."""
    X = with_singular_values(spectrum, 64, 160).astype(np.float32)
    Y = compiled(X, polynomial, **options)
    return float(np.linalg.norm(np.asarray(Y, np.float64) - on_singular_values(X.astype(np.float64), polynomial), 2))


def drift(polynomial: Any, restarts: tuple[int, ...], unit_roundoff: float) -> float:
    """How far rounding carries a zero eigenvalue of R: unit roundoff times a² a step, from each restart to the next."""
    gains = np.array([a * a for a, _, _ in polynomial])
    runs = zip((0, *restarts), (*restarts, len(gains)), strict=True)
    return unit_roundoff * max(np.prod(gains[start : stop - 1]) for start, stop in runs)


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_float32_direct_error_is_rounding_times_the_slope_at_zero(spectrum: np.ndarray, name: str) -> None:
    """Rounding of X, 6e-8 of its norm, grows by at most the composed slope (1,000 for five Polar Express steps)."""
    polynomial = POLYNOMIALS[name]
    assert error(spectrum, polynomial, method="direct") <= 2 * 2**-24 * np.prod([a for a, _, _ in polynomial])


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_float32_gram_error_is_the_predicted_drift(spectrum: np.ndarray, name: str) -> None:
    """Default restarts: the error of "direct" and twice the drift, which is .011 for five Polar Express steps."""
    polynomial = POLYNOMIALS[name]
    restarts = restart_steps(polynomial, 2**-24)
    bound = 2 * 2**-24 * np.prod([a for a, _, _ in polynomial]) + 2 * drift(polynomial, restarts, 2**-24)
    assert error(spectrum, polynomial, method="gram") <= bound


def test_gram_on_well_conditioned_and_hard_spectra() -> None:
    """The figures that the documentation states; without its restart the eight-step one is wrong by more than .3."""
    well = np.linspace(0.3, 1, 64)
    assert error(well, polar_express(5), method="gram") < 5e-5
    assert error(SPECTRA["to 1e-6"], polar_express(5), method="gram", restarts=(2,)) < 1e-4
    assert error(SPECTRA["one and 1e-3"], polar_express(5), method="gram") < 0.012
    assert error(SPECTRA["one and 1e-4"], polar_express(8), method="gram") < 1e-3
    assert error(SPECTRA["one and 1e-4"], polar_express(8), method="gram", restarts=()) > 0.3


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_products_in_half_precision_stay_bounded(name: str, dtype: Any) -> None:
    """Errors of "direct", whose sums are float32: 30 unit roundoffs; of "gram": .65 for five steps, 1.3 for eight."""
    polynomial, unit_roundoff = POLYNOMIALS[name], float(jnp.finfo(dtype).eps) / 2
    for spectrum in SPECTRA.values():
        assert error(spectrum, polynomial, method="direct", dtype=dtype) < 30 * unit_roundoff
        assert error(spectrum, polynomial, method="gram", dtype=dtype) < (0.65 if len(polynomial) == 5 else 1.3)


def test_eight_steps_in_bfloat16_diverge_without_restarts() -> None:
    assert error(SPECTRA["to 1e-6"], polar_express(8), method="gram", dtype=jnp.bfloat16, restarts=()) > 3


def test_restarts_are_few_and_well_placed() -> None:
    five, eight = polar_express(5), polar_express(8)
    assert [restart_steps(five, u) for u in (2**-53, 2**-24, 2**-11, 2**-9)] == [(), (), (2,), (1, 3)]
    assert [restart_steps(eight, u) for u in (2**-53, 2**-24)] == [(), (3,)]
    for polynomial in (*POLYNOMIALS.values(), jordan(20), polar_express(16)):
        for u in (2**-53, 2**-24, 2**-11, 2**-9):
            assert drift(polynomial, restart_steps(polynomial, u), u) <= 0.1


def test_products_known_to_be_inexact_restart_more_often() -> None:
    """Each dtype of the products has its own restarts; on a CPU float32 is exact whatever ``precision`` asks for."""

    def restarts(**options: Any) -> int:
        X = jax.ShapeDtypeStruct((4, 400), jnp.float32)
        flops = count_matmul_flops(lambda X: orthogonalize(X, method="gram", **options), X).products
        return next(k for k in range(5) if flops == gram_flops((4,), 400, 5, range(k)))

    assert restarts() == 0
    assert restarts(precision="highest") == 0
    assert restarts(precision=jax.lax.Precision.DEFAULT) == 0
    assert restarts(dtype=jnp.float16) == 1
    assert restarts(dtype=jnp.bfloat16) == 2
    assert restarts(precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32) == 2


# --- cost ---


COUNTED = [(6, 40), (40, 6), (7, 7), (31, 62), (32, 40), (40, 32), (32, 48), (32, 49), (5, 32, 64)]


@pytest.mark.parametrize("shape", COUNTED)
def test_flops_are_those_of_the_program(shape: tuple[int, ...]) -> None:
    """The two formulas count the traced products, and "auto" takes the cheaper iteration: gram where m > 1.5 n; below
    sides of 32 the direct one.
    """
    short, long = sorted(shape[-2:])
    X = jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = int(np.prod(shape[:-2]))

    def counted(**options: Any) -> float:
        return count_matmul_flops(lambda X: orthogonalize(X, **options), X).products / batch

    assert counted(method="direct") == direct_flops((short,), long, 5)
    for restarts in ((), (2,), (1, 3)):
        assert counted(method="gram", restarts=restarts) == gram_flops((short,), long, 5, restarts)
    gram = long > 1.5 * short and short >= 32
    assert counted() == (gram_flops((short,), long, 5) if gram else direct_flops((short,), long, 5))


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (3, 40, 6)])
def test_no_transpose_is_formed(shape: tuple[int, ...]) -> None:
    program = str(jax.make_jaxpr(orthogonalize)(jax.ShapeDtypeStruct(shape, jnp.float32)))
    assert "dot_general" in program
    assert "transpose" not in program


# --- errors ---


def test_errors() -> None:
    X = jnp.ones((3, 4))
    with pytest.raises(ValueError, match="method must be 'auto', 'direct' or 'gram'; got 'svd'"):
        orthogonalize(X, method="svd")
    with pytest.raises(ValueError, match="wanted a sequence of"):
        orthogonalize(X, [(1.0, 2.0)])
    for restarts in ((5,), (0,), (2, 1), (2, 2)):
        with pytest.raises(ValueError, match="restarts must be increasing steps from 1 to 4"):
            orthogonalize(X, restarts=restarts)
    with pytest.raises(TypeError, match="dtype must be real floating point; got int32"):
        orthogonalize(X, dtype=jnp.int32)
