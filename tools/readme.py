"""Tables in README.md that a program makes, between two lines that name it."""

from pathlib import Path

import click

README = Path(__file__).parent.parent / "README.md"


def print_or_write(table: str, begin: str, end: str, *, write: bool) -> None:
    """Print ``table``, or put it into README.md between the lines ``begin`` and ``end``."""
    if not write:
        click.echo(table, nl=False)
        return
    before, _, rest = README.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    README.write_text(f"{before}{begin}{table}{end}{after}", encoding="utf-8")
