"""SOAP on eight devices: parameters and batch shared out, the optimizer's matrices and state too.

    pip install fisher_optax && python sharded.py

prints

    parameters/bias            (128,)          P('data',)
    parameters/kernel          (128, 128)      P('data',)
    128x128/factors/left       (8, 128, 128)   P('data',)
    128x128/factors/right      (8, 128, 128)   P('data',)
    128x128/basis/left         (8, 128, 128)   P('data',)
    128x128/basis/right        (8, 128, 128)   P('data',)
    128x128/application/count  (8,)            P('data',)
    128x128/application/mu     (8, 128, 128)   P('data',)
    128x128/application/nu     (8, 128, 128)   P('data',)
    parameters: 0.53 MB, of which the first device has 0.07 MB
    SOAP's state: 3.15 MB, of which the first device has 0.39 MB
    loss after 30 steps: 1.0735 on one device, 1.0737 on 8

On a machine with eight accelerators, leave out the two lines that set ``os.environ``.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # eight devices of one CPU, before jax starts
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_optax as fo

WIDTH, LAYERS, BATCH, STEPS = 128, 8, 512, 30


def init(key):
    kernels = [jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in jax.random.split(key, LAYERS)]
    return {f"layer_{i}": {"kernel": kernel, "bias": jnp.zeros(WIDTH)} for i, kernel in enumerate(kernels)}


def loss_fn(params, x, y):
    for layer in params.values():
        x = x + jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - y) ** 2)


def train(tx, params, x, y):
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(STEPS):
        params, state, loss = step(params, state)
    return params, state, loss


def megabytes(tree):
    """Of the whole tree, and of what the first device has of it."""
    leaves = jax.tree.leaves(tree)
    return sum(x.nbytes for x in leaves) / 1e6, sum(x.addressable_shards[0].data.nbytes for x in leaves) / 1e6


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    params, x = init(keys[0]), jax.random.normal(keys[1], (BATCH, WIDTH))
    y = jnp.sin(x @ jax.random.normal(keys[2], (WIDTH, WIDTH)) / WIDTH**0.5)
    _, _, alone = train(fo.soap(3e-3), params, x, y)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        # Each device has an eighth of every parameter, and an eighth of the batch.
        params, x, y = jax.device_put((params, x, y), NamedSharding(mesh, P("data")))
        # Each matrix is preconditioned on one device, which keeps its factors, basis and moments.
        tx = fo.soap(3e-3, storage=fo.Storage(mesh_axis="data"))
        params, state, loss = train(tx, params, x, y)
    for path, leaf in jax.tree.leaves_with_path({"parameters": params["layer_0"], "state": state}):
        name = jax.tree_util.keystr(path[-3:], simple=True, separator="/")
        if name.startswith(("parameters", f"{WIDTH}x{WIDTH}")):  # of the state, what it has for the matrices
            print(f"{name:26} {leaf.shape!s:15} {leaf.sharding.spec}")
    for name, tree in {"parameters": params, "SOAP's state": state}.items():
        whole, first = megabytes(tree)
        print(f"{name}: {whole:.2f} MB, of which the first device has {first:.2f} MB")
    print(f"loss after {STEPS} steps: {alone:.4f} on one device, {loss:.4f} on {mesh.size}")


if __name__ == "__main__":
    main()
