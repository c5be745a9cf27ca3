"""Options that several commands share."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from surgery.channels import CRITERIA, DEFAULT_CRITERION


class Refusal(click.ClickException):
    """Bad usage or bad input: one line on stderr."""

    exit_code = 2


def combined(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Return one decorator that adds all of ``options``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def gathered(name: str, kind: type[Any], *options: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that adds ``options`` and hands them over as one argument ``name``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def gather(*arguments: Any, **given: Any) -> Any:
            parts = {field.name: given.pop(field.name) for field in fields(kind)}
            return command(*arguments, **given, **{name: kind(**parts)})

        return combined(*options)(gather)

    return decorate


@dataclass(frozen=True)
class Target:
    """How much goes: a share of the parameters, or the two sizes that stay."""

    ratio: float | None
    vocab_size: int | None
    intermediate_size: int | None


@dataclass(frozen=True)
class VocabularyOptions:
    """What is asked of the vocabulary beside its size."""

    vocab_by: str = "merge-order"
    drop_reserved: bool = False
    keep_tokens: Path | None = None
    keep_scripts: tuple[str, ...] = ()


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
calibration_options = combined(
    data_option, samples_option, seq_len_option, seed_option, compute_options
)
size_options = gathered(
    "target",
    Target,
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
vocabulary_options = gathered(
    "vocabulary",
    VocabularyOptions,
    click.option(
        "--vocab-by",
        default="merge-order",
        show_default=True,
        type=click.Choice(["merge-order", "frequency"]),
        help="Rarity of tokens: the tail of the merge list, or counts over --data.",
    ),
    click.option(
        "--drop-reserved",
        is_flag=True,
        help="Let tokens go that are reserved for later use and that nothing refers to.",
    ),
    click.option(
        "--keep-tokens",
        type=path_type,
        metavar="FILE",
        help="Tokens that must stay, one a line, as spelled in the vocabulary or as plain text.",
    ),
    click.option(
        "--keep-script",
        "keep_scripts",
        multiple=True,
        metavar="NAME",
        help="Keep all tokens of a Unicode script, such as Cyrillic. May be given several times.",
    ),
)
