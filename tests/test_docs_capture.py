"""The page on capture tells the truth: its blocks run in order as one program, and print what stands below them."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "capture.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def test_every_block_runs_and_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, Any] = {}
    for code, printed in blocks:
        exec(compile(code, PAGE.name, "exec"), names)
        assert capsys.readouterr().out == printed, code
