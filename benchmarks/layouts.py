"""What each optimizer does with each leaf of five models in as many layouts, by default and with inferred axes."""

import argparse
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import fisher_optax as fo
from benchmarks import harness, results
from benchmarks.layouts_models import MODELS, TOKENS, Layout
from fisher_optax.matrices.blocks import canonical_shape
from fisher_optax.matrices.rules import resolve_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 2**31
# Each optimizer, and the statistics that axes are inferred for.
METHODS: dict[str, tuple[Any, object]] = {
    "Muon": (fo.muon, None),
    "SOAP": (fo.soap, None),
    "Shampoo": (fo.shampoo, None),
    "DyKAF": (fo.dykaf, None),
    "KL-SOAP": (fo.kl_soap, None),
    "KL-Shampoo": (fo.kl_shampoo, None),
    "K-FAC": (fo.kfac, fo.KroneckerFactors(max_dim=LONGEST)),
    "EKFAC": (fo.ekfac, fo.KroneckerFactors(max_dim=LONGEST, squares=True)),
    "KFAC-SOAP": (fo.kfac_soap, fo.KroneckerFactors(max_dim=LONGEST)),
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
    columns = {"label": results.Column("leaf"), "shape": results.Column("shape"), "reading": results.Column("read as")}
    columns |= {first: results.Column(names) for first, names in groups.items()}
    rows: dict[str, dict[str, Any]] = {}
    for i, leaf in enumerate(resolve_axes(layout.params)):
        later = re.match(r"(?:model\.)?(?:layers[./]|layer_)[1-9]", leaf.path)
        if len(leaf.shape) < 2 or later:
            continue
        cells = {first: " → ".join(dict.fromkeys(found[first][way][i] for way in WAYS)) for first in groups}
        shape = " x ".join(map(str, leaf.shape))
        rows[f"leaf_{i}"] = {"label": f"`{leaf.path}`", "shape": shape, "reading": leaf.reason} | cells
    return results.table(f"{layout.title}: by default → with inferred axes, where they differ", columns, rows)


def shares_table(
    layouts: Mapping[str, Layout], found: Mapping[str, Mapping[str, Words]], groups: Mapping[str, str]
) -> dict[str, Any]:
    """The share of all entries of matrices, heads among them, that a method takes."""
    columns = {"label": results.Column("model")}
    columns |= {
        f"{first} {way}": results.Column(f"{names}: {way}", ".0%") for first, names in groups.items() for way in WAYS
    }
    rows: dict[str, dict[str, Any]] = {}
    for key, layout in layouts.items():
        leaves = resolve_axes(layout.params)
        program = resolve_axes(layout.params, fo.infer_axes(layout.loss, layout.params, TOKENS))
        sizes = {
            i: math.prod(x.shape)
            for i, (x, inferred) in enumerate(zip(leaves, program, strict=True))
            if x.kind != "embedding" and (x.axes or x.is_ambiguous or inferred.axes)
        }
        shares = {
            f"{first} {way}": sum(n for i, n in sizes.items() if found[first][key][way][i] != "fallback")
            / sum(sizes.values())
            for first in groups
            for way in WAYS
        }
        rows[key] = {"label": layout.title} | shares
    return results.table(
        "Share of the entries of matrices, heads and routers among them, that a method takes", columns, rows
    )


def tables() -> dict[str, Any]:
    layouts = {key: make() for key, make in MODELS.items()}
    found = {name: {key: words(name, layout) for key, layout in layouts.items()} for name in METHODS}
    groups = alike(found)
    of_leaves = {
        key: leaves_table(layout, {first: found[first][key] for first in groups}, groups)
        for key, layout in layouts.items()
    }
    return {"shares": shares_table(layouts, found, groups), **of_leaves}


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    environment = harness.environment()
    yield results.result(
        "layouts",
        "What each optimizer does with the leaves of models as five frameworks store them.",
        "python -m benchmarks layouts",
        tables(),
        environment=environment,
    )


def draw(found: dict[str, Any]) -> "Figure | None":
    """Its tables say it all."""
