"""Pictures, the page of all results and the tables in the documents, made from the results."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import documents, results
from benchmarks.catalogue import CATALOGUE, USAGE, benchmark_of, load, summary

ROOT = Path(__file__).resolve().parents[1]
MOST_ROWS = 30  # of a table on the page; longer ones are left to the file
MOST_SETTING = 60  # characters of a setting

HOW = """# Results

Written by `python -m benchmarks page`; do not edit. Each result is one file of `results/`, in one form, which
`results.py` describes: what was measured, the command, the machine, and tables. Where a measurement was repeated, the
tables show its median, and some columns `(low to high)` beside it: the least and the most of fewer than ten, else the
10th and the 90th percentile. Times are comparable within one result alone.

```text
{usage}
```

A document shows a table between two comments, as a Markdown table that `page` writes:

```text
<!-- table NAME/TABLE columns=a,b rows=x,y first="title of the first column" spread=no -->
<!-- end -->
```

Each option may be left out; quote what holds a space; `spread=no` shows medians alone. `NAME/T,U columns=T:a,U:a` joins
the rows of two tables. Where a table has a column `label`, it replaces the names of the rows. A number in a sentence is
a link to its file, with the path of the cell as title, and `page` keeps it up to date; after a repeated measurement,
`/low`, `/high` or `/n` names another part than the median:

```text
SparseGPT takes [74 ms](benchmarks/results/compression_speed_cpu.json "sparsegpt/ours/ms").
```

| benchmark | measures | minutes on two CPU cores |
|---|---|---|
{benchmarks}
"""


def all_results(folder: Path = results.RESULTS) -> list[dict[str, Any]]:
    """The results in ``folder``, by the catalogue and by name.

    Raises:
        ValueError: a file is no result, or of a benchmark that the catalogue lacks.
    """
    found = [results.read(path) for path in sorted(folder.glob("*.json"))]
    order = list(CATALOGUE)
    return sorted(found, key=lambda result: order.index(benchmark_of(result)))


def draw(found: dict[str, Any], folder: Path = results.RESULTS) -> Path | None:
    """Write the picture of a result, if its benchmark has one for it, and return the path."""
    figure = load(benchmark_of(found)).draw(found)
    if figure is None:
        return None
    path = folder / f"{found['name']}.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})  # no version, which would change the file
    return path


def text_of(found: Iterable[Mapping[str, Any]], folder: Path = results.RESULTS) -> str:
    """The page of all results, as Markdown beside ``folder``."""
    lines = [f"| `{name}` | {summary(name)} | {entry.minutes} |" for name, entry in CATALOGUE.items()]
    sections = [section(result, folder) for result in found]
    return HOW.format(usage=USAGE, benchmarks="\n".join(lines)) + "".join(sections)


def section(found: Mapping[str, Any], folder: Path) -> str:
    """One result on the page."""
    name = found["name"]
    parts = [f"## {name}", found["what"], f"    {found['command']}", f"{found['date']} on {machine(found)}."]
    if settings := brief(found["settings"]):
        parts.append(f"Settings: {settings}.")
    for title, part in found["tables"].items():
        if not part["rows"]:
            continue
        link = f"`{title}`, [{len(part['rows'])} rows]({folder.name}/{name}.json)"
        long = len(part["rows"]) > MOST_ROWS
        parts.append(f"**{part['title']}** ({link})" if long else f"**{part['title']}** (`{title}`)")
        parts += [] if long else [documents.markdown(results.rows_of(part))]
    if (folder / f"{name}.png").exists():
        parts.append(f"![{name}]({folder.name}/{name}.png)")
    return "\n" + "\n\n".join(parts) + "\n"


def machine(found: Mapping[str, Any]) -> str:
    """What a result was measured on, in one line."""
    m, versions = found["machine"], ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    host = f"{m['cpu']}, {m['cores']} cores, load {m['load']:g} as it began"
    device = "" if m["platform"] == "cpu" else f"{m['devices']} x {m['device']}; "
    return f"{device}{host}; Python {m['python']}, {versions}"


def brief(settings: Mapping[str, Any]) -> str:
    """The settings that fit into a line."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return ", ".join(f"`{key} = {text}`" for key, text in texts.items() if len(text) <= MOST_SETTING)


def write_all(folder: Path = results.RESULTS, root: Path = ROOT, pictures: bool = False) -> list[str]:
    """Write the page, the documents' tables and numbers, and perhaps the pictures anew; what is left to a person.

    Pictures are left out unless asked for, since their bytes differ between versions of matplotlib.
    """
    found = all_results(folder)
    for result in found if pictures else []:
        draw(result, folder)
    (folder.parent / "README.md").write_text(text_of(found, folder), encoding="utf-8")
    problems = []
    for path in documents.paths(root):
        text = path.read_text(encoding="utf-8")
        new = documents.rewrite(text, path, folder)
        if new != text:
            path.write_text(new, encoding="utf-8")
        problems += [f"{path.relative_to(root)}:{line}" for line in documents.problems(new, path, folder)]
    return problems


def main(arguments: Sequence[str]) -> int | str:
    parser = argparse.ArgumentParser(prog="python -m benchmarks page", description=__doc__)
    parser.add_argument("--draw", action="store_true", help="pictures, too")
    options = parser.parse_args(arguments)
    try:
        problems = write_all(pictures=options.draw)
    except ValueError as error:
        return str(error)
    print("\n".join(problems) or "the documents say what the results say")
    return int(bool(problems))
