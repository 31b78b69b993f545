"""SOAP: Adam in the eigenbasis of Shampoo's factors.

    g = Q_Lᵀ G Q_R;   m ← b1 m + (1-b1) g;   v ← b2 v + (1-b2) g²            the basis of earlier gradients
    W ← W - lr sqrt(1-b2ᵗ)/(1-b1ᵗ) Q_L [m / (sqrt(v) + eps)] Q_Rᵀ;   W ← W - lr wd W
    L ← βs L + (1-βs) G Gᵀ;   R ← βs R + (1-βs) Gᵀ G
    every k steps   Q_L ← qr(L Q_L),   Q_R ← qr(R Q_R)

Source: Vyas et al. 2024 (arXiv 2409.11321), Algorithm 3, and the authors' code, whose order of operations this
  follows. Moments are kept in the basis and turned only when it
turns, which is the same mathematics at 6mn(m+n) instead of 10mn(m+n) flops a step.
"""

from collections.abc import Callable
from typing import Any

import optax

from .._checks import in_range
from ..preconditioner.applications import adam, in_eigenbasis
from ..preconditioner.contracts import Application, FactorRule
from ..preconditioner.decompositions import eigh, orthogonal_iteration, with_eigenvalues
from ..preconditioner.factors import outer_product
from ..preconditioner.precondition import preconditioner
from ..preconditioner.transform import Preconditioner
from ..transforms.decay import Mask, decay_after_step, decayed_weights
from ..transforms.fallback import with_fallback
from ..transforms.first_step import skip_first_call
from ..transforms.freeze import Freezable, chain
from ..transforms.hyperparameters import injectable, scheduled
from ..transforms.skip_nonfinite import skip_nonfinite

KINDS = ("matrix", "head")
DECOMPOSITIONS = {
    "qr": lambda: orthogonal_iteration("qr"),
    "cholesky": lambda: orthogonal_iteration("cholesky"),
    "eigh": eigh,
}


@injectable
def scale_by_soap(
    b1: Any = 0.95,
    b2: Any = 0.95,
    eps: Any = 1e-8,
    *,
    shampoo_beta: Any = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    bias_correction: bool = True,
    first_step: str = "skip",
    fallback: optax.GradientTransformation | None = None,
    axes: Any = None,
    refresh: str = "every",
    adaptive_tolerance: float = 0.01,
    transport: str = "permute",
    decomposition: str = "qr",
    normalize_updates: bool = False,
    block_size: int | None = None,
    sides: str = "both",
    factor_dtype: Any = None,
    factor_storage: str = "full",
    momentum_dtype: Any = None,
    mesh_axis: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `soap`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam(b1, b2, eps)``.

    Example (SOAP, then orthogonalised, after Nesterov momentum, as a plain chain):
      >>> import optax, fisher_optax as fo
      >>> polar = fo.precondition(None, None, fo.applications.orthogonal(scale="match_rms_adamw"),
      ...                         fallback=optax.identity())
      >>> tx = optax.chain(optax.trace(0.95, nesterov=True), fo.scale_by_soap(b1=0.0), polar,
      ...                  optax.scale_by_learning_rate(3e-3))
    """
    return direction("soap", **locals())


@injectable
def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: Any = 0.95,
    b2: Any = 0.95,
    eps: Any = 1e-8,
    weight_decay: Any = 0.01,
    *,
    shampoo_beta: Any = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    bias_correction: bool = True,
    first_step: str = "skip",
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: Any = None,
    refresh: str = "every",
    adaptive_tolerance: float = 0.01,
    transport: str = "permute",
    decomposition: str = "qr",
    normalize_updates: bool = False,
    block_size: int | None = None,
    sides: str = "both",
    factor_dtype: Any = None,
    factor_storage: str = "full",
    momentum_dtype: Any = None,
    mesh_axis: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP (see the top of this file for the rule).

    Args:
      learning_rate: number or schedule; the authors' 3e-3. Adam's rates are a good start.
      b1, b2: decay of first and second moment, numbers or schedules.
      eps: number or schedule, added to ``sqrt(v)`` before the bias correction, in units of the gradient. It does not
        keep out the rounding of rotated gradients, which has their scale: entries of ``sqrt(v)`` below 16 to 256 units
        of rounding (2e-6 to 3e-5 in float32, by the length of the side) of the norms of their row and column get no
        step, so that a weight or direction that never had a gradient stays, at any scale.
      weight_decay: decoupled, after the step, per unit of learning rate; number or schedule.
      shampoo_beta: βs, decay of the factors; None: ``b2``.
      precondition_frequency: steps between refreshes of a basis. 10 costs little loss; 1 removes the spikes seen at
        large batches.
      max_precond_dim: a longer side is left unrotated; with 0 both are, and SOAP is Adam.
      bias_correction: Adam's, of the moments; the factors have none, since a scale does not turn a basis.
      first_step: "skip" (the authors'): the first call only sets factors and basis; "adam": it steps at once in the
        identity basis.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: a complete optimizer for what is no matrix and for embeddings, default ``optax.adamw`` with the same
        arguments.
      axes: None (rules by path and shape, see `fo.report`), a tree of `fo.MatrixAxes`, or a function of params.
      refresh: "every" (all bases every k steps), "adaptive" (of those, the ones with off-diagonality above
        ``adaptive_tolerance``, Eschenhagen et al. 2025),
        "staggered" (each step its share, so that no step is slow).
      adaptive_tolerance: τ in ``|B - diag B| > τ |B|``, ``B = Qᵀ L Q``.
      transport: of v when a basis turns: "permute" (the authors': follow the columns' new order) or "squared" (``(C∘C)
        v (C∘C)ᵀ``, ``C = Q_newᵀ Q_old``).
      decomposition: "qr", "cholesky" (shifted CholeskyQR, where QR is slow) or "eigh": how a basis is refreshed.
      normalize_updates: scale every matrix's direction to root mean square 1.
      block_size: cut longer sides into blocks of at most this, each with its own factors.
      sides: "both", or "shorter": only the shorter side of each matrix gets a factor, at a quarter of the state.
      factor_dtype: storage of factors and bases, default float32 (arithmetic is float32 in any case).
      factor_storage: "full", or "packed": half of each symmetric factor.
      momentum_dtype: storage of m, default float32.
      mesh_axis: share the matrices and their state out over this axis of the mesh in scope, `init`'s too; a stack that
        the devices do not divide is filled up.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.soap(optax.cosine_decay_schedule(3e-3, 100), refresh="staggered")
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    return complete("soap", **locals())


def direction(
    name: str,
    b1: Any,
    b2: Any,
    eps: Any,
    fallback: Any,
    axes: Any,
    parts: Callable[..., Preconditioner] | None = None,
    route: Callable[..., Any] = with_fallback,
    on: Callable[..., Any] = lambda name, method, axes: method.on_matrices(axes),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_soap`, or with other ``parts`` one of its relatives; ``route`` and ``on`` say what its matrices are."""
    method = (parts or soap_preconditioner)(b1=b1, b2=b2, eps=eps, **options)
    fallback = method.with_first(_adam(b1, b2, eps) if fallback is None else fallback)

    def build(matrices: list[Any]) -> Freezable:
        return on(name, method, matrices)

    return skip_nonfinite(route(name, build, fallback, axes=axes, kinds=KINDS, describe=method.describe))


def complete(
    name: str,
    learning_rate: Any,
    weight_decay: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    mask: Mask,
    fallback: Any,
    axes: Any,
    first_step: str,
    parts: Callable[..., Preconditioner] | None = None,
    route: Callable[..., Any] = with_fallback,
    on: Callable[..., Any] = lambda name, method, axes: method.on_matrices(axes),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`soap`, or with other ``parts`` one of its relatives; ``route`` and ``on`` say what its matrices are."""
    method = (parts or soap_preconditioner)(b1=b1, b2=b2, eps=eps, first_step=first_step, **options)
    in_range("learning_rate", learning_rate, 0)
    in_range("weight_decay", weight_decay, 0)

    def build(matrices: list[Any]) -> optax.GradientTransformation:
        decay = decay_after_step(learning_rate, weight_decay, mask, lambda updates: True)
        decay = skip_first_call(decay, freeze=False) if first_step == "skip" else decay
        return chain(on(name, method, matrices), optax.scale_by_learning_rate(learning_rate), decay)

    if fallback is None:
        # AdamW, whose Adam waits with the matrices while its schedules count calls, as theirs do.
        rest = optax.chain(decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate))
        rest = skip_first_call(rest, freeze=False) if first_step == "skip" else rest
        fallback = chain(method.with_first(_adam(b1, b2, eps)), rest)
    else:
        fallback = method.with_first(fallback)
    return skip_nonfinite(route(name, build, fallback, axes=axes, kinds=KINDS, describe=method.describe))


def soap_preconditioner(
    b1: Any,
    b2: Any,
    eps: Any,
    shampoo_beta: Any,
    bias_correction: bool,
    normalize_updates: bool,
    decomposition: str,
    momentum_dtype: Any,
    factors: Callable[[Any], FactorRule] = outer_product,
    inner: optax.GradientTransformation | None = None,
    application: Application | None = None,
    **options: Any,
) -> Preconditioner:
    """SOAP's preconditioner; ``factors`` makes other factors of their decay, ``inner`` runs in the basis in Adam's
    place, or ``application`` does all.
    """
    in_range("b1", b1, 0, 1)
    in_range("b2", b2, 0, 1)
    in_range("eps", eps, 0)
    in_range("shampoo_beta", 0.0 if shampoo_beta is None else shampoo_beta, 0, 1)
    if decomposition not in DECOMPOSITIONS:
        raise ValueError(f"decomposition must be one of {', '.join(map(repr, DECOMPOSITIONS))}; got {decomposition!r}.")
    rule, decompose = factors(b2 if shampoo_beta is None else shampoo_beta), DECOMPOSITIONS[decomposition]()
    decompose = decompose if rule.track is None else with_eigenvalues(decompose)
    inner = adam(b1, b2, eps, bias_correction, momentum_dtype, normalize_updates) if inner is None else inner
    return preconditioner(rule, decompose, application or in_eigenbasis(inner), **options)


def _adam(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformation:
    return scheduled(optax.scale_by_adam, b1=b1, b2=b2, eps=eps)
