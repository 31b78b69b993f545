"""kfac-jax's whole step, for `benchmarks.capture_cost`: where it is installed and runs.

Empirical statistics every step and inverses every ten, as in the rows it stands beside. It owns its jit, so no flops or
memory can be read from it; its loss is the model's, computed once more under kfac-jax's own registration.
"""

from typing import Any

import jax

from benchmarks.step_time import PERIOD, RATE

DAMPING = 1e-3  # that of fo.kfac


class KfacJax:
    """kfac-jax on a model of `benchmarks.capture_cost`, with the parameters and the state that it has reached."""

    refreshes = True

    def __init__(self, model: Any, batch: Any):
        import kfac_jax  # pyright: ignore[reportMissingImports]

        registers = {
            "softmax_cross_entropy": kfac_jax.register_softmax_cross_entropy_loss,
            "sigmoid_cross_entropy": kfac_jax.register_multi_bernoulli_predictive_distribution,
        }
        register = registers[model.loss.__name__]

        def loss(params: Any, batch: Any) -> Any:
            logits = model.logits(params, batch[0])
            register(logits, batch[1])
            return model.loss(logits, batch[1])

        self.tx = kfac_jax.Optimizer(
            jax.value_and_grad(loss),
            l2_reg=0.0,
            estimation_mode="fisher_empirical",
            inverse_update_period=PERIOD,
            curvature_ema=0.95,
            num_burnin_steps=0,
        )
        self.params = jax.jit(model.init)(jax.random.key(0))
        self.state = self.tx.init(self.params, jax.random.PRNGKey(0), batch[:2])
        self(batch)  # compiles, and fails here if at all

    def __call__(self, batch: Any) -> Any:
        self.params, self.state, seen = self.tx.step(
            self.params,
            self.state,
            jax.random.PRNGKey(0),
            batch=batch[:2],
            learning_rate=RATE,
            momentum=0.9,
            damping=DAMPING,
        )
        return self.params, seen["loss"]

    def size(self) -> dict[str, Any]:
        """What can be said of it beside its times: nothing."""
        return {}
