"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

import dataclasses

import optax
from jaxtyping import PyTree

from .._arguments import in_range, injectable, one_of
from ..preconditioner.applications import adam, in_eigenbasis
from ..preconditioner.contracts import (
    Application,
    FactorRule,
    Products,
    Refresh,
    Storage,
    products_of,
    refresh_of,
    storage_of,
)
from ..preconditioner.decompositions import eigh, orthogonal_iteration, with_eigenvalues
from ..preconditioner.factors import outer_product
from ..preconditioner.precondition import FACTORS, direction, optimizer, preconditioner, scheduled_adam
from ..preconditioner.transform import Preconditioner
from ..transforms.decay import Mask, WeightDecay

DECOMPOSITIONS = ("auto", "qr", "cholesky", "eigh")

STORAGE = (*FACTORS, "momentum_dtype")


@injectable
def scale_by_soap(
    b1: optax.ScalarOrSchedule = 0.95,
    b2: optax.ScalarOrSchedule = 0.95,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    bias_correction: bool = True,
    normalize_updates: bool = False,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    products: Products | None = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `soap`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam(b1, b2, eps)``.

    Example (SOAP, then orthogonalised, after Nesterov momentum, as a plain chain; `fo.soap_muon` is another method):
      >>> import optax, fisher_optax as fo
      >>> polar = fo.precondition(None, None, fo.applications.orthogonal(scale="match_rms_adamw"),
      ...                         fallback=optax.identity())
      >>> tx = optax.chain(optax.trace(0.95, nesterov=True), fo.scale_by_soap(b1=0.0), polar,
      ...                  optax.scale_by_learning_rate(3e-3))
    """
    products = products_of(products)
    method = adam_in_bases(
        "soap",
        outer_product(decay_of(shampoo_beta, b2), precision=products.factors),
        b1,
        b2,
        eps,
        bias_correction,
        normalize_updates,
        precondition_frequency,
        max_precond_dim,
        refresh,
        storage,
        products,
    )
    return direction("soap", method, fallback, axes, adam=scheduled_adam(b1, b2, eps))


@injectable
def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: optax.ScalarOrSchedule = 0.95,
    b2: optax.ScalarOrSchedule = 0.95,
    eps: optax.ScalarOrSchedule = 1e-8,
    weight_decay: WeightDecay = 0.01,
    *,
    shampoo_beta: optax.ScalarOrSchedule | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    bias_correction: bool = True,
    normalize_updates: bool = False,
    refresh: Refresh | str = "every",
    storage: Storage | None = None,
    products: Products | None = None,
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP: Adam in the eigenbasis of Shampoo's factors.

        g = Q_Lᵀ G Q_R;   m ← b1 m + (1-b1) g;   v ← b2 v + (1-b2) g²          the basis of earlier gradients
        W ← W - lr sqrt(1-b2ᵗ)/(1-b1ᵗ) Q_L [m / (sqrt(v) + eps)] Q_Rᵀ;   W ← W - lr wd W
        L ← βs L + (1-βs) G Gᵀ;   R ← βs R + (1-βs) Gᵀ G
        every k steps   Q_L ← qr(L Q_L),   Q_R ← qr(R Q_R)

    Moments stay in the basis and turn when it turns, which is the same mathematics as the authors' at 6mn(m+n)
    instead of 10mn(m+n) flops a step.

    Args:
      learning_rate: number or schedule; the authors' 3e-3. Adam's rates are a good start.
      b1, b2: decay of first and second moment, numbers or schedules.
      eps: number or schedule, added to ``sqrt(v)`` before the bias correction, in units of the gradient. It does not
        keep out the rounding of rotated gradients, which has their scale: entries of ``sqrt(v)`` below 16 to 256 units
        of rounding (2e-6 to 3e-5 in float32, by the length of the side) of the norms of their row and column get no
        step, so that a weight or direction that never had a gradient stays, at any scale.
      weight_decay: after the step, per unit of learning rate, number or schedule; or an `fo.Decay`.
      shampoo_beta: βs, decay of the factors; None: ``b2``.
      precondition_frequency: steps between refreshes of a basis. 10 costs little loss. A large gradient in a new
        direction makes a spike even with 1, since it steps before it turns the basis: see ``before_step`` of `Refresh`.
      max_precond_dim: a longer side is left unrotated; with 0 both are, and SOAP is Adam.
      bias_correction: Adam's, of the moments; the factors have none, since a scale does not turn a basis.
      normalize_updates: scale every matrix's direction to root mean square 1.
      refresh: when and how bases are renewed, a `fo.Refresh` or a word for its ``when``; its decomposition is "qr"
        (Householder), "cholesky" (the same by products), "eigh", or "auto", the default: "qr" on a CPU, "cholesky" on a
        TPU or GPU, where QR is slow to compile or to run (`fo.decompositions.orthogonal_iteration`); ``transport`` and
        ``first_step`` are the authors' "permute" and "skip".
      storage: what is kept, a `fo.Storage`, without ``rank``.
      products: how exactly an accelerator multiplies, a `fo.Products`; None: in float32.
      mask: which parameters decay, as in `optax.adamw`.
      fallback: a complete optimizer for what is no matrix and for embeddings, default ``optax.adamw`` with the same
        arguments.
      axes: None (rules by path and shape, see `fo.report`; an `fo.AxesWarning` names what they leave open), "strict"
        (the same, as an error), "out_in" (the rules for a tree that stores outputs first), a tree of `fo.MatrixAxes`,
        e.g. from `fo.infer_axes`, or a function of params.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind.

    Source: Vyas et al. 2024 (arXiv 2409.11321), Algorithm 3, and the authors' code, whose order of operations this
      follows.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 3))}
      >>> tx = fo.soap(optax.cosine_decay_schedule(3e-3, 100), refresh="staggered")
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    products = products_of(products)
    method = adam_in_bases(
        "soap",
        outer_product(decay_of(shampoo_beta, b2), precision=products.factors),
        b1,
        b2,
        eps,
        bias_correction,
        normalize_updates,
        precondition_frequency,
        max_precond_dim,
        refresh,
        storage,
        products,
    )
    return optimizer(
        "soap",
        method,
        fallback,
        axes,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        adam=scheduled_adam(b1, b2, eps),
    )


def adam_in_bases(
    name: str,
    factors: FactorRule,
    b1: optax.ScalarOrSchedule,
    b2: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule,
    bias_correction: bool,
    normalize_updates: bool,
    precondition_frequency: int,
    max_precond_dim: int,
    refresh: Refresh | str,
    storage: Storage | None,
    products: Products = Products(),  # noqa: B008  frozen
) -> Preconditioner:
    """These factors x orthogonal iteration x Adam in the eigenbasis: SOAP and its nearest relatives."""
    check_moments(b1, b2, eps)
    storage = storage_of(name, storage, STORAGE)
    inner = adam(b1, b2, eps, bias_correction, storage.momentum_dtype, normalize_updates)
    return in_bases_of(
        name,
        factors,
        # The root mean square is of all entries.
        in_eigenbasis(inner, precision=products.rotations)._replace(ignores_zeros=not normalize_updates),
        precondition_frequency,
        max_precond_dim,
        refresh,
        storage,
        basis_precision=products.basis,
    )


def in_bases_of(
    name: str,
    factors: FactorRule,
    application: Application,
    precondition_frequency: int,
    max_precond_dim: int,
    refresh: Refresh | str,
    storage: Storage,
    *,
    transports: bool = True,
    skips: bool = True,
    basis_precision: str = "highest",
) -> Preconditioner:
    """SOAP's preconditioner with these factors, and this done in their bases; ``transports`` says whether there are
    squares to carry along, ``skips`` whether the first call may only set bases.
    """
    takes: dict[str, str | float] = {"decomposition": "auto", "tolerance": 0.01}
    takes |= {"transport": "permute"} if transports else {}
    takes |= {"first_step": "skip", "before_step": False} if skips else {}
    options = refresh_of(name, refresh, takes)
    if not skips:
        options = dataclasses.replace(options, first_step="adam")
    one_of("decomposition", options.decomposition, DECOMPOSITIONS)
    way = options.decomposition or "auto"
    decomposition = eigh() if way == "eigh" else orthogonal_iteration(way, precision=basis_precision)
    return preconditioner(
        factors,
        decomposition if factors.track is None else with_eigenvalues(decomposition),
        application,
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        refresh=options,
        storage=storage,
    )


def decay_of(shampoo_beta: optax.ScalarOrSchedule | None, b2: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    """βs, which is b2 unless it is given."""
    in_range("b2", b2, 0, 1)
    in_range("shampoo_beta", 0.0 if shampoo_beta is None else shampoo_beta, 0, 1)
    return b2 if shampoo_beta is None else shampoo_beta


def check_moments(b1: optax.ScalarOrSchedule, b2: optax.ScalarOrSchedule, eps: optax.ScalarOrSchedule) -> None:
    """A ValueError for what is out of range."""
    in_range("b1", b1, 0, 1)
    in_range("b2", b2, 0, 1)
    in_range("eps", eps, 0)
