"""The Fisher matrices of a model and their relatives, as operators.

With logits z_i(θ) of position i, Jacobians J_i = ∂z_i/∂θ and shares w_i in the loss, the first three are sums over
positions. A share is the position's weight over the sum of all weights, times the factor of that mean in the loss:

    true        Σ w_i J_iᵀ E_y[s sᵀ] J_i        y from the model, s = ∂(-log p(y | z_i))/∂z_i; an exact sum over labels
    mc          the same with n_samples draws of y
    empirical   Σ w_i J_iᵀ s_i s_iᵀ J_i         y the data's labels
    ggn         Σ J_iᵀ (∂²L/∂z_i ∂z_j) J_j      L the loss as written; the true Fisher, but of `fo.losses.normal`
    hessian     ∂²L/∂θ²

The true Fisher is the curvature of a model's distribution and needs no labels; the empirical one shares its form near a
good fit, and is no curvature elsewhere. Sources: Martens 2020 (arXiv 1412.1193), Kunstner et al. 2019 (arXiv
1905.12558).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..._arguments import hashable
from ..._xla import of_each
from ...capture.distributions import data_score
from ...capture.kinds.sums import check_counts
from ...capture.losses import own_key, passes
from ...capture.outputs import Output, is_sum_of_losses, outputs
from ...capture.program.jaxprs import varying
from ...matrices.floats import on_whole, without_rest
from .operator import Operator, RowRule, Rule

FISHERS = ("true", "mc", "empirical")
KINDS = (*FISHERS, "ggn", "hessian")
NO_LOSS = (
    "the Fisher is that of a distribution: compute the loss by fo.losses.softmax_cross_entropy, sigmoid_cross_entropy "
    "or gaussian; none was found in loss_fn."
)


def operator(
    loss_fn: Callable[..., PyTree],
    params: PyTree,
    *batch: PyTree,
    fisher: str = "true",
    n_samples: int = 1,
    temperature: float = 1.0,
    key: PRNGKeyArray | None = None,
) -> Operator:
    """The Fisher of a model, or a relative of it, as a matrix that acts on trees (see the top of this file).

    A product costs about two gradients, of ``"true"`` and ``"empirical"`` alike. `Operator.rows` and `Operator.dense`
    are for small models and batches.

    Args:
      loss_fn: ``loss_fn(params, *batch)`` -> the mean loss, by one or more of `fo.losses` outside of loops (for
        ``"hessian"``, any scalar), or a sum of multiples of them: their Fishers add up, each times its factor. What
        else is added has no part in a Fisher.
      params, *batch: what it is called with. Batch and key become part of the operator: it is of one fixed matrix. So
        do integers, booleans and random states among the parameters; where they are, a tree that it is applied to may
        have None, or anything, which passes through.
      fisher: "true", "mc", "empirical", "ggn" or "hessian".
      n_samples: labels drawn a position, for "mc".
      temperature: labels are drawn from (or, for "true", weighted by) the model at this temperature: logits divided by
        it, of a Gaussian the variance times it. Above 1 flat predictions count for more; only 1 is the Fisher.
      key: a `jax.random.key`, for "mc".

    Raises:
      ValueError, TypeError: for an unknown word, a missing key, labels that are no class, weights that are all 0 or
        negative, a loss that is not of `fo.losses`, and but for "ggn" one that is no sum of them, or has a negative
        factor. Of traced arrays numbers are not looked at, and a factor is the derivative of the loss.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> loss = lambda W, x, y: fo.losses.gaussian(x @ W, y)
      >>> F = fo.fisher.operator(loss, jnp.zeros((3, 2)), jnp.ones((4, 3)), jnp.ones((4, 2)))
      >>> print(F @ jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
      [[1. 0.]
       [1. 0.]
       [1. 0.]]
    """
    if fisher not in KINDS:
        raise ValueError(f"fisher must be one of {', '.join(map(repr, KINDS))}; got {fisher!r}.")
    if (fisher == "mc") != (key is not None):
        what = "pass key=jax.random.key(0)" if fisher == "mc" else f"key is for 'mc' only; this is {fisher!r}"
        raise ValueError(f"fisher='mc' draws labels from the model: {what}.")
    check_counts("operator", n_samples=n_samples)
    check_temperature(temperature)
    if temperature != 1 and fisher not in ("true", "mc"):
        raise ValueError(f"temperature is of labels from the model, for 'true' and 'mc'; this is {fisher!r}.")
    floats, whole = without_rest(params)
    loss_fn, params = hashable(on_whole(loss_fn, params, whole)), floats
    batch = jax.tree.map(jnp.asarray, batch)
    if fisher == "hessian":
        return Operator.on("hessian", _Hessian(loss_fn), (params, batch), params)
    check_outputs(loss_fn, params, batch, fisher)
    if fisher == "ggn":
        return Operator.on("ggn", _GaussNewton(loss_fn), (params, batch), params)
    rule = _Fisher(loss_fn, fisher, n_samples, float(temperature))
    return Operator.on(f"{fisher} Fisher", rule, (params, batch, key), params)


def check_outputs(loss_fn: Callable[..., PyTree], params: PyTree, batch: PyTree, fisher: str) -> None:
    """A ValueError for labels that are no class, weights that are all 0 or negative, and as `check_factors`; not of
    traced batches.
    """
    found = jax.eval_shape(lambda p, b: outputs(loss_fn, p, *b)[0], params, batch)
    if not found:
        raise ValueError(NO_LOSS)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((params, batch))):
        return
    for out, arrays in zip(found, _weights_and_labels(loss_fn, params, batch), strict=True):
        weights, labels, classes = *map(np.asarray, arrays), out.logits.shape[-1]
        if not np.any(weights > 0) or np.any(weights < 0):
            what = "every weight in the loss is 0" if np.all(weights == 0) else "weights in the loss are negative"
            raise ValueError(f"{what}: the batch has no example to take a Fisher of.")
        wrong = labels[(weights > 0) & ((labels < 0) | (labels >= classes))] if labels.ndim == weights.ndim else []
        if len(wrong):
            raise ValueError(
                f"labels are classes 0 to {classes - 1}; got {wrong[0]}. Give padding the weight 0: "
                "fo.losses.softmax_cross_entropy(logits, labels, weights=labels >= 0)."
            )
    if fisher != "ggn":
        check_factors(loss_fn, params, batch)


def check_factors(loss_fn: Callable[..., PyTree], params: PyTree, batch: PyTree) -> None:
    """A ValueError for a loss that is no sum of losses of `fo.losses` times numbers of at least 0."""
    factors, is_sum = _factors(loss_fn, params, batch)
    advice = "fo.fisher.operator(..., fisher='ggn') is the curvature of the loss as written."
    for name, factor in factors.items():
        if np.any(np.asarray(factor) < 0):
            raise ValueError(
                f"{name} is in loss_fn with the factor {np.min(factor):.3g}, and no share in a Fisher is negative: "
                f"leave it out. {advice}"
            )
    if not is_sum:
        raise ValueError(
            "loss_fn is no sum of multiples of its fo.losses, as a * l1 + b * l2 is: which share each has in a Fisher "
            f"is unclear. Return such a sum. {advice}"
        )


@functools.partial(jax.jit, static_argnums=0)
def _factors(loss_fn: Callable[..., PyTree], params: PyTree, batch: PyTree) -> tuple[dict[str, Array], Array]:
    """By name and number; the compiler drops the model."""
    found = outputs(loss_fn, params, *batch)[0]
    factors = {
        f"number {i} of fo.losses, {o.name}," if len(found) > 1 else f"fo.losses.{o.name}": o.factor
        for i, o in enumerate(found)
    }
    return factors, is_sum_of_losses(loss_fn, params, *batch)


@functools.partial(jax.jit, static_argnums=0)
def _weights_and_labels(loss_fn: Callable[..., PyTree], params: PyTree, batch: PyTree) -> list[tuple[Array, Array]]:
    """Of each loss; the compiler drops the logits, and so the model."""
    return [(o.weights, o.labels) for o in outputs(loss_fn, params, *batch)[0]]


def check_temperature(temperature: object) -> None:
    """A ValueError unless it is a number above 0."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a number above 0; got {temperature!r}.")


@dataclasses.dataclass(frozen=True)
class _Hessian(Rule):
    loss_fn: Callable[..., PyTree]

    def product(self, data: PyTree, v: PyTree) -> PyTree:
        params, batch = data
        return jax.jvp(jax.grad(lambda p: self.loss_fn(p, *batch)), (params,), (v,))[1]


@dataclasses.dataclass(frozen=True)
class _GaussNewton(Rule):
    loss_fn: Callable[..., PyTree]

    def product(self, data: PyTree, v: PyTree) -> PyTree:
        params, batch = data
        logits = lambda p: [o.logits for o in outputs(self.loss_fn, p, *batch)[0]]  # noqa: E731
        loss = lambda shifts: outputs(self.loss_fn, params, *batch, shifts=shifts)[1]  # noqa: E731
        z, Jv = jax.jvp(logits, (params,), (v,))
        zero = jax.tree.map(jnp.zeros_like, z)
        HJv = jax.jvp(jax.grad(loss), (zero,), (Jv,))[1]
        return jax.vjp(logits, params)[1](HJv)[0]


@dataclasses.dataclass(frozen=True)
class _Fisher(RowRule):
    loss_fn: Callable[..., PyTree]
    fisher: str
    n_samples: int
    temperature: float

    def product(self, data: PyTree, v: PyTree) -> PyTree:
        params, batch, key = data
        logits, found = self._logits(params, batch)
        _, Jv = jax.jvp(logits, (params,), (v,))
        pull = jax.vjp(logits, params)[1]
        return pull([self._middle(o, i, key, u) for i, (o, u) in enumerate(zip(found, Jv, strict=True))])[0]

    def rows(self, data: PyTree) -> Array:
        """One for each position and label."""
        params, batch, key = data
        logits, found = self._logits(params, batch)
        if axes := varying(*(o.logits for o in found)) - varying(*jax.tree.leaves(params)):
            raise ValueError(
                f"rows are gradients of one position, and JAX would add them up over the devices along {sorted(axes)}: "
                "take them of each device's own parameters, by jax.lax.pcast(params, ..., to='varying'), and loss."
            )
        pull = jax.vjp(logits, params)[1]
        rows = []
        for i, out in enumerate(found):
            scores = self._scores(out, i, key)  # (K, *positions, C)
            K, C = len(scores), scores.shape[-1]
            P = math.prod(scores.shape[1:-1])

            def row(place: Array, i: int = i, scores: Array = scores, K: int = K, P: int = P, C: int = C) -> Array:
                cotangent = jnp.zeros((P, C), scores.dtype).at[place % P].set(scores.reshape(K * P, C)[place])
                cts = [jnp.zeros_like(o.logits) for o in found]
                cts[i] = cotangent.reshape(found[i].logits.shape)
                g = jax.tree.leaves(pull(cts)[0])
                return jnp.concatenate([x.ravel().astype(jnp.result_type(*g)) for x in g])

            rows.append(of_each(row, jnp.arange(K * P), batch_size=32))
        return jnp.concatenate(rows)

    def _logits(self, params: PyTree, batch: PyTree) -> tuple[Callable[[PyTree], list[Array]], list[Output]]:
        return lambda p: [o.logits for o in outputs(self.loss_fn, p, *batch)[0]], outputs(self.loss_fn, params, *batch)[
            0
        ]

    def _middle(self, out: Output, number: int, key: PRNGKeyArray | None, u: Array) -> Array:
        """The mean of ``s sᵀ u`` over labels, times the position's share."""
        share = out.shares[..., None].astype(u.dtype)
        if self.fisher == "true":
            root = lambda ct: out.distribution.root(out.logits, ct, self.temperature)  # noqa: E731
            (half,) = jax.linear_transpose(root, out.logits)(u)
            return share * root(half)
        scores = self._scores(out, number, key, shares=False)
        return share * jnp.sum(scores * jnp.sum(scores * u, -1, keepdims=True), 0)

    def _scores(self, out: Output, number: int, key: PRNGKeyArray | None, shares: bool = True) -> Array:
        """``(K, *positions, C)``: vectors s whose ``s sᵀ`` add up to the middle, with or without the shares."""
        scores = label_scores(out, self.fisher, self.n_samples, self.temperature, number, key)
        return scores * jnp.sqrt(out.shares)[..., None].astype(scores.dtype) if shares else scores


def label_scores(
    out: Output, fisher: str, n_samples: int, temperature: float, number: int, key: PRNGKeyArray | None
) -> Array:
    """``(K, *positions, C)``: gradients at the logits whose outer products add up to their Fisher of that kind."""
    count = passes(fisher, n_samples, out.logits)
    return jax.vmap(lambda k: label_score(out, fisher, n_samples, temperature, number, key, k))(jnp.arange(count))


def label_score(
    out: Output,
    fisher: str,
    n_samples: int,
    temperature: float,
    number: int,
    key: PRNGKeyArray | None,
    k: Array | int,
) -> Array:
    """``(*positions, C)``, number k of them."""
    p, z = out.distribution, out.logits
    if fisher == "empirical":
        return data_score(out.name, z, out.labels)
    if fisher == "true":
        return p.root(z, jax.nn.one_hot(k, z.shape[-1], dtype=z.dtype), temperature)
    assert key is not None
    drawn = jax.random.split(own_key(jax.random.fold_in(key, number), z), n_samples)[k]
    return p.score(z, p.sample(drawn, z, temperature)) / n_samples**0.5
