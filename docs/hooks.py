"""What the site takes from outside of `docs`: pictures and files of results, which stand beside what measured them."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# On the repository's own pages links go by folders; on the site the results are a folder of it.
RESULTS = re.compile(r"\]\(\.\./benchmarks/results/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each picture and each JSON file of results as `results/NAME`."""
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of pages at the top of `docs` to a file of results, as links into the site."""
    return RESULTS.sub("](results/", markdown)
