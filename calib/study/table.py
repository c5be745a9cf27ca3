"""Cuts side by side: rows of a table, and its pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.plot import saved_figure

FFN_CRITERIA = ("random", "abs-act", "act2", "wanda", "l2")
"""Criteria that are compared with the vocabulary whole."""

LAYER_METHODS = ("shortgpt", "laco")

METHODS = (*FFN_CRITERIA, *LAYER_METHODS, "vocabulary", "compact", "search")
"""What can be compared."""

BLEND = 2 / 3
"""What the loss over all bytes counts in a score, that on words cut alike counting the rest.

On the task files of this project (``tools/tasks``) SmolLM2-135M lost 2.4 points of accuracy for
each per cent of bits lost by channels alone, where both losses are the same, and 1.6 for each that
its vocabulary alone cost, where words cut alike cost nothing.
"""


@dataclass(frozen=True)
class Row:
    """One cut and what it does to held-out text."""

    name: str
    vocab_size: int
    widths: dict[str, int]
    """Key of config.json → I'."""
    num_hidden_layers: int
    parameters: int
    removed: float
    """Parts of all parameters."""
    bits_per_byte: float
    """Over all bytes."""
    loss: float
    """Bits over those of the dense model, less 1."""
    alike_loss: float
    """The same on the words that both vocabularies cut alike."""
    alike_share: float
    """Their bytes, of all."""

    @property
    def score(self) -> float:
        """What a search minimizes."""
        return BLEND * self.loss + (1 - BLEND) * self.alike_loss

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self) | {"score": self.score}


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text for people; the best score is marked."""
    keys = list(rows[0].widths)
    wide = 2 + max(map(len, ("cut", *(row.name for row in rows))))
    heads = ["V'", *(["I'"] if len(keys) == 1 else keys), "layers", "parameters", "removed"]
    heads += ["bits/byte", "loss", "alike", "score"]
    widths = [max(10, len(head) + 2) for head in heads]
    lines = [f"{'cut':<{wide}}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))]
    best = min(rows, key=lambda row: row.score)
    for row in rows:
        cells = [f"{row.vocab_size:,}", *(f"{row.widths[key]:,}" for key in keys)]
        cells += [str(row.num_hidden_layers), f"{row.parameters / 1e6:,.1f}M"]
        cells += [f"{row.removed:.1%}", f"{row.bits_per_byte:.4f}"]
        cells += [f"{row.loss:+.1%}", f"{row.alike_loss:+.1%}", f"{row.score:+.1%}"]
        text = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append(f"{row.name:<{wide}}{text}" + ("  best" if row is best else ""))
    return "\n".join(lines)


def plot_pairs(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss of each pair over its V', for all bytes and for words cut alike.

    Raises:
        OutputError: as ``saved_figure``.
    """
    ordered = sorted(rows, key=lambda row: row.vocab_size)
    best = min(ordered, key=lambda row: row.score)
    sizes = [row.vocab_size for row in ordered]
    with saved_figure(path, 7, 4) as figure:
        axes = figure.subplots()
        for label, values in (
            ("all bytes", [row.loss for row in ordered]),
            ("words cut alike", [row.alike_loss for row in ordered]),
            ("score", [row.score for row in ordered]),
        ):
            axes.plot(sizes, [100 * value for value in values], marker="o", label=label)
        axes.axvline(best.vocab_size, color="grey", linestyle=":")
        widths = ", ".join(f"{key} {size:,}" for key, size in best.widths.items())
        axes.set(
            xlabel="V', rows of the embedding",
            ylabel="bits over the dense model's (%)",
            title=f"{best.removed:.0%} fewer parameters; best: V' {best.vocab_size:,}, {widths}",
        )
        axes.legend(frameon=False)


def plot_methods(found: Mapping[float, Sequence[Row]], path: Path) -> None:
    """Draw the loss of each method, a group of bars for each ratio.

    Raises:
        OutputError: as ``saved_figure``.
    """
    names = list(dict.fromkeys(row.name for rows in found.values() for row in rows))
    with saved_figure(path, 8, 0.9 + 0.35 * len(names) * len(found) ** 0.5) as figure:
        axes = figure.subplots()
        height = 0.8 / len(found)
        for group, (ratio, rows) in enumerate(found.items()):
            places = [names.index(row.name) + group * height for row in rows]
            losses = [100 * row.loss for row in rows]
            bars = axes.barh(places, losses, height, label=f"{ratio:.0%} of the parameters gone")
            axes.bar_label(bars, fmt="%+.1f", padding=3, fontsize=8)
        middle = height * (len(found) - 1) / 2
        axes.set_yticks([place + middle for place in range(len(names))], names)
        axes.invert_yaxis()
        worst = max(100 * row.loss for rows in found.values() for row in rows)
        axes.set(xlabel="bits per byte of held-out text, over the dense model's (%)")
        axes.set_xlim(right=1.12 * worst)
        figure.legend(loc="outside lower center", ncols=len(found), frameon=False)


def plot_samples(rows: Mapping[int, Row], path: Path) -> None:
    """Draw the loss over the windows of calibration text (paper figure 3).

    Raises:
        OutputError: as ``saved_figure``.
    """
    with saved_figure(path, 6, 3.5) as figure:
        axes = figure.subplots()
        axes.plot(list(rows), [100 * row.loss for row in rows.values()], marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(rows), [str(count) for count in rows])
        axes.set(
            xlabel="windows of calibration text",
            ylabel="bits per byte over the dense model's (%)",
        )
