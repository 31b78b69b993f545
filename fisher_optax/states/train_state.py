"""Flax's TrainState with statistics: an extra for those who train with Flax."""

import optax
from flax import struct
from flax.training import train_state
from jaxtyping import PyTree


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose ``apply_gradients`` hands ``statistics`` to the optimizer.

    Needs Flax. Everything else is Flax's: ``create(apply_fn=, params=, tx=)``, ``step``, ``opt_state``, ``replace``.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> loss = lambda p, x: fo.losses.gaussian(x @ p["w"], jnp.zeros((len(x), 2)))
      >>> state = fo.TrainState.create(apply_fn=loss, params={"w": jnp.ones((3, 2))}, tx=fo.kfac(0.1))
      >>> value, grads, stats = fo.value_and_grad(loss)(state.params, jnp.ones((4, 3)))
      >>> int(state.apply_gradients(grads=grads, statistics=stats).step)
      1
    """

    params: PyTree = struct.field(pytree_node=True)  # of any structure

    def apply_gradients(self, *, grads: PyTree, statistics: PyTree = None, **kwargs: PyTree) -> "TrainState":
        """The state after one step; ``statistics=None`` means no new curvature. Other arguments replace fields."""
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, statistics=statistics)  # type: ignore[call-arg]
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
