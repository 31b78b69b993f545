"""Optax's own test suite of optimizers, as it ships, on ours."""

import ast
import importlib.util
import types
from pathlib import Path
from typing import Any

import pytest

import fisher_optax as fo
from tests.standins import factors, fed, samples

# Leaves of its trees have two readings, and go to the fallback.
pytestmark = pytest.mark.filterwarnings("ignore::fisher_optax.AxesWarning")
# Constant rates, with which the suite's problems are solved in its 30,000 steps.
OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "soap": (fo.soap, {"learning_rate": 1e-2}),
    "muon": (fo.muon, {"learning_rate": 1e-2}),
    "shampoo": (fo.shampoo, {"learning_rate": 1e-2}),
    "dykaf": (fo.dykaf, {"learning_rate": 1e-2}),
    "kl_soap": (fo.kl_soap, {"learning_rate": 1e-2}),
    "kl_shampoo": (fo.kl_shampoo, {"learning_rate": 1e-2}),
    "kfac": (fed(fo.kfac, factors), {"learning_rate": 1e-2, "damping": 0.1}),
    "ekfac": (fed(fo.ekfac, factors, with_bases=True), {"learning_rate": 1e-2, "damping": 0.1}),
    "kfac_soap": (fed(fo.kfac_soap, factors), {"learning_rate": 1e-2}),
    "frog": (fed(fo.frog, samples), {"learning_rate": 1e-2, "momentum": 0.0}),
    "kfrog": (fed(fo.kfrog, samples), {"learning_rate": 1e-3, "momentum": 0.0}),
}
TABLES = ("_MAIN_OPTIMIZERS_UNDER_TEST", "_ALL_OPTIMIZERS_UNDER_TEST")


def suite() -> Any:
    """The suite's class, defined from Optax's file with our optimizers in its tables."""
    found = importlib.util.find_spec("optax.contrib._common_test")
    assert found is not None
    assert found.origin is not None
    body = ast.parse(Path(found.origin).read_text()).body
    [place] = [i for i, node in enumerate(body) if isinstance(node, ast.ClassDef)]
    module = types.ModuleType(found.name)

    def run(part: list[ast.stmt]) -> None:
        exec(compile(ast.Module(part, []), str(found.origin), "exec"), vars(module))

    run(body[:place])
    assert {*TABLES, "_get_opt_factory"} <= vars(module).keys()
    row = {"wrapper_name": None, "wrapper_kwargs": None}
    rows = tuple({"opt_name": name, "opt_kwargs": options, **row} for name, (_, options) in OURS.items())
    vars(module).update(dict.fromkeys(TABLES, rows), _get_opt_factory=lambda name: OURS[name][0])
    run(body[place : place + 1])
    return vars(module)["ContribTest"]


ContribTest = suite()
