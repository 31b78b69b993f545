"""One contract for refusing a step, which every stage of an optimizer here keeps.

A transformation that is `Freezable` takes ``update(updates, state, params, *, accept=None, **extra)``. Where
``accept``, a boolean of the program, is false, its new state is its old one; its updates are then thrown away, by
whoever refused the step. None accepts. A stage selects between the two states where it makes the new one, in one pass
over both: a conditional around all of it would keep two copies of its state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._xla import branch, by_platform, select


class Freezable(optax.GradientTransformationExtraArgs):
    """A transformation whose `update` takes ``accept``: see the top of this file."""


def freezable(tx: optax.GradientTransformation) -> Freezable:
    """``tx`` if it is `Freezable`; else ``tx`` and a selection of its state, on a CPU in a conditional where that is
    large (`PLATFORMS`).
    """
    if isinstance(tx, Freezable):
        return tx
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, *, accept: Any = None, **extra: Any) -> tuple[Any, Any]:
        def step(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
            return inner.update(updates, state, params, **extra)

        def skip(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(step, updates, state, params)[0]), state

        def either(conditional: bool, accept: Any, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
            if conditional:
                return branch(accept, step, skip, updates, state, params)
            new, after = step(updates, state, params)
            return new, select(accept, after, state)

        if accept is None:
            return step(updates, state, params)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        large = lambda platform: platform.copied is not None and size > platform.copied  # noqa: E731
        return by_platform(either, large, accept, updates, state, params)

    return Freezable(inner.init, update)


def chain(*stages: optax.GradientTransformation) -> Freezable:
    """`optax.chain` of stages, each made `freezable`."""
    return Freezable(*optax.chain(*map(freezable, stages)))


def counted(accept: Any, count: Any) -> Any:
    """One call more, if it is accepted."""
    return count + (1 if accept is None else accept.astype(count.dtype))
