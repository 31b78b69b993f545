"""The largest eigenvalues of a network's Fisher before, during and after training, as a picture.

    pip install 'fisher_optax[plots]' scikit-learn && python fisher_spectrum.py

prints

    step    0: loss 2.4024, largest eigenvalue 2.610, the first 9 of 2410 hold 86% of the trace
    step   10: loss 1.2874, largest eigenvalue 1.929, the first 9 of 2410 hold 68% of the trace
    step  100: loss 0.0699, largest eigenvalue 1.113, the first 9 of 2410 hold 61% of the trace
    step 1000: loss 0.0010, largest eigenvalue 0.079, the first 9 of 2410 hold 59% of the trace

and the hundred largest eigenvalues at each of these steps in ``fisher_spectrum.png``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import fisher_optax as fo

STEPS, LARGEST = (0, 10, 100, 1000), 100  # when to look, and at how many eigenvalues


def init(key):
    keys = jax.random.split(key)
    return {
        "hidden": {"kernel": jax.random.normal(keys[0], (64, 32)) / 8, "bias": jnp.zeros(32)},
        "head": {"kernel": jax.random.normal(keys[1], (32, 10)) / 32**0.5, "bias": jnp.zeros(10)},
    }


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return fo.losses.softmax_cross_entropy(hidden @ params["head"]["kernel"] + params["head"]["bias"], y)


def main():
    x, y = load_digits(return_X_y=True)
    x = jnp.asarray(x / 16, jnp.float32)
    params, tx = init(jax.random.key(0)), optax.adam(1e-2)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for count in range(max(STEPS) + 1):
        if count in STEPS:
            F = fo.fisher.operator(loss_fn, params, x, y)  # the true one: of the model's labels, not the data's
            found = fo.fisher.spectrum(F, LARGEST)
            axes.semilogy(np.arange(1, LARGEST + 1), found.eigenvalues, label=f"after {count} steps")
            share = found.eigenvalues[:9].sum() / fo.fisher.density(F).trace
            print(
                f"step {count:4}: loss {loss_fn(params, x, y):.4f}, largest eigenvalue {found.eigenvalues[0]:.3f}, "
                f"the first 9 of {F.size} hold {share:.0%} of the trace"
            )
        params, state = step(params, state)
    axes.set(xlabel="rank", ylabel="eigenvalue of the Fisher", title="The Fisher of a network for ten classes")
    axes.axvline(9.5, color="gray", linestyle=":", label="one less than there are classes")
    axes.legend()
    figure.savefig("fisher_spectrum.png", dpi=150)


if __name__ == "__main__":
    main()
