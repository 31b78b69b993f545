"""The page of all results and the tables in the documents, written from the results.

A document shows a table between two comments, outside fenced code:

```text
<!-- table NAME/TABLE columns=a,b rows=x,y first="title of the first column" spread=no -->
<!-- end -->
```

Each option may be left out; quote what holds a space; ``spread=no`` shows medians alone. ``NAME/T,U columns=T:a,U:a``
joins the rows of two tables. Where a table has a column ``label``, it replaces the names of the rows.
"""

import inspect
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results

OPTIONS = ("columns", "rows", "first", "spread")
MARKED = re.compile(
    r"^(?P<fence>```|~~~).*?^(?P=fence)[^\n]*$|<!-- table (?P<what>[^\n]*?) -->.*?(?P<end><!-- (?:end|table)|\Z)",
    re.DOTALL | re.MULTILINE,
)
MOST_ROWS, MOST_SETTING = 30, 60  # of a table on the page, longer ones are left to the file; characters of a setting

HOW = """# Results

Written by `python -m benchmarks page`; do not edit. Each result is one file of `results/`, in one form, which
`results.py` describes: what was measured, the command, the machine, and tables. Where a measurement was repeated, the
tables show its median, and some columns `(low to high)` beside it: the least and the most of fewer than ten, else the
10th and the 90th percentile. Times are comparable within one result alone.

```text
{usage}
```

{markers}

Measured are, with the minutes on two CPU cores:

{benchmarks}
"""


def documents(root: Path) -> list[Path]:
    """Those that may show tables of results."""
    return [root / "README.md", *sorted(root.glob("docs/**/*.md"))]


def rewritten(text: str, folder: Path) -> str:
    """A document with its tables as the results in ``folder`` say.

    Raises:
        ValueError, KeyError: a table cannot be made; the message says which, and why.
    """

    def renewed(match: re.Match[str]) -> str:
        what = match["what"]
        if what is None:
            return match[0]
        if match["end"] != "<!-- end":
            raise ValueError(f"the table {what} has no <!-- end -->: add it")
        return f"<!-- table {what} -->\n\n{results.markdown(lines_of(what, folder))}\n\n<!-- end"

    return MARKED.sub(renewed, text)


def lines_of(what: str, folder: Path) -> list[list[str]]:
    """The cells of the table that a comment asks for."""
    where, *options = shlex.split(what)
    given = {name: text for name, _, text in (option.partition("=") for option in options)}
    if unknown := given.keys() - set(OPTIONS):
        raise ValueError(f"table {where} has the options {', '.join(sorted(unknown))}; known are {', '.join(OPTIONS)}")
    name, _, key = where.partition("/")
    part = joined(results.read(folder / f"{name}.json"), key.split(","))
    columns, rows = (given[axis].split(",") if axis in given else [] for axis in ("columns", "rows"))
    return results.rows_of(part, columns, rows, given.get("first", ""), "spread" not in given)


def joined(found: Mapping[str, Any], keys: Sequence[str]) -> Mapping[str, Any]:
    """The table of that name; of several, one with the columns of all as ``table:column``."""
    tables = found["tables"]
    for key in keys:
        if key not in tables:
            raise KeyError(f"{found['name']} has no table {key!r}; there is {', '.join(tables)}")
    if len(keys) == 1:
        return tables[keys[0]]
    whole: dict[str, Any] = {"title": ", ".join(tables[key]["title"] for key in keys), "columns": {}, "rows": {}}
    for key in keys:
        columns = tables[key]["columns"]
        named = {name: name if name == "label" else f"{key}:{name}" for name in columns}
        for name, column in columns.items():
            title = column["title"] if name == "label" else f"{key}: {column['title']}"
            whole["columns"][named[name]] = {**column, "title": title}
        for row, cells in tables[key]["rows"].items():
            whole["rows"].setdefault(row, {}).update({named[name]: cell for name, cell in cells.items()})
    return whole


def text_of(found: Sequence[Mapping[str, Any]], usage: str, benchmarks: str, folder: Path) -> str:
    """The page of all results, as Markdown beside ``folder``."""
    markers = inspect.cleandoc(__doc__ or "").partition("\n\n")[2]
    how = HOW.format(usage=usage, markers=markers, benchmarks=benchmarks)
    return how + "".join(section(result, folder) for result in found)


def section(found: Mapping[str, Any], folder: Path) -> str:
    """One result on the page."""
    name = found["name"]
    parts = [f"## {name}", found["what"], f"    {found['command']}", f"{found['date']} on {machine(found)}."]
    settings = {key: x if isinstance(x, str) else json.dumps(x) for key, x in found["settings"].items()}
    if short := [f"`{key} = {text}`" for key, text in settings.items() if len(text) <= MOST_SETTING]:
        parts.append(f"Settings: {', '.join(short)}.")
    for title, part in found["tables"].items():
        count = len(part["rows"])
        if count > MOST_ROWS:
            parts.append(f"**{part['title']}** (`{title}`, [{count} rows]({folder.name}/{name}.json))")
        elif count:
            parts += [f"**{part['title']}** (`{title}`)", results.markdown(results.rows_of(part))]
    if (folder / f"{name}.png").exists():
        parts.append(f"![{name}]({folder.name}/{name}.png)")
    return "\n" + "\n\n".join(parts) + "\n"


def machine(found: Mapping[str, Any]) -> str:
    """What a result was measured on, in one line."""
    m, versions = found["machine"], ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    host = f"{m['cpu']}, {m['cores']} cores, load {m['load']:g} as it began"
    device = "" if m["platform"] == "cpu" else f"{m['devices']} x {m['device']}; "
    return f"{device}{host}; Python {m['python']}, {versions}"
