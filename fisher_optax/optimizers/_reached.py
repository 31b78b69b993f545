"""Averages of statistics, of the matrices that a gradient has reached.

An expert without rows has nothing to say, nor has any matrix whose B is zero: all that is kept of it stays, the sum of
weights that averages are divided by included, so that

    A_e ← β A_e + (1-β) left_e,  w_e ← β w_e + (1-β),  read as A_e / w_e      over the steps in which e was reached

and its bases are made as soon as it is reached at all, not at the next refresh.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from .. import linalg
from .._xla import select
from ..linalg.eigenbasis import LowRank
from ..preconditioner.contracts import Application, FactorRule, Kronecker, MatrixState
from ..preconditioner.factors import kronecker
from ..preconditioner.refresh import START
from ..preconditioner.step import Step
from ..preconditioner.transform import Preconditioner
from ..statistics import LayerFactors


def reached_factors(decay: optax.ScalarOrSchedule, rank: int | None = None) -> FactorRule:
    """`factors.kronecker`, where a schedule of the decay counts each matrix's own updates."""
    rule = kronecker(decay, rank=rank)
    assert rule.overwrite is not None
    overwrite = rule.overwrite

    def update(statistics: LayerFactors, factors: Kronecker, bases: PyTree) -> Kronecker:
        return select(_is_reached(statistics.right), rule.update(statistics, factors, bases), factors)

    def in_place(statistics: LayerFactors, factors: Kronecker, accept: Bool[Array, ""] | None) -> Kronecker:
        reached = _is_reached(statistics.right)
        return overwrite(statistics, factors, reached if accept is None else accept & reached)

    return rule._replace(update=update, overwrite=in_place)


def where_reached(application: Application) -> Application:
    """The application, whose own averages of statistics are of the matrices that a gradient has reached."""
    observe = application.observe
    if observe is None:
        return application

    def observed(state: PyTree, statistics: LayerFactors, basis: PyTree) -> PyTree:
        return select(_is_reached(statistics.right), observe(state, statistics, basis), state)

    return application._replace(observe=observed)


class OfReached(Preconditioner):
    """A preconditioner of `reached_factors`, whose bases start when the first gradient reaches a matrix."""

    @classmethod
    def of(cls, method: Preconditioner) -> "OfReached":
        """The same otherwise."""
        return cls(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})

    def _renewed(
        self,
        step: Step,
        count: Array,
        stacks: dict[str, Array],
        states: dict[str, MatrixState],
        sides: dict[str, LayerFactors],
        actions: dict[str, Array],
    ) -> Any:
        def started(key: str, action: Array) -> Array:
            if key not in sides:
                return action
            first = (states[key].factors.seen[1] == 0) & _is_reached(sides[key].right)
            return jnp.where(first if step.accept is None else first & step.accept, START, action)

        actions = {key: started(key, action) for key, action in actions.items()}
        return super()._renewed(step, count, stacks, states, sides, actions)


def _is_reached(B: Array | LowRank) -> Bool[Array, "*stack"]:
    """Of one matrix, or each of a stack."""
    if isinstance(B, LowRank):
        return jnp.any(B.rows != 0, (-2, -1))
    return jnp.any(linalg.diagonal(B) != 0, -1)
