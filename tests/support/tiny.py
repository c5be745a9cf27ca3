"""Tiny real checkpoints, built in memory from transformers' own configs and saved by it."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from surgery.families.schema import EXPERT_KEYS
from surgery.families.table import FAMILIES
from tests.support import ROOT
from tests.support.tiny_configs import TINY
from tools.derive.configs import registered
from tools.derive.tiny import tiny_config
from tools.synthetic_tokenizer import trained_tokenizer

TEXT = ROOT / "tools" / "text" / "heldout.txt"
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
VOCAB_SIZE = 640
"""Rows of a tiny checkpoint's embedding; its tokenizer has TOKENS of them, the rest is padding."""
TOKENS = 620
INTERMEDIATE_SIZE = 96
LAYERS = 3


def prose(size: int = 60_000) -> str:
    """Return the first ``size`` characters of real prose."""
    return TEXT.read_text(encoding="utf-8")[:size]


@cache
def _trained(special_first: bool, bos: bool) -> str:
    first = SPECIAL if special_first else ()
    learned = TOKENS - (0 if special_first else len(SPECIAL))
    tokenizer = trained_tokenizer([prose()], learned, first)
    tokenizer.add_special_tokens(list(SPECIAL))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return str(tokenizer.to_str())


def tokenizer(*, special_first: bool = True, bos: bool = True) -> Tokenizer:
    """Return a byte-level BPE of TOKENS tokens; special ones in front (Llama) or behind (Qwen)."""
    return Tokenizer.from_str(_trained(special_first, bos))


def config(key: str, *, tied: bool, specials: dict[str, int], **changes: Any) -> Any:
    """Return the tiny config of ``key``: as in ``tiny_configs.TINY``, or as the class has it."""
    ids = {
        "bos_token_id": specials["<s>"],
        "eos_token_id": specials["</s>"],
        "pad_token_id": specials["<pad>"],
    }
    values, text = _values(key)
    values.setdefault("tie_word_embeddings", tied)
    text |= ids | changes | {"tie_word_embeddings": tied}
    return AutoConfig.for_model(**{**values, "model_type": key.partition(":")[0]})


def _values(key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tiny config of ``key``, and the part of it for the language model."""
    model_type = key.partition(":")[0]
    values = deepcopy(TINY.get(key) or tiny_config(model_type))
    section = getattr(FAMILIES.get(model_type), "section", "")
    return values, values[section] if section else values


def expert_key(key: str) -> str:
    """Return the name that the tiny config of a mixture has for the number of experts."""
    _, text = _values(key)
    return next(name for name in EXPERT_KEYS if name in text)


def save(
    path: Path,
    key: str = "llama",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    special_first: bool = True,
    bos: bool = True,
    **changes: Any,
) -> Path:
    """Save a seeded random checkpoint with tokenizer and generation config, and return its path.

    Weights have a spread at which logits differ visibly; norms and biases are random, too.
    """
    fast = tokenizer(special_first=special_first, bos=bos)
    specials = {token: fast.get_vocab()[token] for token in SPECIAL}
    torch.manual_seed(0)
    made = config(key, tied=tied, specials=specials, **changes)
    model = auto_class(key).from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for name, table in model.named_buffers():  # the experts of each token
        if name.endswith("tid2eid"):
            chances = torch.rand(len(table), getattr(made, expert_key(key)))
            table.copy_(chances.topk(table.shape[1]).indices)
    model.to(dtype).save_pretrained(path, max_shard_size="60KB" if sharded else "5GB")
    PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(path)
    return path


def auto_class(key: str) -> Any:
    """The class of transformers that loads a model of ``key``."""
    return registered().get(key.partition(":")[0], AutoModelForCausalLM)


def load(path: Path, key: str = "llama") -> Any:
    """Load a checkpoint in fp32; experts run in the library's plain loop."""
    model = auto_class(key).from_pretrained(path, dtype=torch.float32)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation("eager")
    return model.eval()


WANT_IMAGES = ("blip-2", "instructblip", "instructblipvideo")
"""Model types whose class runs no text without an image; their language model does."""


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Run ``ids`` through a model, or through its language model where it wants an image, too."""
    alone = model.config.model_type in WANT_IMAGES
    with torch.no_grad():
        found: torch.Tensor = (model.language_model if alone else model)(input_ids=ids).logits
    return found
