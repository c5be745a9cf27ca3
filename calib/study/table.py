"""Rows that compare pruned models, as a table and as pictures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calib.scoring.answers import Answers
from surgery.planning.serving import COUNTED, DECODE, MARGIN, MEMORY, QUALITY
from surgery.planning.sizes import TOLERANCE
from surgery.plot import html_table, saved_figure, titled
from surgery.process import spoken

FFN_CRITERIA = ("random", "abs-act", "act2", "wanda", "l2")
"""Criteria that are compared with the whole vocabulary kept."""

LAYER_METHODS = ("shortgpt", "laco")

EXPERT_METHODS = {
    **{name: name for name in ("reap", "man", "msan", "frequency", "gate", "aimer")},
    "random-experts": "random",
}
"""Method that removes whole experts → the criterion of experts; tried if they are named."""

ROTATE, HIDDEN = STREAM_METHODS = ("rotate", "hidden")
"""Methods that remove columns of the residual stream; tried if they are named."""

OTHER_ARCHITECTURES = {
    "slicegpt": "matrices between the blocks that change the basis of the residual stream",
    "2ssp": "layers without an attention",
}
"""Method whose output is no standard checkpoint → what config.json has no place for."""

METHODS = (
    *FFN_CRITERIA,
    *LAYER_METHODS,
    *OTHER_ARCHITECTURES,
    *("vocabulary", "compact", "prune", "search"),
)
"""All methods that can be compared."""

DENSE = "dense"
"""Name of the row of the model from which nothing is removed."""


@dataclass(frozen=True)
class Row:
    """A pruned model, and how many bits held-out text takes."""

    name: str
    vocab_size: int
    widths: dict[str, int]
    """Key of config.json → I'."""
    num_hidden_layers: int
    parameters: int
    removed: float
    """Removed share of all parameters."""
    bits_per_byte: float
    """Over all bytes."""
    loss: float
    """Bits divided by those of the dense model, minus 1: the number that a search minimizes."""
    heldout_windows: int
    """Windows of held-out text."""
    heldout_bytes: int
    """UTF-8 bytes of these windows."""
    loss_margin: float | None = None
    """Half of the interval that holds 95 % of the losses on windows drawn anew: ``Change``."""
    window_bits: tuple[float, ...] = ()
    """Bits of each window."""
    experts: int = 0
    """Routed experts of each layer that has some."""
    decoded_bytes: int = 0
    """Bytes of weights read for each decoded token, as predicted; 0 where that is not known."""
    memory_bytes: int = 0
    """Bytes in memory with the cache and logits of ``POSITIONS`` positions, as predicted."""
    answers: Answers | None = None
    """Which items of tasks it answers right, if it was asked."""
    seconds: float = 0.0
    """What its method alone takes to choose what is removed, in a comparison."""

    def served(self, aim: str) -> int:
        """Return the bytes that ``aim`` makes few; 0 for quality, which counts none."""
        return {DECODE: self.decoded_bytes, MEMORY: self.memory_bytes}.get(aim, 0)

    def facts(self, dense: "Row | None" = None) -> dict[str, Any]:
        """Return all fields, for JSON; answers beside those of ``dense``."""
        found = asdict(replace(self, answers=None))
        del found["answers"]
        found["window_bits"] = list(self.window_bits)
        if self.answers is not None:
            found["tasks"] = self.answers.facts(dense.answers if dense is not None else None)
        return found


def missed(row: Row, ratio: float) -> bool:
    """Whether a method removed another share than asked for, in steps such as whole layers."""
    return row.name != DENSE and abs(row.removed - ratio) > TOLERANCE


def rows_html(title: str, rows: Sequence[Row]) -> str:
    """Return the rows as a table for a notebook."""
    routed = any(row.experts for row in rows)
    heads = ["cut", "V'", *rows[0].widths, *["experts"] * routed, "layers", "removed"]
    cells = []
    for row in rows:
        sizes = [row.vocab_size, *row.widths.values(), *[row.experts] * routed]
        bits = [f"{row.bits_per_byte:.4f}", f"{row.loss:+.2%}"]
        cells.append([row.name, *sizes, row.num_hidden_layers, row.removed, *bits])
    return html_table(title, [*heads, "bits per byte", "loss"], cells)


WITHIN = 0.01
"""How much more a row may lose than the best one does, if it serves an aim better."""


def best_for(aim: str, rows: Sequence[Row]) -> Row:
    """Return the row that loses least; or of those close to it, that with the fewest bytes.

    The dense model's row is never it. Bytes that differ by less than ``MARGIN`` count as equal.
    """
    rows = [row for row in rows if row.name != DENSE]
    best = min(rows, key=lambda row: row.loss)
    close = [row for row in rows if row.loss <= best.loss + WITHIN]
    least = min(row.served(aim) for row in close)
    equal = [row for row in close if row.served(aim) <= (1 + MARGIN) * least]
    return min(equal, key=lambda row: row.loss)


def table(rows: Sequence[Row], ratio: float | None = None, aim: str = QUALITY) -> str:
    """Return the rows as text for people; the least loss is marked.

    Args:
        rows: One may be ``DENSE``.
        ratio: Share of the parameters that was to be removed; rows that miss it are marked.
        aim: What the best row is to serve, which is marked, too.
    """
    keys = list(rows[0].widths)
    wide = 2 + max(map(len, ("cut", *(row.name for row in rows))))
    routed = any(row.experts for row in rows)
    heads = ["V'", *(["I'"] if len(keys) == 1 else keys), *["experts"] * routed]
    heads += ["layers", "parameters", "removed"]
    known = any(row.loss_margin is not None for row in rows)
    heads += ["bits/byte", "loss", *["±"] * known]
    heads += {DECODE: ["read MB"], MEMORY: ["memory MB"]}.get(aim, [])
    answers = rows[0].answers
    heads += ["acc_norm", "of dense", "±"] if answers is not None else []
    timed = any(row.seconds for row in rows)
    heads += ["time"] * timed
    widths = [13 if head == "time" else max(10, len(head) + 2) for head in heads]
    lines = [f"{'cut':<{wide}}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))]
    tried = [row for row in rows if row.name != DENSE]
    marks = {best_for(name, tried).name: mark for name, mark in _marks(aim) if tried}
    for row in rows:
        cells = [f"{row.vocab_size:,}", *(f"{row.widths[key]:,}" for key in keys)]
        cells += [str(row.experts)] * routed
        cells += [str(row.num_hidden_layers), f"{row.parameters / 1e6:,.1f}M"]
        mark = "*" if ratio is not None and missed(row, ratio) else ""
        cells += [f"{row.removed:.1%}{mark}", f"{row.bits_per_byte:.4f}", f"{row.loss:+.1%}"]
        cells += ["?" if row.loss_margin is None else f"{row.loss_margin:.1%}"] * known
        cells += [f"{row.served(aim) / 1e6:,.1f}"] * (aim != QUALITY)
        if answers is not None and row.answers is not None:
            share = row.answers.share_of(answers)
            cells += [f"{row.answers.accuracy:.1%}", f"{share.share:.1%}"]
            cells.append("?" if share.margin is None else f"{share.margin:.1%}")
        cells += [spoken(row.seconds) if row.name != DENSE else ""] * timed
        text = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append(f"{row.name:<{wide}}{text}" + marks.get(row.name, ""))
    return "\n".join(lines)


def _marks(aim: str) -> list[tuple[str, str]]:
    """Return what a table marks, and how; of two marks on one row, the last is shown."""
    return [*([(aim, f"  for {aim}")] if aim != QUALITY else []), (QUALITY, "  best")]


def notes(names: Iterable[str]) -> list[str]:
    """Return why the output of some methods is only tried, and is never written."""
    return [
        f"{name}: no standard checkpoint: config.json has no place for {OTHER_ARCHITECTURES[name]}"
        for name in names
        if name in OTHER_ARCHITECTURES
    ]


def legend(row: Row, *, marked: bool = False, timed: bool = False, aim: str = QUALITY) -> str:
    """Return what the columns of a table mean, and on how much text its rows were measured.

    Args:
        row: Any of its rows.
        marked: Whether a row misses the ratio.
        timed: Whether rows say how long their methods took.
        aim: What the best row is to serve.
    """
    lines = [
        f"held out: {row.heldout_windows:,} windows, {row.heldout_bytes:,} bytes, "
        "by which no channel was chosen",
        "loss: bits over those of the dense model"
        + (
            "; ±: other windows of such text move it by less" if row.loss_margin is not None else ""
        ),
    ]
    if aim != QUALITY:
        lines.append(
            f"for {aim}: fewest {COUNTED[aim]}, of those that lose at most "
            f"{100 * WITHIN:g} point more than the best"
        )
    if row.answers is not None:
        sizes = " + ".join(f"{len(task.right):,} {task.name}" for task in row.answers.tasks)
        lines += [
            f"acc_norm: right answers by log-likelihood per byte, to {sizes} items, the mean of "
            f"the tasks; guessing gets {row.answers.chance:.1%}",
            "of dense: the same, divided by that of the dense model; ±: other items of this kind "
            "move it by less, in 95 of 100 cases",
        ]
    if timed:
        lines.append(
            "time: what the method alone takes to choose and refit, without reading and writing "
            "weights; of several sizes, with the held-out text by which the best is found"
        )
    if marked:
        lines.append(
            "*: not the share asked for, but the nearest that whole layers, experts or steps reach"
        )
    return "\n".join(lines)


LOSS_LABEL = "bits over the dense model's (%)"


def plot_sizes(rows: Sequence[Row], path: Path, model: str = "") -> None:
    """Draw what the sizes of a search lose: over their E' where these differ, else over V'.

    The title names ``model``.

    Raises:
        OutputError: as ``saved_figure``.
    """
    ordered = sorted(rows, key=lambda row: row.vocab_size)
    best = min(ordered, key=lambda row: row.loss)
    by_experts = len({row.experts for row in rows}) > 1
    with saved_figure(path, 7, 4) as figure:
        axes = figure.subplots()
        if by_experts:
            _plot_experts(axes, ordered)
        else:
            sizes = [row.vocab_size for row in ordered]
            axes.plot(sizes, [100 * row.loss for row in ordered], marker="o")
            axes.set(xlabel="V', rows of the embedding")
        axes.axvline(best.experts if by_experts else best.vocab_size, color="grey", linestyle=":")
        named = [f"V' {best.vocab_size:,}", *[f"E' {best.experts}"] * by_experts]
        named += [f"{key} {size:,}" for key, size in best.widths.items()]
        axes.set(
            ylabel=LOSS_LABEL,
            title=titled(model, f"{best.removed:.0%} fewer parameters\nbest: {', '.join(named)}"),
        )
        axes.title.set_fontsize("medium")


def plot_frontier(rows: Sequence[Row], aim: str, path: Path, model: str = "") -> None:
    """Draw the loss over the bytes that ``aim`` makes few, and the frontier.

    Of the rows on it, none has fewer bytes and loses less. The title names ``model``.

    Raises:
        OutputError: as ``saved_figure``.
    """
    rows = sorted((row for row in rows if row.name != DENSE), key=lambda row: row.served(aim))
    front = [row for n, row in enumerate(rows) if all(row.loss < r.loss for r in rows[:n])]
    chosen = best_for(aim, rows)
    with saved_figure(path, 7, 4.5) as figure:
        axes = figure.subplots()

        def points(chosen: Sequence[Row]) -> tuple[list[float], list[float]]:
            return [row.served(aim) / 1e6 for row in chosen], [100 * row.loss for row in chosen]

        axes.plot(*points(front), color="grey", drawstyle="steps-post", label="frontier")
        dots = axes.scatter(*points(rows), c=[r.vocab_size for r in rows], cmap="viridis", zorder=3)
        axes.scatter(*points([chosen]), s=140, facecolors="none", edgecolors="black", zorder=4)
        for row in rows:
            widths = ", ".join(f"{size:,}" for size in row.widths.values())
            named, at = f"{row.vocab_size:,} : {widths}", (row.served(aim) / 1e6, 100 * row.loss)
            axes.annotate(named, at, (7, 7), textcoords="offset points", fontsize="x-small")
        figure.colorbar(dots, ax=axes, label="V', rows of the embedding")
        axes.set(
            xlabel=f"MB: {COUNTED[aim]}",
            ylabel=LOSS_LABEL,
            title=titled(model, f"V' : I' by what they lose and take; circled: for {aim}"),
        )
        axes.title.set_fontsize("medium")
        axes.margins(x=0.25)
        axes.legend(frameon=False)


def _plot_experts(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the loss over E': a dot for each row, as dark as its V' is large, and the best line."""
    counts = sorted({row.experts for row in rows})
    best = [min(row.loss for row in rows if row.experts == count) for count in counts]
    axes.plot(counts, [100 * loss for loss in best], color="grey", label="best of each E'")
    dots = axes.scatter(
        [row.experts for row in rows],
        [100 * row.loss for row in rows],
        c=[row.vocab_size for row in rows],
        cmap="viridis_r",
        zorder=3,
    )
    axes.figure.colorbar(dots, ax=axes, label="V', rows of the embedding")
    axes.set(xlabel="E', routed experts of each layer")
    axes.legend(frameon=False)


def plot_methods(found: Mapping[float, Sequence[Row]], path: Path, model: str = "") -> None:
    """Draw the loss of each method, with one bar for each ratio.

    A bar of a method that misses the ratio says which share it removed. The dense model, which
    loses nothing, has no bar.

    Raises:
        OutputError: as ``saved_figure``.
    """
    found = {ratio: [row for row in rows if row.name != DENSE] for ratio, rows in found.items()}
    names = list(dict.fromkeys(row.name for rows in found.values() for row in rows))
    with saved_figure(path, 8, 0.9 + 0.35 * len(names) * len(found) ** 0.5) as figure:
        axes = figure.subplots()
        height = 0.8 / len(found)
        for group, (ratio, rows) in enumerate(found.items()):
            positions = [names.index(row.name) + group * height for row in rows]
            losses = [100 * row.loss for row in rows]
            bars = axes.barh(
                positions, losses, height, label=f"{100 * ratio:g}% of the parameters removed"
            )
            labels = [
                f"{100 * row.loss:+.1f}"
                + (f"  ({row.removed:.1%} removed)" if missed(row, ratio) else "")
                for row in rows
            ]
            axes.bar_label(bars, labels, padding=3, fontsize=8)
        middle = height * (len(found) - 1) / 2
        axes.set_yticks([position + middle for position in range(len(names))], names)
        axes.invert_yaxis()
        every = [(row, missed(row, ratio)) for ratio, rows in found.items() for row in rows]
        worst = max(row.loss for row, _ in every)
        right = max(100 * (row.loss + (0.35 if long else 0.12) * worst) for row, long in every)
        first = every[0][0]
        size = f"{first.heldout_windows:,} windows, {first.heldout_bytes:,} bytes"
        axes.set(
            xlabel=f"bits of held-out text ({size}), over the dense model's (%)",
            title=titled(model, "what each method loses"),
        )
        axes.set_xlim(right=right)
        figure.legend(loc="outside lower center", ncols=len(found), frameon=False)


def plot_answers(found: Mapping[float, Sequence[Row]], path: Path, model: str = "") -> None:
    """Draw each method's share of the dense model's right answers over the removed share.

    All rows have answers. The bars are the ± of ``Share``. Methods stand a little beside each
    other, so that their bars can be told apart. A line begins at the dense model, unless the
    method's output is larger than that.

    Raises:
        OutputError: as ``saved_figure``.
    """
    dense = next(iter(found.values()))[0]
    assert dense.answers is not None
    names = list(dict.fromkeys(row.name for rows in found.values() for row in rows))
    with saved_figure(path, 7, 4.5) as figure:
        axes = figure.subplots()
        names.remove(DENSE)
        for number, name in enumerate(names):
            rows = [row for each in found.values() for row in each if row.name == name]
            shares = [row.answers.share_of(dense.answers) for row in rows if row.answers]
            beside = 0.4 * (number - (len(names) - 1) / 2)
            points = [
                (100 * row.removed + beside, 100 * share.share, 100 * (share.margin or 0))
                for row, share in zip(rows, shares, strict=True)
            ]
            if all(row.removed > 0 for row in rows):
                points.insert(0, (0.0, 100.0, 0.0))
            sizes, answers, margins = zip(*points, strict=True)
            axes.errorbar(
                sizes,
                answers,
                margins,
                marker="os^vDP*X<>hp"[number % 12],
                markersize=4,
                linewidth=1,
                capsize=2,
                label=name,
            )
        axes.axhline(
            100 * dense.answers.chance / dense.answers.accuracy,
            color="grey",
            linestyle=":",
            label="guessing",
        )
        axes.set(
            xlabel="removed share of the parameters (%)",
            ylabel="right answers, of the dense model's (%)",
            title=titled(model, "what each method keeps"),
        )
        figure.legend(loc="outside lower center", ncols=4, frameon=False)


def plot_samples(rows: Sequence[Row], path: Path, model: str = "") -> None:
    """Draw the loss over the number of calibration windows, each row's name (paper figure 3).

    Raises:
        OutputError: as ``saved_figure``.
    """
    rows = [row for row in rows if row.name != DENSE]
    counts = [int(row.name) for row in rows]
    with saved_figure(path, 6, 3.5) as figure:
        axes = figure.subplots()
        axes.plot(counts, [100 * row.loss for row in rows], marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, list(map(str, counts)))
        axes.set(
            xlabel="windows of calibration text",
            ylabel="bits per byte over the dense model's (%)",
            title=titled(model, "loss by windows of calibration text"),
        )
