"""What each optimizer does with each leaf of five models in as many layouts, by default and with inferred axes."""

import argparse
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import fisher_optax as fo
from benchmarks import results
from benchmarks.results import Column
from experiments.models.layouts import MODELS, TOKENS, Layout
from fisher_optax.matrices.blocks import canonical_shape
from fisher_optax.matrices.rules import resolve_axes

LONGEST = 2**31
# Each optimizer, and the statistics that axes are inferred for.
FACTORS = fo.KroneckerFactors(max_dim=LONGEST)
METHODS: dict[str, tuple[Any, object]] = {
    "Muon": (fo.muon, None),
    "SOAP": (fo.soap, None),
    "Shampoo": (fo.shampoo, None),
    "DyKAF": (fo.dykaf, None),
    "KL-SOAP": (fo.kl_soap, None),
    "KL-Shampoo": (fo.kl_shampoo, None),
    "K-FAC": (fo.kfac, FACTORS),
    "EKFAC": (fo.ekfac, fo.KroneckerFactors(max_dim=LONGEST, squares=True)),
    "KFAC-SOAP": (fo.kfac_soap, FACTORS),
    "FROG": (fo.frog, fo.LayerSamples()),
}
WAYS = ("default", "inferred")
Words = dict[str, list[str]]  # by way, what becomes of each leaf


def words(name: str, layout: Layout) -> Words:
    """What a method makes of each leaf."""
    make, kind = METHODS[name]
    inferred = fo.infer_axes(layout.loss, layout.params, TOKENS, statistics=kind)
    found = {}
    for way, axes in zip(WAYS, (None, inferred), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fo.AxesWarning)  # the table says it
            found[way] = [word(row) for row in fo.report(make(1e-3, axes=axes), layout.params).rows]
    return found


def word(row: Any) -> str:
    """The matrices that a leaf is, or where else it goes."""
    if row.method == "fallback":
        return "fallback"
    if row.axes is None:
        return "with its kernel"
    shapes = row.matrices or (canonical_shape(row.shape, row.axes),)
    *batch, m, n = shapes[0]
    return f"{batch[0]} of {m} x {n}" if batch else f"{m} x {n}"


def alike(found: Mapping[str, Mapping[str, Words]]) -> dict[str, str]:
    """The methods that do the same to all models, by the first of them: their names."""
    groups: dict[str, list[str]] = {}
    for name in METHODS:
        first = next((other for other in groups if found[other] == found[name]), name)
        groups.setdefault(first, []).append(name)
    return {first: ", ".join(names) for first, names in groups.items()}


def leaves_table(layout: Layout, found: Mapping[str, Words], groups: Mapping[str, str]) -> dict[str, Any]:
    """One row a leaf of two axes or more; of layers that are leaves of their own, the first."""
    columns = {"label": Column("leaf"), "shape": Column("shape"), "reading": Column("read as")}
    columns |= {first: Column(names) for first, names in groups.items()}
    rows: dict[str, dict[str, Any]] = {}
    for i, leaf in enumerate(resolve_axes(layout.params)):
        if len(leaf.shape) < 2 or re.match(r"(?:model\.)?(?:layers[./]|layer_)[1-9]", leaf.path):
            continue
        cells = {first: " → ".join(dict.fromkeys(found[first][way][i] for way in WAYS)) for first in groups}
        shape = " x ".join(map(str, leaf.shape))
        rows[f"leaf_{i}"] = {"label": f"`{leaf.path}`", "shape": shape, "reading": leaf.reason} | cells
    return results.table(f"{layout.title}: by default → with inferred axes, where they differ", columns, rows)


def shares(layout: Layout, found: Mapping[str, Words]) -> dict[str, Any]:
    """The share of all entries of matrices, heads among them, that a method takes, by method and way."""
    leaves = resolve_axes(layout.params)
    program = resolve_axes(layout.params, fo.infer_axes(layout.loss, layout.params, TOKENS))
    sizes = {
        i: math.prod(x.shape)
        for i, (x, inferred) in enumerate(zip(leaves, program, strict=True))
        if x.kind != "embedding" and (x.axes or x.is_ambiguous or inferred.axes)
    }
    return {
        f"{first} {way}": sum(n for i, n in sizes.items() if of[way][i] != "fallback") / sum(sizes.values())
        for first, of in found.items()
        for way in WAYS
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    layouts = {key: make() for key, make in MODELS.items()}
    found = {name: {key: words(name, layout) for key, layout in layouts.items()} for name in METHODS}
    groups = alike(found)
    of_each = {key: {first: found[first][key] for first in groups} for key in layouts}
    rows = {key: {"label": layout.title} | shares(layout, of_each[key]) for key, layout in layouts.items()}
    columns = {f"{first} {way}": Column(f"{names}: {way}", ".0%") for first, names in groups.items() for way in WAYS}
    title = "Share of the entries of matrices, heads and routers among them, that a method takes"
    yield results.result(
        "layouts",
        "What each optimizer does with the leaves of models as five frameworks store them.",
        options.command,
        {
            "shares": results.table(title, {"label": Column("model"), **columns}, rows),
            **{key: leaves_table(layout, of_each[key], groups) for key, layout in layouts.items()},
        },
    )
