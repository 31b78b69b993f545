"""Other JAX optimizers of the same families, as `pip install -e '.[peers]'` installs them today.

Some were released for an older JAX or Optax and do not run on these. What they miss is put back into their own view of
JAX, never a line of their algorithm; `NOTES` says what, for the results. kfac-jax is in `experiments.kfac_jax`.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from experiments import kfac_jax, optimizers
from experiments.kfac_jax import silenced


class Peer(NamedTuple):
    """An optimizer of matrices in somebody else's package."""

    label: str
    build: Callable[..., optax.GradientTransformation]  # rate, weight decay, steps between refreshes or None: its own
    learning_rate: float  # a first guess for the GPT of `experiments.train_gpt`
    note: str = ""  # what it was run with


class With:
    """A module with names that it has lost."""

    def __init__(self, module: Any, **names: Any):
        vars(self).update(names, module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def psgd(load: Callable[[], Any]) -> Callable[..., optax.GradientTransformation]:
    """PSGD Kron. Its own schedule renews the factors at every one of the first 500 steps, then ever more rarely."""

    def build(rate: Any, weight_decay: float, every: int | None) -> optax.GradientTransformation:
        given = {} if every is None else {"preconditioner_update_probability": lambda t: 1.0 * (t % every == 0)}
        return load().kron(rate, weight_decay=weight_decay, **given)

    return build


def load_psgd_jax() -> Any:
    import optax._src

    with mock.patch.multiple(optax._src, create=True, clipping=None):
        return importlib.import_module("psgd_jax.kron")


def load_optax_shampoo() -> Any:
    shampoo: Any = importlib.import_module("optax_shampoo.distributed_shampoo")
    tree = jax.tree
    shampoo.jax = With(jax, tree_map=tree.map, tree_flatten=tree.flatten, tree_unflatten=tree.unflatten)
    shampoo.lax = With(jax.lax, while_loop=promoting_while_loop)
    return shampoo


def promoting_while_loop(test: Callable[..., Any], body: Callable[..., Any], start: Any) -> Any:
    """`jax.lax.while_loop` when it still gave ``start`` the types of what ``body`` returns."""
    after = jax.eval_shape(body, start)
    return jax.lax.while_loop(test, body, jax.tree.map(lambda x, out: jnp.asarray(x, out.dtype), start, after))


def optax_shampoo(rate: Any, weight_decay: float, every: int | None) -> optax.GradientTransformation:
    shampoo = load_optax_shampoo()
    return shampoo.distributed_shampoo(
        rate,
        block_size=128,
        preconditioning_compute_steps=10 if every is None else every,
        graft_type=shampoo.GraftingType.RMSPROP,  # Adam's step, nearly; its default is SGD's
        weight_decay=weight_decay,
        decoupled_weight_decay=True,
    )


def prism(rate: Any, weight_decay: float, every: int | None) -> optax.GradientTransformation:
    return importlib.import_module("rollfast").prism(rate, weight_decay=weight_decay)


PEERS: Mapping[str, Peer] = {
    "psgd_jax": Peer(
        "PSGD Kron (psgd-jax)",
        psgd(load_psgd_jax),
        1e-3,
        "as released (0.2.9) it does not import with optax 0.2.8, which has no `_src.clipping`; "
        "run with an empty one put back, since nothing of it is used",
    ),
    "psgdax": Peer("PSGD Kron (psgdax)", psgd(lambda: importlib.import_module("psgdax")), 1e-3),
    "prism": Peer("PRISM (rollfast)", prism, 1e-2),
    "optax_shampoo": Peer(
        "Distributed Shampoo (optax-shampoo)",
        optax_shampoo,
        3e-3,
        "as released (0.0.6) it stops on jax 0.10: run with `jax.tree_map`, `tree_flatten` and `tree_unflatten` put "
        "back, and a `lax.while_loop` that promotes what it starts with",
    ),
}
NOTES = {name: peer.note for name, peer in PEERS.items()} | {"kfac_jax": kfac_jax.NOTE}
# Of the same families, and not run.
ABSENT = {
    "soap_jax": "soap_jax is not installed; it is not on PyPI, only on GitHub (haydn-jones/SOAP_JAX)",
    "distributed_kron": "it can wait for ever on a CPU, where jaxlib's batched factorisations wait for each other",
}


def make(name: str, rate: Any, weight_decay: float, every: int | None = None) -> optax.GradientTransformation:
    """A peer for a tree of matrices, silent while it is traced.

    Raises:
        ImportError: it is not installed, or does not import.
    """
    with silenced():
        tx = PEERS[name].build(rate, weight_decay, every)

    def init(params: Any) -> Any:
        with silenced():
            return tx.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with silenced():
            return tx.update(updates, state, params)

    return optax.GradientTransformation(init, update)


def hidden(params: Any) -> Any:
    """True for the kernels, which the matrix methods take; embeddings, scales and biases are left to Adam."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def on_hidden(tx: optax.GradientTransformation, rest: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` on the hidden kernels, ``rest`` on embeddings and norms: what our own methods do by themselves."""
    return optax.partition({True: tx, False: rest}, hidden)


def absence(name: str) -> str:
    """Why a peer cannot be run here; nothing if it can."""
    try:
        kfac_jax.load_kfac_jax() if name == "kfac_jax" else make(name, 1e-3, 0.0)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever an import of somebody else's may raise
        return f"does not import: {type(error).__name__}: {error}"
    return ""


def methods() -> tuple[dict[str, optimizers.Method], dict[str, str]]:
    """The peers that can be run here, as rows for `optimizers.METHODS`, as released; and why the others cannot."""

    def row(name: str) -> optimizers.Method:
        def build(rate: optax.Schedule, settings: optimizers.Settings) -> optax.GradientTransformation:
            return on_hidden(make(name, rate, settings.weight_decay), optimizers.adamw(rate, settings))

        return optimizers.Method(build, PEERS[name].learning_rate)

    absent = ABSENT | {name: reason for name in PEERS if (reason := absence(name))}
    return {name: row(name) for name in PEERS if name not in absent}, absent
