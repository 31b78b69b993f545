"""Weights, distributions and ways to put a loss together, with the Fisher of each by enumeration."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fisher_optax as fo
from tests.reference.curvature import output_fisher

EXAMPLES, TOKENS, D, H = 5, 3, 3, 4
OUTPUTS = {
    "softmax_cross_entropy": 3,
    "sigmoid_cross_entropy": 2,
    "gaussian": 2,
    "one yes or no": 1,
    "one number": 1,
    "normal": 4,  # two means and the logarithms of their variances
}
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(EXAMPLES, TOKENS, D)), rng.integers(0, 3, size=(EXAMPLES, TOKENS))
MASK = rng.random((EXAMPLES, TOKENS)) < 0.6
WEIGHTS: dict[str, Any] = {
    "none": None,
    "booleans": MASK,
    "zeros and ones": MASK * 1.0,
    "of classes": np.array([1.0, 5.0, 0.2])[Y],
    "of tokens": np.where(np.arange(TOKENS) < 1, 0.1, 1.0) * np.ones((EXAMPLES, 1)),
    "fractions": np.where(MASK, rng.uniform(0.1, 3, size=MASK.shape), 0),
    "of examples": np.array([0.5, 2.0, 0.0, 1.0, 3.0]),
    "whole numbers": rng.integers(0, 3, size=MASK.shape),
}


class Term(NamedTuple):
    """``factor`` times the mean loss of some examples."""

    factor: float
    name: str
    x: Any
    y: Any
    w: Any


def loss_name(name: str) -> str:
    return {"one yes or no": "sigmoid_cross_entropy", "one number": "gaussian"}.get(name, name)


def labels_of(name: str) -> np.ndarray:
    C = OUTPUTS[name]
    C = C // 2 if name == "normal" else C
    return Y if name.startswith("soft") else np.random.default_rng(C).integers(0, 2, size=(EXAMPLES, TOKENS, C)) * 1.0


def params_of(name: str) -> Any:
    r = np.random.default_rng(7)
    return {"in": jnp.asarray(r.normal(size=(D, H))), "out": jnp.asarray(r.normal(size=(H, OUTPUTS[name])))}


def net(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["in"]) @ p["out"]


def of_term(p: Any, term: Term) -> Any:
    z = net(p, term.x)
    outputs = jnp.split(z, 2, -1) if term.name == "normal" else [z]
    return getattr(fo.losses, loss_name(term.name))(*outputs, term.y, term.w)


# --- ways to write a loss, with what it is a sum of


def whole(name: str, x: Any, y: Any, w: Any) -> tuple[list[Term], Callable[[Any], Any]]:
    term = Term(1, name, x, y, w)
    return [term], lambda p: of_term(p, term)


def a_third(name: str, x: Any, y: Any, w: Any) -> tuple[list[Term], Callable[[Any], Any]]:
    term = Term(1 / 3, name, x, y, w)
    return [term], lambda p: of_term(p, term) / 3 + 0.01 * jnp.sum(jnp.square(p["in"]))


def micro_batches(name: str, x: Any, y: Any, w: Any) -> tuple[list[Term], Callable[[Any], Any]]:
    """Ragged ones."""
    parts = [
        Term(c, name, x[cut], y[cut], None if w is None else w[cut])
        for c, cut in ((0.3, slice(2)), (0.9, slice(2, None)))
    ]
    return parts, lambda p: 0.3 * of_term(p, parts[0]) + 0.9 * jax.jit(lambda p: of_term(p, parts[1]))(p)


def auxiliary(name: str, x: Any, y: Any, w: Any) -> tuple[list[Term], Callable[[Any], Any]]:
    terms = [Term(1, name, x, y, w), Term(0.01, "gaussian", x, np.zeros((*x.shape[:-1], OUTPUTS[name])), None)]
    return terms, lambda p: of_term(p, terms[0]) + 0.01 * of_term(p, terms[1])


def mapped(name: str, x: Any, y: Any, w: Any) -> tuple[list[Term], Callable[[Any], Any]]:
    """By vmap, and averaged."""
    del w
    each = lambda p: jax.vmap(lambda x, y: of_term(p, Term(1, name, x, y, None)))(x, y)  # noqa: E731
    return [Term(1, name, x, y, None)], lambda p: jnp.mean(each(p))


def mapped_and_weighed(name: str, x: Any, y: Any, w: Any) -> tuple[list[Term], Callable[[Any], Any]]:
    """By vmap, and each with a number of its own."""
    del w
    each = lambda p: jax.vmap(lambda x, y: of_term(p, Term(1, name, x, y, None)))(x, y)  # noqa: E731
    shares = np.array([0.5, 2.0, 0.0, 1.0, 3.0])
    return [Term(c, name, x[i], y[i], None) for i, c in enumerate(shares)], lambda p: shares @ each(p)


def in_remat(name: str, x: Any, y: Any, w: Any) -> tuple[list[Term], Callable[[Any], Any]]:
    term = Term(2.0, name, x, y, w)
    inside = jax.checkpoint(lambda p: of_term(p, term))
    return [term], lambda p: 2 * inside(p)


FORMS = {f.__name__: f for f in (whole, a_third, micro_batches, auxiliary, mapped, mapped_and_weighed, in_remat)}
CASES = [("whole", "softmax_cross_entropy", weights) for weights in WEIGHTS]
CASES += [("whole", name, weights) for name in list(OUTPUTS)[1:] for weights in ("none", "fractions")]
CASES += [
    (form, "softmax_cross_entropy", weights)
    for form in FORMS
    for weights in ("none", "fractions")
    if form != "whole" and (weights == "none" or not form.startswith("mapped"))
]


def case(form: str, name: str, weights: str) -> tuple[Any, list[Term], Callable[[Any], Any]]:
    w = WEIGHTS[weights]
    batch = X, labels_of(name), w
    terms, loss = FORMS[form](name, *(None if b is None else jnp.asarray(b) for b in batch))
    return params_of(name), terms, loss


# --- enumeration


def data_scores(name: str, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    if name == "softmax_cross_entropy":
        p = np.exp(z - z.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True) - np.eye(z.shape[-1])[y]
    if name == "normal":
        m, s = np.split(z, 2, -1)
        return np.concatenate([(m - y) * np.exp(-s), (1 - (m - y) ** 2 * np.exp(-s)) / 2], -1)
    return (1 / (1 + np.exp(-z)) if name.startswith("sigmoid") else z) - y


def middles(p: Any, term: Term, fisher: str) -> tuple[np.ndarray, np.ndarray]:
    """``E s sᵀ`` of each position, and its share in the loss."""
    z = np.asarray(net(p, term.x), np.float64).reshape(-1, p["out"].shape[1])
    w = np.ones(term.x.shape[:-1]) if term.w is None else np.asarray(term.w, np.float64)
    w = np.broadcast_to(w.reshape(*w.shape, *[1] * (term.x.ndim - 1 - w.ndim)), term.x.shape[:-1]).ravel()
    name = loss_name(term.name)
    if fisher == "true":
        M = output_fisher(name, z)
    else:
        y = np.asarray(term.y)
        s = data_scores(name, z, y.reshape(-1) if name.startswith("soft") else y.reshape(len(z), -1))
        M = s[:, :, None] * s[:, None, :]
    return M, term.factor * w / w.sum()


def enumerated(p: Any, terms: list[Term], fisher: str) -> np.ndarray:
    """``Σ c Σ_i w_i / W J_iᵀ M_i J_i``."""
    flat, unravel = ravel_pytree(p)
    total = np.zeros((flat.size, flat.size))
    for term in terms:
        J = np.asarray(jax.jacrev(lambda v, x=term.x: net(unravel(v), x).reshape(-1, p["out"].shape[1]))(flat))
        M, share = middles(p, term, fisher)
        total += np.einsum("i,iap,iab,ibq->pq", share, J, M, J)
    return total


def right_sides(p: Any, terms: list[Term], fisher: str) -> dict[str, np.ndarray]:
    """The second moments of the gradients at both layers' outputs."""
    sides = {"in": np.zeros((H, H)), "out": np.zeros((p["out"].shape[1],) * 2)}
    for term in terms:
        M, share = middles(p, term, fisher)
        h = np.tanh(np.asarray(term.x @ p["in"]).reshape(-1, H))
        G = (1 - h**2)[:, :, None] * np.asarray(p["out"])  # ∂z / ∂(before tanh)
        sides["out"] += np.einsum("i,iab->ab", share, M)
        sides["in"] += np.einsum("i,iha,iab,igb->hg", share, G, M, G)
    return sides


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])
