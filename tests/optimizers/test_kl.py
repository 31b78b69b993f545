"""The Kullback-Leibler factors and the two optimizers on them, against NumPy and against what they are to recover."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.preconditioner.contracts import Eigenpairs
from tests.grouped import grouped
from tests.optimizers.test_soap import gradients, trajectory
from tests.reference.kl import KL

OPTIONS = {
    "defaults": {},
    "every-second": {"precondition_frequency": 2, "weight_decay": 0.3},
    "betas": {"b1": 0.7, "b2": 0.9, "precondition_frequency": 3},
    "own-decay": {"shampoo_beta": 0.6, "precondition_frequency": 2},
    "no-bias-correction": {"bias_correction": False, "precondition_frequency": 2},
    "large-eps": {"eps": 0.3, "precondition_frequency": 2},
    "from-the-identity": {"init": "identity", "precondition_frequency": 2},
    "before-step": {"before_step": True, "precondition_frequency": 2, "eps": 1e-2},
    "before-every-step": {"before_step": True, "precondition_frequency": 1, "eps": 1e-2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["kl_soap", "kl_shampoo"])
@pytest.mark.usefixtures("x64")
def test_the_reference(name: str, options: dict[str, Any]) -> None:
    """12 steps in float64, to 1e-9."""
    grads, W = gradients((4, 4)), np.ones((4, 4))
    path = trajectory(getattr(fo, name)(1e-2, **grouped(factor_dtype=jnp.float64, **options)), W, grads)
    method = KL(W, name, 1e-2, **options)
    np.testing.assert_allclose(path, np.stack([method.step(G) for G in grads]), atol=1e-9)


def test_a_true_covariance_is_recovered() -> None:
    """From 20,000 samples of N(0, A ⊗ B), with the running mean, to 1.5% of its norm."""
    rng = np.random.default_rng(0)
    A, B = (M @ M.T / d + 0.1 * np.eye(d) for d in (4, 3) for M in [rng.normal(size=(d, d))])
    a, b = np.linalg.cholesky(A), np.linalg.cholesky(B)
    samples = jnp.asarray(a @ rng.normal(size=(20_000, 4, 3)) @ b.T, jnp.float32)
    rule, decomposition = fo.factors.kullback_leibler(fo.factors.running_mean), fo.decompositions.eigh()
    factors = rule.init(4, 3, True, True, jnp.float32)
    assert rule.track is not None
    track = rule.track

    def values(A: Any, Q: Any) -> Any:
        return jnp.sum(Q * (A @ Q), 0)

    def block(carry: Any, Gs: Any) -> Any:
        """Ten gradients in one basis, as between two refreshes."""

        def one(carry: Any, G: Any) -> Any:
            factors, basis = carry
            return (rule.update(G, factors, basis), track(G, factors, basis)), None

        (factors, basis), _ = jax.lax.scan(one, carry, Gs)
        pairs = zip(factors[:2], basis[:2], strict=True)
        Q = [decomposition.renew(M, V, jnp.array(False), None).value for M, V in pairs]
        return (factors, Eigenpairs(*Q, *map(values, factors[:2], Q))), None

    start = Eigenpairs(jnp.eye(4), jnp.eye(3), jnp.ones(4), jnp.ones(3))
    (factors, _), _ = jax.jit(lambda s: jax.lax.scan(block, s, samples.reshape(-1, 10, 4, 3)))((factors, start))
    wanted = np.kron(A, B)
    assert np.linalg.norm(np.kron(factors.left, factors.right) - wanted) <= 0.015 * np.linalg.norm(wanted)


@pytest.mark.usefixtures("x64")
def test_tracked_values_are_those_of_the_factors() -> None:
    """Between refreshes, λ is the diagonal of Qᵀ A Q at m n instead of 2 d³ operations."""
    rule, rng = fo.factors.kullback_leibler(0.9), np.random.default_rng(0)
    Q = [jnp.asarray(np.linalg.qr(rng.normal(size=(d, d)))[0]) for d in (4, 3)]
    factors, basis = rule.init(4, 3, True, True, jnp.float64), Eigenpairs(*Q, jnp.ones(4), jnp.ones(3))
    assert rule.track is not None
    for G in gradients((4, 3)):
        factors, basis = rule.update(jnp.asarray(G), factors, basis), rule.track(jnp.asarray(G), factors, basis)
        for A, V, values in zip(factors[:2], basis[:2], basis[2:], strict=True):
            np.testing.assert_allclose(values, np.diag(V.T @ A @ V), rtol=1e-10)


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**30])
@pytest.mark.parametrize("sides", ["both", "shorter"])
@pytest.mark.usefixtures("x64")
def test_factors_have_the_scale_of_the_gradients(sides: str, scale: float) -> None:
    """From their first on, after zeros; the paper's keep that of their start."""
    rule, both = fo.factors.kullback_leibler(), sides == "both"
    assert rule.track is not None
    after = []
    for c in (1.0, scale):
        factors = rule.init(4, 3, True, both, jnp.float64)
        basis = Eigenpairs(jnp.eye(4), jnp.eye(3) if both else None, jnp.ones(4), jnp.ones(3) if both else None)
        for G in [np.zeros((4, 3)), *gradients((4, 3))[:5]]:
            G = jnp.asarray(c * G)
            factors, basis = rule.update(G, factors, basis), rule.track(G, factors, basis)
        after.append([x for x in (*factors[:2], *basis[2:]) if x is not None])
    for one, other in zip(*after, strict=True):
        np.testing.assert_allclose(other, one * (scale if both else scale**2), rtol=1e-12)
        assert bool(jnp.any(one))


def test_zeros_before_the_first_gradient_move_nothing_without_eps() -> None:
    tx, params = fo.scale_by_kl_shampoo(eps=0.0, refresh=fo.Refresh(first_step="adam")), {"w": jnp.ones((4, 3))}
    updates, _ = tx.update({"w": jnp.zeros((4, 3))}, tx.init(params), params)
    assert not bool(jnp.any(updates["w"]))


def test_factors_that_need_eigenvalues_say_so() -> None:
    with pytest.raises(TypeError, match="with_eigenvalues"):
        fo.precondition(
            fo.factors.kullback_leibler(), fo.decompositions.eigh(), fo.in_eigenbasis(fo.applications.adam())
        )
    with pytest.raises(ValueError, match=r"fo.kl_shampoo takes no transport; got Refresh\(transport='squared'\)"):
        fo.kl_shampoo(refresh=fo.Refresh(transport="squared"))
    with pytest.raises(ValueError, match="'gradient', 'identity'; got 'zero'"):
        fo.kl_soap(1e-3, init="zero")
