"""The pages of documentation tell the truth: their blocks run in order as one program, and print what stands below."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs_and_prints_what_the_page_says(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for code, printed in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(code, page.name, "exec"), names)
        assert capsys.readouterr().out == printed, code


def test_pages_have_blocks() -> None:
    assert sum(bool(BLOCK.search(page.read_text(encoding="utf-8"))) for page in PAGES) >= 2
