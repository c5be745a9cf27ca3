"""Encoders with a decoder, and undivided models: a part of the table that is made by hand.

Slots have the names of the model without a head.
"""

from dataclasses import replace

from surgery.families.blocks import (
    attention,
    into,
    older_norms,
    one,
    optional,
    out_of,
    per_layer,
)
from surgery.families.encoder_table import TASKS
from surgery.families.schema import (
    DECODER_FFN,
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

_TABLES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
_WORDS = ("word_embeddings", "encoder.word_embeddings", "decoder.word_embeddings")
_STACKS = ("encoder", "decoder")
_BEFORE = tuple(f"{stack}." for stack in _STACKS)
_OF_TASKS = ("classification_head.", "qa_outputs.")


def _undivided(
    why: str,
    tables: tuple[str, ...],
    *heads: str,
    prefix: str = "",
    carried: tuple[str, ...] = (),
) -> Family:
    """Return a model of which the vocabulary is pruned and nothing else.

    Args:
        why: Why it loses nothing else.
        tables: The embedding by all its names; files may hold it under each of them.
        heads: The map that predicts tokens, then its biases by their names.
        prefix: What names begin with where a checkpoint has a head.
        carried: Prefixes of all other tensors, without ``prefix``.
    """
    head, *biases = heads
    weights = tuple(
        Slot(f"{name}.weight", "vocabulary", (VOCAB, None), required=name == tables[0])
        for name in (*tables, head)
    )
    return Family(
        weights + tuple(Slot(name, "vocabulary", (VOCAB,), required=False) for name in biases),
        tied=True,
        widths={},
        kind=UNDIVIDED,
        only_vocabulary=why,
        embedding=f"{tables[0]}.weight",
        head=f"{head}.weight",
        prefixes=((prefix, ""),) if prefix else (),
        carried=(*carried, *(prefix + name for name in carried if prefix)),
    )


def _both(
    why: str = "",
    head: str = "lm_head",
    *,
    layers: tuple[Slot, ...] = (),
    prefix: str = "model.",
    tables: tuple[str, ...] = _TABLES,
    carried: tuple[str, ...] = (),
) -> Family:
    """Return an encoder with a decoder; ``layers`` are the slots of both, where they run, and
    ``why`` says why they do not."""
    made = _undivided(why, tables, head, prefix=prefix, carried=(*_BEFORE, *carried))
    bias = Slot("final_logits_bias", "vocabulary", (None, VOCAB), required=False, block=HEAD)
    slots = tuple(
        replace(slot, block=HEAD) if slot.name == made.head else slot for slot in made.slots
    )
    return replace(
        made,
        kind=ENCODER_DECODER,
        depth="encoder_layers",
        decoder_depth="decoder_layers" if layers else "",
        slots=(*slots, replace(bias, is_parameter=False), *layers),
    )


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
        found += older_norms("self_attn_layer_norm", "encoder_attn_layer_norm", at=at)
        found += older_norms("final_layer_norm", at=at)
        found += one(f"{stack}.embed_positions.weight", required=False)
        found += older_norms(f"{stack}.layernorm_embedding", f"{stack}.layer_norm")
    return tuple(found)


def _bart(*own_attention: str) -> Family:
    widths = {FFN: Width("encoder_ffn_dim"), DECODER_FFN: Width("decoder_ffn_dim")}
    made = _both(layers=_bart_layers(*own_attention), carried=_OF_TASKS)
    return replace(made, widths=widths)


def _t5_layers(*, long: bool) -> tuple[Slot, ...]:
    """The layers of T5's kin: attention, then attention to the encoder in a decoder, then the FFN,
    with one map into the channels or with two. LongT5's encoder attends to a part of the text."""
    found: list[Slot] = []
    for last, stack in enumerate(_STACKS, start=1):
        at = f"{stack}.block.{{layer}}."
        own = ("layer.0.SelfAttention", "layer.1.EncDecAttention")[:last]
        biases = [f"{own[0]}.relative_attention_bias"]
        if long and stack == "encoder":
            own = ("layer.0.LocalSelfAttention", "layer.0.TransientGlobalSelfAttention")
            found += older_norms(f"{own[1]}.global_input_layer_norm", at=at)
            biases = [f"{module}.relative_attention_bias" for module in own]
            biases.append(f"{own[1]}.global_relative_attention_bias")
        maps = attention(*(f"{module}.{name}" for module in own for name in "qkvo"), at=at)
        found += optional("attention", maps) if long else maps
        names = (f"{name}.weight" for name in biases)
        found += per_layer("attention", *names, required=False, at=at)
        ffn = f"layer.{last}.DenseReluDense"
        found += into(f"{ffn}.wi", block="plain", at=at)
        found += into(f"{ffn}.wi_0", block="gated", at=at)
        found += into(f"{ffn}.wi_1", block="gated", at=at)
        found += out_of(f"{ffn}.wo", at=at)
        found += older_norms(*(f"layer.{n}.layer_norm" for n in range(last + 1)), at=at)
        found += older_norms(f"{stack}.final_layer_norm")
    return tuple(found)


def _t5(layer_outputs: int, *, long: bool = False) -> Family:
    return replace(
        _both(layers=_t5_layers(long=long), prefix=""),
        depth="num_layers",
        decoder_depth="num_decoder_layers",
        layer_outputs=layer_outputs,
        widths={FFN: Width("d_ff")},
    )


_T5 = _t5(3)
_BART = _bart()
_READS_IMAGES = "its encoder reads images, and no text stands for these"
_OWN_EXPERTS = "its experts run in code of their own, where calibration sees no activations"
_BESIDE_IMAGE = "its text is read beside an image, and no text stands for that"
_CHANNEL_NORM = "a norm over the FFN's channels divides by all of them, kept or not"

ENCODER_DECODERS: dict[str, Family] = {
    "t5": _T5,
    "mt5": _T5,
    "umt5": _t5(2),
    "longt5": _t5(4, long=True),
    "bart": _BART,
    "mbart": _BART,
    "mvp": _BART,
    "plbart": _BART,
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "bigbird_pegasus": _bart(
        *(f"self_attn.self.{name}" for name in ("query", "key", "value")), "self_attn.output"
    ),
    "m2m_100": replace(_BART, positions_after_pad=True),
    "marian": _BART,
    "pegasus": _BART,
    "led": _both(
        "its encoder pads every text to whole windows of its attention",
        prefix="led.",
        carried=_OF_TASKS,
    ),
    "pegasus_x": _both("its encoder's layers pass on states that stand for no token of the text"),
    "switch_transformers": replace(_both(_OWN_EXPERTS, prefix=""), depth="num_layers"),
    "t5gemma2": replace(
        _both(
            "its decoder's layers attend to text and encoder at once, and are not run one by one",
            "lm_head.out_proj",
            tables=("encoder.embed_tokens", "decoder.embed_tokens"),
        ),
        prefixes=(("model.encoder.text_model.", "encoder."), ("model.", "")),
        section="decoder",
        depth="num_hidden_layers",
    ),
    "whisper": _both(
        "its encoder hears sound, and no text stands for that",
        "proj_out",
        tables=("decoder.embed_tokens",),
    ),
    "prophetnet": replace(
        _both("its decoder has several states for each token", prefix="prophetnet.", tables=_WORDS),
        depth="num_encoder_layers",
    ),
    "udop": replace(
        _both(
            "its encoder reads where each word lies on a page",
            prefix="",
            carried=("patch_embed.",),
        ),
        depth="num_layers",
    ),
    "pix2struct": replace(
        _both(_READS_IMAGES, "decoder.lm_head", prefix="", tables=("decoder.embed_tokens",)),
        section="text_config",
        depth="num_layers",
        tied=False,
    ),
    "pp_formulanet": replace(
        _both(_READS_IMAGES, tables=("decoder.embed_tokens",)),
        section="text_config",
        depth="decoder_layers",
        tied=False,
    ),
    "florence2": replace(
        _BART,
        prefixes=(("model.language_model.", ""),),
        carried=(
            *_BEFORE,
            *(f"model.language_model.{stack}" for stack in _BEFORE),
            *("model.vision_tower.", "model.multi_modal_projector."),
            *("vision_tower.", "multi_modal_projector."),
        ),
        section="text_config",
        text_type="bart",
    ),
    "vision-encoder-decoder": replace(
        _both(
            _READS_IMAGES,
            "decoder.output_projection",
            prefix="",
            tables=("decoder.model.decoder.embed_tokens", "decoder.lm_head"),
            carried=("enc_to_dec_proj.",),
        ),
        section="decoder",
        depth="decoder_layers",
        positions_after_pad=True,
    ),
}
"""model_type → family."""

_KOSMOS = replace(
    _undivided(
        _CHANNEL_NORM,
        ("text_model.model.embed_tokens",),
        "text_model.lm_head",
        carried=("text_model.model.", "vision_model.", "image_to_text_projection."),
    ),
    section="text_config",
    depth="layers",
    positions_after_pad=True,
)

_STRONGEST = "its first layers use each token's strongest channels alone: fewer would be others"
_GEMMA3N = _undivided(
    _STRONGEST,
    ("model.embed_tokens",),
    "lm_head",
    carried=tuple(f"model.{name}" for name in ("layers.", "norm.", "altup_", "per_layer_")),
)
_PER_LAYER = Slot("model.embed_tokens_per_layer.weight", "vocabulary", (TEXT_VOCAB, None))
_GEMMA3N_TEXT = replace(_GEMMA3N, slots=(*_GEMMA3N.slots, _PER_LAYER))
_GEMMA3N_BESIDE = ("language_model.", "vision_tower.", "audio_tower.", "embed_vision.")

UNDIVIDED_MODELS: dict[str, Family] = {
    "xlm": replace(
        _undivided(
            "its layers are no modules that could run one by one",
            ("embeddings",),
            *("pred_layer.proj", "pred_layer.proj.bias"),
            prefix="transformer.",
            carried=(
                *("attentions.", "ffns.", "layer_norm1.", "layer_norm2.", "layer_norm_emb."),
                *("position_embeddings.", "lang_embeddings.", "position_ids"),
                *("sequence_summary.", *TASKS),
            ),
        ),
        depth="n_layers",
    ),
    "xlnet": replace(
        _undivided(
            "its layers compute two streams of states, and are not run one by one",
            ("word_embedding",),
            *("lm_loss", "lm_loss.bias"),
            prefix="transformer.",
            carried=("layer.", "mask_emb", "sequence_summary.", "logits_proj.", *TASKS),
        ),
        depth="n_layer",
    ),
    "reformer": replace(
        _undivided(
            "its layers are reversible, and run as one",
            ("embeddings.word_embeddings",),
            *("lm_head.decoder", "lm_head.decoder.bias", "lm_head.bias"),
            prefix="reformer.",
            carried=("embeddings.position_embeddings.", "encoder.", *TASKS),
        ),
        depth="attn_layers",
        tied=False,
    ),
    "xmod": replace(
        _undivided(
            "its layers have an adapter for each language, which a text does not name",
            ("embeddings.word_embeddings",),
            *("lm_head.decoder", "lm_head.decoder.bias", "lm_head.bias"),
            prefix="roberta.",
            carried=("embeddings.", "encoder.", "lm_head.", *TASKS),
        ),
        positions_after_pad=True,
    ),
    "trocr": replace(
        _undivided(
            "it reads what an encoder makes of an image, and no text stands for that",
            ("decoder.embed_tokens",),
            "output_projection",
            prefix="model.",
            carried=("decoder.",),
        ),
        depth="decoder_layers",
        positions_after_pad=True,
    ),
    "git": replace(
        _undivided(
            _BESIDE_IMAGE,
            ("embeddings.word_embeddings",),
            *("output", "output.bias"),
            prefix="git.",
            carried=(
                *("embeddings.", "encoder.", "image_encoder.", "visual_projection."),
                "img_temporal_embedding.",
            ),
        ),
        tied=False,
    ),
    "blip": replace(
        _undivided(
            _BESIDE_IMAGE,
            ("text_decoder.bert.embeddings.word_embeddings",),
            "text_decoder.cls.predictions.decoder",
            *("text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.bias"),
            carried=("text_decoder.", "vision_model."),
        ),
        section="text_config",
    ),
    "idefics2": replace(
        _undivided(
            "its connector has the width of the text's FFN",
            ("model.text_model.embed_tokens",),
            "lm_head",
            carried=("model.text_model.", "model.connector.", "model.vision_model."),
        ),
        section="text_config",
        tied=False,
    ),
    "kosmos-2": _KOSMOS,
    "kosmos-2.5": _KOSMOS,
    "gemma3n_text": _GEMMA3N_TEXT,
    "gemma3n": replace(
        _GEMMA3N_TEXT,
        prefixes=(("model.language_model.", "model."),),
        carried=tuple(f"model.{name}" for name in (*_GEMMA3N_BESIDE, "embed_audio.")),
        section="text_config",
        text_type="gemma3n_text",
    ),
}
"""model_type → family."""
