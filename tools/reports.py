"""Make the pages of `report` that the docs show, for SmolLM2-135M and for Gemma 3 270M.

    python -m tools.reports --smollm2 DIR --gemma3 DIR -o build/reports

Each model is calibrated. SmolLM2 is pruned by a fifth and scored; Gemma 3 is planned with a quarter
of its 262,144 tokens, on the Declaration of Human Rights in sixteen languages.
"""

import subprocess
import sys
from pathlib import Path

import click

from tests.support.languages import ARTICLE_1

TEXTS = Path(__file__).parent / "text"
NAMES = {
    "Latin": "English",
    "Cyrillic": "Russian",
    "Devanagari": "Hindi",
    "Han": "Chinese",
    "Hiragana": "Japanese",
    "Hangul": "Korean",
}
"""Keys of ``ARTICLE_1`` that name a script → the language."""

CALIBRATION = ("--data", TEXTS / "calibration.txt", "--seq-len", 512)
WIDTHS = {1280: 1000, 390: 844}
"""Width of a screenshot in pixels → its height."""


def compact_surgery(*arguments: object) -> str:
    """Run a command of this project, and return what it prints."""
    code = "from surgery.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def pages_of(output: Path) -> Path:
    """The folder of the pages, made where it is missing; the site has what is in ``pages``."""
    folder = output / "pages" / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def smollm2(model: Path, output: Path) -> None:
    """Prune SmolLM2 by a fifth, score it, and write its page; all that is made stays beside it."""
    pruned, heldout = output / "smollm2-pruned", TEXTS / "heldout.txt"
    stats, scores = pruned.with_name("smollm2-pruned.stats.safetensors"), output / "smollm2.json"
    if not pruned.exists():
        cut = ("--ratio", 0.2, "--samples", 64, "--force", "-o", pruned)
        compact_surgery("prune", model, *CALIBRATION, *cut)
    if not scores.exists():
        scores.write_text(
            compact_surgery("score", model, pruned, "--data", heldout, "--samples", 32, "--json")
        )
    given = ("--stats", stats, "--results", scores, "--forward", "--data", heldout)
    plan = ("--source", model, *given, "--force", "-o", pages_of(output) / "smollm2.html")
    compact_surgery("report", pruned, *plan)


def gemma3(model: Path, output: Path) -> None:
    """Plan Gemma 3 with 65,536 tokens, and write its page."""
    stats, plan = output / "gemma3.stats.safetensors", output / "gemma3.plan.json"
    data: list[object] = []
    for key, text in ARTICLE_1.items():
        name = NAMES.get(key, key.rpartition(", ")[2])
        path = output / "texts" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
        data += ["--data", path]
    if not stats.exists():
        compact_surgery("calibrate", model, *CALIBRATION, "--samples", 36, "-o", stats)
    cut = ("--vocab-size", 65536, "--stats", stats, *data, "--force", "-o", plan)
    compact_surgery("plan", model, *cut)
    given = ("--source", model, "--stats", stats, *data)
    compact_surgery("report", plan, *given, "--force", "-o", pages_of(output) / "gemma3.html")


def screenshots(page: Path, output: Path) -> None:
    """Save what a phone and a screen show first of a page; Chromium must be installed."""
    from tests.support.browser import chromium, open_page

    with chromium() as browser:
        for width, height in WIDTHS.items():
            size = {"width": width, "height": height}
            opened = open_page(browser, page, viewport=size, reduced_motion="reduce")
            opened.page.screenshot(path=output / f"report-{width}.png")
            opened.page.wait_for_selector("#choose[data-ready]")
            opened.page.evaluate("document.getElementById('whatif').scrollIntoView()")
            opened.page.screenshot(path=output / f"report-what-if-{width}.png")


@click.command(help=__doc__)
@click.option("--smollm2", "small", type=click.Path(path_type=Path), required=True)
@click.option("--gemma3", "gemma", type=click.Path(path_type=Path), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--screenshots", "shots", type=click.Path(path_type=Path), help="Also save pictures.")
def main(small: Path, gemma: Path, output: Path, shots: Path | None) -> None:
    """Make both pages."""
    pages_of(output)
    smollm2(small, output)
    gemma3(gemma, output)
    if shots is not None:
        screenshots(pages_of(output) / "gemma3.html", shots)
    for page in sorted(pages_of(output).glob("*.html")):
        click.echo(f"{page}: {page.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
