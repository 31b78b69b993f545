"""Every example in a docstring of the package runs, and prints what it says."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import fisher_optax

NAMES = [module.name for module in pkgutil.walk_packages(fisher_optax.__path__, "fisher_optax.")]
FINDER = doctest.DocTestFinder(exclude_empty=True)


def with_examples() -> list[ModuleType]:
    modules = [fisher_optax, *map(importlib.import_module, NAMES)]
    return [module for module in modules if any(test.examples for test in FINDER.find(module))]


@pytest.mark.parametrize("module", with_examples(), ids=lambda module: module.__name__)
def test_examples_run(module: ModuleType) -> None:
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_examples_are_found() -> None:
    """Of most modules that a user calls."""
    assert len(with_examples()) >= 20
