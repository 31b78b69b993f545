"""Packed symmetric matrices: exact round trips, the promised size, no tables of indices in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax.linalg import pack, unpack

SIZES = (0, 1, 2, 3, 4, 5, 8, 9)


def symmetric(d: int, batch: tuple[int, ...] = ()) -> np.ndarray:
    """Every entry of a half different, so that one out of place is seen."""
    upper = np.triu(np.arange(1.0, d * d + 1).reshape(d, d))
    A = upper + np.triu(upper, 1).T
    return A + 1000 * np.arange(np.prod(batch, dtype=int)).reshape(*batch, 1, 1)


@pytest.mark.parametrize("d", SIZES)
def test_round_trip_is_exact(d: int) -> None:
    """Of one matrix and of batches, in every precision."""
    dtypes, batches = (jnp.float16, jnp.bfloat16, jnp.float32), ((), (2,), (2, 3))
    matrices = [jnp.asarray(symmetric(d, batch), dtype) for dtype in dtypes for batch in batches]
    packed = jax.jit(lambda matrices: [pack(A) for A in matrices])(matrices)
    unpacked = jax.jit(lambda packed: [unpack(A, d) for A in packed])(packed)
    for A, half, B in zip(matrices, packed, unpacked, strict=True):
        assert half.dtype == B.dtype == A.dtype
        np.testing.assert_array_equal(B, A)


@pytest.mark.usefixtures("x64")
def test_round_trip_of_doubles() -> None:
    A = jnp.asarray(np.random.default_rng(0).standard_normal((7, 7)))
    A = A + A.T
    np.testing.assert_array_equal(unpack(pack(A), 7), A)


@pytest.mark.parametrize("d", SIZES)
def test_every_entry_is_stored_once(d: int) -> None:
    """``d (d + 1) / 2`` numbers, exactly those of one triangle."""
    packed = np.asarray(pack(jnp.asarray(symmetric(d))))
    assert packed.size == d * (d + 1) // 2
    np.testing.assert_array_equal(np.sort(packed.ravel()), symmetric(d)[np.triu_indices(d)])


def test_values_that_are_not_finite_stay_where_they_are() -> None:
    A = symmetric(5)
    A[1, 3] = A[3, 1] = np.nan
    A[4, 4] = np.inf
    np.testing.assert_array_equal(unpack(pack(jnp.asarray(A)), 5), A.astype(np.float32))


@pytest.mark.parametrize("d", [64, 65])
def test_no_array_is_baked_into_the_program(d: int) -> None:
    A = jax.ShapeDtypeStruct((d, d), jnp.float32)
    programs = jax.make_jaxpr(pack)(A), jax.make_jaxpr(lambda A: unpack(pack(A), d))(A)
    assert all(not program.consts for program in programs)
    assert "gather" not in str(programs)


def test_packing_commutes_with_averaging() -> None:
    """Running averages can be kept packed."""
    A, B = jnp.asarray(symmetric(5)), jnp.asarray(symmetric(5)[::-1, ::-1])
    np.testing.assert_array_equal(pack(0.5 * A + 0.25 * B), 0.5 * pack(A) + 0.25 * pack(B))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"packed into shape \(5, 2\); got \(5, 3\)"):
        unpack(pack(jnp.eye(5)), 4)
