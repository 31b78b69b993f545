"""In which order a program meets its layers, and which matrices of a stack it meets together."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..traced import Traced
from . import jaxprs
from .leaves import LeafPlan
from .sites import Site
from .walk import Plan


class Met(NamedTuple):
    """Matrices of one parameter that are used at one time: of its stack, counted in row-major order."""

    leaf: LeafPlan
    members: np.ndarray


def in_order(traced: Traced) -> list[Met]:
    """All matrices with an input, each where it is first used; loops over a stack one step after the other."""
    used, met = {leaf.number: np.zeros(leaf.batch_shape, bool) for leaf in traced.leaves if leaf.sites}, []
    for site, loops in _uses(traced.program, traced.plan, ()):
        leaf = traced.leaves[site.leaf]
        if site.number not in {s.number for s in leaf.sites}:
            continue
        now = np.zeros(leaf.batch_shape, bool)
        now[_places(site, loops)] = True
        now &= ~used[leaf.number]
        if now.any():
            used[leaf.number] |= now
            order = np.argsort(leaf.sites[0].batch_axes)  # as loops and products take them -> as in the parameter
            met.append(Met(leaf, np.flatnonzero(np.transpose(now, order))))
    return met


def _uses(program: jaxprs.Program, plan: Plan, loops: tuple[int, ...]) -> Iterator[tuple[Site, tuple[int, ...]]]:
    """Every site, with the steps of the loops around it, as the program runs."""
    for i in sorted({*plan.sites, *plan.inner}):
        if i in plan.sites:
            yield plan.sites[i], loops
        if i not in plan.inner:
            continue
        eqn = program.jaxpr.eqns[i]
        if eqn.primitive.name == "scan":
            length = eqn.params["length"]
            for step in reversed(range(length)) if eqn.params["reverse"] else range(length):
                yield from _uses(jaxprs.body(eqn), plan.inner[i][0], (*loops, step))
        else:
            for inside, its_plan in zip(jaxprs.bodies(eqn), plan.inner[i], strict=True):
                yield from _uses(inside, its_plan, loops)


def _places(site: Site, loops: tuple[int, ...]) -> tuple[int | slice, ...]:
    """Of the matrices that loops and indices take; all of a loop's where it is not clear which loop takes them."""
    steps = list(loops) if len(loops) == sum(item[0] == "scan" for item in site.steps) else []
    return tuple(item[2] if item[0] == "at" else steps.pop(0) if steps else slice(None) for item in site.steps)
