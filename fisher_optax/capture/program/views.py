"""What is left of a parameter after transposes, reshapes, casts and slices: which of its axes are where.

An axis of a variable is a row-major product of atoms, each a stretch of one axis of the parameter, be it of length 1;
an axis that a reshape or broadcast has added has none. The same describes a product: its positions are axes of nothing
(negative numbers).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

REPEATED = None  # the source of an axis that only repeats what is there


class Atom(NamedTuple):
    """``size`` entries of axis ``source``, ``stride`` apart."""

    source: int | None
    size: int
    stride: int = 1


Dims = tuple[tuple[Atom, ...], ...]
Step = tuple[Literal["scan"], int] | tuple[Literal["at"], int, int]  # a loop over an axis, an index on one: its place


class View(NamedTuple):
    """A variable as an array of the entries of ``root``."""

    root: Any  # ("leaf", number), ("product", site) or ("input", number)
    dims: Dims
    steps: tuple[Step, ...] = ()  # by which loops and indices have come from the root to here
    sole: bool = True  # whether nothing else has read the root


def whole(root: tuple[Literal["leaf", "input"], int], shape: Sequence[int], first: int = 0) -> View:
    """All of an array, its axes numbered from ``first`` on."""
    return View(root, tuple((Atom(first + a, n),) for a, n in enumerate(shape)))


def through(view: View, name: str, params: dict[str, Any], shape: tuple[int, ...]) -> View | None:
    """The result, of that shape, of applying a primitive to the view; None where it is no view any more."""
    dims = view.dims
    if name in (
        "convert_element_type",
        "copy",
        "copy_p",
        "pvary",
        "pcast",
        "sharding_constraint",
        "reshard",
        "optimization_barrier",
    ):
        return view
    if name == "transpose":
        return view._replace(dims=tuple(dims[a] for a in params["permutation"]))
    if name == "squeeze":
        gone = {a % len(dims) for a in params["dimensions"]}
        return view._replace(dims=tuple(d for a, d in enumerate(dims) if a not in gone))
    if name == "reshape" and params.get("dimensions") is None:
        new = _reshaped(dims, shape)
        return None if new is None else view._replace(dims=new)
    if name == "broadcast_in_dim":
        return view._replace(dims=_broadcast(dims, shape, tuple(map(int, params["broadcast_dimensions"]))))
    if name == "slice" and all(stride == 1 for stride in params["strides"] or ()):
        return _sliced(view, params["start_indices"], params["limit_indices"])
    return None


def unstacked(view: View, axis: int) -> list[View | None]:
    """The views at each place of an axis, without the axis."""
    lengths, found = sizes(view.dims), []
    for place in range(lengths[axis]):
        start, stop = [0] * len(lengths), list(lengths)
        start[axis], stop[axis] = place, place + 1
        part = _sliced(view, start, stop)
        found.append(part and part._replace(dims=part.dims[:axis] + part.dims[axis + 1 :]))
    return found


def sizes(dims: Dims) -> tuple[int, ...]:
    """The shape of a variable with these axes."""
    return tuple(math.prod(a.size for a in d) for d in dims)


def _reshaped(dims: Dims, shape: tuple[int, ...]) -> Dims | None:
    """Atoms of length 1 go to an axis of length 1 at their place, or else to the one that follows."""
    rest = [a for d in dims for a in d]
    if 0 in shape:
        return None
    out = []
    for length in shape:
        dim: list[Atom] = [rest.pop(0)] if length == 1 and rest and rest[0].size == 1 else []
        while length > 1:
            a = rest.pop(0)
            if a.size > length:
                major, remainder = divmod(a.size, length)
                if remainder:
                    return None
                rest.insert(0, Atom(a.source, major, a.stride))
                a = Atom(a.source, length, a.stride * major)
            elif length % a.size:
                return None
            dim.append(a)
            length //= a.size
        out.append(_merged(dim))
    return (*out[:-1], (*out[-1], *rest)) if out else ()


def _merged(atoms: list[Atom]) -> tuple[Atom, ...]:
    out: list[Atom] = []
    for a in atoms:
        last = out[-1] if out else None
        if last and last.source == a.source and a.source is not REPEATED and last.stride == a.stride * a.size:
            out[-1] = Atom(a.source, last.size * a.size, a.stride)
        else:
            out.append(a)
    return tuple(out)


def _broadcast(dims: Dims, shape: tuple[int, ...], places: Sequence[int]) -> Dims:
    out: list[tuple[Atom, ...]] = [(Atom(REPEATED, n),) if n != 1 else () for n in shape]
    for d, place in zip(dims, places, strict=True):
        if d and shape[place] == math.prod(a.size for a in d):
            out[place] = d
    return tuple(out)


def _sliced(view: View, start: Sequence[int], stop: Sequence[int]) -> View | None:
    """Whole axes, and single places on axes that count the matrices of a stack."""
    steps, dims = list(view.steps), list(view.dims)
    for i, (d, a, b) in enumerate(zip(view.dims, start, stop, strict=True)):
        if (a, b) == (0, math.prod(atom.size for atom in d)):
            continue
        if b - a != 1 or len(d) != 1 or d[0].stride != 1 or d[0].source is None:  # REPEATED
            return None
        steps.append(("at", d[0].source, a))
        dims[i] = ()
    return view._replace(steps=tuple(steps), dims=tuple(dims))
