"""KFAC-SOAP: Adam in the eigenbases of K-FAC's factors instead of Shampoo's.

    A ← β A + (1-β) a aᵀ,  B ← β B + (1-β) δ δᵀ   of the layer's inputs and output gradients, the bias an input of 1
    g = Q_Aᵀ G Q_B,  and all else as in SOAP

Sources: Vyas et al. 2024 (arXiv 2409.11321) for SOAP, Martens and Grosse 2015 (arXiv 1503.05671) for A and B.
"""

from typing import Any

import optax

from ..capture.to_optimizer import layer_axes, on_layers
from ..matrices.layers import Layer
from ..preconditioner.factors import kronecker
from ..preconditioner.transform import Preconditioner
from ..statistics import LayerFactors
from ..transforms.fallback import layers_with_fallback
from ..transforms.hyperparameters import injectable, takes
from . import soap as soap_parts
from ._sides import same_shapes


@injectable
@takes(soap_parts.scale_by_soap)
def scale_by_kfac_soap(**options: Any) -> optax.GradientTransformationExtraArgs:
    """The direction of `kfac_soap`, in `fo.scale_by_soap`'s arguments."""
    return soap_parts.direction("kfac_soap", route=layers_with_fallback, on=_on_layers, factors=kronecker, **options)


@injectable
@takes(soap_parts.soap)
def kfac_soap(**options: Any) -> optax.GradientTransformationExtraArgs:
    """KFAC-SOAP (see the top of this file for the rule), in `fo.soap`'s arguments; ``shampoo_beta`` is the decay of A
    and B.

    ``update(grads, state, params, statistics=stats)`` takes the statistics of `fo.value_and_grad` with
    `fo.KroneckerFactors`; with ``statistics=None`` factors stay as they are. A side longer than ``max_precond_dim`` is
    left unrotated.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params, x, y = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, jnp.ones((8, 4)), jnp.ones((8, 3))
      >>> loss = lambda p: fo.losses.gaussian(x @ p["kernel"] + p["bias"], y)
      >>> tx = fo.kfac_soap(3e-3)
      >>> value, grads, stats = fo.value_and_grad(loss)(params)
      >>> updates, state = tx.update(grads, tx.init(params), params, statistics=stats)
    """
    return soap_parts.complete("kfac_soap", route=layers_with_fallback, on=_on_layers, factors=kronecker, **options)


def _on_layers(name: str, method: Preconditioner, layers: list[Layer]) -> optax.GradientTransformationExtraArgs:
    def fits(*given: Any) -> None:
        same_shapes(name, method.storage, False, *given)

    inner = method.on_matrices(layer_axes(layers))
    return on_layers(inner, layers, method=name, wants=LayerFactors, check=fits)
