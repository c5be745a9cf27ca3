"""Encoders, and models that lose vocabulary alone: the part of the table that is made by hand.

Slots have the names of the model without a head.
"""

from dataclasses import replace

from surgery.families.blocks import (
    attention,
    buffers,
    fused,
    into,
    one,
    optional,
    out_of,
    per_layer,
)
from surgery.families.schema import (
    DECODER_FFN,
    ENCODER,
    ENCODER_DECODER,
    FFN,
    HEAD,
    TEXT_VOCAB,
    UNDIVIDED,
    VOCAB,
    Family,
    Slot,
    Width,
)

_BERT = "encoder.layer.{layer}."
_DISTIL = "transformer.layer.{layer}."
_MODERN = "layers.{layer}."

_TASKS = ("pooler.", "classifier.", "qa_outputs.", "pre_classifier.", "dense.")
"""Heads of tasks: they know nothing of the vocabulary, and are copied as they are."""


def _norms(*names: str, at: str = "") -> tuple[Slot, ...]:
    """Norms, each with a weight and a bias; the first checkpoints call them gamma and beta."""
    leaves = ("weight", "bias", "gamma", "beta")
    return tuple(
        Slot(f"{at}{name}.{leaf}", "norms", required=False) for name in names for leaf in leaves
    )


def _table(name: str) -> tuple[Slot, ...]:
    """The embedding of tokens."""
    return (Slot(f"{name}.weight", "vocabulary", (VOCAB, None)),)


def _embeddings() -> tuple[Slot, ...]:
    """The embedding of tokens, and tables of positions and segments, which are never pruned."""
    return (
        *_table("embeddings.word_embeddings"),
        *one("embeddings.position_embeddings.weight", required=False),
        *one("embeddings.token_type_embeddings.weight", required=False),
        *buffers("embeddings.position_ids", "embeddings.token_type_ids", at=""),
        *_norms("embeddings.LayerNorm"),
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


def _encoder(
    slots: tuple[Slot, ...],
    prefix: str,
    decoder: str,
    *biases: str,
    carried: tuple[str, ...] = (),
    embedding: str = "embeddings.word_embeddings.weight",
    **rest: object,
) -> Family:
    """Return an encoder whose names begin with ``prefix`` where a checkpoint has a head."""
    return replace(
        Family(
            slots + _head(decoder, *biases),
            tied=True,
            kind=ENCODER,
            embedding=embedding,
            head=f"{decoder}.weight",
            prefixes=((prefix, ""),),
            carried=(*carried, *_TASKS, f"{prefix}pooler."),
        ),
        **rest,  # type: ignore[arg-type]
    )


_BERT_FFN = into("intermediate.dense", at=_BERT) + out_of("output.dense", at=_BERT)
_BERT_LAYERS = (
    attention(
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        "attention.output.dense",
        at=_BERT,
    )
    + _norms("attention.output.LayerNorm", "output.LayerNorm", at=_BERT)
    + _BERT_FFN
)
_BERT_LIKE = _embeddings() + _BERT_LAYERS
_BERT_MAPS = tuple(slot for slot in _BERT_LAYERS if slot.group != "norms")
_CLS = ("cls.predictions.decoder", "cls.predictions.bias")
_LM_HEAD = ("lm_head.decoder", "lm_head.bias")
_ROBERTA = _encoder(
    _BERT_LIKE, "roberta.", *_LM_HEAD, carried=("lm_head.",), positions_after_pad=True
)

ENCODERS: dict[str, Family] = {
    "bert": _encoder(_BERT_LIKE, "bert.", *_CLS, carried=("cls.",)),
    "ernie": _encoder(
        _BERT_LIKE + one("embeddings.task_type_embeddings.weight", required=False),
        "ernie.",
        *_CLS,
        carried=("cls.",),
    ),
    "megatron-bert": _encoder(
        _embeddings() + _BERT_MAPS + _norms("attention.ln", "ln", at=_BERT) + _norms("encoder.ln"),
        "bert.",
        *_CLS,
        carried=("cls.",),
    ),
    "big_bird": _encoder(_BERT_LIKE, "bert.", *_CLS, carried=("cls.",)),
    "bert-generation": _encoder(_BERT_LIKE, "bert.", *_LM_HEAD, carried=("lm_head.",)),
    "roc_bert": _encoder(
        _BERT_LIKE
        + one("embeddings.pronunciation_embed.weight")
        + one("embeddings.shape_embed.weight")
        + one("embeddings.map_inputs_layer.weight", required=False)
        + one("embeddings.map_inputs_layer.bias", required=False),
        "roc_bert.",
        *_CLS,
        carried=("cls.",),
    ),
    "rembert": _encoder(
        _BERT_LIKE
        + one("encoder.embedding_hidden_mapping_in.weight")
        + one("encoder.embedding_hidden_mapping_in.bias"),
        "rembert.",
        *_CLS,
        carried=("cls.",),
        tied=False,
    ),
    "roformer": _encoder(
        _BERT_LIKE
        + one("encoder.embed_positions.weight", required=False)
        + one("embeddings_project.weight", required=False)
        + one("embeddings_project.bias", required=False),
        "roformer.",
        *_CLS,
        carried=("cls.",),
    ),
    "distilbert": _encoder(
        _embeddings()
        + attention(*(f"attention.{name}_lin" for name in ("q", "k", "v", "out")), at=_DISTIL)
        + _norms("sa_layer_norm", "output_layer_norm", at=_DISTIL)
        + into("ffn.lin1", at=_DISTIL)
        + out_of("ffn.lin2", at=_DISTIL),
        "distilbert.",
        "vocab_projector",
        carried=("vocab_transform.", "vocab_layer_norm."),
        widths={FFN: Width("hidden_dim")},
        depth="n_layers",
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "data2vec-text": _encoder(
        _BERT_LIKE,
        "data2vec_text.",
        *_LM_HEAD,
        carried=("lm_head.",),
        positions_after_pad=True,
    ),
    "roberta-prelayernorm": _encoder(
        _embeddings()
        + _BERT_MAPS
        + _norms("attention.LayerNorm", "intermediate.LayerNorm", at=_BERT)
        + _norms("LayerNorm"),
        "roberta_prelayernorm.",
        *_LM_HEAD,
        carried=("lm_head.",),
        positions_after_pad=True,
    ),
    "xlm-roberta-xl": _encoder(
        _embeddings()
        + _BERT_MAPS
        + _norms("attention.self_attn_layer_norm", "LayerNorm", at=_BERT)
        + _norms("encoder.LayerNorm"),
        "roberta.",
        *_LM_HEAD,
        carried=("lm_head.",),
        positions_after_pad=True,
    ),
    "mpnet": _encoder(
        _embeddings()
        + attention(*(f"attention.attn.{name}" for name in "qkvo"), at=_BERT)
        + one("encoder.relative_attention_bias.weight")
        + _norms("attention.LayerNorm", "output.LayerNorm", at=_BERT)
        + _BERT_FFN,
        "mpnet.",
        *_LM_HEAD,
        carried=("lm_head.",),
        positions_after_pad=True,
    ),
    "electra": _encoder(
        _BERT_LIKE
        + one("embeddings_project.weight", required=False)
        + one("embeddings_project.bias", required=False),
        "electra.",
        "generator_lm_head",
        carried=("generator_predictions.", "discriminator_predictions."),
    ),
    "deberta-v2": _encoder(
        _embeddings()
        + attention(
            *(f"attention.self.{name}_proj" for name in ("query", "key", "value")),
            "attention.output.dense",
            at=_BERT,
        )
        + optional(
            "attention",
            attention(*(f"attention.self.pos_{name}_proj" for name in ("key", "query")), at=_BERT),
        )
        + _norms("attention.output.LayerNorm", "output.LayerNorm", at=_BERT)
        + _BERT_FFN
        + one("embeddings.embed_proj.weight", required=False)
        + one("encoder.rel_embeddings.weight", required=False)
        + _norms("encoder.LayerNorm", "encoder.conv.LayerNorm")
        + one("encoder.conv.conv.weight", required=False)
        + one("encoder.conv.conv.bias", required=False),
        "deberta.",
        *_CLS,
        "lm_predictions.lm_head.bias",
        carried=("cls.", "lm_predictions.", "mask_predictions."),
        between_layers=("encoder.conv.conv.weight",),
    ),
    "modernbert": _encoder(
        _table("embeddings.tok_embeddings")
        + _norms("embeddings.norm", "final_norm")
        + attention("attn.Wqkv", "attn.Wo", at=_MODERN)
        + _norms("attn_norm", "mlp_norm", at=_MODERN)
        + fused("mlp.Wi", at=_MODERN)
        + out_of("mlp.Wo", at=_MODERN),
        "model.",
        "decoder",
        carried=("head.",),
        embedding="embeddings.tok_embeddings.weight",
    ),
    "eurobert": _encoder(
        _table("embed_tokens")
        + _norms("norm")
        + attention(*(f"self_attn.{name}_proj" for name in "qkvo"), at=_MODERN)
        + _norms("input_layernorm", "post_attention_layernorm", at=_MODERN)
        + into("mlp.gate_proj", at=_MODERN)
        + into("mlp.up_proj", at=_MODERN)
        + out_of("mlp.down_proj", at=_MODERN),
        "model.",
        "lm_head",
        embedding="embed_tokens.weight",
        tied=False,
    ),
}
"""model_type → family."""

_TABLES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
_WORDS = ("word_embeddings", "encoder.word_embeddings", "decoder.word_embeddings")
_STACKS = ("encoder", "decoder")
_BEFORE = tuple(f"{stack}." for stack in _STACKS)


def _undivided(
    tables: tuple[str, ...],
    head: str,
    *biases: str,
    prefix: str = "",
    carried: tuple[str, ...] = (),
    **rest: object,
) -> Family:
    """Return a model of which the vocabulary is pruned and nothing else.

    The first of ``tables`` is the embedding. Files may hold it several times, under each name.
    """
    weights = tuple(
        Slot(f"{name}.weight", "vocabulary", (VOCAB, None), required=name == tables[0])
        for name in (*tables, head)
    )
    made = Family(
        weights + tuple(Slot(name, "vocabulary", (VOCAB,), required=False) for name in biases),
        tied=True,
        widths={},
        kind=UNDIVIDED,
        embedding=f"{tables[0]}.weight",
        head=f"{head}.weight",
        prefixes=((prefix, ""),) if prefix else (),
        carried=(*carried, *(prefix + name for name in carried if prefix)),
    )
    return replace(made, **rest)  # type: ignore[arg-type]


def _both(
    head: str = "lm_head",
    *,
    layers: tuple[Slot, ...] = (),
    prefix: str = "model.",
    tables: tuple[str, ...] = _TABLES,
    carried: tuple[str, ...] = (),
    **rest: object,
) -> Family:
    """Return an encoder with a decoder; ``layers`` are the slots of both, where they run."""
    made = _undivided(tables, head, prefix=prefix, carried=(*_BEFORE, *carried))
    bias = Slot("final_logits_bias", "vocabulary", (None, VOCAB), required=False, block=HEAD)
    slots = tuple(
        replace(slot, block=HEAD) if slot.name == made.head else slot for slot in made.slots
    )
    known = {
        "kind": ENCODER_DECODER,
        "depth": "encoder_layers",
        "decoder_depth": "decoder_layers" if layers else "",
        "slots": (*slots, replace(bias, is_parameter=False), *layers),
    }
    return replace(made, **{**known, **rest})  # type: ignore[arg-type]


def _projections(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}_proj" for name in ("q", "k", "v", "out"))


def _bart_layers(*own_attention: str) -> tuple[Slot, ...]:
    """The layers of BART's kin; ``own_attention`` are the encoder's maps, where they have names of
    their own."""
    found: list[Slot] = []
    for stack, axis in zip(_STACKS, (FFN, DECODER_FFN), strict=True):
        at, crosses = f"{stack}.layers.{{layer}}.", stack == "decoder"
        own = own_attention if own_attention and not crosses else _projections("self_attn")
        found += attention(*own, *(_projections("encoder_attn") if crosses else ()), at=at)
        found += into("fc1", axis, at=at) + out_of("fc2", axis, at=at)
        found += _norms("self_attn_layer_norm", "encoder_attn_layer_norm", at=at)
        found += _norms("final_layer_norm", at=at)
        found += one(f"{stack}.embed_positions.weight", required=False)
        found += _norms(f"{stack}.layernorm_embedding", f"{stack}.layer_norm")
    return tuple(found)


def _t5_layers() -> tuple[Slot, ...]:
    """The layers of T5's kin: attention, then attention to the encoder in a decoder, then the FFN,
    with one map into the channels or with two."""
    found: list[Slot] = []
    for last, stack in enumerate(_STACKS, start=1):
        at = f"{stack}.block.{{layer}}."
        own = ("layer.0.SelfAttention", "layer.1.EncDecAttention")[:last]
        found += attention(*(f"{module}.{name}" for module in own for name in "qkvo"), at=at)
        bias = f"{own[0]}.relative_attention_bias.weight"
        found += per_layer("attention", bias, required=False, at=at)
        ffn = f"layer.{last}.DenseReluDense"
        found += into(f"{ffn}.wi", block="plain", at=at)
        found += into(f"{ffn}.wi_0", block="gated", at=at)
        found += into(f"{ffn}.wi_1", block="gated", at=at)
        found += out_of(f"{ffn}.wo", at=at)
        found += _norms(*(f"layer.{n}.layer_norm" for n in range(last + 1)), at=at)
        found += _norms(f"{stack}.final_layer_norm")
    return tuple(found)


_T5 = _both(
    layers=_t5_layers(),
    prefix="",
    depth="num_layers",
    decoder_depth="num_decoder_layers",
    layer_outputs=3,
    widths={FFN: Width("d_ff")},
)
_TWO_WIDTHS = {FFN: Width("encoder_ffn_dim"), DECODER_FFN: Width("decoder_ffn_dim")}
_BART = _both(
    layers=_bart_layers(),
    widths=_TWO_WIDTHS,
    carried=("classification_head.", "qa_outputs."),
)
_READS_IMAGES = "its encoder reads images, and no text stands for these"

ENCODER_DECODERS: dict[str, Family] = {
    "t5": _T5,
    "mt5": _T5,
    "umt5": replace(_T5, layer_outputs=2),
    "bart": _BART,
    "mbart": _BART,
    "mvp": _BART,
    "plbart": _BART,
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "bigbird_pegasus": _both(
        layers=_bart_layers(
            *(f"self_attn.self.{name}" for name in ("query", "key", "value")), "self_attn.output"
        ),
        widths=_TWO_WIDTHS,
        carried=("classification_head.", "qa_outputs."),
    ),
    "m2m_100": replace(_BART, positions_after_pad=True),
    "marian": _BART,
    "pegasus": _BART,
    "whisper": _both(
        "proj_out",
        tables=("decoder.embed_tokens",),
        only_vocabulary="its encoder hears sound, and no text stands for that",
    ),
    "prophetnet": _both(
        prefix="prophetnet.",
        tables=_WORDS,
        depth="num_encoder_layers",
        only_vocabulary="its decoder has several states for each token",
    ),
    "udop": _both(
        prefix="",
        carried=("patch_embed.",),
        depth="num_layers",
        only_vocabulary="its encoder reads where each word lies on a page",
    ),
    "pix2struct": _both(
        "decoder.lm_head",
        prefix="",
        tables=("decoder.embed_tokens",),
        section="text_config",
        depth="num_layers",
        tied=False,
        only_vocabulary=_READS_IMAGES,
    ),
    "pp_formulanet": _both(
        tables=("decoder.embed_tokens",),
        section="text_config",
        depth="decoder_layers",
        tied=False,
        only_vocabulary=_READS_IMAGES,
    ),
    "florence2": _both(
        layers=_bart_layers(),
        widths=_TWO_WIDTHS,
        prefix="model.language_model.",
        carried=tuple(
            f"{at}{name}"
            for at in ("model.", "")
            for name in ("vision_tower.", "multi_modal_projector.")
        ),
        section="text_config",
        text_type="bart",
    ),
    "vision-encoder-decoder": _both(
        "decoder.output_projection",
        prefix="",
        tables=("decoder.model.decoder.embed_tokens", "decoder.lm_head"),
        carried=("enc_to_dec_proj.",),
        section="decoder",
        depth="decoder_layers",
        positions_after_pad=True,
        only_vocabulary=_READS_IMAGES,
    ),
}
"""model_type → family."""

_KOSMOS = _undivided(
    ("text_model.model.embed_tokens",),
    "text_model.lm_head",
    carried=("text_model.model.", "vision_model.", "image_to_text_projection."),
    section="text_config",
    depth="layers",
    positions_after_pad=True,
)


_GEMMA3N = _undivided(
    ("model.embed_tokens",),
    "lm_head",
    carried=tuple(f"model.{name}" for name in ("layers.", "norm.", "altup_", "per_layer_")),
)
_PER_LAYER = Slot("model.embed_tokens_per_layer.weight", "vocabulary", (TEXT_VOCAB, None))

UNDIVIDED_MODELS: dict[str, Family] = {
    "xlm": _undivided(
        ("embeddings",),
        "pred_layer.proj",
        "pred_layer.proj.bias",
        prefix="transformer.",
        carried=(
            *("attentions.", "ffns.", "layer_norm1.", "layer_norm2.", "layer_norm_emb."),
            *("position_embeddings.", "lang_embeddings.", "position_ids"),
            *("sequence_summary.", *_TASKS),
        ),
        depth="n_layers",
    ),
    "xlnet": _undivided(
        ("word_embedding",),
        "lm_loss",
        "lm_loss.bias",
        prefix="transformer.",
        carried=("layer.", "mask_emb", "sequence_summary.", "logits_proj.", *_TASKS),
        depth="n_layer",
    ),
    "reformer": _undivided(
        ("embeddings.word_embeddings",),
        "lm_head.decoder",
        "lm_head.decoder.bias",
        "lm_head.bias",
        prefix="reformer.",
        carried=("embeddings.position_embeddings.", "encoder.", *_TASKS),
        depth="attn_layers",
        tied=False,
    ),
    "xmod": _undivided(
        ("embeddings.word_embeddings",),
        *("lm_head.decoder", "lm_head.decoder.bias", "lm_head.bias"),
        prefix="roberta.",
        carried=("embeddings.", "encoder.", "lm_head.", *_TASKS),
        positions_after_pad=True,
    ),
    "trocr": _undivided(
        ("decoder.embed_tokens",),
        "output_projection",
        prefix="model.",
        carried=("decoder.",),
        depth="decoder_layers",
        positions_after_pad=True,
    ),
    "git": _undivided(
        ("embeddings.word_embeddings",),
        "output",
        "output.bias",
        prefix="git.",
        carried=(
            *("embeddings.", "encoder.", "image_encoder.", "visual_projection."),
            "img_temporal_embedding.",
        ),
        tied=False,
    ),
    "blip": _undivided(
        ("text_decoder.bert.embeddings.word_embeddings",),
        "text_decoder.cls.predictions.decoder",
        *("text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.bias"),
        carried=("text_decoder.", "vision_model."),
        section="text_config",
    ),
    "idefics2": _undivided(
        ("model.text_model.embed_tokens",),
        "lm_head",
        carried=("model.text_model.", "model.connector.", "model.vision_model."),
        section="text_config",
        tied=False,
    ),
    "kosmos-2": _KOSMOS,
    "kosmos-2.5": _KOSMOS,
    "gemma3n_text": replace(_GEMMA3N, slots=(*_GEMMA3N.slots, _PER_LAYER)),
}
"""model_type → family."""
