"""The commands on statistics: merge."""

from pathlib import Path

import click

from surgery.options import path_type


@click.group()
def stats() -> None:
    """Work on files of statistics."""


@stats.command()
@click.argument("paths", metavar="STATS…", nargs=-1, required=True, type=path_type)
@click.option("-o", "output", type=path_type, required=True, metavar="FILE")
def merge(paths: tuple[Path, ...], output: Path) -> None:
    """Add the statistics of separate runs over parts of a text, or over several texts."""
    from surgery.merge import merge_stats
    from surgery.writer import check_file

    check_file(output)
    merged = merge_stats(paths)
    merged.save(output)
    click.echo(f"{output}: {merged.info.samples} windows, {merged.info.tokens:,} tokens")
