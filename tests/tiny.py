"""Tiny real checkpoints, built in memory from transformers' own configs and saved by it."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = Path(__file__).parent.parent / "tools" / "text" / "heldout.txt"
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
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS - (0 if special_first else len(SPECIAL)),
        special_tokens=list(SPECIAL) if special_first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose()], trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return str(tokenizer.to_str())


def tokenizer(*, special_first: bool = True, bos: bool = True) -> Tokenizer:
    """Return a byte-level BPE of TOKENS tokens; special ones in front (Llama) or behind (Qwen)."""
    return Tokenizer.from_str(_trained(special_first, bos))


def config(model_type: str, *, tied: bool, specials: dict[str, int], **changes: Any) -> Any:
    """Return a tiny config of ``model_type``."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": specials["<s>"],
        "eos_token_id": specials["</s>"],
        "pad_token_id": specials["<pad>"],
    }
    if model_type == "gemma3_text":
        sizes |= {
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    return AutoConfig.for_model(model_type, **{**sizes, **changes})


def save(
    path: Path,
    model_type: str = "llama",
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
    model = AutoModelForCausalLM.from_config(
        config(model_type, tied=tied, specials=specials, **changes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(path, max_shard_size="60KB" if sharded else "5GB")
    PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(path)
    return path
