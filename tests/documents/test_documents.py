"""The documents' tables are those of the results, and the page of results is up to date."""

from pathlib import Path

import pytest

import benchmarks.__main__ as verbs
from benchmarks import page, results
from tests.benchmarks.made_up_results import made_up

ROOT = Path(__file__).parents[2]
TABLE = """
<!-- table step_time_cpu/steps columns=ms,saved rows=fo_soap first="a method" -->

| a method | step, ms | saved |
|---|---|---|
| `fo.soap` \\| every 10 | 74.0 (72.0 to 79.0) | -5% |

<!-- end -->
"""


@pytest.mark.parametrize("path", page.documents(ROOT), ids=lambda path: path.name)
def test_tables_are_what_the_results_say(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert page.rewritten(text, results.RESULTS) == text, "run `python -m benchmarks page`"


def test_the_page_of_results_is_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to(results.RESULTS)
    (tmp_path / "README.md").touch()
    assert verbs.write_page([], tmp_path / "results", tmp_path) == 0
    written = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == written, "run `python -m benchmarks page`"


# That these checks can fail: documents and results made up


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with one result."""
    results.write(made_up(), tmp_path / "benchmarks" / "results")
    return tmp_path / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("stale", "fresh"), [("74.0", "73.0"), ("| -5% ", ""), (TABLE.strip().split("\n", 2)[2], "<!-- end -->")]
)
def test_a_stale_table_is_written_anew(stale: str, fresh: str, folder: Path) -> None:
    assert page.rewritten(TABLE, folder) == TABLE
    assert page.rewritten(TABLE.replace(stale, fresh), folder) == TABLE


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("<!-- table step_time_cpu/stp -->\n<!-- end -->", "has no table 'stp'; there is steps"),
        ("<!-- table stp_time_cpu/steps -->\n<!-- end -->", "no result 'stp_time_cpu' .* there are step_time_cpu"),
        ("<!-- table step_time_cpu/steps row=a -->\n<!-- end -->", "options row; known are columns, rows, first, "),
        ("<!-- table step_time_cpu/steps rows=soap -->\n<!-- end -->", "no row 'soap'; there are fo_soap, adamw"),
        ("<!-- table step_time_cpu/steps -->\n\nA table.", "has no <!-- end -->: add it"),
        ("<!-- table step_time_cpu/steps -->\n<!-- table step_time_cpu/steps -->", "has no <!-- end -->: add it"),
    ],
)
def test_what_cannot_be_written_is_named_with_its_document(comment: str, message: str, folder: Path) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        page.rewritten(f"# Title\n{comment}\n", folder)
    root = folder.parents[1]
    (root / "README.md").write_text(comment)
    assert str(verbs.write_page([], folder, root)).startswith(f"{root / 'README.md'}: ")


def test_tables_are_joined_by_row(folder: Path) -> None:
    """Each with its cells; who is in one table alone has none of the other's."""
    found = made_up()
    more = found["tables"]["steps"]["rows"] | {"muon": {"label": "Muon", "saved": 0.5}}
    found["tables"]["deep"] = {**found["tables"]["steps"], "rows": more}
    results.write(found, folder)
    marker = "<!-- table step_time_cpu/steps,deep columns=deep:saved,steps:saved rows=adamw,muon -->"
    lines = [
        "| optimizer | deep: saved | steps: saved |",
        "|---|---|---|",
        "| adamw | 12% | 12% |",
        "| Muon | 50% |  |",
    ]
    assert page.rewritten(f"{marker}\n<!-- end -->", folder) == "\n".join([f"{marker}\n", *lines, "\n<!-- end -->"])


def test_code_is_left_alone(folder: Path) -> None:
    text = "```text\n<!-- table no/such -->\n```\n"
    assert page.rewritten(text + TABLE, folder) == text + TABLE


def test_writing_twice_changes_nothing_more(folder: Path) -> None:
    root = folder.parents[1]
    (folder / "step_time_cpu.png").touch()
    (root / "docs" / "deep").mkdir(parents=True)
    for name in ("README.md", "docs/deep/speed.md"):
        (root / name).write_text(TABLE.replace("74", "73"))
    assert verbs.write_page([], folder, root) == 0
    written = {path: path.read_text() for path in root.rglob("*.md")}
    assert written[root / "docs" / "deep" / "speed.md"] == TABLE
    assert verbs.write_page([], folder, root) == 0
    assert {path: path.read_text() for path in root.rglob("*.md")} == written
    told = written[root / "benchmarks" / "README.md"]
    for part in (
        "## step_time_cpu\n\nSteps that nobody timed.\n\n    python -m benchmarks step_time --tree none\n",
        "2030-01-02 on Abacus, 2 cores, load 0.5 as it began; Python 3.11.0, jax 1.2.3.",
        "Settings: `width = 8`, `data = none`.",
        "| `fo.soap` \\| every 10 | 74.0 (72.0 to 79.0) | -5% | 1234 |",
        "![step_time_cpu](results/step_time_cpu.png)",
    ):
        assert part in told


def test_the_page_leaves_long_tables_to_the_file(folder: Path) -> None:
    found = made_up()
    rows = found["tables"]["steps"]["rows"]
    rows |= {f"row_{i}": rows["fo_soap"] for i in range(page.MOST_ROWS)}
    told = page.section(found, folder)
    assert "**Steps** (`steps`, [32 rows](results/step_time_cpu.json))" in told
    assert "74.0" not in told
    found["tables"]["steps"]["rows"] = {}
    assert "Steps**" not in page.section(found, folder)  # nor an empty one
