"""Which axes of a model count the tokens of its vocabulary: as the program has it, by names, or as a user says."""

import math
from collections.abc import Callable, Mapping, Sequence

from jaxtyping import PyTree

from ..capture.roles import Role, read_roles
from ..matrices.axes import LeafAxes
from ..matrices.floats import on_whole, without_rest
from ..matrices.rules import is_told, resolve_axes

ASK = "Name the leaves to slice: leaves={path: vocabulary axis}."
SHOW = "Show the program: apply_fn= and batch=, or name the leaves to slice: leaves={path: vocabulary axis}."


def of_program(apply_fn: Callable[..., PyTree], params: PyTree, batch: PyTree, V: int | None) -> dict[str, int]:
    """Path -> axis of all that has one entry a token: tables that data is looked up in, and products that are returned.

    Raises:
      ValueError: for none of them, several tables that may be meant, lengths that differ, and leaves of that length
        whose use is not understood.
    """
    floats, whole = without_rest(params)
    roles = read_roles(on_whole(apply_fn, params, whole), floats, batch)
    tables = [(x, x.shape[x.tokens]) for x in roles if x.by_data and x.tokens is not None]
    length = lambda axes, shape: math.prod(shape[a] for a in axes.outputs)  # noqa: E731
    heads = [(x, length(x.axes, x.shape)) for x in roles if x.is_returned and x.axes and x.kind != "embedding"]
    rows, columns = ({n for _, n in some} for some in (tables, heads))
    if V is None:
        if len(sizes := rows & columns or rows or columns) != 1:
            raise ValueError(f"remove_tokens: which length is the vocabulary's? {_lengths(tables, heads)}. {ASK}")
        (V,) = sizes
    axes = {x.path: x.tokens for x, n in tables if n == V and x.tokens is not None}
    if len(axes) > 1:
        raise ValueError(f"remove_tokens: {_and(list(axes))} are tables of {V} that the data is looked up in. {ASK}")
    if (rows and not axes) or columns - {V} or not (rows or columns):
        raise ValueError(
            f"remove_tokens: {V} tokens do not fit all of the program: {_lengths(tables, heads)}. Bring table and head "
            f"to one length, or, where one of them is of something else, leave it out. {ASK}"
        )
    for head, _ in heads:
        outputs = [] if head.axes is None else [*head.axes.outputs, *head.axes.batch]
        if len(outputs) > 1:
            raise ValueError(f"remove_tokens: {head.path!r} {head.shape} has its tokens along several axes. {ASK}")
        axes[head.path] = outputs[0]
        axes |= {head.bias: 0} if head.bias is not None else {}
    biases = {x.bias for x in roles}
    for x in roles:
        if x.kind == "other" and x.path not in axes and x.path not in biases and V in x.shape:
            raise ValueError(
                f"remove_tokens: {x.path!r} {x.shape} has an axis of {V} too, and what the program does with it is not "
                f"understood. {ASK}"
            )
    return axes


def _lengths(tables: Sequence[tuple[Role, int]], heads: Sequence[tuple[Role, int]]) -> str:
    each = [f"the data is looked up in {n} rows of {x.path!r}" for x, n in tables]
    each += [f"{n} outputs of {x.path!r} are returned" for x, n in heads]
    return "; ".join(each) or "nothing is looked up by the data, and no product alone is returned"


def of_names(params: PyTree, V: int | None) -> dict[str, int]:
    """Path -> axis of V tokens, by the rules.

    Raises:
      ValueError: where another reading is left.
    """
    found = resolve_axes(params)
    embeddings = [x for x in found if x.kind == "embedding"]
    heads = [x for x in found if x.kind == "head" and x.axes and len(x.axes.outputs) == 1]
    V = _length(embeddings, heads) if V is None else V
    if len(several := [x.path for x in embeddings if V in x.shape]) > 1:
        raise ValueError(
            f"remove_tokens: {_and(several)} both have an axis of {V}, and may be embeddings of tokens, of positions "
            f"or other things. {SHOW}"
        )
    _require_alike(embeddings, heads, V)
    biases = {x.bias for x in heads}
    sliced = {x.path: x.shape for x in found if V in x.shape and (x in embeddings or x in heads or x.path in biases)}
    for x in found:
        if x.path in sliced and x.shape.count(V) > 1:
            raise ValueError(f"remove_tokens: {x.path!r} has two axes of {V}, {x.shape}. {SHOW}")
        if x.path not in sliced and V in x.shape:
            raise ValueError(
                f"remove_tokens: {x.path!r} {x.shape} has an axis of {V} too, but is no embedding or head by its name. "
                f"{SHOW}"
            )
    return {path: shape.index(V) for path, shape in sliced.items()}


def _length(embeddings: Sequence[LeafAxes], heads: Sequence[LeafAxes]) -> int:
    """Of the vocabulary: what heads and an embedding have in common; a head alone has to be told by more than order."""
    rows = {x.shape[x.axes.inputs[0]] for x in embeddings if x.axes}
    outputs = {x.shape[x.axes.outputs[0]] for x in heads if x.axes}
    sizes = outputs & rows if outputs and rows else outputs or rows
    is_clear = bool(rows) or all(map(is_told, heads))
    if len(sizes) == 1 and len(outputs) < 2 and is_clear:
        return next(iter(sizes))
    names = ", ".join(f"{x.path!r} {x.shape}" for x in (*embeddings, *heads)) or "no head and no embedding"
    raise ValueError(f"remove_tokens: which length is the vocabulary's? There is {names}. Pass vocabulary=. {SHOW}")


def _require_alike(embeddings: Sequence[LeafAxes], heads: Sequence[LeafAxes], V: int) -> None:
    """A ValueError where an embedding and a head are of different vocabularies."""
    without = [] if any(V in x.shape for x in embeddings) else list(embeddings)
    for x in heads:
        assert x.axes is not None
        if x.shape[x.axes.outputs[0]] != V and (is_told(x) or V not in x.shape):
            without.append(x)
    some = any(V in x.shape for x in (*embeddings, *heads))
    if not some:
        raise ValueError(f"remove_tokens: no embedding or head has an axis of {V}. {SHOW}")
    if without:
        names = ", ".join(f"{x.path!r} {x.shape}" for x in (*embeddings, *heads))
        raise ValueError(
            f"remove_tokens: {V} tokens do not fit {_and([x.path for x in without])}; there is {names}. Where one is "
            "padded, bring both to one length, since new ids would mean other tokens to one than to the other; where "
            f"one is of something else, leave it out. {ASK}"
        )


def of_user(params: PyTree, leaves: Mapping[str, int]) -> dict[str, int]:
    """``leaves``, checked.

    Raises:
      ValueError: for none, and paths and axes that are not there.
    """
    shapes = {x.path: x.shape for x in resolve_axes(params)}
    if not leaves:
        raise ValueError("remove_tokens: leaves= is empty; name at least one path and its vocabulary axis.")
    for path, axis in leaves.items():
        if path not in shapes:
            raise ValueError(
                f"remove_tokens: no leaf {path!r}; there are {', '.join(map(repr, list(shapes)[:8]))}, ..."
            )
        rank = len(shapes[path])
        if not -rank <= axis < rank:
            raise ValueError(f"remove_tokens: {path!r} is {shapes[path]} and has no axis {axis}.")
    return dict(leaves)


def _and(paths: Sequence[str]) -> str:
    return " and ".join(map(repr, paths))
