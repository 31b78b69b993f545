"""Symmetric products in rows of blocks: the same matrices in fewer flops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.flops import count_matmul_flops
from fisher_optax._xla import PLATFORMS
from fisher_optax.linalg import direct_flops, gram_flops, orthogonalize, polar_express
from fisher_optax.linalg.orthogonalize import add_identity, combine, symmetric_flops, trace
from fisher_optax.linalg.products import Products, row_sizes, whole
from tests.reference.newton_schulz import direct


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks at every size, not only where `PLATFORMS` asks for them."""
    monkeypatch.setitem(PLATFORMS, "cpu", PLATFORMS["cpu"]._replace(symmetric_blocks=1))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.usefixtures("x64", "blocked")
def test_blocks_hold_what_the_whole_holds(n: int, tall: bool) -> None:
    """X Xᵀ, a polynomial of it, its trace and its product with X, batched, odd sizes and size one too."""
    X = jnp.asarray(np.random.default_rng(n).standard_normal((2, 11, n) if tall else (2, n, 11)))
    wide = np.asarray(X.mT if tall else X)
    A = wide @ np.swapaxes(wide, -1, -2)
    p = Products(tall, row_sizes(n, PLATFORMS["cpu"].symmetric_blocks), jnp.float64, None)
    R = p.outer(X)
    S = add_identity(0.5, combine(2.0, R, -1.0, p.product(R, R)))
    np.testing.assert_allclose(whole(S), 0.5 * np.eye(n) + 2 * A - A @ A, atol=1e-10)
    np.testing.assert_allclose(trace(S), np.trace(whole(S), axis1=-2, axis2=-1), atol=1e-10)
    applied = np.asarray(p.apply(S, X))
    np.testing.assert_allclose(
        np.swapaxes(applied, -1, -2) if tall else applied, np.asarray(whole(S)) @ wide, atol=1e-10
    )


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6), (2, 4, 9), (1, 6)])
@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.usefixtures("x64", "blocked")
def test_the_polar_factor_in_blocks_is_the_reference(shape: tuple[int, ...], method: str) -> None:
    X = np.random.default_rng(0).standard_normal(shape)
    wanted = np.stack([direct(M, polar_express(5)) for M in X.reshape(-1, *shape[-2:])]).reshape(shape)
    np.testing.assert_allclose(orthogonalize(jnp.asarray(X), method=method), wanted, atol=1e-10)


@pytest.mark.usefixtures("blocked")
def test_the_polar_factor_in_blocks_in_single_precision() -> None:
    """Blocks lose no accuracy: singular values over four decades, against float64."""
    X = np.random.default_rng(0).standard_normal((8, 20)) * np.logspace(0, -4, 8)[:, None]
    for method, error in (("direct", 1e-4), ("gram", 0.012)):
        got = orthogonalize(jnp.asarray(X, jnp.float32), method=method)
        np.testing.assert_allclose(got, direct(X, polar_express(5)), atol=error)


@pytest.mark.parametrize("n", [8, 11, 32, 35])
@pytest.mark.usefixtures("blocked")
def test_flops_in_blocks_are_counted(n: int) -> None:
    """Exactly, and at most five eighths of the whole, plus what an odd size adds."""
    X = jax.ShapeDtypeStruct((n, 3 * n), jnp.float32)
    rows = row_sizes(n, PLATFORMS["cpu"].symmetric_blocks)
    assert len(rows) == 4

    def counted(**options: Any) -> int:
        return count_matmul_flops(lambda X: orthogonalize(X, **options), X).most

    assert counted(method="direct") == direct_flops(rows, 3 * n, 5)
    assert counted(method="gram") == gram_flops(rows, 3 * n, 5)
    assert counted() == (gram_flops if n >= 32 else direct_flops)(rows, 3 * n, 5)
    assert symmetric_flops(rows) <= (0.625 if n % 4 == 0 else 0.63) * symmetric_flops((n,))
