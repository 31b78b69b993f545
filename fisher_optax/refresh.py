"""When a basis is renewed, and what must be carried along when it turns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Int

from . import linalg
from .branching import branch
from .types import Decomposition, Eigenpairs, Kronecker, Moments, Refreshed, Rows

KEEP, REFRESH, START = 0, 1, 2


class Policy(NamedTuple):
    """Options of `fo.soap` that say when and how bases are renewed: see there for the words."""

    refresh: str = "every"
    frequency: int = 10
    tolerance: float = 0.01
    transport: str = "permute"

    def check(self) -> "Policy":
        """Itself, or a ValueError that names what is wrong."""
        for name, value, known in (
            ("refresh", self.refresh, ("every", "adaptive", "staggered")),
            ("transport", self.transport, ("permute", "squared")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
        if isinstance(self.frequency, bool) or not isinstance(self.frequency, int) or self.frequency < 1:
            raise ValueError(
                f"precondition_frequency must be a positive integer number of steps; got {self.frequency!r}."
            )
        return self

    def phases(self, costs: dict[str, float], counts: dict[str, int]) -> dict[str, list[int]]:
        """For each stack the step of the period at which each of its matrices is due: 0, or, staggered, whatever evens
        the load out.

        ``costs`` is for one matrix of a stack, ``counts`` how many it holds. The costliest are dealt out first, each
        to the phase with the least so far.
        """
        if self.refresh != "staggered":
            return {key: [0] * count for key, count in counts.items()}
        load = [0.0] * self.frequency
        due: dict[str, list[int]] = {key: [] for key in counts}
        for key in sorted(counts, key=lambda key: -costs[key]):
            for _ in range(counts[key]):
                phase = load.index(min(load))
                load[phase] += costs[key]
                due[key].append(phase)
        return due

    def action(self, first: Bool[Array, ""], step: Int[Array, ""], phase: Int[Array, "*stack"]) -> Int[Array, "*stack"]:
        """What is to be done at this step with a matrix of this phase."""
        return jnp.where(first, START, jnp.where(step % self.frequency == phase, REFRESH, KEEP))


def renew(
    policy: Policy,
    decomposition: Decomposition,
    factors: Callable[[], Kronecker],
    basis: Any,
    moments: Moments,
    action: Int[Array, ""],
) -> tuple[Any, Moments, Int[Array, ""]]:
    """The basis, the moments in it, and how many sides failed, after ``action``; ``factors()`` are looked at only
    where there is something to do.
    """

    sides = [side for side, Q in enumerate(basis[:2]) if Q is not None]
    tolerance = policy.tolerance if policy.refresh == "adaptive" else None

    def decomposed(decompose: Callable[[Array, Array], Refreshed]) -> Callable[[], list[Refreshed]]:
        def side(A: Any, Q: Array) -> Refreshed:
            if isinstance(A, Rows):
                return Refreshed(linalg.range_of_rows(A.rows), jnp.arange(Q.shape[-1]))
            return decompose(A, Q.astype(A.dtype))

        return lambda: [side(factors()[i], basis[i]) for i in sides]

    def turn() -> Any:
        again = decomposed(lambda A, Q: decomposition.refresh(A, Q, tolerance))
        new, orders, failed = list(basis[:2]), list[Any]([None, None]), jnp.zeros([], jnp.int32)
        start = decomposition.start
        both = again() if start is None else branch(action == START, decomposed(start), again)
        for i, done in zip(sides, both, strict=True):
            new[i], bad = linalg.keep_last_good(done.value.astype(basis[i].dtype), basis[i])
            orders[i] = jnp.where(bad, jnp.arange(basis[i].shape[-1]), done.order)
            failed = failed + bad.astype(jnp.int32)
        turned = _measured(basis, new, factors()) if isinstance(basis, Eigenpairs) else type(basis)(*new)
        linear = tuple(_rotate(m, basis, turned) for m in moments.linear)
        squared = policy.transport == "squared"
        quadratic = tuple(
            _rotate_squares(v, basis, turned) if squared else _permute(v, *orders) for v in moments.quadratic
        )
        left, right = (
            tuple(_turn_vector(v, basis[i], new[i], orders[i], squared) for v in vectors)
            for i, vectors in enumerate((moments.left, moments.right))
        )
        return turned, Moments(linear, quadratic, left, right), failed

    return branch(action != KEEP, turn, lambda: (basis, moments, jnp.zeros([], jnp.int32)))


def _measured(old: Eigenpairs, new: list[Any], factors: Kronecker) -> Eigenpairs:
    """The new vectors with the values ``diag(Qᵀ A Q)``; the old values where these are not finite."""

    def values(A: Any, Q: Array | None, before: Array | None) -> Array | None:
        if A is None or Q is None or before is None:
            return None
        if isinstance(A, Rows):
            new = jnp.sum(jnp.square(jnp.matmul(A.rows, Q, precision=Precision.HIGHEST)), 0, keepdims=True)
        else:
            new = jnp.sum(Q.astype(A.dtype) * linalg.project(A, Q), 0, keepdims=True).astype(before.dtype)
        return linalg.keep_last_good(new, before[None])[0][0]

    return Eigenpairs(
        new[0],
        new[1],
        values(factors.left, new[0], old.left_values),
        values(factors.right, new[1], old.right_values),
    )


def _turn_vector(v: Float[Array, " d"], old: Any, new: Any, order: Any, squared: bool) -> Array:
    if old is None:
        return v
    if not squared:
        return v.at[order].get(mode="promise_in_bounds")
    C = jnp.matmul(new.mT.astype(v.dtype), old.astype(v.dtype), precision=Precision.HIGHEST)
    return jnp.matmul(jnp.square(C), v, precision=Precision.HIGHEST)


def _rotate(m: Float[Array, "m n"], old: Any, new: Any) -> Array:
    """``Q_newᵀ Q_old m``, and the same on the right: exact, out of the old basis and into the new one."""
    x = m.astype(jnp.promote_types(m.dtype, jnp.float32))
    for side, (P, Q) in enumerate(zip(old[:2], new[:2], strict=True)):
        if P is not None:
            x = _apply(Q.mT, _apply(P, x, side), side)
    return x.astype(m.dtype)


def _rotate_squares(v: Float[Array, "m n"], old: Any, new: Any) -> Array:
    """``(C∘C) v (C∘C)ᵀ`` with ``C = Q_newᵀ Q_old``: exact if the entries of the gradient in the old basis are
    uncorrelated.
    """
    x = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    for side, (P, Q) in enumerate(zip(old[:2], new[:2], strict=True)):
        if P is not None:
            C = jnp.matmul(Q.mT.astype(x.dtype), P.astype(x.dtype), precision=Precision.HIGHEST)
            x = _apply(jnp.square(C), x, side)
    return x.astype(v.dtype)


def _permute(v: Float[Array, "m n"], left: Array | None, right: Array | None) -> Array:
    """The SOAP authors' transport: entries follow the columns of the basis as they are reordered, and ignore that
    these turn.
    """
    rows = slice(None) if left is None else left if right is None else left[:, None]
    return v.at[rows, slice(None) if right is None else right].get(mode="promise_in_bounds")


def _apply(Q: Array, x: Array, side: int) -> Array:
    """``Q x`` on the left side (0), ``x Qᵀ`` on the right."""
    Q = Q.astype(x.dtype)
    return (
        jnp.matmul(Q, x, precision=Precision.HIGHEST) if side == 0 else jnp.matmul(x, Q.mT, precision=Precision.HIGHEST)
    )
