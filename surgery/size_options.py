"""Options that say how much goes."""

from dataclasses import dataclass

import click

from surgery.options import combined, gathered


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
