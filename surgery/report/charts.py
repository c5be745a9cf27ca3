"""Charts of a report as the text of SVG elements; the page's style sheet has their colours."""

from collections.abc import Sequence
from html import escape
from math import inf, log10

from surgery.report.layers import ExpertMap, LayerRow
from surgery.report.proof import TrialRow

SHADES = 8
"""Shades of a heat map."""

MOST_NAMES = 12
"""Joined dots that are named."""

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
    size, left, top, rows = 12, 28, 14, experts.shares
    columns, most = max(map(len, rows)), max(map(max, rows)) or 1.0
    cells: list[list[str]] = [[] for _ in range(SHADES)]
    crosses, names = [], []
    for y, shares in enumerate(rows):
        below = top + y * size
        names.append(f'<text class="end" x="{left - 5}" y="{below + 9}">{experts.layers[y]}</text>')
        for x, share in enumerate(shares):
            shade = min(SHADES - 1, int(SHADES * (share / most) ** 0.5))
            place = f"M{left + x * size} {below}"
            cells[shade].append(f"{place}h{size - 1}v{size - 1}h{1 - size}z")
            if not experts.kept[y][x]:
                crosses.append(f"{place}m2 2l7 7m0 -7l-7 7")
    names += [f'<text x="{left + x * size}" y="10">{x}</text>' for x in range(0, columns, 8)]
    paths = [f'<path class="shade{n}" d="{"".join(d)}"/>' for n, d in enumerate(cells) if d]
    paths.append(f'<path class="crossed" d="{"".join(crosses)}"/>' if crosses else "")
    label = f"{columns} experts in {len(rows)} layers: share of tokens, removed experts crossed"
    width, height = left + columns * size + 12, top + len(rows) * size
    return (
        f'<svg class="heat" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{label}">{"".join(paths)}{"".join(names)}</svg>'
    )


def tried_sizes(rows: Sequence[TrialRow]) -> str:
    """Return the loss of each of a search's trials over its V', all joined."""
    ordered = sorted(rows, key=lambda row: row.vocab_size)
    label = "bits over the dense model's (%), by V'"
    return _scatter(
        [(float(row.vocab_size), row) for row in ordered], ordered, label, "V' to {:,.0f}"
    )


def frontier(rows: Sequence[TrialRow]) -> str:
    """Return loss over removed share of trials; those that no other one beats are joined."""
    ahead, least = [], inf
    for row in sorted(rows, key=lambda row: (-row.removed, row.loss)):
        if row.loss < least:
            ahead.append(row)
            least = row.loss
    label = "bits over the dense model's (%), by share of the parameters removed"
    return _scatter([(row.removed, row) for row in rows], ahead, label, "removed, to {:.0%}")


def _scatter(
    rows: Sequence[tuple[float, TrialRow]], joined: Sequence[TrialRow], label: str, most: str
) -> str:
    """Return a dot for each row at its x and its loss, and a line through those that are joined."""
    width, height, left, bottom = 560, 260, 48, 34
    right = max((x for x, _ in rows), default=0) or 1
    high = max((row.loss for _, row in rows), default=0) or 1
    places = {
        id(row): (
            left + (width - left - 70) * x / right,
            height - bottom - (height - bottom - 14) * max(0.0, row.loss) / high,
        )
        for x, row in rows
    }
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (places[id(row)] for row in joined))
    marks = []
    for _, row in rows:
        x, y = places[id(row)]
        name = f"{escape(row.name)}: {row.removed:.1%} removed, {row.loss:+.1%} bits"
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{name}</title></circle>')
        if any(row is each for each in joined) and len(joined) <= MOST_NAMES:
            marks.append(f'<text x="{x + 6:.1f}" y="{y - 5:.1f}">{escape(row.name)}</text>')
    axes = (
        f'<path class="axis" d="M{left} 8V{height - bottom}H{width - 8}"/>'
        f'<text x="{left}" y="{height - 6}">0</text>'
        f'<text class="end" x="{width - 8}" y="{height - 6}">{most.format(right)}</text>'
        f'<text class="end" x="{left - 5}" y="18">{high:+.0%}</text>'
        f'<text class="end" x="{left - 5}" y="{height - bottom}">0 %</text>'
    )
    return (
        f'<svg class="frontier" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{axes}<polyline points="{line}"/>{"".join(marks)}</svg>'
        f'<p class="note">{escape(label)}</p>'
    )
