"""Options that several commands share."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from surgery.channels import CRITERIA, DEFAULT_CRITERION, LEAST_TOKENS


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
            parts = {f.name: given.pop(f.name) for f in fields(kind) if f.name in given}
            return command(*arguments, **given, **{name: kind(**parts)})

        return combined(*options)(gather)

    return decorate


@dataclass(frozen=True)
class VocabularyOptions:
    """What is asked of the vocabulary beside its size."""

    vocab_by: str = "merge-order"
    drop_reserved: bool = False
    keep_tokens: Path | None = None
    keep_scripts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChannelOptions:
    """How channels are chosen."""

    criterion: str = DEFAULT_CRITERION
    min_expert_tokens: int = LEAST_TOKENS
    repair: str = "none"


@dataclass(frozen=True)
class CutOptions:
    """Which vocabulary cuts the calibration text, and for which the statistics are exact."""

    vocab_size: int | None = None
    vocab_sizes: str | None = None
    """Such as "32768,24576"."""


@dataclass(frozen=True)
class DivisionOptions:
    """How calibration is divided over machines."""

    part: str | None = None
    engine: str = "local"
    parts: int | None = None


path_type = click.Path(path_type=Path)

model_argument = click.argument("model", metavar="MODEL")
family_option = click.option(
    "--family",
    metavar="NAME",
    help="Treat the model as this model type, whatever config.json says.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
push_option = click.option(
    "--push-to", metavar="ORG/NAME", help="Upload the result to this model on the hub, too."
)
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
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    help="auto: CUDA where there is one.",
)
engine_option = click.option(
    "--engine",
    default="local",
    show_default=True,
    type=click.Choice(["local", "ray"]),
    help="ray: tasks on a cluster whose nodes share the file system (extra 'ray').",
)
io_option = click.option(
    "--io",
    default="mmap",
    show_default=True,
    type=click.Choice(["mmap", "read"]),
    help="How shards are reached. mmap: mapped into memory; read: for network file systems.",
)
division_options = gathered(
    "spread",
    DivisionOptions,
    click.option(
        "--part",
        metavar="K/N",
        help="Use every N-th window from the K-th on; stats merge adds the parts.",
    ),
    engine_option,
    click.option(
        "--parts",
        type=click.IntRange(1),
        help="Tasks of --engine ray.  [default: one for each node, or for each GPU]",
    ),
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
cut_options = gathered(
    "cut",
    CutOptions,
    click.option(
        "--vocab-size",
        type=int,
        help="Cut the text as the tokenizer pruned to V' rows will: what the result will see.",
    ),
    click.option(
        "--vocab-sizes",
        metavar="V,V,…",
        help="Sizes V' for which the statistics are to be exact; "
        "else --vocab-size, or those of --ratio 0.1, 0.2, 0.35 and 0.5.",
    ),
)
spill_option = click.option(
    "--spill",
    type=click.Path(path_type=Path, exists=True, file_okay=False, writable=True),
    metavar="DIR",
    help="Keep hidden states in files in DIR, not in memory.",
)
windows_option = click.option(
    "--windows",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Windows of 2,048 bytes that are held out, at most.",
)
channel_options = gathered(
    "channels",
    ChannelOptions,
    click.option(
        "--criterion",
        default=DEFAULT_CRITERION,
        show_default=True,
        type=click.Choice(list(CRITERIA)),
        help="Importance of a channel.",
    ),
    click.option(
        "--min-expert-tokens",
        default=LEAST_TOKENS,
        show_default=True,
        type=click.IntRange(0),
        help="Refuse to rank the channels of an expert that saw fewer tokens.",
    ),
    click.option(
        "--repair",
        default="none",
        show_default=True,
        type=click.Choice(["none", "least-squares"]),
        help="Refit down_proj to the channels that stay, on --data, where held-out text agrees.",
    ),
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
