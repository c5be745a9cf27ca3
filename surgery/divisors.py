"""What V' and I' must be multiples of, so that engines can split and quantize them."""

import re
from dataclasses import dataclass
from math import lcm

from surgery.errors import BudgetError

VOCAB_PADDING = 64
"""vLLM and SGLang pad the vocabulary to a multiple of this before they split it.

vllm-project/vllm ``vllm/model_executor/layers/vocab_parallel_embedding.py``,
sgl-project/sglang ``python/sglang/srt/layers/vocab_parallel_embedding.py``.
"""

TARGET_KEYS = ("tp", "group")


@dataclass(frozen=True)
class Steps:
    """What the two sizes must be multiples of."""

    vocab: int
    """Step of V'."""
    width: int
    """Step of I' and of every other FFN width."""


def steps(multiple_of: int, *, tp: int = 1, group: int = 1) -> Steps:
    """Return steps of which every multiple serves ``tp`` ranks and groups of ``group``.

    - Width: gate_proj and up_proj are split over the ranks by output, down_proj by input, and
      groups run along the input. A rank's part of down_proj has to hold whole groups, so I' is a
      multiple of ``tp · group`` (``verify_group_size_divides_partition`` in vllm-project/vllm
      ``vllm/distributed/utils.py``; ``validate_fp8_block_shape`` in
      ``vllm/model_executor/layers/quantization/utils/fp8_utils.py`` and in sgl-project/sglang
      ``python/sglang/srt/layers/quantization/fp8_utils.py``). A part in multiples of 128 is also
      whole tiles of Marlin (``marlin_utils.py`` beside it: 64 outputs by 128 inputs).
    - Vocabulary: embeddings and lm_head are split by rows. Groups run along the hidden size, so
      ``group`` asks nothing of V'. vLLM pads V' to 64 and then needs ``tp`` to divide it: a ``tp``
      that does not divide 64 has V' a multiple of 64 too, for the padding to add nothing.

    Raises:
        BudgetError: ``multiple_of`` below 1.
    """
    if multiple_of < 1:
        raise BudgetError(
            "`multiple_of`",
            "is no step",
            expected="1 or more",
            found=multiple_of,
            fix="give a whole number, such as 128",
        )
    padding = VOCAB_PADDING if VOCAB_PADDING % tp else 1
    return Steps(vocab=lcm(multiple_of, tp, padding), width=lcm(multiple_of, tp * group))


def parse_target(text: str, multiple_of: int) -> Steps:
    """Return the steps that ``target``, such as ``"tp=4,group=128"``, asks for.

    Raises:
        BudgetError: an unknown or repeated key, or a value that is no number from 1 to 999999.
    """
    given: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in TARGET_KEYS:
            raise _target_error("has no such key", " or ".join(TARGET_KEYS), key)
        if key in given:
            raise _target_error("names a key twice", f"{key} once", text)
        if not re.fullmatch("[0-9]{1,6}", value) or int(value) == 0:
            raise _target_error(f"has no size for {key}", "a whole number from 1 to 999999", value)
        given[key] = int(value)
    return steps(multiple_of, tp=given.get("tp", 1), group=given.get("group", 1))


def _target_error(problem: str, expected: str, found: str) -> BudgetError:
    fix = "write it as tp=4,group=128"
    return BudgetError("`target`", problem, expected=expected, found=repr(found[:40]), fix=fix)
