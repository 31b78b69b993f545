"""The kinds of Fisher: exact where they must be, drawn labels converge, and K-FAC and EKFAC where theory says so."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax import capture
from fisher_optax.preconditioner.contracts import Eigenbasis
from tests.capture.capture_models import assert_near, normal
from tests.reference.curvature import fisher, gauss_newton, output_fisher, per_example_gradients, relative

pytestmark = pytest.mark.usefixtures("x64")
LOSSES = {
    "softmax_cross_entropy": lambda C: jnp.arange(5) % C,
    "sigmoid_cross_entropy": lambda C: jnp.arange(5.0 * C).reshape(5, C) % 2,
    "gaussian": lambda C: normal(9, 5, C),
}


def linear(name: str, C: int = 3) -> tuple[Any, Any, Any, Any]:
    """A loss of one linear layer, its matrix, inputs and labels."""
    loss = lambda W, x, y, *w: getattr(capture.losses, name)(x @ W, y, *w)  # noqa: E731
    return loss, normal(0, 4, C), normal(1, 5, 4), LOSSES[name](C)


@pytest.mark.parametrize("name", LOSSES)
def test_true_fisher_of_a_linear_layer(name: str) -> None:
    """``right`` is the mean Fisher of the outputs by enumerating labels; with one example left ⊗ right is the
    Gauss-Newton matrix, which is the Fisher.
    """
    loss, W, x, y = linear(name)
    stats = jax.jit(capture.value_and_grad(loss, fisher="true"))(W, x, y)[2]
    assert_near(stats.left, x.T @ x / 5)
    assert_near(stats.right, output_fisher(name, x @ W).mean(0))
    one = jax.jit(capture.value_and_grad(loss, fisher="true"))(W, x[:1], y[:1])[2]
    exact = gauss_newton(lambda W: x[:1] @ W, W, output_fisher(name, x[:1] @ W))
    assert_near(np.kron(one.left, one.right), exact)


def test_true_fisher_does_not_see_labels_and_weights_average_it() -> None:
    """Soft, hard and wrong labels give one Fisher; example weights make it a weighted mean."""
    loss, W, x, y = linear("softmax_cross_entropy")
    grad_fn = jax.jit(capture.value_and_grad(loss, fisher="true"))
    hard, soft = grad_fn(W, x, y)[2], grad_fn(W, x, jnp.full((5, 3), 1 / 3))[2]
    assert_near(hard.right, soft.right)
    w = jnp.array([1.0, 0, 2, 0.5, 0])
    each = output_fisher("softmax_cross_entropy", x @ W)
    assert_near(grad_fn(W, x, y, w)[2].right, np.average(each, axis=0, weights=w))


def test_empirical_fisher_is_of_the_labels_in_the_data() -> None:
    """One example: left ⊗ right is exactly the outer product of its gradient; soft labels have a score of their own."""
    loss, W, x, y = linear("softmax_cross_entropy")
    for labels in (y, jax.nn.softmax(normal(5, 5, 3))):
        stats = jax.jit(capture.value_and_grad(loss))(W, x[:1], labels[:1])[2]
        scores = per_example_gradients(lambda W: loss(W, x[:1], labels[:1])[None], W)  # noqa: B023
        assert_near(np.kron(stats.left, stats.right), fisher(scores))
        stats = jax.jit(capture.value_and_grad(loss))(W, x, labels)[2]
        q = np.eye(3)[np.asarray(labels)] if labels.ndim == 1 else np.asarray(labels)
        assert_near(stats.right, fisher(np.asarray(jax.nn.softmax(x @ W)) - q))


@pytest.mark.parametrize("name", LOSSES)
def test_drawn_labels_converge_to_the_true_fisher(name: str) -> None:
    """The mean over K draws of outer products of scores is unbiased: within 6 standard errors, which are measured from
    the draws themselves, in every entry.
    """
    loss, W, x, y = linear(name)
    keys = jax.random.split(jax.random.key(3), 400)
    one = jax.jit(jax.vmap(lambda k: capture.value_and_grad(loss, fisher="mc")(W, x, y, fisher_key=k)[2].right))(keys)
    true = output_fisher(name, x @ W).mean(0)
    error = np.abs(np.mean(one, 0) - true)
    assert np.all(error <= 6 * np.std(one, 0) / 20)
    many = capture.value_and_grad(loss, fisher="mc", n_samples=400)
    right = jax.jit(many)(W, x, y, fisher_key=jax.random.key(4))[2].right
    assert np.all(np.abs(right - true) <= 6 * np.std(one, 0) / 20)


def test_drawn_labels_of_several_passes_see_inputs_once() -> None:
    """``left`` does not depend on how many labels are drawn, and gradients are those of the data's labels."""
    loss, W, x, y = linear("softmax_cross_entropy")
    _, grads, stats = capture.value_and_grad(loss, fisher="mc", n_samples=3)(W, x, y, fisher_key=jax.random.key(0))
    assert_near(stats.left, x.T @ x / 5)
    assert stats.weight == 5
    assert_near(grads, jax.grad(loss)(W, x, y), 1e-12)


def test_two_losses_draw_independent_labels() -> None:
    """A model with two heads over the same logits: were the labels the same, the scores would add up. Each counts by
    its factor in the whole.
    """
    W, x, y = normal(0, 4, 3), normal(1, 5, 4), jnp.arange(5) % 3

    def loss(W: Any, x: Any, y: Any) -> Any:
        inner = jax.jit(lambda z: capture.losses.softmax_cross_entropy(z, y))
        return inner(x @ W) + jax.jit(lambda z: inner(z) / 2)(x @ W)

    def right(key: Any) -> Any:
        return capture.value_and_grad(loss, fisher="mc")(W, x, y, fisher_key=key)[2].right

    drawn = jax.jit(jax.vmap(right))(jax.random.split(jax.random.key(3), 400))
    true = 1.5 * output_fisher("softmax_cross_entropy", x @ W).mean(0)
    assert np.all(np.abs(np.mean(drawn, 0) - true) <= 6 * np.std(drawn, 0) / 20)
    with pytest.raises(ValueError, match=r"loss_fn calls fo.losses 2 times"):
        capture.value_and_grad(loss, fisher="true")(W, x, y)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_loss_mapped_over_examples_is_that_of_the_batch(name: str, kind: str) -> None:
    """``jax.vmap`` of one example's loss, averaged: the same statistics as the loss of all, for the same normaliser."""
    loss, W, x, y = linear(name)
    each = lambda W, x, y: jnp.mean(jax.vmap(loss, (None, 0, 0))(W, x, y))  # noqa: E731
    mapped, wanted = (jax.jit(capture.value_and_grad(f, fisher=kind))(W, x, y)[2] for f in (each, loss))
    assert_near(mapped.left, wanted.left)
    assert_near(mapped.right, wanted.right)


def test_loss_mapped_with_weights_cannot_be_counted() -> None:
    """Each example's weights then divide by their own sum."""
    loss, W, x, y = linear("gaussian")
    each = lambda W, x, y, w: jnp.mean(jax.vmap(loss, (None, 0, 0, 0))(W, x[:, None], y[:, None], w))  # noqa: E731
    with pytest.raises(ValueError, match=r"stands inside a vmap, .*fisher='true' needs it"):
        capture.value_and_grad(each, fisher="true")(W, x, y, jnp.ones((5, 1)))


def count(jaxpr: Any, name: str) -> int:
    """How many equations of a primitive there are, inside calls and loops too (a loop's body once)."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == name
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += count(inner, name) if hasattr(inner, "eqns") else 0
    return total


def test_one_forward_pass_and_one_backward_pass_a_kind() -> None:
    """An element-wise marker counts passes: once forwards whatever the Fisher, once backwards for "empirical", and once
    more for the labels of a single draw.
    """
    W, x, y = normal(0, 4, 3), normal(1, 5, 4), jnp.arange(5) % 3

    def loss(W: Any, x: Any, y: Any) -> Any:
        return capture.losses.softmax_cross_entropy(jnp.sin(x @ W), y)

    def passes(**options: Any) -> tuple[int, int]:
        key = {"fisher_key": jax.random.key(0)} if options.get("fisher") == "mc" else {}
        grad_fn = capture.value_and_grad(loss, **options)
        jaxpr = jax.make_jaxpr(lambda W: grad_fn(W, x, y, **key))(W).jaxpr
        return count(jaxpr, "sin"), count(jaxpr, "dot_general")

    assert passes() == (1, 1 + 1 + 2)  # forwards, the gradient, two factors
    forwards, products = passes(fisher="mc")
    # Each of the two passes back has a product for the gradient and two for factors.
    assert (forwards, products) == (1, 1 + 2 * 3)


def deep(params: Any, x: Any) -> Any:
    for W in params:
        x = x @ W
    return x


def test_kfac_is_exact_for_deep_linear_networks_with_squared_error() -> None:
    """Output gradients then do not depend on the input, so every block of the Fisher is left ⊗ right."""
    params, x, y = [normal(0, 3, 4), normal(1, 4, 4), normal(2, 4, 2)], normal(3, 6, 3), normal(4, 6, 2)
    loss = lambda p, x, y: capture.losses.gaussian(deep(p, x), y)  # noqa: E731
    stats = jax.jit(capture.value_and_grad(loss, fisher="true"))(params, x, y)[2]
    for i, W in enumerate(params):
        before, after = deep(params[:i], x), params[i + 1 :]
        H = output_fisher("gaussian", deep(params, x))
        exact = gauss_newton(lambda W: deep([W, *after], before), W, H)  # noqa: B023
        assert_near(np.kron(stats[i].left, stats[i].right), exact)


def bases_of(stats: Any) -> Eigenbasis:
    return Eigenbasis(*(jnp.linalg.eigh(side)[1] for side in (stats.left, stats.right)))


def squares_by_hand(A: Any, D: Any, bases: Any) -> np.ndarray:
    """Mean of the squared entries of each example's gradient in the bases; D is of each one's own loss."""
    QA, QB = (np.asarray(Q, np.float64) for Q in bases)
    gradients = np.einsum("pi,pj->pij", np.asarray(A) @ QA, np.asarray(D) @ QB)
    return np.mean(gradients**2, 0)


@pytest.mark.parametrize("seed", range(3))
def test_ekfac_is_never_farther_from_the_fisher_than_kfac(seed: int) -> None:
    """In the eigenbases of the factors, the squares are the best diagonal in Frobenius norm."""
    params = {"kernel": normal(seed, 4, 3), "bias": normal(7 + seed, 3)}
    x, y = normal(seed + 20, 6, 4), jnp.arange(6) % 3
    z = lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"])  # noqa: E731
    loss = lambda p, x, y: capture.losses.softmax_cross_entropy(z(p, x), y)  # noqa: E731
    plain = jax.jit(capture.value_and_grad(loss))(params, x, y)[2]["kernel"]
    bases = bases_of(plain)
    grad_fn = jax.jit(capture.value_and_grad(loss, capture.KroneckerFactors(squares=True)))
    stats = grad_fn(params, x, y, bases={"kernel": bases, "bias": None})[2]["kernel"]
    assert_near(stats.left, plain.left)

    A, W1 = jnp.hstack([x, jnp.ones((6, 1))]), jnp.vstack([params["kernel"], params["bias"]])
    each = lambda W: -jax.nn.log_softmax(jnp.tanh(A @ W))[jnp.arange(6), y]  # noqa: E731
    exact = fisher(per_example_gradients(each, W1))
    D = jax.grad(lambda u: -jnp.sum(jax.nn.log_softmax(jnp.tanh(u))[jnp.arange(6), y]))(A @ W1)
    assert_near(stats.squares, squares_by_hand(A, D, bases))
    Q = np.kron(*bases)
    ekfac = Q @ np.diag(np.asarray(stats.squares).ravel()) @ Q.T
    assert relative(ekfac, exact) <= relative(np.kron(plain.left, plain.right), exact)


def test_squares_of_an_embedding_are_by_token() -> None:
    """Its left side is diagonal in the tokens, with no basis to turn: squares are sums over each token's places."""
    W, tokens, y = normal(0, 5, 3), jnp.array([[0, 2], [2, 4], [2, 0]]), normal(1, 3, 2, 3)
    loss = lambda W, tokens, y: capture.losses.gaussian(W[tokens], y)  # noqa: E731
    Q = jnp.linalg.qr(normal(2, 3, 3))[0]
    grad_fn = jax.jit(capture.value_and_grad(loss, capture.KroneckerFactors(squares=True)))
    stats = grad_fn(W, tokens, y, bases=Eigenbasis(None, Q))[2]
    A, D = np.eye(5)[np.asarray(tokens).ravel()], np.asarray(W[tokens] - y).reshape(6, 3)
    assert_near(stats.squares, squares_by_hand(A, D, (np.eye(5), Q)))


def test_squares_of_a_stack_use_each_matrix_s_own_bases() -> None:
    """A scanned stack and experts in one product: bases are stacked as the factors are."""
    W, x = normal(0, 3, 4, 4), normal(1, 5, 4)
    loss = lambda W, x: jnp.mean(jax.lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, W)[0] ** 2)  # noqa: E731
    bases = Eigenbasis(jnp.linalg.qr(normal(2, 3, 4, 4))[0], jnp.linalg.qr(normal(3, 3, 4, 4))[0])
    kind = capture.KroneckerFactors(squares=True)
    stats = jax.jit(lambda W: capture.value_and_grad(loss, kind)(W, x, bases=bases)[2])(W)

    def by_hand(W: Any, e: Any) -> Any:
        h, inputs = x, []
        for i in range(3):
            inputs.append(h)
            h = jnp.tanh(h @ W[i] + e[i])
        return jnp.mean(h**2), inputs

    delta, inputs = jax.grad(by_hand, argnums=1, has_aux=True)(W, jnp.zeros((3, 5, 4)))
    for i in range(3):
        assert_near(stats.squares[i], squares_by_hand(inputs[i], 5 * delta[i], (bases.left[i], bases.right[i])))


def test_true_fisher_where_positions_mix_is_unbiased_not_their_sum() -> None:
    """A layer below a causal mean feeds the losses of all later positions, whose scores are uncorrelated: columns of
    one class at all positions at once would be several times too large.
    """
    N, T, H, C = 40, 6, 4, 5
    params = {"below": normal(0, 3, H), "above": normal(1, H, C)}
    x, y = normal(2, N, T, 3), jnp.zeros((N, T), int)
    mixed = lambda h: jnp.cumsum(h, -2) / jnp.arange(1, T + 1)[:, None]  # noqa: E731
    logits = lambda p, x, shift: mixed(jnp.tanh(x @ p["below"] + shift)) @ p["above"]  # noqa: E731
    loss = lambda p, x, y: capture.losses.softmax_cross_entropy(logits(p, x, 0.0), y)  # noqa: E731
    J = np.asarray(jax.vmap(jax.jacrev(logits, 2), (None, 0, None))(params, x, jnp.zeros((T, H))))  # (N, T, C, T, H)
    F = output_fisher("softmax_cross_entropy", np.asarray(logits(params, x, 0.0)).reshape(N * T, C)).reshape(N, T, C, C)
    wanted = np.einsum("ntcsh,ntcd,ntdsg->hg", J, F, J) / (N * T)
    right = jax.jit(capture.value_and_grad(loss, fisher="true"))(params, x, y)[2]["below"].right
    assert relative(right, wanted) < 0.15
