"""How Sphinx builds these pages: `make docs`."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from surgery import __version__  # noqa: E402

project = "compact-surgery"
author = "the authors of compact-surgery"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
smartquotes = False  # they make – of --
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!(surgery|calib)\b).*"),  # names of other libraries
    (
        "py:.*",
        r".*\.(Layout|StatsInfo|AxisSums|ReportFacts)",
    ),  # what is inside is no part of the API
]

REPORTS = ROOT / "build" / "reports" / "pages"
"""What `make reports` makes; the site shows it where it is there."""

html_extra_path = [str(REPORTS)] if REPORTS.is_dir() else []

LIVE = """
## Two live pages

- <a href="reports/smollm2.html">SmolLM2-135M, pruned by a fifth</a>, verified and scored
- <a href="reports/gemma3.html">Gemma 3 270M with 65,536 of its 262,144 tokens</a>, with text in
  sixteen languages
"""

PAGE_OF = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tools/tasks/README.md": "task-files.md",
}
"""Files outside this folder → the pages that show them."""

INCLUDE = re.compile(r"```\{include\} \.\./(.*)\n```\n")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def show_files_outside(app: Sphinx, name: str, source: list[str]) -> None:
    """Put in the files that a page includes, with links that hold on the site as on a forge."""

    def include(match: re.Match[str]) -> str:
        text = (ROOT / match[1]).read_text(encoding="utf-8")
        return LINK.sub(lambda link: relative((ROOT / match[1]).parent / link[1]), text)

    def relative(target: Path) -> str:
        path = os.path.relpath(target, ROOT).replace(os.sep, "/")
        return PAGE_OF.get(path) or os.path.relpath(target, ROOT / "docs").replace(os.sep, "/")

    text = LINK.sub(lambda link: relative(ROOT / "docs" / link[1]), source[0])
    source[0] = INCLUDE.sub(include, text)
    if name == "see-before-you-cut" and REPORTS.is_dir():
        source[0] += LIVE


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", show_files_outside)
