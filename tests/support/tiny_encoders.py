"""Tiny encoders with the tokenizers of their kind, built in memory and saved by transformers."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PreTrainedTokenizerFast,
)

from surgery.families.schema import Family
from surgery.families.table import FAMILIES
from tests.support import tiny

Kwargs = dict[str, Any]

VOCAB_SIZE = 640
TOKENS = 630
"""The other rows are padding."""

_PLAIN: Kwargs = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}

ENCODERS: dict[str, Kwargs] = {
    "bert": _PLAIN,
    "distilbert": {
        "vocab_size": VOCAB_SIZE,
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 96,
        "max_position_embeddings": 64,
    },
    "roberta": {**_PLAIN, "type_vocab_size": 1},
    "xlm-roberta": {**_PLAIN, "type_vocab_size": 1},
    "camembert": {**_PLAIN, "type_vocab_size": 1},
    "mpnet": _PLAIN,
    "electra": {**_PLAIN, "embedding_size": 16},
    "deberta-v2": {
        **_PLAIN,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_buckets": 16,
        "type_vocab_size": 0,
    },
    "deberta-v2:own_positions": {
        **_PLAIN,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "embedding_size": 16,
    },
    "modernbert": {**_PLAIN, "global_attn_every_n_layers": 2, "local_attention": 16},
    "eurobert": {**_PLAIN, "num_key_value_heads": 2},
    "ernie": {**_PLAIN, "use_task_id": True},
    "megatron-bert": _PLAIN,
    "rembert": {**_PLAIN, "input_embedding_size": 16, "output_embedding_size": 24},
    "roformer": {**_PLAIN, "embedding_size": 16},
    "data2vec-text": _PLAIN,
    "roberta-prelayernorm": _PLAIN,
    "xlm-roberta-xl": _PLAIN,
    "big_bird": _PLAIN,
    "bert-generation": _PLAIN,
    "roc_bert": {
        **_PLAIN,
        "pronunciation_vocab_size": 20,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 20,
        "shape_embed_dim": 8,
    },
}
"""Keyword arguments for ``AutoConfig.for_model``; keys are as in ``tiny_configs``."""

_BART: Kwargs = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_T5: Kwargs = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "d_ff": 96,
    "d_kv": 8,
}

_SMALL: Kwargs = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_EYES: Kwargs = {"model_type": "vit", **_SMALL, "image_size": 16, "patch_size": 8}
_GEMMA: Kwargs = {
    "vocab_size": VOCAB_SIZE,
    **_SMALL,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}
_GEMMA3N: Kwargs = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE - 24,
    "hidden_size": 32,
    "intermediate_size": [96, 64, 96, 64],
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "hidden_size_per_layer_input": 12,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "laurel_rank": 4,
    "sliding_window": 8,
}
_REFORMER: Kwargs = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "attention_head_size": 8,
    "num_attention_heads": 4,
    "feed_forward_size": 96,
    "attn_layers": ["local", "lsh"],
    "axial_pos_shape": [8, 8],
    "axial_pos_embds_dim": [16, 16],
    "max_position_embeddings": 64,
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "num_buckets": 4,
    "hash_seed": 0,
}
_KOSMOS: Kwargs = {
    "text_config": {
        "vocab_size": VOCAB_SIZE,
        "embed_dim": 32,
        "layers": 2,
        "attention_heads": 4,
        "ffn_dim": 96,
        "max_position_embeddings": 64,
    },
    "vision_config": {**_SMALL, "image_size": 16, "patch_size": 8},
    "latent_query_num": 4,
}

ENCODER_DECODERS: dict[str, Kwargs] = {
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "longt5": {**_T5, "local_radius": 7, "feed_forward_proj": "gated-gelu"},
    "longt5:global": {
        **_T5,
        "local_radius": 7,
        "encoder_attention_type": "transient-global",
        "global_block_size": 4,
    },
    "switch_transformers": {
        **_T5,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 4,
    },
    "led": {
        **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
        "attention_window": 8,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
    },
    "pegasus_x": {**_BART, "block_size": 8, "num_global_tokens": 4},
    "t5gemma2": {
        "encoder": {
            "text_config": _GEMMA,
            "vision_config": {**_SMALL, "image_size": 16, "patch_size": 4},
            "mm_tokens_per_image": 4,
            "boi_token_index": 7,
            "eoi_token_index": 8,
            "image_token_index": 6,
        },
        "decoder": _GEMMA,
        "image_token_index": 6,
        "eoi_token_index": 8,
    },
    "bart": _BART,
    "mbart": _BART,
    "mvp": _BART,
    "plbart": _BART,
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "bigbird_pegasus": {**_BART, "attention_type": "original_full"},
    "m2m_100": _BART,
    "marian": _BART,
    "pegasus": _BART,
    "whisper": {
        **_BART,
        "num_mel_bins": 8,
        "max_source_positions": 20,
        "max_target_positions": 64,
    },
    "prophetnet": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 1,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
    },
    "udop": {**_T5, "image_size": 32, "max_2d_position_embeddings": 64},
    "pix2struct": {
        "text_config": {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "d_ff": 96,
            "d_kv": 8,
        },
        "vision_config": {
            "hidden_size": 32,
            "patch_embed_hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "d_ff": 64,
            "d_kv": 8,
            "seq_len": 16,
        },
    },
    "pp_formulanet": {
        "text_config": _BART,
        "vision_config": {
            **_SMALL,
            "image_size": 64,
            "patch_size": 16,
            "mlp_dim": 64,
            "output_channels": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "post_conv_in_channels": 16,
            "post_conv_mid_channels": 24,
            "post_conv_out_channels": 32,
            "decoder_hidden_size": 32,
        },
    },
    "vision-encoder-decoder": {
        "encoder": _EYES,
        "decoder": {
            "model_type": "trocr",
            "vocab_size": VOCAB_SIZE,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 96,
            "max_position_embeddings": 64,
            "add_cross_attention": True,
        },
    },
    "vision-encoder-decoder:mbart": {
        "encoder": _EYES,
        "decoder": {"model_type": "mbart", **_BART, "add_cross_attention": True},
    },
    "florence2": {
        "text_config": {"model_type": "bart", **_BART},
        "vision_config": {
            "embed_dim": [16, 16],
            "depths": [1, 1],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "projection_dim": 32,
        },
        "image_token_id": 7,
    },
}

UNDIVIDED: dict[str, Kwargs] = {
    "xlm": {
        "vocab_size": VOCAB_SIZE,
        "emb_dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
        "n_langs": 2,
    },
    "xlnet": {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 96},
    "reformer": _REFORMER,
    "reformer:decoder": {**_REFORMER, "is_decoder": True},
    "xmod": {**_PLAIN, "languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
    "trocr": {
        "vocab_size": VOCAB_SIZE,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 64,
    },
    "git": {**_PLAIN, "vision_config": {**_SMALL, "image_size": 16, "patch_size": 8}},
    "blip": {
        "text_config": {**_PLAIN, "encoder_hidden_size": 32},
        "vision_config": {**_SMALL, "image_size": 16, "patch_size": 8},
    },
    "idefics2": {
        "text_config": {"model_type": "mistral", **_PLAIN, "num_key_value_heads": 2},
        "vision_config": {**_SMALL, "image_size": 16, "patch_size": 8},
        "perceiver_config": {"resampler_n_latents": 2, "resampler_depth": 1},
        "image_token_id": 7,
    },
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {
        "text_config": _GEMMA3N,
        "vision_config": {
            "hidden_size": 16,
            "vocab_size": 12,
            "vocab_offset": VOCAB_SIZE - 24,
        },
        "audio_config": {
            "hidden_size": 16,
            "vocab_size": 12,
            "vocab_offset": VOCAB_SIZE - 12,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 4,
            "sscp_conv_channel_size": [8, 4],
            "input_feat_size": 16,
        },
        "image_token_id": VOCAB_SIZE - 23,
        "eoi_token_id": VOCAB_SIZE - 24,
        "audio_token_id": VOCAB_SIZE - 11,
        "eoa_token_id": VOCAB_SIZE - 12,
        "boi_token_id": 7,
        "boa_token_id": 8,
    },
    "kosmos-2": _KOSMOS,
    "kosmos-2.5": {
        "text_config": _KOSMOS["text_config"],
        "vision_config": {**_SMALL, "num_channels": 3, "patch_size": 8, "d_ff": 64, "d_kv": 8},
        "latent_query_num": 4,
    },
}
"""Models of which only the vocabulary is pruned: encoders, decoders, and readers of images."""

VOCABULARY_ALONE = ENCODER_DECODERS | UNDIVIDED

_HEADS = {
    "whisper": "speech",
    **dict.fromkeys(("xlm", "reformer", "xmod"), "masked"),
    **dict.fromkeys(("xlnet", "reformer:decoder", "trocr", "gemma3n_text"), "next"),
    **dict.fromkeys(("pix2struct", "pp_formulanet", "florence2", "git", "blip"), "image"),
    **dict.fromkeys(("idefics2", "kosmos-2", "kosmos-2.5", "udop", "gemma3n"), "image"),
    **dict.fromkeys(("vision-encoder-decoder", "vision-encoder-decoder:mbart"), "image"),
}


def head_of(key: str) -> str:
    """The head, of MODELS, that predicts tokens."""
    return _HEADS.get(key, "text")


WORDPIECE, UNIGRAM, BYTE_LEVEL = "WordPiece", "Unigram", "BPE"

TOKENIZERS = {
    "roberta": BYTE_LEVEL,
    "data2vec-text": BYTE_LEVEL,
    "roberta-prelayernorm": BYTE_LEVEL,
    "modernbert": BYTE_LEVEL,
    "eurobert": BYTE_LEVEL,
    "xlm-roberta": UNIGRAM,
    "xlm-roberta-xl": UNIGRAM,
    "rembert": UNIGRAM,
    "big_bird": UNIGRAM,
    "bert-generation": UNIGRAM,
    "camembert": UNIGRAM,
    "deberta-v2": UNIGRAM,
    **dict.fromkeys(VOCABULARY_ALONE, UNIGRAM),
    "bart": BYTE_LEVEL,
    "whisper": BYTE_LEVEL,
}
"""Model type → kind of its tokenizer; WordPiece for the others."""

ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTA = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
IN_ROBERTA = (2, 0, 3, 1, 4)
"""The order of the roles where the table of positions begins after the padding token: it is 1."""

MODELS = {
    "masked": AutoModelForMaskedLM,
    "base": AutoModel,
    "classifier": AutoModelForSequenceClassification,
    "text": AutoModelForSeq2SeqLM,
    "speech": AutoModelForSpeechSeq2Seq,
    "image": AutoModelForImageTextToText,
    "next": AutoModelForCausalLM,
}
"""Heads with which encoders are published, and what a decoder beside one makes."""


def class_of(config: Any, head: str) -> Any:
    """The class with a head; BertGeneration predicts its tokens as a decoder would."""
    alone = head == "masked" and type(config) not in AutoModelForMaskedLM._model_mapping
    return AutoModelForCausalLM if alone else MODELS[head]


def kind_of(key: str) -> str:
    """The kind of tokenizer of a tiny encoder."""
    return TOKENIZERS.get(key.partition(":")[0], WORDPIECE)


def names_of(kind: str) -> tuple[str, ...]:
    """The special tokens of a kind of tokenizer, in the order of ROLES."""
    return _BERT if kind == WORDPIECE else _ROBERTA


@cache
def _trained(kind: str, pad_first: bool) -> str:
    named = names_of(kind)
    special = list(named if pad_first else [named[i] for i in IN_ROBERTA])
    text = [tiny.prose(30_000), "Привет, мир! 東京 è una città. Ünïcödé, наука и жизнь"]
    if kind == WORDPIECE:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=False)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=TOKENS, special_tokens=special, show_progress=False
        )
    elif kind == UNIGRAM:
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=TOKENS, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=TOKENS,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    made.train_from_iterator(text, trainer)
    _, _, first, last, _ = named
    ids = [(token, made.token_to_id(token)) for token in (first, last)]
    made.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1", special_tokens=ids
    )
    return str(made.to_str())


def tokenizer(key: str) -> Tokenizer:
    """The tokenizer of a tiny encoder, of TOKENS tokens or fewer."""
    family = FAMILIES[key.partition(":")[0]]
    pads_first = isinstance(family, Family) and not family.positions_after_pad
    return Tokenizer.from_str(_trained(kind_of(key), pads_first))


def save(path: Path, key: str, head: str = "masked", **changes: Any) -> Path:
    """Save a seeded random encoder with its tokenizer; ``head`` is a key of MODELS."""
    fast, names = tokenizer(key), names_of(kind_of(key))
    ids = {role: fast.token_to_id(name) for role, name in zip(ROLES, names, strict=True)}
    named = {
        "pad_token_id": ids["pad_token"],
        "bos_token_id": ids["cls_token"],
        "eos_token_id": ids["sep_token"],
        "cls_token_id": ids["cls_token"],
        "sep_token_id": ids["sep_token"],
        "mask_token_id": ids["mask_token"],
        "decoder_start_token_id": ids["sep_token"],
        "forced_eos_token_id": ids["sep_token"],
    }
    torch.manual_seed(0)
    values = {**{**ENCODERS, **VOCABULARY_ALONE}[key], **changes}
    model_type = key.partition(":")[0]
    section = FAMILIES[model_type].section
    values = values | {section: named | values[section]} if section else named | values
    config = AutoConfig.for_model(model_type, **values)
    model = class_of(config, head).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    roles = dict(zip(ROLES, names, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=fast, **roles).save_pretrained(path)
    return path


def load(path: Path, head: str = "base") -> Any:
    """Load an encoder in fp32."""
    made = class_of(AutoConfig.from_pretrained(path), head)
    return made.from_pretrained(path, dtype=torch.float32).eval()
