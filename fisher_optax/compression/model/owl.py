"""Which layers lose more: those with fewer outliers among their weights times inputs.

    A_ij = |W_ij| sqrt(H_ii)         D_l = share of A above M times its mean
    S_l = S - λ (D_l - D̄) / max |D - D̄|,   D̄ the mean by weights: the mean sparsity is S, and each within S ± λ

Source: Yin et al. 2024 (arXiv 2310.05175), S_l ∝ 1 - D_l within S ± λ. Their code stretches D to a range of 2 λ, and a
  layer may leave S ± λ; here none does.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree
from tqdm import tqdm

from ...matrices.axes import made
from ...matrices.floats import on_whole, without_rest
from ..matrix import checking
from ..matrix.masks import Pattern, Sparsity, as_sparsity
from ..matrix.scores import wanda_scores
from .calibration import Mask, finite, first_of, input_gram, rereadable
from .layers import Layers, find_layers


def outlier_share(W: ArrayLike, H: ArrayLike, M: float = 5.0) -> Float[Array, ""]:
    """The share of ``|W_ij| sqrt(H_ii)`` above M times their mean.

    Args:
      W: ``(*batch, inputs, outputs)``.
      H: ``(*batch, inputs, inputs)``, the mean of x xᵀ.
      M: 5 in the source.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> float(fo.compression.outlier_share(jnp.ones((10, 1)).at[0].set(100.0), jnp.eye(10)))
      0.10000000149011612
    """
    W = checking.kernel("outlier_share", W)
    A = wanda_scores(W, checking.gram("outlier_share", H, W))
    return jnp.mean(M * jnp.mean(A) < A)


def owl(
    apply_fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    sparsity: Sparsity,
    *,
    M: float = 5.0,
    spread: float = 0.08,
    group: Callable[[str], str] | None = None,
    layers: Layers = None,
    axes: PyTree = None,
    mask: Mask = None,
    progress: bool = True,
) -> dict[str, float]:
    """A share to remove for each layer, or part of one, by name, made for ``fo.compression.prune(...,
    sparsity=)``; its rule and source are at the top of this file.

    Args:
      apply_fn, params, batches, layers, axes, mask, progress: as for `prune`; inputs are those of the model as given.
      sparsity: S, of all weights of these layers together.
      M: what makes an outlier; the source uses 5.
      spread: λ, how far a layer's share may be from S.
      group: layers of one group share D, by their path: ``lambda path: path.split("/")[0]`` for blocks, as in the
        source. None: each layer for itself.

    Raises:
      ValueError: for a pattern instead of a share, and a spread that leaves [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, fisher_optax as fo
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)]), jnp.ones((9, 4))
      >>> shares = fo.compression.owl(model.apply, model.init(jax.random.key(0), x), [x], 0.5, progress=False)
      >>> sorted(shares), round(sum(shares.values()) / 2, 3)
      (['params/layers_0/kernel', 'params/layers_2/kernel'], 0.5)
    """
    S = as_sparsity(sparsity)
    if isinstance(S, Pattern):
        raise ValueError(f"owl shares a sparsity out over layers: give a share, not {sparsity!r}.")
    if not spread >= 0 or (spread and not (S - spread >= 0 and S + spread < 1)):
        raise ValueError(f"spread must leave every layer a share in [0, 1): {S} ± {spread} does not.")
    batches = rereadable(batches)
    floats, whole = without_rest(params)
    apply_fn, axes = on_whole(apply_fn, params, whole), made(axes, params)
    found, leaves = find_layers(apply_fn, floats, first_of(batches), layers, axes), jax.tree.leaves(floats)
    outliers, sizes, keys = {}, {}, {}
    for layer in tqdm(found, "outliers", disable=not progress, unit="layer"):
        H = finite(input_gram(apply_fn, floats, batches, layer, mask), layer)
        for piece in layer.pieces:
            W = piece.read(jnp.asarray(leaves[layer.leaf]))
            shares = [float(outlier_share(w, piece.moment(H, i), M)) for i, w in enumerate(W)]
            keys[piece.name] = key = piece.name if group is None else group(layer.path)
            outliers[key] = outliers.get(key, 0.0) + sum(shares) / len(shares) * piece.size
            sizes[key] = sizes.get(key, 0) + piece.size
    D = {key: outliers[key] / sizes[key] for key in sizes}
    mean = sum(outliers.values()) / sum(sizes.values())
    widest = max(abs(d - mean) for d in D.values())
    scale = spread / widest if widest > 0 else 0.0
    return {name: S - scale * (D[key] - mean) for name, key in keys.items()}
