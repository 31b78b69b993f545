"""Which sides of a layer's statistics a preconditioner must have whole."""

from ..linalg.eigenbasis import LowRank
from ..matrices.layout import Layer
from ..preconditioner.storage import Store
from ..statistics import LayerFactors, Logits


def whole_sides(method: str, storage: Store, layer: Layer, shape: tuple[int, ...]) -> None:
    """A ValueError unless both sides of a matrix of that shape have a basis."""
    *_, m, n = shape
    if not all(storage.wanted(m, n)):
        raise ValueError(
            f"fo.{method}: {layer.path!r} is {m} x {n}, longer than max_precond_dim={storage.max_dim}, and a side of "
            "low rank has no whole basis: raise max_precond_dim, or leave the layer to the fallback by axes=."
        )


def same_shapes(
    method: str, storage: Store, squares: bool, layer: Layer, given: LayerFactors, shape: tuple[int, ...]
) -> None:
    """A ValueError unless the statistics are of a matrix of that shape, each side kept as the optimizer keeps it."""
    *_, m, n = shape
    if squares and given.squares is None:
        raise ValueError(
            f"fo.{method}: statistics of {layer.path!r} have no squares: use fo.KroneckerFactors(squares=True) and "
            "grad_fn(..., bases=fo.eigenbases(opt_state, params))."
        )
    if isinstance(given.right, Logits):
        raise ValueError(
            f"fo.{method}: the right statistics of {layer.path!r} are logits, which fo.kfac(head=...) takes of a layer "
            "called head, lm_head or logits: call it so and pass head=, or leave head_rows= out of fo.KroneckerFactors."
        )
    for name, side, d, whole in zip(
        ("left", "right"), (given.left, given.right), (m, n), storage.wanted(m, n), strict=True
    ):
        have = (
            "nothing" if side is None else f"{side.rows.shape} rows" if isinstance(side, LowRank) else f"{side.shape}"
        )
        fits = isinstance(side, LowRank) if not whole else getattr(side, "shape", ())[-2:] == (d, d)
        if not fits:
            wanted = f"a {d} x {d} matrix" if whole else f"rows of a side longer than {storage.max_dim}"
            raise ValueError(
                f"fo.{method}: the {name} statistics of {layer.path!r} are {have}; wanted {wanted}. Give the optimizer "
                "and fo.KroneckerFactors the same max_precond_dim=max_dim and rank; axes=fo.infer_axes(loss_fn, "
                "params, batch) leaves to the fallback what is only looked up."
            )
