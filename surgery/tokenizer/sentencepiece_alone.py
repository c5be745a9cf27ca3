"""A SentencePiece model without tokenizer.json, as XLM-R, mBART and T5 may be published."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from surgery.errors import AMEND, TokenizerError
from surgery.files.index_sets import MAX_SIZE
from surgery.files.model_files import (
    ALONE_NAMES,
    CONFIG_NAME,
    SETTINGS_NAME,
    tokenizer_files,
)
from surgery.files.strict_json import read_file, read_json
from surgery.tokenizer.checks import check_tokenizer
from surgery.tokenizer.legacy import (
    OF_MODEL,
    ROLE,
    ROLES,
    NamedToken,
    all_named,
    optional_json,
    with_named_tokens,
)
from surgery.tokenizer.marian import LANGUAGE_CODES
from surgery.tokenizer.sentencepiece_model import opened_model

FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
"""The first tokens of fairseq's models, in place of the first three pieces."""

MASK = "<mask>"
SENTINELS = 100
"""T5's ``extra_ids`` where no file says otherwise."""

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BY_WORD = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]}
TEXT = "$A"


@dataclass(frozen=True)
class SentencePieceClass:
    """How a class of transformers 5 makes a tokenizer of the model."""

    first: tuple[str, ...] = FAIRSEQ
    """Tokens that take the place of the model's first pieces."""
    replaced: int = 3
    """How many pieces those are."""
    unknown: str = "<unk>"
    normalizes: bool = True
    """Whether the model's own normalization is used."""
    joins_spaces: bool = False
    """Whether several spaces are made one, and text is not split at white space first."""
    around: tuple[str, ...] = (TEXT, "</s>")
    """What stands around a text; "" is the language, by ``src_lang``."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Roles of special tokens where no file names them."""


_ROLES = dict(zip(ROLES, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", MASK), strict=True))

CLASSES = {
    "XLMRobertaTokenizer": SentencePieceClass(around=("<s>", TEXT, "</s>"), roles=_ROLES),
    "MBartTokenizer": SentencePieceClass(normalizes=False, around=(TEXT, "</s>", ""), roles=_ROLES),
    "MBart50Tokenizer": SentencePieceClass(
        joins_spaces=True, around=("", TEXT, "</s>"), roles=_ROLES
    ),
    "T5Tokenizer": SentencePieceClass(
        first=(),
        replaced=0,
        roles={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
}
"""tokenizer_class, without Fast → how it makes a tokenizer."""

CLASS_OF_TYPE = {
    "xlm-roberta": "XLMRobertaTokenizer",
    "mbart": "MBartTokenizer",
    "mt5": "T5Tokenizer",
    "t5": "T5Tokenizer",
}
"""model_type → the class where tokenizer_config.json names none."""


def is_alone(directory: Path) -> bool:
    """Whether the tokenizer is a SentencePiece model alone, of a class in ``CLASSES``."""
    files = tokenizer_files(directory)
    return bool(files) and files[0].name in ALONE_NAMES and _class_of(directory) in CLASSES


def alone_data(directory: Path) -> dict[str, Any]:
    """Return the tokenizer.json that transformers 5 makes of the model.

    Raises:
        TokenizerError: the model is damaged, or is no Unigram model.
    """
    path = tokenizer_files(directory)[0]
    name = _class_of(directory)
    class_, settings = CLASSES[name], optional_json(directory / SETTINGS_NAME)
    model = opened_model(read_file(path), path, "download it again")
    trainer_spec = model.trainer_spec
    if trainer_spec.model_type != trainer_spec.UNIGRAM:
        raise TokenizerError(
            path,
            f"is no model that {name} can read",
            expected="a Unigram model",
            found=f"a model of type {trainer_spec.ModelType.Name(trainer_spec.model_type)}",
            fix="download it again",
        )
    _check_first(list(islice(model.pieces, class_.replaced)), name, path)
    pieces = [[piece.piece, piece.score] for piece in model.pieces]
    added_last, language = _last(name, settings, directory / SETTINGS_NAME)
    vocab = [[token, 0.0] for token in class_.first] + pieces[class_.replaced :]
    vocab += [[token, 0.0] for token in added_last]
    ids = {token: id_ for id_, (token, _) in enumerate(vocab)}
    special = _special(directory, class_) | {*added_last}
    around = [language if token == "" else token for token in class_.around]
    if class_.unknown not in ids:
        raise TokenizerError(path, f"lacks the token {class_.unknown!r}", fix=AMEND)
    used = {token: ids[token] for token in around if token != TEXT}
    data = {
        "added_tokens": [
            NamedToken(ROLE, "", token).added(id_, special=True)
            for token, id_ in ids.items()
            if token in special
        ],
        "normalizer": _normalizer(class_, model.normalizer_spec.precompiled_charsmap),
        "pre_tokenizer": METASPACE if class_.joins_spaces else BY_WORD,
        "decoder": METASPACE,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_part(token, "A") for token in around],
            "pair": [_part(t, "A") for t in around] + [_part(t, "B") for t in around],
            "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in used.items()},
        },
        "model": {"type": "Unigram", "unk_id": ids[class_.unknown], "vocab": vocab},
    }
    check_tokenizer(data, path)
    return with_named_tokens(data, directory)


def _check_first(pieces: Sequence[Any], name: str, path: Path) -> None:
    """Refuse a model in which text has a piece that the class ``name`` replaces."""
    if not all(piece.type in (piece.UNKNOWN, piece.CONTROL) for piece in pieces):
        raise TokenizerError(
            path,
            f"does not begin with the pieces in whose place {name} puts its own",
            expected="<unk>, <s>, </s>",
            found=", ".join(piece.piece for piece in pieces),
            fix="download it again",
        )


def reserved_ids(directory: Path, data: Mapping[str, Any]) -> frozenset[int]:
    """Ids of the pieces that are no part of ordinary text: bytes, control and user's symbols."""
    path = tokenizer_files(directory)[0]
    model = opened_model(read_file(path), path, "download it again")
    reserved = {p.piece for p in model.pieces if p.type not in (p.NORMAL, p.UNUSED)}
    return frozenset(id_ for id_, (t, _) in enumerate(data["model"]["vocab"]) if t in reserved)


def _class_of(directory: Path) -> str:
    settings, config = (optional_json(directory / n) for n in (SETTINGS_NAME, CONFIG_NAME))
    named = settings.get("tokenizer_class") or CLASS_OF_TYPE.get(str(config.get("model_type")))
    return str(named or "").removesuffix("Fast")


def _last(name: str, settings: Mapping[str, Any], where: Path) -> tuple[list[str], str]:
    """Return the tokens after the pieces, and the language that stands beside a text.

    Raises:
        TokenizerError: ``settings``, which are read from ``where``, name neither.
    """
    if name == "T5Tokenizer":
        number = settings.get("extra_ids", SENTINELS)
        if type(number) is not int or number >= MAX_SIZE:
            raise _wrong(f"{where}: extra_ids", "a number of tokens", number)
        return [f"<extra_id_{i}>" for i in range(number - 1, -1, -1)], ""
    codes = [code for codes in read_json(LANGUAGE_CODES).get(name, {}).values() for code in codes]
    language = settings.get("src_lang") or "en_XX"
    if codes and language not in codes:
        raise _wrong(f"{where}: src_lang", "a language of this tokenizer", language)
    return [*codes, MASK], language if codes else ""


def _wrong(where: str, expected: str, found: object) -> TokenizerError:
    return TokenizerError(where, "cannot be used", expected=expected, found=found, fix=AMEND)


def _special(directory: Path, class_: SentencePieceClass) -> set[str]:
    named = {str(t.key): t.text for t in all_named(directory) if t.how in (ROLE, OF_MODEL)}
    return {text for text in {**class_.roles, **named}.values() if text}


def _normalizer(class_: SentencePieceClass, charsmap: bytes) -> dict[str, Any] | None:
    if not class_.normalizes or not charsmap:
        return None
    own = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    if not class_.joins_spaces:
        return own
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    return {"type": "Sequence", "normalizers": [own, spaces]}


def _part(token: str, text: str) -> dict[str, Any]:
    if token == TEXT:
        return {"Sequence": {"id": text, "type_id": 0}}
    return {"SpecialToken": {"id": token, "type_id": 0}}
