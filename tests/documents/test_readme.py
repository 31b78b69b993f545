"""The README's snippets run as printed, and its pictures are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_snippets_run_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """One after another."""
    names: dict[str, object] = {}
    printed = []
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert "soap" in printed[0]
    assert "skipped=0" in printed[0]
    assert "21x21, 64x64" in printed[1]


def test_the_first_snippet_is_twelve_lines() -> None:
    assert len([line for line in SNIPPETS[0].splitlines() if line]) == 12


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size > 10_000, picture


def test_optax_arguments_in_the_migration_tables_exist() -> None:
    """A row for an argument that Optax does not have would send its users looking for nothing."""
    import inspect

    import optax

    tables = README.split("## From Optax")[1].split("## What you")[0].strip().split("\n\n")
    for factory, table in zip((optax.adamw, optax.contrib.muon), tables, strict=True):
        rows = [line.split("|")[1] for line in table.splitlines()[2:]]
        named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
        assert named <= set(inspect.signature(factory).parameters), named
