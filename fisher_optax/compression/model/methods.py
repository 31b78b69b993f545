"""The pruning methods by name, and how to add one: a function of a matrix and of what is known about it."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from jaxtyping import Array, PyTree

from ..matrix.checking import Number
from ..matrix.obert import block_moments, from_moments
from ..matrix.obs import solve as solve_obs
from ..matrix.scores import fisher, fisher_scores, magnitude, magnitude_scores, wanda, wanda_scores
from ..matrix.sparsegpt import solve as solve_sparsegpt

NEEDS = ("weights", "inputs", "fisher")
Needs: TypeAlias = str | Callable[[Array], PyTree]  # one of `NEEDS`, or a function of gradients
Prune: TypeAlias = Callable[..., Sequence[Number]]  # gives weights, mask, and the damping where there is one
Scores: TypeAlias = Callable[..., Array]


class Method(NamedTuple):
    """How `prune` treats one matrix ``W: (inputs, outputs)``.

    ``prune(W, X, sparsity)`` (without X where ``needs`` is "weights") returns the new weights and the mask, and if it
    damps also the damping it took. ``scores(W, X)`` is what weights are ranked by over all layers.
    """

    name: str
    prune: Prune
    needs: Needs
    scores: Scores | None = None
    damping: float | None = None  # asked for

    @property
    def needs_batches(self) -> bool:
        """Whether it looks at data."""
        return self.needs == "inputs" or callable(self.needs)


_FACTORIES: dict[str, Callable[..., Method]] = {}


def register(name: str, prune: Prune, *, needs: Needs = "inputs", scores: Scores | None = None) -> None:
    """Makes ``fo.compression.prune(..., method=name)`` know one more method.

    Args:
      name: not taken yet.
      prune: ``prune(W, X, sparsity, **options)`` -> ``(weights, mask)``, for one matrix ``W: (inputs, outputs)``; the
        mask is True where a weight stays, as `fo.compression.mask` makes it. Options of `prune` that it does not know
        are passed on. It may return a third value, the damping it took, for the report.
      needs: what X is. "inputs": ``H: (inputs, inputs)``, the mean of x xᵀ over the layer's inputs. "fisher": F shaped
        like W, from ``fisher=``. "weights": nothing, it is called as ``prune(W, sparsity)``. Or a function of gradients
        of single examples ``(examples, inputs, outputs)``, by ``loss_fn=``: X is the mean of what it returns.
      scores: ``scores(W, X)``, shaped like W, larger for what matters more; for ``scope="global"``.

    Raises:
      ValueError: for a name that is taken, or unknown needs.

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> def by_chance(W, sparsity, seed=0):
      ...     stays = fo.compression.mask(jax.random.uniform(jax.random.key(seed), W.shape), sparsity)
      ...     return W * stays, stays
      >>> fo.compression.register("chance", by_chance, needs="weights")
      >>> model = lambda params, x: x @ params["kernel"]
      >>> pruned = fo.compression.prune(
      ...     model, {"kernel": jnp.ones((4, 2))}, [jnp.ones((3, 4))], "chance", 0.25, seed=1, progress=False
      ... )
      >>> int(pruned.masks["kernel"].sum())
      6
    """
    if name in _FACTORIES:
        raise ValueError(f"there is a method {name!r} already: take another name.")
    if not callable(needs) and needs not in NEEDS:
        raise ValueError(f"needs must be one of {', '.join(map(repr, NEEDS))} or a function; got {needs!r}.")
    _FACTORIES[name] = functools.partial(_of_function, name, prune, needs, scores)


def find_method(method: str, options: dict[str, PyTree]) -> Method:
    """A method with its options, by its name.

    Raises:
      ValueError, TypeError: for an unknown name or option.
    """
    if method not in _FACTORIES:
        raise ValueError(f"method must be one of {', '.join(map(repr, sorted(_FACTORIES)))}; got {method!r}.")
    return _FACTORIES[method](**options)


def _of_function(name: str, prune: Prune, needs: Needs, scores: Scores | None, **options: PyTree) -> Method:
    known = inspect.signature(prune).parameters
    unknown = [o for o in options if o not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        rest = [p for p in list(known)[2 if needs == "weights" else 3 :] if p != "mask"]
        raise TypeError(f"{name} has no option {unknown[0]!r}; it has {', '.join(rest) or 'none'}.")
    asked = options.get("damping", known["damping"].default if "damping" in known else None)
    return Method(name, functools.partial(prune, **options), needs, scores, asked)


@functools.cache
def _moments(block: int) -> Callable[..., Array]:
    """One object a size, by which `jit` knows it again."""
    return functools.partial(block_moments, block=block)


def _obert(block: int = 50, **options: PyTree) -> Method:
    return _of_function("obert", from_moments, _moments(block), None, **options)


register("magnitude", magnitude, needs="weights", scores=magnitude_scores)
register("wanda", wanda, scores=wanda_scores)
register("fisher", fisher, needs="fisher", scores=fisher_scores)
register("sparsegpt", solve_sparsegpt)
register("obs", solve_obs)
_FACTORIES["obert"] = _obert
