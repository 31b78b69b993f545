"""Bases are renewed side by side, whatever the shapes of their matrices: who is due, and what the program holds."""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import fisher_optax as fo
from fisher_optax._xla import PLATFORMS
from fisher_optax.matrices.blocks import over_stack, repeat
from fisher_optax.preconditioner.refresh import KEEP, REFRESH, START, who_is_due

SHAPES = ((6, 18), (6, 6), (6, 24), (24, 6))
PARAMS = {f"layer_{i}": {"kernel": jnp.zeros(shape)} for i, shape in enumerate(SHAPES * 3)}
LENGTHS = {d for shape in SHAPES for d in shape}
METHODS = {
    "soap": lambda: fo.soap(1e-2),
    "soap-staggered": lambda: fo.soap(1e-2, refresh="staggered"),
    "soap-adaptive": lambda: fo.soap(1e-2, refresh="adaptive"),
    "dykaf": lambda: fo.dykaf(1e-2),
    "kl_shampoo": lambda: fo.kl_shampoo(1e-2),
}
# Those of Kullback-Leibler read one factor to begin the other, and copy it.
IN_PLACE = {name: METHODS[name] for name in METHODS if name != "kl_shampoo"} | {
    "shampoo": lambda: fo.shampoo(1e-2),
    "muon": lambda: fo.muon(1e-2),
}


def equations(jaxpr: Jaxpr, platform: str) -> Iterator[Any]:
    """All of a program's for a platform, however deep."""
    for eqn in jaxpr.eqns:
        if eqn.params.get("branches_platforms"):
            yield from equations(of_platform(eqn, platform), platform)
            continue
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value, platform)


def of_platform(eqn: Any, platform: str) -> Jaxpr:
    """What a choice by platform comes to."""
    named = eqn.params["branches_platforms"]
    place = next((i for i, names in enumerate(named) if names and platform in names), len(named) - 1)
    return eqn.params["branches"][place].jaxpr


@functools.cache
def program(name: str, platform: str = "cpu") -> list[Any]:
    tx = METHODS[name]()
    state = jax.eval_shape(tx.init, PARAMS)
    return list(equations(jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS).jaxpr, platform))


def test_those_that_are_due_come_first_in_their_stack() -> None:
    actions = {"a": jnp.array([KEEP, REFRESH, KEEP, START]), "b": jnp.array([KEEP]), "c": jnp.array([REFRESH, REFRESH])}
    due = who_is_due(actions)
    assert {key: x.count.item() for key, x in due.items()} == {"a": 2, "b": 0, "c": 2}
    assert {key: x.places.tolist() for key, x in due.items()} == {"a": [1, 3, 0, 2], "b": [0], "c": [0, 1]}


@pytest.mark.parametrize("name", METHODS)
def test_a_program_decomposes_once_for_each_length_of_side(name: str) -> None:
    """Not for each side of each shape: eight here, of three lengths."""
    shapes = [eqn.invars[0].aval.shape for eqn in program(name) if eqn.primitive.name == "eigh"]
    # DyKAF's dominant pair of the first gradient is one for each shape.
    assert len(shapes) == (len(LENGTHS) if name != "dykaf" else len(LENGTHS) + len(SHAPES))
    assert {shape[-1] for shape in shapes} == LENGTHS


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", METHODS)
def test_an_accelerator_refreshes_by_products_alone(name: str, platform: str) -> None:
    """One Cholesky factorisation of a block for each length, and neither QR nor eigh, whose programs are large."""
    names = Counter(eqn.primitive.name for eqn in program(name, platform))
    assert names["cholesky"] == len(LENGTHS)
    assert not {"geqrf", "householder_product", "eigh"} & set(names)


@pytest.mark.parametrize("name", METHODS)
def test_no_conditional_holds_a_stack(name: str) -> None:
    """Of what a conditional returns, compilers keep two copies: one side of one matrix, but never a state."""
    sizes = [out.aval.size for eqn in program(name) if eqn.primitive.name == "cond" for out in eqn.outvars]
    assert sizes
    assert max(sizes) <= max(LENGTHS) ** 2


@pytest.mark.parametrize("name", IN_PLACE)
def test_no_loop_copies_a_stack(name: str) -> None:
    """What every pass of a loop copied would make a step of many matrices many times as long."""
    tx = IN_PLACE[name]()
    state = jax.eval_shape(tx.init, PARAMS)
    text: Any = jax.jit(tx.update, donate_argnums=1).lower(PARAMS, state, PARAMS).compile().as_text()
    bodies, copies, inside = set(re.findall(r"body=%?([\w.-]+)", text)), [], False
    for line in text.splitlines():
        if line.endswith("{"):  # a computation starts
            inside = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0] in bodies
        if inside and re.search(r"= f32\[[369],\d+,\d+\]\S* copy\(", line):
            copies.append(line)
    assert bodies
    assert not copies


def test_a_loop_that_finds_out_how_often_it_runs() -> None:
    body = lambda i, x: x + i  # noqa: E731
    run = jax.jit(lambda n: repeat(n, 4, body, jnp.zeros([], jnp.int32)))
    for n, total in ((0, 0), (3, 3), (4, 6)):
        assert run(jnp.asarray(n)).item() == repeat(jnp.asarray(n), 4, body, jnp.zeros([], jnp.int32)).item() == total


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_matrix_of_a_stack_is_stepped_alone(
    platform: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLATFORMS, "cpu", PLATFORMS[platform])
    x, y, z = (np.random.default_rng(i).normal(size=(4, 2, 3)).astype(np.float32) for i in range(3))

    def one(overwritten: Any, copied: Any, read: Any) -> tuple[Any, Any]:
        return overwritten + jnp.sum(copied), copied * read

    run = jax.jit(lambda x, y, z: over_stack(one, x, y, z, max_stack=3, grouped=grouped))
    for results in (run(x, y, z), over_stack(one, x, y, z, max_stack=3)):
        np.testing.assert_allclose(results[0], x + y.sum((1, 2), keepdims=True), rtol=1e-5)
        np.testing.assert_allclose(results[1], y * z, rtol=1e-6)
