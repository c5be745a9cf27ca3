"""Encoders: a part of the table that is made by hand.

Slots have the names of the model without a head.
"""

from dataclasses import replace

from surgery.families.blocks import (
    attention,
    buffers,
    fused,
    into,
    older_norms,
    one,
    optional,
    out_of,
)
from surgery.families.schema import ENCODER, FFN, HEAD, VOCAB, Family, Slot, Width

_BERT = "encoder.layer.{layer}."
_DISTIL = "transformer.layer.{layer}."
_MODERN = "layers.{layer}."

TASKS = ("pooler.", "classifier.", "qa_outputs.", "pre_classifier.", "dense.")
"""Heads of tasks: they know nothing of the vocabulary, and are copied as they are."""


def _others(*names: str) -> tuple[Slot, ...]:
    """Tensors outside the layers that a model may lack."""
    return tuple(slot for name in names for slot in one(name, required=False))


def _linear(name: str) -> tuple[Slot, ...]:
    """A linear map outside the layers that a model may lack."""
    return _others(f"{name}.weight", f"{name}.bias")


def _table(name: str) -> tuple[Slot, ...]:
    """The embedding of tokens."""
    return (Slot(f"{name}.weight", "vocabulary", (VOCAB, None)),)


def _embeddings() -> tuple[Slot, ...]:
    """The embedding of tokens, and tables of positions and segments, which are never pruned."""
    return (
        *_table("embeddings.word_embeddings"),
        *_others("embeddings.position_embeddings.weight"),
        *_others("embeddings.token_type_embeddings.weight"),
        *buffers("embeddings.position_ids", "embeddings.token_type_ids", at=""),
        *older_norms("embeddings.LayerNorm"),
    )


def _head(decoder: str, *biases: str) -> tuple[Slot, ...]:
    """The head that predicts masked tokens, where a checkpoint has it; no pass runs it."""
    return (
        Slot(f"{decoder}.weight", "vocabulary", (VOCAB, None), required=False, block=HEAD),
        *(
            Slot(name, "vocabulary", (VOCAB,), required=False, block=HEAD)
            for name in (f"{decoder}.bias", *biases)
        ),
    )


_CLS = ("cls.predictions.decoder", "cls.predictions.bias")
_LM_HEAD = ("lm_head.decoder", "lm_head.bias")
"""Where a head for masked tokens has its rows and its biases: BERT's kin, and RoBERTa's."""

_BERT_FFN = into("intermediate.dense", at=_BERT) + out_of("output.dense", at=_BERT)
_BERT_MAPS = (
    attention(
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        "attention.output.dense",
        at=_BERT,
    )
    + _BERT_FFN
)
_BERT_LIKE = (
    _embeddings()
    + _BERT_MAPS
    + older_norms("attention.output.LayerNorm", "output.LayerNorm", at=_BERT)
)
"""All that BERT has below its heads."""


def _normed(*in_layers: str, after: str) -> tuple[Slot, ...]:
    """BERT with other norms: in its layers, and after the last."""
    return _embeddings() + _BERT_MAPS + older_norms(*in_layers, at=_BERT) + older_norms(after)


def _encoder(
    prefix: str,
    slots: tuple[Slot, ...] = _BERT_LIKE,
    head: tuple[str, ...] = _CLS,
    carried: tuple[str, ...] = (),
) -> Family:
    """Return an encoder; unless told otherwise, it is BERT.

    Args:
        prefix: What names begin with where a checkpoint has a head.
        slots: Its tensors, the embedding first.
        head: The map that predicts masked tokens, then its biases by other names.
        carried: What else is beside the encoder, such as the rest of its head.
    """
    module, inside, _ = head[0].partition(".")
    around = (f"{module}.",) if inside else ()
    return Family(
        slots + _head(*head),
        tied=True,
        kind=ENCODER,
        embedding=slots[0].name,
        head=f"{head[0]}.weight",
        prefixes=((f"{prefix}.", ""),),
        carried=(*carried, *around, *TASKS, f"{prefix}.pooler."),
    )


def _roberta(prefix: str, slots: tuple[Slot, ...] = _BERT_LIKE) -> Family:
    """Return an encoder of RoBERTa's kin; unless told otherwise, its tensors are BERT's."""
    return replace(_encoder(prefix, slots, _LM_HEAD), positions_after_pad=True)


_ROBERTA = _roberta("roberta")

ENCODERS: dict[str, Family] = {
    "bert": _encoder("bert"),
    "ernie": _encoder("ernie", _BERT_LIKE + _others("embeddings.task_type_embeddings.weight")),
    "megatron-bert": _encoder("bert", _normed("attention.ln", "ln", after="encoder.ln")),
    "big_bird": _encoder("bert"),
    "bert-generation": _encoder("bert", head=_LM_HEAD),
    "roc_bert": _encoder(
        "roc_bert",
        _BERT_LIKE
        + one("embeddings.pronunciation_embed.weight")
        + one("embeddings.shape_embed.weight")
        + _linear("embeddings.map_inputs_layer"),
    ),
    "rembert": replace(
        _encoder(
            "rembert",
            _BERT_LIKE
            + one("encoder.embedding_hidden_mapping_in.weight")
            + one("encoder.embedding_hidden_mapping_in.bias"),
        ),
        tied=False,
    ),
    "roformer": _encoder(
        "roformer",
        _BERT_LIKE + _others("encoder.embed_positions.weight") + _linear("embeddings_project"),
    ),
    "distilbert": replace(
        _encoder(
            "distilbert",
            _embeddings()
            + attention(*(f"attention.{name}_lin" for name in ("q", "k", "v", "out")), at=_DISTIL)
            + older_norms("sa_layer_norm", "output_layer_norm", at=_DISTIL)
            + into("ffn.lin1", at=_DISTIL)
            + out_of("ffn.lin2", at=_DISTIL),
            ("vocab_projector",),
            ("vocab_transform.", "vocab_layer_norm."),
        ),
        widths={FFN: Width("hidden_dim")},
        depth="n_layers",
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "data2vec-text": _roberta("data2vec_text"),
    "roberta-prelayernorm": _roberta(
        "roberta_prelayernorm",
        _normed("attention.LayerNorm", "intermediate.LayerNorm", after="LayerNorm"),
    ),
    "xlm-roberta-xl": _roberta(
        "roberta",
        _normed("attention.self_attn_layer_norm", "LayerNorm", after="encoder.LayerNorm"),
    ),
    "mpnet": _roberta(
        "mpnet",
        _embeddings()
        + attention(*(f"attention.attn.{name}" for name in "qkvo"), at=_BERT)
        + one("encoder.relative_attention_bias.weight")
        + older_norms("attention.LayerNorm", "output.LayerNorm", at=_BERT)
        + _BERT_FFN,
    ),
    "electra": _encoder(
        "electra",
        _BERT_LIKE + _linear("embeddings_project"),
        ("generator_lm_head",),
        ("generator_predictions.", "discriminator_predictions."),
    ),
    "deberta-v2": replace(
        _encoder(
            "deberta",
            _embeddings()
            + attention(
                *(f"attention.self.{name}_proj" for name in ("query", "key", "value")),
                "attention.output.dense",
                at=_BERT,
            )
            + optional(
                "attention",
                attention(
                    *(f"attention.self.pos_{name}_proj" for name in ("key", "query")), at=_BERT
                ),
            )
            + older_norms("attention.output.LayerNorm", "output.LayerNorm", at=_BERT)
            + _BERT_FFN
            + _others("embeddings.embed_proj.weight", "encoder.rel_embeddings.weight")
            + older_norms("encoder.LayerNorm", "encoder.conv.LayerNorm")
            + _linear("encoder.conv.conv"),
            (*_CLS, "lm_predictions.lm_head.bias"),
            ("lm_predictions.", "mask_predictions."),
        ),
        between_layers=("encoder.conv.conv.weight",),
    ),
    "modernbert": _encoder(
        "model",
        _table("embeddings.tok_embeddings")
        + older_norms("embeddings.norm", "final_norm")
        + attention("attn.Wqkv", "attn.Wo", at=_MODERN)
        + older_norms("attn_norm", "mlp_norm", at=_MODERN)
        + fused("mlp.Wi", at=_MODERN)
        + out_of("mlp.Wo", at=_MODERN),
        ("decoder",),
        ("head.",),
    ),
    "eurobert": replace(
        _encoder(
            "model",
            _table("embed_tokens")
            + older_norms("norm")
            + attention(*(f"self_attn.{name}_proj" for name in "qkvo"), at=_MODERN)
            + older_norms("input_layernorm", "post_attention_layernorm", at=_MODERN)
            + into("mlp.gate_proj", at=_MODERN)
            + into("mlp.up_proj", at=_MODERN)
            + out_of("mlp.down_proj", at=_MODERN),
            ("lm_head",),
        ),
        tied=False,
    ),
}
"""model_type → family."""
