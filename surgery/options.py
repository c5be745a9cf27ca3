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
class Target:
    """How much goes: a share of the parameters, or the sizes that stay; and in which dtype."""

    ratio: float | None = None
    vocab_size: int | None = None
    intermediate_size: int | None = None
    widths: tuple[str, ...] = ()
    """KEY=N each, for models with several widths."""
    multiple_of: int | None = None
    """None is the usual step, which given sizes need not keep."""
    serve: str | None = None
    """Such as "tp=4,group=128"."""
    dequantize: bool = False
    layers: str | None = None
    """Such as "0-20,21+22+23,24-29"."""
    num_hidden_layers: int | None = None


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
multiple_option = click.option(
    "--multiple-of",
    type=click.IntRange(1),
    help="What V' and I' are to be multiples of.  [default: 128 with --ratio]",
)
serve_option = click.option(
    "--target",
    "serve",
    metavar="tp=N,group=N",
    help="Tensor parallelism and quantization groups that V' and I' must divide for.",
)
dequantize_option = click.option(
    "--dequantize",
    is_flag=True,
    help="Write FP8 weights as bf16, which can be cut anywhere; alone it cuts nothing.",
)
layer_options = combined(
    click.option(
        "--layers",
        metavar="SPEC",
        help="Layers to keep, such as 0-20,21+22+23,24-29; + makes one of several (LaCo).",
    ),
    click.option(
        "--num-hidden-layers",
        type=int,
        help="Layers to keep: those of largest block influence in --stats (ShortGPT).",
    ),
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
    click.option(
        "--width",
        "widths",
        multiple=True,
        metavar="KEY=N",
        help="Channels to keep by their key in config.json, such as moe_intermediate_size=512.",
    ),
    multiple_option,
    serve_option,
    dequantize_option,
    layer_options,
)
step_options = gathered("target", Target, multiple_option, serve_option, dequantize_option)
ratio_options = gathered(
    "target",
    Target,
    click.option("--ratio", type=float, required=True, help="Share of all parameters to remove."),
    multiple_option,
    serve_option,
    dequantize_option,
)
spill_option = click.option(
    "--spill",
    type=path_type,
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
