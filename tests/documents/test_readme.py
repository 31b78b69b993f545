"""The README fits on a page, its snippets run as printed, and what it points to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL)


def test_it_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


def test_the_first_screen_has_a_picture_the_commands_and_a_program() -> None:
    places = [README.index(mark) for mark in ("![", "```bash", "```python", "```text", "## ")]
    assert places == sorted(places)


def test_snippets_run_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """One after another."""
    names: dict[str, object] = {}
    for code, printed in SNIPPETS:
        exec(compile(code, "README.md", "exec"), names)
        assert capsys.readouterr().out == printed


def test_the_first_snippet_is_twelve_lines() -> None:
    assert len([line for line in SNIPPETS[0][0].splitlines() if line]) == 12


def test_pictures_and_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("https://")]
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).exists()] == []
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert all((ROOT / picture).stat().st_size > 10_000 for picture in pictures)


def test_optax_arguments_in_the_migration_tables_exist() -> None:
    """A row for an argument that Optax does not have would send its users looking for nothing."""
    import inspect

    import optax

    start = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    tables = start.split("## From Optax")[1].split("## What you")[0].strip().split("\n\n")
    for factory, table in zip((optax.adamw, optax.contrib.muon), tables, strict=True):
        rows = [line.split("|")[1] for line in table.splitlines()[2:]]
        named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
        assert named <= set(inspect.signature(factory).parameters), named
