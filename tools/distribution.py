"""The paper's Figures 1, 4 and 5: where the parameters are, by family and size of the model.

    python -m tools.distribution [--plot FILE]

The shapes are published ones. Only headers are written, in a temporary directory, and read.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.layout.build import read_layout
from surgery.plot import saved_figure
from tools.published import PUBLISHED, llama_config
from tools.shapes import write_headers_only

PARTS = ("vocabulary", "FFN", "attention", "other")


def _qwen(*sizes: int, tied: bool) -> dict[str, Any]:
    names: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    return llama_config(*sizes[:6], tie_word_embeddings=tied, **names)


def _gemma(*sizes: int, head_dim: int = 256) -> dict[str, Any]:
    names: dict[str, Any] = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    return llama_config(*sizes[:6], tie_word_embeddings=True, head_dim=head_dim, **names)


FIGURES: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "Figure 1: Qwen 2.5": {
        "0.5B": PUBLISHED["Qwen2.5-0.5B"],
        "1.5B": _qwen(1536, 8960, 28, 12, 2, 151936, tied=True),
        "3B": _qwen(2048, 11008, 36, 16, 2, 151936, tied=True),
        "7B": _qwen(3584, 18944, 28, 28, 4, 152064, tied=False),
        "14B": _qwen(5120, 13824, 48, 40, 8, 152064, tied=False),
        "32B": _qwen(5120, 27648, 64, 40, 8, 152064, tied=False),
        "72B": _qwen(8192, 29568, 80, 64, 8, 152064, tied=False),
    },
    "Figure 4: Llama 3": {
        "1B": PUBLISHED["Llama-3.2-1B"],
        "3B": llama_config(
            *(3072, 8192, 28, 24, 8, 128256), head_dim=128, tie_word_embeddings=True
        ),
        "8B": PUBLISHED["Llama-3.1-8B"],
        "70B": PUBLISHED["Llama-3.1-70B"],
        "405B": PUBLISHED["Llama-3.1-405B"],
    },
    "Figure 5: Gemma 3": {
        "270M": _gemma(640, 2048, 18, 4, 1, 262144),
        "1B": PUBLISHED["Gemma-3-1B"],
        "4B": _gemma(2560, 10240, 34, 8, 4, 262208),
        "12B": _gemma(3840, 15360, 48, 16, 8, 262208),
        "27B": _gemma(5376, 21504, 62, 32, 16, 262208, head_dim=128),
    },
}
"""Title → size → config.json. Of Gemma 3, the language model alone."""


def shares(config: dict[str, Any], directory: Path) -> dict[str, float]:
    """Return the share of each of ``PARTS`` in all parameters, and their number."""
    groups = read_layout(Checkpoint.open(write_headers_only(directory, config))).groups
    total = groups.total()
    found = {
        "vocabulary": groups["vocabulary"],
        "FFN": groups["ffn"],
        "attention": groups["attention"],
    }
    found["other"] = total - sum(found.values())
    return {name: count / total for name, count in found.items()} | {"parameters": total}


def draw(found: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Draw a bar for each model, one above the other by family."""
    with saved_figure(path, 11, 3.6) as figure:
        for axes, (title, models) in zip(
            figure.subplots(1, len(found)), found.items(), strict=True
        ):
            bottom = [0.0] * len(models)
            for part in PARTS[:3]:  # norms and biases are too few to see
                values = [100 * of[part] for of in models.values()]
                axes.bar(list(models), values, bottom=bottom, label=part)
                bottom = [a + b for a, b in zip(bottom, values, strict=True)]
            axes.set(title=title, ylim=(0, 100), ylabel="share of the parameters (%)")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


@click.command()
@click.option("--plot", type=click.Path(path_type=Path), help="File to draw the shares to.")
def main(plot: Path | None) -> None:
    """Print where the parameters of published models are."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for title, models in FIGURES.items():
            directory = Path(name) / title.split()[-2].lower()
            found[title] = {s: shares(c, directory / s) for s, c in models.items()}
    for title, of in found.items():
        click.echo(f"{title:<22}{'parameters':>12}" + "".join(f"{part:>12}" for part in PARTS))
        for size, each in of.items():
            cells = "".join(f"{each[part]:>12.1%}" for part in PARTS)
            click.echo(f"{size:<22}{each['parameters'] / 1e6:>11,.0f}M{cells}")
        click.echo()
    if plot is not None:
        draw(found, plot)


if __name__ == "__main__":
    main()
