"""No method warns of a model of the examples or the experiments: what goes to its fallback there is meant to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import examples.gpt
import examples.kfac_cnn
import examples.kfac_nnx
import examples.merge
import examples.muon_nnx
import examples.prune
import examples.soap_mlp
import fisher_optax as fo
from experiments.models.cnn import CNN
from experiments.models.gpt import GPT
from experiments.models.resnet import ResNet

IMAGES, DIGITS, PIXELS = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 8, 8, 1)), jnp.zeros((2, 64))
TOKENS = jnp.zeros((2, 4), jnp.int32)


class OfNnx:
    """A model of Flax nnx, with the two methods of one of linen."""

    def __init__(self, kind: Any):
        self.kind = kind

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        return {"params": nnx.split(self.kind(nnx.Rngs(0)), nnx.Param)[1]}

    def apply(self, variables: Any, x: jax.Array) -> jax.Array:
        graph, _ = nnx.split(nnx.eval_shape(lambda: self.kind(nnx.Rngs(0))), nnx.Param)
        return nnx.merge(graph, variables["params"])(x)


class PlainMLP:
    """The network of `examples/soap_mlp.py`, likewise."""

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        return {"params": examples.soap_mlp.init(key)}

    def apply(self, variables: Any, x: jax.Array) -> jax.Array:
        return examples.soap_mlp.apply(variables["params"], x)


MODELS: dict[str, tuple[Any, Any]] = {
    "cnn": (CNN(classes=5), IMAGES),
    "resnet": (ResNet(classes=5, blocks=(1, 1), width=4), IMAGES),
    "gpt": (GPT(vocabulary=11, context=4, layers=2, width=8, heads=2), TOKENS),
    "gpt with biases and a head": (
        GPT(vocabulary=11, context=4, layers=2, width=8, heads=2, bias=True, tied=False),
        TOKENS,
    ),
    "gpt in bfloat16": (
        GPT(vocabulary=11, context=4, layers=2, width=8, heads=2, dtype=jnp.dtype("bfloat16")),
        TOKENS,
    ),
    "example: gpt": (examples.gpt.GPT(vocabulary=11, context=4, layers=2, width=8, heads=2), TOKENS),
    "example: kfac_cnn": (examples.kfac_cnn.model, DIGITS),
    "example: kfac_nnx": (OfNnx(examples.kfac_nnx.MLP), PIXELS),
    "example: merge": (examples.merge.model, DIGITS),
    "example: muon_nnx": (OfNnx(examples.muon_nnx.Transformer), DIGITS[..., 0]),
    "example: prune": (examples.prune.model, PIXELS),
    "example: soap_mlp": (PlainMLP(), PIXELS),
}
METHODS: dict[str, Any] = {
    "muon": fo.muon,
    "soap": fo.soap,
    "shampoo": fo.shampoo,
    "dykaf": fo.dykaf,
    "kl_soap": fo.kl_soap,
    "kl_shampoo": fo.kl_shampoo,
    "normuon": lambda rate: fo.scale_by_normuon(),
    "graft": lambda rate: fo.graft(fo.scale_by_muon(), "adam"),
    "movement": lambda rate: fo.compression.movement(optax.sgd(rate), 0.5, score_learning_rate=1.0),
    "gradual": lambda rate: fo.compression.gradual(optax.sgd(rate), 0.5),
}
# With what each is given: on statistics too, of which none may be for what it leaves to its fallback by the rules.
CAPTURED: dict[str, tuple[Any, Any]] = {
    "kfac": (fo.kfac, fo.KroneckerFactors()),
    "kfac_soap": (fo.kfac_soap, fo.KroneckerFactors()),
    "frog": (fo.frog, fo.LayerSamples(4)),
    "kfrog": (fo.kfrog, fo.LayerSamples(4)),
}


def variables_of(model: str) -> Any:
    module, x = MODELS[model]
    return jax.eval_shape(module.init, jax.random.key(0), x)


@pytest.mark.parametrize("axes", [None, "strict"], ids=["rules", "strict"])
@pytest.mark.parametrize("model", MODELS)
def test_no_init_says_a_word(model: str, axes: str | None) -> None:
    params = variables_of(model)["params"]
    makers = METHODS | {name: make for name, (make, _) in CAPTURED.items()} | {"ekfac": fo.ekfac}
    for name, make in makers.items():
        if axes is None:
            jax.eval_shape(make(1e-3).init, params)
        elif name not in ("normuon", "graft", "movement", "gradual"):
            jax.eval_shape(make(1e-3, axes=axes).init, params)


@functools.cache
def types_of_a_step(model: str, kind: Any) -> tuple[Any, Any, Any]:
    """Of parameters, gradients and statistics, whose capture is silent as well."""
    module, x = MODELS[model]
    variables = variables_of(model)
    labels = jnp.zeros(x.shape if x is TOKENS else x.shape[:1], jnp.int32)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        logits = module.apply(variables_like(variables) | {"params": params}, x)
        return fo.losses.softmax_cross_entropy(logits, labels)

    fo.infer_axes(loss, variables["params"], x, statistics=kind)
    return variables["params"], *jax.eval_shape(fo.value_and_grad(loss, kind), variables["params"], x)[1:]


@pytest.mark.parametrize("method", CAPTURED)
@pytest.mark.parametrize("model", MODELS)
def test_no_step_with_statistics_says_a_word(model: str, method: str) -> None:
    make, kind = CAPTURED[method]
    tx = make(1e-3)

    def step(params: Any, grads: Any, stats: Any) -> Any:
        return tx.update(grads, tx.init(params), params, statistics=stats)

    jax.eval_shape(step, *types_of_a_step(model, kind))


def variables_like(variables: Any) -> Any:
    """What is no parameter, as zeros."""
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
