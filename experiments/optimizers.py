"""The optimizers that the experiments know by name, a row each."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import fisher_optax as fo


class Settings(Protocol):
    """What a row may read of an experiment's configuration."""

    @property
    def weight_decay(self) -> float: ...
    @property
    def refresh(self) -> int: ...  # steps between two renewals of a preconditioner


class CurvatureSettings(Settings, Protocol):
    """What a row with damping reads besides."""

    @property
    def damping(self) -> Any: ...


class Method(NamedTuple):
    """How to build an optimizer for a schedule, what suits a table's default model, and what a step must gather."""

    build: Callable[[optax.Schedule, Any], optax.GradientTransformation]  # of a schedule and `Settings`
    learning_rate: float  # at the peak
    weight_decay: float = 0.1
    damping: float | None = None  # None: the optimizer has none
    statistics: Callable[[], Any] | None = None  # of the layers, for `fo.value_and_grad`; None: gradients are enough
    fisher: str = "empirical"  # "mc": the statistics are of labels drawn from the model
    bases: Callable[[Any, Any], Any] | None = None  # from its state and the parameters: where statistics are taken
    own_head: bool = False  # the output layer must not be the embedding too


def decayed(params: optax.Params) -> optax.Params:
    """Weight decay's mask, nanoGPT's rule: matrices and embeddings decay, norms and biases do not."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def adamw(rate: optax.Schedule, settings: Settings) -> optax.GradientTransformation:
    # nanoGPT's b2 for characters: a step sees few of them, so the second moment averages over more steps.
    return optax.adamw(rate, b2=0.99, weight_decay=settings.weight_decay, mask=decayed)


def with_adamw(
    make: Callable[..., optax.GradientTransformation], *reads: str
) -> Callable[..., optax.GradientTransformation]:
    """An optimizer of matrices, with AdamW's own betas for what it leaves alone: embeddings, norms, perhaps heads.

    ``reads`` are the settings it takes besides weight decay.
    """

    def build(rate: optax.Schedule, settings: Settings, **options: Any) -> optax.GradientTransformation:
        read = {OPTIONS[name]: getattr(settings, name) for name in reads}
        common = {"weight_decay": settings.weight_decay, "mask": decayed, "fallback": adamw(rate, settings)}
        return make(options.pop("learning_rate", rate), **{**common, **read, **options})

    return build


OPTIONS = {"refresh": "precondition_frequency", "damping": "damping"}  # a setting's name in the package
soap = with_adamw(fo.soap, "refresh")
muon = with_adamw(fo.muon)
kfac, ekfac = (with_adamw(make, "refresh", "damping") for make in (fo.kfac, fo.ekfac))


def optax_muon(rate: optax.Schedule, settings: Settings) -> optax.GradientTransformation:
    return optax.contrib.muon(rate, weight_decay=settings.weight_decay, weight_decay_mask=decayed)


def sgd(rate: optax.Schedule, settings: Settings) -> optax.GradientTransformation:
    momentum = optax.trace(decay=0.9, nesterov=True)
    decay = optax.add_decayed_weights(settings.weight_decay, mask=decayed)
    return optax.chain(decay, momentum, optax.scale_by_learning_rate(rate))


with_squares = functools.partial(fo.KroneckerFactors, squares=True)
with_tokens = functools.partial(fo.KroneckerFactors, head_rows=256)
samples_of_64 = functools.partial(fo.LayerSamples, 64)


def as_long_as_adams(make: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """K-FAC or EKFAC with Adam's power of the curvature, -1/2, and steps as long as Adam's, for transformers."""
    momentum = 0.9
    complete = with_adamw(make, "refresh", "damping")

    def build(rate: optax.Schedule, settings: CurvatureSettings) -> optax.GradientTransformation:
        # K-FAC's momentum is a sum, and AdamW's an average: this is the same rate for both.
        return complete(
            rate,
            settings,
            learning_rate=lambda count: (1 - momentum) * rate(count),
            momentum=momentum,
            weight_decay=settings.weight_decay / (1 - momentum),
            exponent=-0.5,
            grafting="adam",
        )

    return build


def kfac_with_head(head: str) -> Method:
    """K-FAC for the GPT, and the softmax's own Fisher for its head."""
    build = as_long_as_adams(functools.partial(fo.kfac, head=head))
    return Method(build, 6e-3, damping=1e-3, statistics=with_tokens, own_head=True)


# For characters and the default GPT, 128 wide: each the best of at least three rates, to which the grids of
# steps_to_target and figure3 in benchmarks/results are close; those of Shampoo, DyKAF and the KL methods are not tuned.
METHODS = {
    "adamw": Method(adamw, 3e-3),
    "soap": Method(soap, 6e-3),
    "muon": Method(muon, 1e-2),
    "shampoo": Method(with_adamw(fo.shampoo, "refresh"), 3e-3),
    "shampoo_half": Method(with_adamw(functools.partial(fo.shampoo, exponent=-0.5), "refresh"), 3e-3),
    "dykaf": Method(with_adamw(fo.dykaf, "refresh"), 6e-3),
    "dykaf_rank1": Method(with_adamw(functools.partial(fo.dykaf, rank1_second_moment=True), "refresh"), 6e-3),
    "kl_soap": Method(with_adamw(fo.kl_soap, "refresh"), 6e-3),
    "kl_shampoo": Method(with_adamw(fo.kl_shampoo, "refresh"), 6e-3),
    "optax_muon": Method(optax_muon, 3e-2),
    "kfac": Method(as_long_as_adams(fo.kfac), 6e-3, damping=1e-3, statistics=fo.KroneckerFactors),
    "ekfac": Method(as_long_as_adams(fo.ekfac), 6e-3, damping=1e-3, statistics=with_squares, bases=fo.eigenbases),
    "kfac_true_head": kfac_with_head("true"),
    "kfac_empirical_head": kfac_with_head("empirical"),
    "kfac_soap": Method(with_adamw(fo.kfac_soap, "refresh"), 1e-2, statistics=fo.KroneckerFactors),
    "frog": Method(with_adamw(fo.frog, "damping"), 6e-3, damping=1e-4, statistics=samples_of_64),
    "kfrog": Method(with_adamw(fo.kfrog, "damping"), 1e-3, damping=1e-2, statistics=samples_of_64),
}


# For images and the default CNN: the best rates of benchmarks/results/curvature_digits.json; Shampoo's is not
# tuned. SGD's decay, a part of its gradient, is the only one that momentum multiplies.
IMAGE_METHODS = {
    "sgd": Method(sgd, 3e-2, weight_decay=5e-4),
    "adamw": Method(adamw, 3e-3, weight_decay=0.05),
    "muon": Method(muon, 3e-3, weight_decay=0.05),
    "soap": Method(soap, 3e-3, weight_decay=0.05),
    "shampoo": Method(with_adamw(fo.shampoo, "refresh"), 9e-3, weight_decay=0.05),
    "kfac": Method(kfac, 3e-3, 0.05, 0.1, fo.KroneckerFactors, "mc"),
    "ekfac": Method(ekfac, 1e-2, 0.05, 0.1, with_squares, "mc", fo.eigenbases),
    "kfac_soap": Method(with_adamw(fo.kfac_soap, "refresh"), 3e-3, 0.05, statistics=fo.KroneckerFactors),
    "frog": Method(with_adamw(fo.frog, "damping"), 3e-3, 0.05, 1e-4, samples_of_64),
    "kfrog": Method(with_adamw(fo.kfrog, "damping"), 3e-4, 0.05, 1e-2, samples_of_64),
}


def find_method(name: str, methods: Mapping[str, Method] = METHODS) -> Method:
    """The row of ``methods`` called ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in methods:
        raise ValueError(f"unknown optimizer {name!r}: choose from {', '.join(methods)}")
    return methods[name]


def scheduled(
    method: Method, settings: Settings, peak: Float[Array, ""] | float, warmup: int, steps: int
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a row: its rate rises over ``warmup`` steps to ``peak``, then falls as a cosine to a tenth."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps, end_value=0.1)
    return optax.with_extra_args_support(method.build(lambda count: peak * shape(count + 1), settings))


LossFn = Callable[[Any, Any], tuple[Any, Any]]  # (params, batch) -> (mean loss, anything else)
GradFn = Callable[[Any, Any, Any, PRNGKeyArray], tuple[tuple[Any, Any], Any, dict[str, Any]]]


def gradients(loss_fn: LossFn, method: Method) -> GradFn:
    """What a training step needs of ``loss_fn`` for ``method``, in one backward pass.

    Args:
        loss_fn: from parameters and a batch, the mean loss over the batch and anything else.
        method: a row; its ``statistics`` say what to gather from the layers besides gradients.

    Returns:
        A function from parameters, the optimizer's state, a batch and a random key to ``(loss, anything else)``, the
        gradients, and the keyword arguments that the update takes besides gradients, state and parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> grad_fn = gradients(lambda params, batch: ((params * batch).sum(), None), METHODS["soap"])
        >>> (loss, _), grads, extra = grad_fn(jnp.ones(2), None, jnp.array([3.0, 4.0]), jax.random.key(0))
        >>> float(loss), grads.tolist(), extra
        (7.0, [3.0, 4.0], {})
    """
    if method.statistics is None:
        plain = jax.value_and_grad(loss_fn, has_aux=True)
        return lambda params, opt_state, batch, key: (*plain(params, batch), {})
    gather = fo.value_and_grad(loss_fn, statistics=method.statistics(), fisher=method.fisher, has_aux=True)

    def grad_fn(params: Any, opt_state: Any, batch: Any, key: PRNGKeyArray) -> Any:
        drawn = key if method.fisher == "mc" else None
        bases = method.bases(opt_state, params) if method.bases else None
        value, grads, statistics = gather(params, batch, fisher_key=drawn, bases=bases)
        return value, grads, {"statistics": statistics}

    return grad_fn
