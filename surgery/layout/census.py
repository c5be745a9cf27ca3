"""Parameters by group (paper section 3.1, eq. 1 to 3, figure 1); how routers spread tokens."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surgery.errors import StatsError, printable
from surgery.families.schema import EXPERT, GROUPS
from surgery.layout.layout import Layout
from surgery.plot import html_table, saved_figure, titled
from surgery.stats.channel_stats import ChannelStats


@dataclass(frozen=True)
class Census:
    """Parameter counts of one checkpoint."""

    model: str
    model_type: str
    vocab_size: int
    widths: dict[str, int]
    """Key of config.json → channels of each FFN, or expert, of this kind."""
    experts: int
    """Routed experts per layer."""
    num_hidden_layers: int
    tied: bool
    parameters: int
    """Of the whole model; tied embeddings count once."""
    nbytes: int
    """Bytes of all tensors on disk."""
    shards: int
    notes: tuple[str, ...]
    """What the user should know."""
    groups: dict[str, int]
    """Parameters by group: vocabulary, attention, ffn, norms, and "other" if there are any."""

    @classmethod
    def of(cls, layout: Layout, model: str) -> "Census":
        """Count ``layout`` from its headers; ``model`` is the name to print."""
        groups = layout.groups
        kind = layout.checkpoint.config.get("model_type") or layout.family.model_type
        return cls(
            model=model,
            model_type=printable(str(kind)),
            vocab_size=layout.vocab_size,
            widths=dict(layout.widths),
            experts=layout.experts,
            num_hidden_layers=layout.num_hidden_layers,
            tied=layout.tied,
            notes=layout.notes,
            parameters=groups.total(),
            nbytes=layout.checkpoint.nbytes,
            shards=len(layout.checkpoint.shards),
            groups={group: groups[group] for group in GROUPS if group != "other" or groups[group]},
        )

    def table(self) -> str:
        """The census as text for people."""
        wide = 2 + max(map(len, ("intermediate_size", *self.widths)))
        rows = [
            f"{self.model}  ({self.model_type}, {self.num_hidden_layers} layers, "
            f"{self.shards} shard{'s' if self.shards != 1 else ''})",
            *(f"note: {note}" for note in self.notes),
            f"{'vocab_size':<{wide}}{self.vocab_size:>16,}{'  tied' if self.tied else ''}",
            *(f"{key:<{wide}}{width:>16,}" for key, width in self.widths.items()),
        ]
        if self.experts:
            rows.append(f"{'experts':<{wide}}{self.experts:>16,}")
        for group, count in self.groups.items():
            rows.append(f"{group:<{wide}}{count:>16,}{count / self.parameters:>8.1%}")
        rows.append(f"{'parameters':<{wide}}{self.parameters:>16,}")
        rows.append(f"{'bytes':<{wide}}{self.nbytes:>16,}")
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        rows = [(name, n, n / self.parameters) for name, n in self.groups.items()]
        rows.append(("all", self.parameters, 1.0))
        return html_table(
            titled(self.model, self.model_type), ("part", "parameters", "share"), rows
        )


def plot_census(census: Census, path: Path) -> None:
    """Draw the groups' shares as a bar and save it to the image file ``path``.

    Raises:
        OutputError: as ``saved_figure``.
    """
    with saved_figure(path, 8, 2.2) as figure:
        axes = figure.subplots()
        left = 0.0
        for group, count in census.groups.items():
            share = 100 * count / census.parameters
            axes.barh(0, share, left=left, label=f"{group} {share:.1f} %", edgecolor="white")
            left += share
        axes.set(xlim=(0, 100), yticks=[], xlabel="share of parameters (%)")
        axes.set_title(
            titled(
                census.model,
                f"{census.parameters / 1e6:,.1f} M parameters, "
                f"{'tied' if census.tied else 'untied'} embeddings",
            )
        )
        figure.legend(loc="outside lower center", ncols=len(census.groups), frameon=False)


@dataclass(frozen=True)
class RoutingCensus:
    """How the routers of a model spread the tokens of a text over their experts."""

    model: str
    shares: dict[int, list[float]]
    """Layer → the share of its tokens that went to each expert; a token goes to several."""
    tokens: dict[int, int]
    """Layer → tokens that its experts saw, each as often as it had an expert."""

    @classmethod
    def of(cls, stats: ChannelStats, model: str) -> "RoutingCensus":
        """Read the shares from statistics; ``model`` is the name to print.

        Raises:
            StatsError: no layer has experts.
        """
        counts = {
            layer: axes[EXPERT].tokens.sum(axis=0)
            for layer, axes in enumerate(stats.layers)
            if EXPERT in axes
        }
        if not counts:
            raise StatsError(stats.where, "are of a model without experts", fix="leave them out")
        shares = {layer: (n / max(1, n.sum())).tolist() for layer, n in counts.items()}
        return cls(model, shares, {layer: int(n.sum()) for layer, n in counts.items()})

    def table(self) -> str:
        """The spread of each layer as text for people."""
        rows = [
            f"{self.model}: tokens by expert",
            f"{'layer':>5}{'experts':>9}{'unused':>8}{'fewest':>9}{'most':>9}{'half go to':>12}",
        ]
        for layer, shares in self.shares.items():
            ordered = np.sort(shares)[::-1]
            half = int(np.searchsorted(np.cumsum(ordered), 0.5 * ordered.sum())) + 1
            unused = int((ordered == 0).sum())
            rows.append(
                f"{layer:>5}{len(shares):>9}{unused:>8}{ordered[-1]:>9.2%}{ordered[0]:>9.2%}"
                f"{half:>12}"
            )
        return "\n".join(rows)


def plot_routing(routing: RoutingCensus, path: Path) -> None:
    """Draw each expert's share of its layer's tokens, experts × layers, to the file ``path``.

    Raises:
        OutputError: as ``saved_figure``.
    """
    rows = np.array([sorted(shares, reverse=True) for shares in routing.shares.values()])
    with saved_figure(path, 8, 0.8 + 4 * min(1, len(rows) / 24 + 0.3)) as figure:
        axes = figure.subplots()
        image = axes.imshow(100 * rows, aspect="auto", interpolation="nearest", vmin=0)
        axes.set_yticks(range(len(rows)), list(map(str, routing.shares)))
        axes.set(xlabel="experts of the layer, by their share", ylabel="layer")
        axes.set_title(titled(routing.model, "tokens by expert"))
        figure.colorbar(image, label="share of tokens (%)")
