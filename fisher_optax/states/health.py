"""What an optimizer state says of its run, and whether it fits: `health` and `check_state`.

Both go by the paths of arrays, which are the same whatever a state lies in: a chain, the boxes of `nnx.Optimizer`, the
dictionaries of a checkpoint.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from ..matrices.axes import path_names
from ..transforms.skip_nonfinite import STATE_VERSION, GuardState

Names = tuple[str, ...]
UNTYPED = (
    "as a checkpoint restored without a target gives it, and nnx.state: restore it into the structure of "
    "`jax.eval_shape(tx.init, params)`, or put it into its nnx.Optimizer by `nnx.update(optimizer, state)`"
)


@runtime_checkable
class Optimizer(Protocol):
    """What makes states: an Optax transformation, or `optax.MultiSteps`, which is none."""

    @property
    def init(self) -> Callable[..., PyTree]: ...


class Health(NamedTuple):
    """What went wrong so far, summed over the transformations of this package in a state, and over the members of one
    that `jax.vmap` made; ``steps`` is the largest.
    """

    version: int
    steps: int  # carried out
    skipped: int  # not carried out: a gradient, or its square, was not finite
    failures: int  # of decompositions: the last good one stayed


def health(state: PyTree) -> Health:
    """Read the counters out of an optimizer state, however deep.

    Args:
      state: of an optimizer, inside whatever holds it: wrappers, a train state, an `nnx.Optimizer`, a list of states,
        a checkpoint's dictionaries; also of many members, from `jax.vmap`.

    Raises:
      ValueError: where there is no state of this package in it, or one of another version (from a checkpoint, say), or
        no numbers, as inside `jax.jit`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> tx = fo.muon(1e-2)
      >>> fo.health(tx.init({"w": jnp.ones((4, 4))})).skipped
      0
    """
    arrays = _arrays(state)
    guards = _guards(arrays)
    if not guards:
        raise ValueError(
            f"health: no state of fisher_optax in {type(state).__name__}; pass the optimizer state, e.g. "
            "train_state.opt_state."
        )
    counts = {field: [_number(arrays[*at, field]) for at in guards] for field in ("version", "steps", "skipped")}
    versions = sorted({int(v) for version in counts["version"] for v in version.ravel()})
    if versions != [STATE_VERSION]:
        raise ValueError(
            f"health: state of version {versions}, this release reads {STATE_VERSION}; restore it with the "
            "release that saved it."
        )
    failures = [
        _number(x) for path, x in arrays.items() if path[-1] == "failures" and _is_counter(x) and _within(path, guards)
    ]
    steps = max(int(x.max(initial=0)) for x in counts["steps"])
    return Health(STATE_VERSION, steps, *(sum(int(x.sum()) for x in found) for found in (counts["skipped"], failures)))


def check_state(tx: Optimizer, state: PyTree, params: PyTree) -> None:
    """Check that a restored ``state`` is one that ``tx`` can continue on ``params``: version, structure, shapes and
    dtypes.

    Args:
      tx: the optimizer, with the wrappers that ``state`` was made by.
      state: its state; also an `nnx.Optimizer` or a train state that holds it, or that of many members, from
        `jax.vmap`.
      params: the parameters, or their `jax.ShapeDtypeStruct`; of many members, stacked as the state is.

    Raises:
      ValueError: naming the first thing that does not fit.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> tx, params = fo.soap(3e-3), {"w": jnp.ones((4, 4))}
      >>> fo.check_state(tx, tx.init(params), params)
    """
    health(state)
    state = state if isinstance(state, tuple) else getattr(state, "opt_state", state)  # SAM's has such a field too
    have = _arrays(state)
    members = np.shape(have[*_guards(have)[0], "version"])
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    _require_members(described, members)
    init = tx.init
    for _ in members:
        init = jax.vmap(init)
    wanted = jax.eval_shape(init, described)
    lines = list(_misfits(have, _arrays(wanted), list(_arrays(described)))) or list(_other_nodes(state, wanted))[:1]
    if lines:
        raise ValueError(
            "check_state: the state was made by another optimizer, with other options, or for other parameters; use "
            "those that it was saved with.\n  " + "\n  ".join(lines)
        )


def _arrays(tree: PyTree) -> dict[Names, PyTree]:
    return {path_names(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _is_counter(x: PyTree) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.integer)


def _guards(arrays: dict[Names, PyTree]) -> list[Names]:
    """Where the guards are in a state."""
    counters = [field for field in GuardState._fields if field != "inner"]
    found = [path[:-1] for path in arrays if path[-1] == counters[0]]
    return [at for at in found if all(_is_counter(arrays.get((*at, field), 0.0)) for field in counters)]


def _within(path: Names, places: list[Names]) -> bool:
    return any(path[: len(place)] == place for place in places)


def _number(x: PyTree) -> np.ndarray:
    if isinstance(x, Tracer | jax.ShapeDtypeStruct):
        raise ValueError(
            "health: the state holds no numbers, since it is being traced by jax.jit or the like, or described by "
            "jax.eval_shape; call it outside, on the state that comes out."
        )
    return np.asarray(x)


def _require_members(params: PyTree, members: tuple[int, ...]) -> None:
    for path, x in _arrays(params).items():
        if x.shape[: len(members)] != members:
            raise ValueError(
                f"check_state: the state is of {'x'.join(map(str, members))} members, made by jax.vmap, and the "
                f"parameter {'/'.join(path)!r} of shape {x.shape} does not begin with these axes; pass the parameters "
                "of all members, as they were given to jax.vmap(tx.init)."
            )


def _misfits(have: dict[Names, PyTree], wanted: dict[Names, PyTree], params: list[Names]) -> Iterator[str]:
    """A line for each way in which the arrays of two states differ, with the first that does."""
    own = {path: _own_name(path, params) for path in wanted}
    heads = {path[: len(path) - len(name)] for path, name in own.items() if name != path}

    def known(path: Names) -> Names:
        """Without the place in the state where the parameters' names begin."""
        lengths = [len(head) for head in heads if path[: len(head)] == head]
        return path[max(lengths, default=0) :]

    for paths, what in (
        ([own[path] for path in wanted if path not in have], "the state has nothing for it"),
        ([known(path) for path in have if path not in wanted], "the state holds it, and nothing here needs it"),
    ):
        if paths:
            count = len(set(paths)) - 1
            yield f"{_shown(paths[0])}: {what}" + (f" ({count} more like it)" if count else "")
    for path, x in have.items():
        if path in wanted and _type(x) != _type(wanted[path]):
            yield f"{_shown(path)}: {_type(x)} in the state, and {_type(wanted[path])} is needed"
            return


def _own_name(path: Names, params: list[Names]) -> Names:
    """The parameter that an array in a state is kept for, or the array's place where it is kept for no single one."""
    return next((path[k:] for k in range(len(path)) if path[k:] in params), path)


def _shown(path: Names, longest: int = 160) -> str:
    name = "/".join(path)
    return name if len(name) <= longest else f"...{name[-longest:]}"


def _type(x: PyTree) -> str:
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"


def _other_nodes(have: PyTree, wanted: PyTree, at: Names = ()) -> Iterator[str]:
    """A line for each node that is of another type or holds other things, at the same place."""
    have, wanted = _unboxed(have), _unboxed(wanted)
    (below, structure), (theirs, needed) = _children(have), _children(wanted)
    if structure == needed:
        for (path, x), (_, y) in zip(below, theirs, strict=True):
            if path:
                yield from _other_nodes(x, y, (*at, *path_names(path)))
        return
    kinds = [type(x).__name__ for x in (have, wanted)]
    how = f"a {kinds[0]}, and a {kinds[1]} is needed" if kinds[0] != kinds[1] else f"another {kinds[0]} than is needed"
    hint = f", {UNTYPED}" if isinstance(wanted, tuple) and not isinstance(have, tuple) else ""
    yield f"{_shown(at) or 'the state'}: {how}{hint}"


def _children(node: PyTree) -> tuple[list[tuple[KeyPath, PyTree]], object]:
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def _unboxed(node: PyTree) -> PyTree:
    """What lies in a box of ``nnx`` or ``nn``, which adds nothing to a path."""
    children, _ = _children(node)
    boxed = len(children) == 1 and children[0][0] == (jax.tree_util.GetAttrKey("value"),)
    return _unboxed(children[0][1]) if boxed else node
