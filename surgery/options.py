"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from surgery.channels import CRITERIA, DEFAULT_CRITERION


def combined(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Return one decorator that adds all of ``options``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


path_type = click.Path(path_type=Path)

model_argument = click.argument("model", metavar="MODEL")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
data_option = click.option(
    "--data",
    required=True,
    metavar="TEXT",
    help="A .txt or .jsonl file, a directory of them, or hub:name[:config][:split][:field].",
)
samples_option = click.option(
    "--samples",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    help="Windows of text, at most.",
)
seed_option = click.option("--seed", type=int, help="Shuffle the documents first.")
seq_len_option = click.option(
    "--seq-len",
    default=2048,
    show_default=True,
    type=click.IntRange(2),
    help="Tokens per window.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="auto: CUDA where there is one.",
)
compute_options = combined(
    device_option,
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="auto: float32 on the CPU, else the checkpoint's.",
    ),
)
size_options = combined(
    click.option(
        "--ratio",
        type=float,
        help="Share of all parameters to remove; V' and I' follow by the rule of thumb.",
    ),
    click.option("--vocab-size", type=int, help="V': embedding rows to keep."),
    click.option("--intermediate-size", type=int, help="I': channels per layer to keep."),
)
criterion_option = click.option(
    "--criterion",
    default=DEFAULT_CRITERION,
    show_default=True,
    type=click.Choice(list(CRITERIA)),
    help="Importance of a channel.",
)
