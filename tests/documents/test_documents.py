"""The documents say what the results say: their tables, their linked numbers, and no number besides."""

from pathlib import Path

import pytest

from benchmarks import documents, page, results
from tests.benchmarks.made_up_results import made_up

ROOT = Path(__file__).parents[2]
FILE = "benchmarks/results/step_time_cpu.json"


@pytest.mark.parametrize("path", documents.paths(ROOT), ids=lambda path: path.name)
def test_document_says_what_the_results_say(path: Path) -> None:
    """Tables and linked numbers are what `python -m benchmarks page` would write, and nothing else looks measured."""
    problems = documents.problems(path.read_text(encoding="utf-8"), path, results.RESULTS)
    assert not problems, "\n".join(["", *(f"{path.relative_to(ROOT)}:{problem}" for problem in problems)])


def test_the_page_of_results_is_up_to_date() -> None:
    written = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert written == page.text_of(page.all_results()), "run `python -m benchmarks page`"


# That these checks can fail: documents and results made up


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with one result and one document in `docs`."""
    folder = tmp_path / "benchmarks" / "results"
    results.write(made_up(), folder)
    (tmp_path / "docs").mkdir()
    for name in ("README", "CONTRIBUTING", "CHANGELOG", "docs/speed"):
        (tmp_path / f"{name}.md").write_text("# Title\n")
    return tmp_path


def problems(text: str, root: Path) -> list[str]:
    return documents.problems(text, root / "README.md", root / "benchmarks" / "results")


def rewritten(text: str, root: Path) -> str:
    return documents.rewrite(text, root / "README.md", root / "benchmarks" / "results")


def link(text: str, cell: str, file: str = FILE) -> str:
    return f'[{text}]({file} "{cell}")'


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("74 ms", "fo_soap/ms"),
        ("72.0 ms", "fo_soap/ms/low"),
        ("7.9e+01", "fo_soap/ms/high"),
        ("-5 %", "fo_soap/saved"),
        ("−5.1 %", "fo_soap/saved"),
        ("-.05", "fo_soap/saved"),
        ("+.125", "adamw/saved"),
        ("12 per cent", "adamw/saved"),
        ("1,234", "fo_soap/state"),
        ("3 runs", "fo_soap/ms/n"),
    ],
)
def test_a_number_equals_its_cell_to_the_digits_shown(text: str, cell: str, root: Path) -> None:
    """A share may be shown as per cent."""
    assert problems(f"It is {link(text, f'steps/{cell}')}.", root) == []


@pytest.mark.parametrize("text", ["73 ms", "74.1 ms", "5 %", "-5.2 %", "saved -5"])
def test_a_wrong_number_is_told_and_mended(text: str, root: Path) -> None:
    cell = "steps/fo_soap/ms" if "ms" in text else "steps/fo_soap/saved"
    sentence = f"A line.\n\nThat takes {link(text, cell)}, and more."
    (told,) = problems(sentence, root)
    assert told.startswith(f"3: {link(text, cell)} must be [")
    assert told.endswith("run `python -m benchmarks page`")
    assert problems(rewritten(sentence, root), root) == []


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        (link("74 ms", "steps/soap/ms"), "no 'soap' of 'steps/soap/ms'; there is fo_soap, adamw"),
        (link("74 ms", "steps/fo_soap/ms", FILE.replace("step", "stp")), "no result 'stp_time_cpu'; there are step_ti"),
        (link("74 ms", "steps/fo_soap/ms", "other.json"), "is not in"),
        (link("72 to 79 ms", "steps/fo_soap/ms"), "holds 2 numbers"),
        (link("fast", "steps/fo_soap/ms"), "holds 0 numbers"),
        (link("1", "steps/adamw/state"), "has 'none' at 'steps/adamw/state', and no number"),
        ("<!-- table step_time_cpu/stp -->\n<!-- end -->", "has no table 'stp'; there is steps"),
        ("<!-- table step_time_cpu/steps row=a -->\n<!-- end -->", "options row; known are columns, rows, first, "),
        ("<!-- table step_time_cpu/steps spread=yes -->\n<!-- end -->", "spread=no leaves it out, and no option shows"),
        ("<!-- table step_time_cpu/steps rows=soap -->\n<!-- end -->", "no row 'soap'; there are fo_soap, adamw"),
        ("<!-- table step_time_cpu/steps -->\n\nA table.", "a table without <!-- end -->"),
    ],
)
def test_what_cannot_be_found_is_told_and_left_as_it_is(sentence: str, message: str, root: Path) -> None:
    (told,) = problems(f"# Title\n{sentence}\n", root)
    assert told.startswith("2: ")
    assert message in told
    assert rewritten(sentence, root) == sentence


TABLE = """
<!-- table step_time_cpu/steps columns=ms,saved rows=fo_soap first="a method" -->

| a method | step, ms | saved |
|---|---|---|
| `fo.soap` \\| every 10 | 74.0 (72.0 to 79.0) | -5% |

<!-- end -->
"""


def test_a_stale_table_is_told_and_mended(root: Path) -> None:
    assert problems(TABLE, root) == []
    for stale in (
        TABLE.replace("74", "73"),
        TABLE.replace("| -5% ", ""),
        "\n".join(TABLE.split("\n")[:2]) + "\n<!-- end -->\n",
    ):
        assert problems(stale, root) == [
            "2: the table step_time_cpu/steps columns=ms,saved rows=fo_soap "
            'first="a method" is out of date: run `python -m benchmarks page`'
        ]
        assert rewritten(stale, root) == TABLE


def test_tables_are_joined_by_row(root: Path) -> None:
    """Each with its cells; who is in one table alone has none of the other's."""
    found = made_up()
    more = found["tables"]["steps"]["rows"] | {"muon": {"label": "Muon", "saved": 0.5}}
    found["tables"]["deep"] = {**found["tables"]["steps"], "rows": more}
    results.write(found, root / "benchmarks" / "results")
    marker = "<!-- table step_time_cpu/steps,deep columns=deep:saved,steps:saved rows=adamw,muon -->"
    lines = [
        "| optimizer | deep: saved | steps: saved |",
        "|---|---|---|",
        "| adamw | 12% | 12% |",
        "| Muon | 50% |  |",
    ]
    assert rewritten(f"{marker}\n<!-- end -->", root) == "\n".join([f"{marker}\n", *lines, "\n<!-- end -->"])


STRAY = [
    *("0.53", ".53", "-0.011", "3.4e-07", "±0.02", "1,024.5", "5.12", "10.7M"),
    *("74 ms", "12 s", "3 seconds", "25 minutes", "80 %", "5 per cent", "43 times", "2x", "2 x", "4-fold"),
    *("589 MB", "2 GiB", "3 nats", "5 points", "12 bits", "9 Gflop"),
]


@pytest.mark.parametrize("token", STRAY)
def test_a_stray_number_is_told_with_its_line(token: str, root: Path) -> None:
    (told,) = problems(f"First.\n\n- It took **{token}** then.\n", root)
    assert told.startswith(f"3: '{token.removesuffix('M')}' looks measured: link it to its cell")


def test_a_number_alone_in_a_cell_of_a_table_is_stray(root: Path) -> None:
    assert len(problems("| a | b |\n|---|---|\n| AdamW | 303 |\n", root)) == 1


NOT_MEASURED = f"""# Version 0.1.0, 80 % done

With `beta = 0.95` and `80 %`, 300 steps, three seeds, 28 x 28 images, 2:4, p = -1/4, ten times, half, in 2026-11-21.
See Section 3.1 of arXiv 1905.12558, version 0.10.2, https://x.org/1.5/ms, [page 2.5](https://x.org/0.1 "4.5 ms") and
![0.5 s](x_0.5.png). <!-- 0.7 s --> It saves {link("12 %", "steps/adamw/saved")}.

    indented = 0.5

```text
0.25 s [1 s]({FILE} "steps/none/at all")
<!-- table no/such -->
```
{TABLE}"""


def test_settings_citations_versions_and_code_pass(root: Path) -> None:
    assert problems(NOT_MEASURED, root) == []
    assert rewritten(NOT_MEASURED, root) == NOT_MEASURED


def test_lines_that_are_only_indented_are_no_code() -> None:
    assert list(documents.stray("- an item\n    of 0.5 s\n")) == [(2, "0.5 s")]


def test_page_writes_everything_and_says_what_is_left(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once more changes nothing."""
    folder = root / "benchmarks" / "results"
    (folder / "step_time_cpu.png").touch()
    speed = f"It takes {link('1 ms', 'steps/fo_soap/ms', '../' + FILE)}.\n"
    (root / "docs" / "speed.md").write_text(speed + TABLE.replace("74", "73"))
    (root / "CHANGELOG.md").write_text("\n2 s faster\n")
    assert [told.split(" looks")[0] for told in page.write_all(folder, root)] == ["CHANGELOG.md:2: '2 s'"]
    written = {path: path.read_text() for path in root.rglob("*.md")}
    assert written[root / "docs" / "speed.md"] == speed.replace("1 ms", "74 ms") + TABLE
    assert page.write_all(folder, root) != []
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
    monkeypatch.setattr(page, "write_all", lambda pictures: ["x:1: wrong"] if pictures else [])
    assert (page.main([]), page.main(["--draw"])) == (0, 1)
    assert capsys.readouterr().out == "the documents say what the results say\nx:1: wrong\n"


def test_page_names_a_file_that_is_no_result(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "benchmarks" / "results" / "old.json").write_text("[]")
    monkeypatch.setattr(page, "write_all", lambda pictures: page.all_results(root / "benchmarks" / "results"))
    assert "old.json" in str(page.main([]))


def test_the_page_leaves_long_tables_to_the_file(root: Path) -> None:
    found = made_up()
    rows = found["tables"]["steps"]["rows"]
    rows |= {f"row_{i}": rows["fo_soap"] for i in range(page.MOST_ROWS)}
    told = page.section(found, root / "benchmarks" / "results")
    assert "**Steps** (`steps`, [32 rows](results/step_time_cpu.json))" in told
    assert "74.0" not in told
    found["tables"]["steps"]["rows"] = {}
    assert "Steps**" not in page.section(found, root / "benchmarks" / "results")  # nor an empty one


def test_results_come_in_the_catalogues_order(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import catalogue

    entries = {name: catalogue.Entry("step_time", 1) for name in ("zeta", "step_time")}
    for module in (catalogue, page):
        monkeypatch.setattr(module, "CATALOGUE", entries)
    folder = root / "benchmarks" / "results"
    results.write(made_up("z_2", command="python -m benchmarks zeta"), folder)
    results.write(made_up("z_1", command="python -m benchmarks zeta"), folder)
    assert [found["name"] for found in page.all_results(folder)] == ["z_1", "z_2", "step_time_cpu"]
