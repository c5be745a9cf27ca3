"""Options that say what to remove: how much, and how tokens, channels and experts are chosen."""

import re

import click

from surgery.cli.options import choice_option, combined, gathered, number_option, path_type, share
from surgery.errors import BudgetError
from surgery.planning.request import CutRequest, SizeRequest
from surgery.planning.serving import AIMS, QUALITY
from surgery.stats.channels import (
    CRITERIA,
    DEFAULT_CRITERION,
    DEFAULT_EXPERT_CRITERION,
    EXPERT_CRITERIA,
    LEAST_TOKENS,
    REPAIRS,
    ChannelOptions,
)
from surgery.vocabulary.order import ORDERS, VocabularyOptions


class Width(click.ParamType):
    """A width of the model, such as moe_intermediate_size=512."""

    name = "width"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Return the key of config.json and the channels."""
        match = re.fullmatch(r"(\w+)=([0-9]{1,9})", str(value))
        if not match:
            raise BudgetError(
                "`widths`",
                "is no width of this model",
                expected="KEY=N with KEY a key of config.json",
                found=value,
                fix="correct it",
            )
        return match[1], int(match[2])


class Ratio(click.ParamType):
    """A share of the parameters, such as 0.2 or 20%."""

    name = "ratio"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the share."""
        try:
            return share(value)
        except ValueError:
            raise BudgetError(
                "`ratio`", "is no number", found=repr(value), fix="write it as 0.2 or 20%"
            ) from None


channel_options = gathered(
    "channels",
    ChannelOptions,
    choice_option(
        "--criterion", of=CRITERIA, default=DEFAULT_CRITERION, help="Importance of a channel."
    ),
    number_option(
        "--min-expert-tokens",
        default=LEAST_TOKENS,
        least=0,
        help="Fewest tokens an expert must have seen for its channels to be ranked.",
    ),
    choice_option(
        "--repair",
        of=REPAIRS,
        default="none",
        help="Refit down_proj to the kept channels on --data, if it helps on held-out text; "
        "reconstruct also trains each FFN alone, which takes longer.",
    ),
    choice_option(
        "--expert-criterion",
        of=EXPERT_CRITERIA,
        default=DEFAULT_EXPERT_CRITERION,
        help="Importance of a routed expert.",
    ),
)
vocabulary_options = gathered(
    "vocabulary",
    VocabularyOptions,
    choice_option(
        "--vocab-by",
        of=ORDERS,
        default="merge-order",
        help="Rarity of tokens: the tail of the merge list, or counts over --data.",
    ),
    click.option(
        "--drop-reserved",
        is_flag=True,
        help="Remove tokens that are reserved for later use and that nothing refers to, before all "
        "others; without a size or ratio, these alone.",
    ),
    click.option(
        "--keep-tokens",
        type=path_type,
        metavar="FILE",
        help="Tokens to keep, one per line, as the vocabulary spells them or as plain text; of a "
        "text that is several tokens, all.",
    ),
    click.option(
        "--keep-script",
        "keep_scripts",
        multiple=True,
        metavar="NAME",
        help="Keep all tokens of a Unicode script, such as Cyrillic. May be given several times.",
    ),
    click.option(
        "--drop-script",
        "drop_scripts",
        multiple=True,
        metavar="NAME",
        help="Remove the tokens of a Unicode script before all others; without a size or ratio, "
        "these alone. May be given several times.",
    ),
)

aim_option = choice_option(
    "--for",
    "aim",
    of=AIMS,
    default=QUALITY,
    help="What the split between V' and I' serves at the ratio. decode: fewest bytes read for each "
    "decoded token; memory: fewest bytes with the cache and logits of a batch.",
)
step_options = combined(
    click.option(
        "--multiple-of",
        type=click.IntRange(1),
        help="Make V' and I' multiples of this.  [default: 128 with --ratio]",
    ),
    click.option(
        "--target",
        metavar="tp=N,group=N",
        help="Make V' and I' divide for tensor parallelism and quantization groups.",
    ),
    click.option(
        "--dequantize",
        is_flag=True,
        help="Write FP8 weights as bf16, which can be pruned anywhere; alone it removes nothing.",
    ),
)
size_options = gathered(
    "sizes",
    SizeRequest,
    click.option(
        "--ratio",
        type=Ratio(),
        help="Share of all parameters to remove. Sizes that are not given follow, by the rule of "
        "thumb.",
    ),
    click.option(
        "--only",
        default="",
        metavar="PART[,PART]",
        help="Take --ratio from these alone: vocabulary, channels, whole experts of a mixture, or "
        "layers (those of least block influence).  [default: vocabulary,channels]",
    ),
    aim_option,
    click.option("--vocab-size", type=int, help="V': embedding rows to keep."),
    click.option("--intermediate-size", type=int, help="I': channels per layer to keep."),
    click.option(
        "--width",
        "widths",
        multiple=True,
        type=Width(),
        callback=lambda ctx, param, value: dict(value),
        metavar="KEY=N",
        help="Channels to keep by their key in config.json, such as moe_intermediate_size=512.",
    ),
    step_options,
    click.option(
        "--layers",
        metavar="SPEC",
        help="Layers to keep, such as 0-20,21+22+23,24-29; + merges several into one (LaCo).",
    ),
    click.option(
        "--num-hidden-layers",
        type=int,
        help="How many layers to keep: those of largest block influence (ShortGPT), by the "
        "statistics.",
    ),
    click.option("--num-experts", type=int, help="E': routed experts per layer to keep."),
)
search_size_options = gathered(
    "sizes",
    SizeRequest,
    click.option("--ratio", type=Ratio(), help="Share of all parameters to remove."),
    click.option(
        "--only",
        default="",
        metavar="PART[,PART]",
        help="Take --ratio from these alone: vocabulary, channels, whole experts of a mixture; or "
        "from layers.  [default: all that the model has, but layers]",
    ),
    aim_option,
    step_options,
)
base_model_option = click.option(
    "--base-model",
    metavar="ORG/NAME",
    help="Model on the hub that the model card names as the base.  [default: MODEL, if it is one]",
)
cut_options = gathered(
    "cut", CutRequest, size_options, vocabulary_options, channel_options, base_model_option
)
search_cut_options = gathered(
    "cut", CutRequest, search_size_options, vocabulary_options, channel_options
)
step_cut_options = gathered(
    "cut", CutRequest, gathered("sizes", SizeRequest, step_options), vocabulary_options
)
