"""Charts of a report as the text of SVG elements; the page's style sheet has their colours."""

from collections.abc import Sequence
from html import escape
from math import log10

from surgery.report.layers import ExpertMap, LayerRow
from surgery.report.proof import TrialRow

SHADES = 8
"""Shades of a heat map."""

FLOOR = -4.0
"""Smallest power of ten that a curve of act² shows."""


def bar(after: float, before: float, most: float) -> str:
    """Return a bar of what is kept beside what is removed, over ``most``; for a table's cell."""
    scale = 100 / most if most else 0.0
    kept, total = after * scale, before * scale
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="kept" width="{kept:.2f}" height="10"/>'
        f'<rect class="gone" x="{kept:.2f}" width="{max(0.0, total - kept):.2f}" height="10"/>'
        "</svg>"
    )


def parts(counts: Sequence[tuple[str, float]], label: str) -> str:
    """Return one bar of several parts, in the colours of series 0, 1 and so on."""
    total, x, rects = sum(count for _, count in counts) or 1, 0.0, []
    for number, (name, count) in enumerate(counts):
        width = 100 * count / total
        rects.append(
            f'<rect class="series{number}" x="{x:.2f}" width="{width:.2f}" height="12">'
            f"<title>{escape(name)}: {count:,}</title></rect>"
        )
        x += width
    return (
        f'<svg class="parts" viewBox="0 0 100 12" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(rects)}</svg>'
    )


def curve(row: LayerRow) -> str:
    """Return the curve of a layer's sorted act², on a logarithmic scale, with its cut."""
    width, height = 160, 72
    cut = width * row.kept / row.channels
    points = []
    for number, value in enumerate(row.curve):
        x = width * number / max(1, len(row.curve) - 1)
        power = max(FLOOR, log10(value)) if value > 0 else FLOOR
        points.append((x, height * power / FLOOR))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    label = f"{row.name}: sorted act² of {row.channels:,} channels; the first {row.kept:,} are kept"
    clip = f'<rect class="lost" x="{cut:.1f}" width="{width - cut:.1f}" height="{height}"/>'
    return (
        f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{clip}<polyline points="{line}"/>'
        f'<line class="cut" x1="{cut:.1f}" x2="{cut:.1f}" y2="{height}"/></svg>'
    )


def heat_map(experts: ExpertMap) -> str:
    """Return experts × layers: each expert's share of tokens as a shade, removed ones crossed."""
    size, rows = 12, experts.shares
    columns, top = max(map(len, rows)), max(map(max, rows)) or 1.0
    cells: list[list[str]] = [[] for _ in range(SHADES)]
    crosses = []
    for y, shares in enumerate(rows):
        for x, share in enumerate(shares):
            shade = min(SHADES - 1, int(SHADES * (share / top) ** 0.5))
            cells[shade].append(f"M{x * size} {y * size}h{size - 1}v{size - 1}h{1 - size}z")
            if not experts.kept[y][x]:
                crosses.append(f"M{x * size + 2} {y * size + 2}l7 7m0 -7l-7 7")
    paths = [f'<path class="shade{n}" d="{"".join(d)}"/>' for n, d in enumerate(cells) if d]
    paths.append(f'<path class="crossed" d="{"".join(crosses)}"/>' if crosses else "")
    label = f"{columns} experts in {len(rows)} layers: share of tokens, removed experts crossed"
    return (
        f'<svg class="heat" viewBox="0 0 {columns * size} {len(rows) * size}" '
        f'width="{columns * size}" height="{len(rows) * size}" role="img" '
        f'aria-label="{escape(label)}">{"".join(paths)}</svg>'
    )


def frontier(rows: Sequence[TrialRow]) -> str:
    """Return loss over removed share of trials, each a dot, with those that none beats joined."""
    width, height, left, bottom = 560, 260, 48, 34
    most_x = max((row.removed for row in rows), default=0) or 1
    most_y = max((row.loss for row in rows), default=0) or 1

    def place(row: TrialRow) -> tuple[float, float]:
        x = left + (width - left - 60) * row.removed / most_x
        return x, height - bottom - (height - bottom - 14) * max(0.0, row.loss) / most_y

    ahead, least = [], float("inf")
    for row in sorted(rows, key=lambda row: (-row.removed, row.loss)):
        if row.loss < least:
            ahead.append(row)
            least = row.loss
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, ahead))
    dots = []
    for row in rows:
        x, y = place(row)
        name = f"{escape(row.name)}: {row.removed:.1%} removed, {row.loss:+.1%} bits"
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{name}</title></circle>')
    names = [
        f'<text x="{x + 6:.1f}" y="{y - 5:.1f}">{escape(row.name)}</text>'
        for row in ahead
        for x, y in [place(row)]
    ]
    axes = (
        f'<path class="axis" d="M{left} 8V{height - bottom}H{width - 8}"/>'
        f'<text x="{left}" y="{height - 6}">0 %</text>'
        f'<text class="end" x="{width - 8}" y="{height - 6}">parameters removed, to {most_x:.0%}'
        f'</text><text class="end" x="{left - 5}" y="18">{most_y:+.0%}</text>'
        f'<text class="end" x="{left - 5}" y="{height - bottom}">0 %</text>'
    )
    label = "bits over the dense model's, by share of the parameters removed"
    return (
        f'<svg class="frontier" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f'{axes}<polyline points="{line}"/>{"".join(dots)}{"".join(names)}</svg>'
    )
