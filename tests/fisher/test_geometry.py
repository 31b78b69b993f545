"""What the theory of Fisher information states, each as one exact check; then the functions' other forms and errors."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.fisher import geometry as g
from tests.reference import geometry as reference

rng = np.random.default_rng(0)
A, B = rng.standard_normal((2, 3, 2))
THETA, DELTA = np.array([0.3, -0.5]), np.array([0.7, 0.4])
CLASSES = np.arange(3)
DRAWS = np.array(list(itertools.product(CLASSES, repeat=3)))  # of three draws, all outcomes
NODES, MASS = np.polynomial.hermite_e.hermegauss(16)
MASS = MASS / MASS.sum()

information = jax.jit(g.information, static_argnums=0, static_argnames="form")
statistic_information = jax.jit(g.statistic_information, static_argnums=(0, 3))
exactly = pytest.mark.usefixtures("x64")


def table(θ: np.ndarray) -> np.ndarray:
    """A curved family of distributions over three classes."""
    e = np.exp(A @ θ + np.sin(B @ θ))
    return e / e.sum()


def log_p(θ: Any, x: Any) -> jax.Array:
    return jax.nn.log_softmax(A @ θ + jnp.sin(B @ θ))[x]


def log_joint(θ: Any, xs: Any) -> jax.Array:
    return jnp.sum(jax.vmap(log_p, (None, 0))(θ, xs))


def log_normal(θ: Any, x: Any) -> jax.Array:
    """Mean and log σ."""
    return -jnp.square((x - θ["μ"]) * jnp.exp(-θ["log σ"])) / 2 - θ["log σ"]


def log_shares(θ: Any, x: Any) -> jax.Array:
    """Three classes by the probabilities of two."""
    return jnp.log(jnp.concatenate([θ, 1 - jnp.sum(θ, keepdims=True)]))[x]


def log_cubed(θ: Any, x: Any) -> jax.Array:
    """N(θ₁³, 1); θ₂ does nothing."""
    return -jnp.square(x - θ[0] ** 3) / 2


def fisher(θ: Any = THETA, form: str = "score") -> jax.Array:
    return information(log_p, θ, CLASSES, table(np.asarray(θ)), form=form)


def scores(log_density: Any, θ: Any, xs: Any) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(lambda x: g.score(log_density, θ, x)))(xs))


def least(A: Any) -> float:
    return float(np.linalg.eigvalsh(np.asarray(A))[0])


def close(a: Any, b: Any, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-10, atol=atol)


@exactly
def test_the_score_has_zero_mean() -> None:
    close(table(THETA) @ scores(log_p, THETA, CLASSES), np.zeros(2))


@exactly
def test_information_is_the_covariance_of_the_score_and_minus_the_mean_hessian() -> None:
    s, w = scores(log_p, THETA, CLASSES), table(THETA)
    F = fisher()
    close(F, reference.information(table, THETA))
    close(F, np.cov(s.T, aweights=w, ddof=0))
    close(F, fisher(form="hessian"))
    assert least(F) > 0.1


@exactly
def test_information_of_a_normal_distribution() -> None:
    """diag(1/σ², 2) of mean and log σ, of a tree, by quadrature; in order of the tree's keys."""
    θ = {"μ": 1.5, "log σ": np.log(0.5)}
    for form in ("score", "hessian"):
        close(information(log_normal, θ, 1.5 + 0.5 * NODES, MASS, form=form), np.diag([2.0, 4.0]))


@exactly
def test_a_statistic_keeps_all_information_if_sufficient_and_less_otherwise() -> None:
    """F_T ≼ F. Counts of the classes are sufficient for independent draws; how many are 0 is not, nor is a constant."""
    w = reference.draws(table, DRAWS)(THETA)
    F = np.asarray(information(log_joint, THETA, DRAWS, w))
    counts = lambda xs: jnp.sum(xs[:, None] == jnp.arange(3), 0)  # noqa: E731
    zeros = lambda xs: jnp.sum(xs == 0)  # noqa: E731
    kept = statistic_information(log_joint, THETA, DRAWS, counts, w)
    less = statistic_information(log_joint, THETA, DRAWS, zeros, w)
    close(kept, F)
    close(less, reference.information(reference.merged(reference.draws(table, DRAWS), (DRAWS == 0).sum(1)), THETA))
    assert least(F - less) > -1e-12
    assert np.trace(F - less) > 0.1
    # Sufficient: given T, the score is known. Lossy: it is not.
    s, sets = scores(log_joint, THETA, DRAWS), np.sort(DRAWS, 1) @ [9, 3, 1]
    assert max(np.ptp(s[sets == key], 0).max() for key in sets) < 1e-12
    assert np.ptp(s[(DRAWS == 0).sum(1) == 1], 0).max() > 0.1
    close(statistic_information(log_joint, THETA, DRAWS, lambda xs: jnp.zeros(()), w), np.zeros((2, 2)))


@exactly
def test_cramer_rao() -> None:
    """Frequencies of classes are efficient; a lopsided mean of draws is unbiased and not. Both have E[T sᵀ] = I."""
    θ = np.array([0.2, 0.5])
    shares = lambda θ: np.append(θ, 1 - θ.sum())  # noqa: E731
    log_density = lambda θ, xs: jnp.sum(jax.vmap(log_shares, (None, 0))(θ, xs))  # noqa: E731
    w = reference.draws(shares, DRAWS)(θ)
    F = information(log_density, θ, DRAWS, w)
    close(F, 3 * information(log_shares, θ, CLASSES, shares(θ)))
    bound, s = np.asarray(g.cramer_rao_bound(F)), scores(log_density, θ, DRAWS)
    excess = []
    for weights in (np.ones(3) / 3, np.array([0.6, 0.3, 0.1])):
        T = np.einsum("d,xdk->xk", weights, np.eye(3)[DRAWS][..., :2])
        close(w @ T, θ)
        close((w[:, None] * T).T @ s, np.eye(2))
        excess.append(np.cov(T.T, aweights=w, ddof=0) - bound)
        joint = np.cov(np.hstack([T, s]).T, aweights=w, ddof=0)
        close(joint[2:, :2], np.eye(2))
        assert least(joint) > -1e-12
    close(excess[0], np.zeros((2, 2)))
    assert least(excess[1]) > 0.01


@exactly
def test_information_of_independent_variables_is_block_diagonal() -> None:
    outcomes = np.array(list(itertools.product(CLASSES, CLASSES)))
    log_pair = lambda θ, x: log_p(θ[0], x[0]) + log_p(θ[1], x[1])  # noqa: E731
    p, q = table(THETA), table(DELTA)
    F = information(log_pair, (THETA, DELTA), outcomes, np.outer(p, q).ravel())
    close(F, np.block([[fisher(), np.zeros((2, 2))], [np.zeros((2, 2)), fisher(DELTA)]]))


@exactly
def test_information_about_a_shared_parameter_adds_up() -> None:
    """Of two variables that depend on θ each in its way; and of N independent samples, N times that of one."""
    outcomes = np.array(list(itertools.product(CLASSES, CLASSES)))
    log_pair = lambda θ, x: log_p(θ, x[0]) + log_p(jnp.tanh(θ), x[1])  # noqa: E731
    weights = np.outer(table(THETA), table(np.tanh(THETA))).ravel()
    second = information(lambda θ, x: log_p(jnp.tanh(θ), x), THETA, CLASSES, table(np.tanh(THETA)))
    close(information(log_pair, THETA, outcomes, weights), fisher() + second)
    close(information(log_joint, THETA, DRAWS, reference.draws(table, DRAWS)(THETA)), 3 * fisher())


def θ_of(η: Any) -> jax.Array:
    """A diffeomorphism of the plane."""
    return jnp.array([η[0] + η[1] ** 3, 2 * η[1] + jnp.sin(η[1])])


@exactly
def test_metric_and_jeffreys_prior_do_not_depend_on_the_parameters() -> None:
    """Lengths and angles of changes, the natural gradient as a change, and the volume."""
    η = np.array([0.4, -0.6])
    θ, J = np.asarray(θ_of(η)), np.asarray(jax.jit(jax.jacobian(θ_of))(η))
    F = fisher(θ)
    new = information(lambda η, x: log_p(θ_of(η), x), η, CLASSES, table(θ))
    close(new, g.reparametrised(F, J))
    close(g.inner_product(new, THETA, DELTA), g.inner_product(F, J @ THETA, J @ DELTA))
    close(J @ g.natural_gradient(new, J.T @ DELTA), g.natural_gradient(F, DELTA))
    close(g.jeffreys_log_prior(new), g.jeffreys_log_prior(F) + np.log(abs(np.linalg.det(J))))


@exactly
def test_kl_is_the_quadratic_form_up_to_third_order() -> None:
    """Halving Δ divides the error by 8, up to a share that halves too."""
    F, p = fisher(), table(THETA)
    steps = [DELTA / 2**k for k in range(4, 8)]
    errors = np.array([reference.kl(p, table(THETA + Δ)) - float(g.kl_quadratic(F, Δ)) for Δ in steps])
    ratios = errors[:-1] / errors[1:]
    assert abs(errors[0]) > 1e-6
    assert all(abs(ratios - 8) < [0.5, 0.25, 0.125])


@exactly
def test_information_is_singular_exactly_where_the_model_is_overparameterised() -> None:
    """A null direction is one along which no outcome's probability changes, and there is none otherwise."""
    over = lambda θ, x: log_p(θ[:2] * θ[2], x)  # noqa: E731
    θ = np.array([0.3, -0.5, 1.2])
    F = information(over, θ, CLASSES, table(θ[:2] * θ[2]))
    v = g.null_directions(F)
    assert v.shape == (3, 1)
    assert g.rank(F) == 2
    close(scores(over, θ, CLASSES) @ v, np.zeros((3, 1)))
    close(abs(v[:, 0]), abs(np.append(θ[:2], -θ[2])) / np.linalg.norm(θ))
    assert g.jeffreys_log_prior(F) == -jnp.inf
    assert g.null_directions(fisher()).shape == (2, 0)
    assert np.linalg.svd(scores(log_p, THETA, CLASSES))[1][-1] > 0.1


@exactly
def test_information_is_nowhere_singular_where_distributions_are_parameters_one_to_one() -> None:
    """Logits of two classes against the third, at random places."""
    log_density = lambda θ, x: jax.nn.log_softmax(jnp.append(θ, 0.0))[x]  # noqa: E731
    ranks = jax.jit(
        jax.vmap(lambda θ: g.rank(information(log_density, θ, CLASSES, jax.nn.softmax(jnp.append(θ, 0.0)))))
    )
    np.testing.assert_array_equal(ranks(3 * rng.standard_normal((50, 2))), 2)


@exactly
def test_there_is_no_unbiased_estimator_of_overparameterised_parameters() -> None:
    """Over all T, E[T sᵀ] = I is missed by 1 for each null direction; θ₁ + θ₂ alone has a bound."""
    log_density = lambda θ, x: log_shares(jnp.array([jnp.sum(θ), 0.3]), x)  # noqa: E731
    p = np.array([0.2, 0.3, 0.5])
    weighted = p[:, None] * scores(log_density, np.array([0.15, 0.05]), CLASSES)
    T = np.linalg.lstsq(weighted.T, np.eye(2))[0].T
    close(np.sum((T @ weighted - np.eye(2)) ** 2), 1)
    F = information(log_density, np.array([0.15, 0.05]), CLASSES, p)
    with pytest.raises(ValueError, match=r"rank 1 of 2, and functions \[0 1\] of θ change along its null directions"):
        g.cramer_rao_bound(F)
    close(g.cramer_rao_bound(F, np.ones((1, 2))), [[1 / (1 / 0.2 + 1 / 0.5)]])
    assert jnp.isnan(jax.jit(g.cramer_rao_bound)(F)).all()


@pytest.mark.parametrize(("θ", "rank"), [((0.5, -0.3, 0.8), 2), ((0.0, 0.0, 0.8), 1), ((0.0, 0.0, 0.0), 0)])
@exactly
def test_rank_and_kernel_are_those_of_the_jacobian(θ: tuple[float, ...], rank: int) -> None:
    """Of distributions with two parameters η(θ), given by three."""
    η = lambda θ: jnp.array([θ[0] * θ[1], θ[1] * θ[2] + jnp.square(θ[0])])  # noqa: E731
    J = np.asarray(jax.jit(jax.jacobian(η))(np.array(θ)))
    F = information(lambda θ, x: log_p(η(θ), x), np.array(θ), CLASSES, table(np.asarray(η(np.array(θ)))))
    V = g.null_directions(F)
    assert int(g.rank(F)) == np.linalg.matrix_rank(J) == rank
    close(F, g.reparametrised(fisher(η(np.array(θ))), J))
    close(V @ V.T, np.eye(3) - np.linalg.pinv(J) @ J)


@pytest.mark.parametrize("θ", [(0.0, 1.0), (0.8, -2.0), (-1.3, 0.0)])
@exactly
def test_a_parameter_that_stops_mattering(θ: tuple[float, float]) -> None:
    """N(θ₁³, 1): diag(9 θ₁⁴, 0), of rank 0 where θ₁ = 0. By θ₁³ in place of θ₁ the rank is 1 everywhere."""
    F = information(log_cubed, np.array(θ), θ[0] ** 3 + NODES, MASS)
    close(F, np.diag([9 * θ[0] ** 4, 0]))
    assert g.rank(F) == (θ[0] != 0)
    better = information(lambda η, x: -jnp.square(x - η[0]) / 2, np.array(θ), θ[0] + NODES, MASS)
    assert g.rank(better) == 1


@pytest.mark.parametrize("x64", [True, False])
def test_null_directions_of_a_softmax_regression_shift_all_logits(x64: bool) -> None:
    """One for each feature, in either precision; of the model's Fisher as an operator too."""
    with jax.enable_x64(x64):
        x, W = rng.standard_normal((8, 3)), jnp.asarray(rng.standard_normal((3, 4)))
        pairs = np.repeat(x, 4, 0), np.tile(np.arange(4), 8)
        weights = jax.nn.softmax(x @ W).ravel() / 8
        F = information(lambda W, xy: jax.nn.log_softmax(xy[0] @ W)[xy[1]], W, pairs, weights)
        shift = np.kron(np.eye(3), np.full((4, 4), 0.25))
        loss = lambda W: fo.losses.softmax_cross_entropy(jnp.asarray(x) @ W, jnp.zeros(8, int))  # noqa: E731
        for matrix in (F, fo.fisher.operator(loss, W)):
            V = g.null_directions(matrix)
            assert V.shape == (12, 3)
            close(V @ V.T, shift, 1e-12 if x64 else 1e-5)
