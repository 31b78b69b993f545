"""KFAC-SOAP: Adam in the eigenbases of K-FAC's factors instead of Shampoo's."""

import functools
from collections.abc import Callable

import optax
from jaxtyping import PyTree

from .._arguments import injectable
from ..capture.to_optimizer import layer_axes, on_layers, same_shapes, unused_statistics
from ..matrices.layout import Layer
from ..preconditioner.contracts import FactorRule, Refresh, Storage
from ..preconditioner.factors import kronecker
from ..preconditioner.precondition import direction, optimizer, scheduled_adam
from ..preconditioner.transform import Preconditioner
from ..statistics import LayerFactors
from ..transforms.decay import Mask, WeightDecay
from ..transforms.fallback import layers_with_fallback
from ..transforms.skip_nonfinite import Freezable
from .soap import adam_in_bases, decay_of


@injectable
def scale_by_kfac_soap(
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
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `kfac_soap`, without learning rate and decay; ``fallback`` is a direction too, default
    ``optax.scale_by_adam(b1, b2, eps)``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_kfac_soap(), optax.scale_by_learning_rate(3e-3))
    """
    method = adam_in_bases(
        "kfac_soap",
        averages(decay_of(shampoo_beta, b2)),
        b1,
        b2,
        eps,
        bias_correction,
        normalize_updates,
        precondition_frequency,
        max_precond_dim,
        refresh,
        storage,
    )
    return direction(
        "kfac_soap",
        method,
        fallback,
        axes,
        adam=scheduled_adam(b1, b2, eps),
        route=functools.partial(layers_with_fallback, unused=unused_statistics),
        on_matrices=_on_layers(method),
    )


@injectable
def kfac_soap(
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
    mask: Mask = None,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """KFAC-SOAP: Adam in the eigenbases of K-FAC's factors instead of Shampoo's.

        A ← βs A + (1-βs) a aᵀ,  B ← βs B + (1-βs) δ δᵀ   of the layer's inputs and output gradients, the bias an input
        of 1;   g = Q_Aᵀ G Q_B, and all else as in `fo.soap`

    ``update(grads, state, params, statistics=stats)`` takes the statistics of `fo.value_and_grad` with
    `fo.KroneckerFactors`; with ``statistics=None`` factors stay as they are, and so do those of an expert that got no
    rows. A side longer than ``max_precond_dim`` is left unrotated.

    Args:
      shampoo_beta: βs; None: ``b2``.
      learning_rate, b1, b2, eps, weight_decay, precondition_frequency, max_precond_dim, bias_correction,
        normalize_updates, refresh, storage, mask, fallback, axes: as in `fo.soap`.

    Raises:
      ValueError, TypeError: at construction, for an argument out of range or of the wrong kind; in `update`, without
        ``statistics``, or with those of another kind, shape or axes.

    Sources: Vyas et al. 2024 (arXiv 2409.11321) for SOAP, Martens and Grosse 2015 (arXiv 1503.05671) for A and B.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params, x, y = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, jnp.ones((8, 4)), jnp.ones((8, 3))
      >>> loss = lambda p: fo.losses.gaussian(x @ p["kernel"] + p["bias"], y)
      >>> tx = fo.kfac_soap(3e-3)
      >>> value, grads, stats = fo.value_and_grad(loss)(params)
      >>> updates, state = tx.update(grads, tx.init(params), params, statistics=stats)
    """
    method = adam_in_bases(
        "kfac_soap",
        averages(decay_of(shampoo_beta, b2)),
        b1,
        b2,
        eps,
        bias_correction,
        normalize_updates,
        precondition_frequency,
        max_precond_dim,
        refresh,
        storage,
    )
    return optimizer(
        "kfac_soap",
        method,
        fallback,
        axes,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        adam=scheduled_adam(b1, b2, eps),
        route=functools.partial(layers_with_fallback, unused=unused_statistics),
        on_matrices=_on_layers(method),
    )


def _on_layers(method: Preconditioner) -> Callable[[list[Layer]], Freezable]:
    def fits(layer: Layer, statistics: LayerFactors, shape: tuple[int, ...]) -> None:
        same_shapes("kfac_soap", method.storage, False, layer, statistics, shape)

    def build(layers: list[Layer]) -> Freezable:
        inner = method.on_matrices(layer_axes(layers))
        return on_layers(inner, layers, method="kfac_soap", wants=LayerFactors, check=fits)

    return build


def averages(decay: optax.ScalarOrSchedule) -> FactorRule:
    """K-FAC's. A basis begins with all others, since moments follow the order of its columns from then on."""
    return kronecker(decay)._replace(begins=None)
