"""Tokenizers of Marian and M2M-100: SentencePiece models, and vocab.json, which gives ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import AMEND, TokenizerError
from surgery.files.model_files import M2M_NAME, MARIAN_NAMES, tokenizer_files
from surgery.files.strict_json import read_json
from surgery.tokenizer.checks import check_numbers, check_tokenizer
from surgery.tokenizer.legacy import (
    CONFIG_NAME,
    ROLE,
    SAVE,
    VOCAB_NAME,
    NamedToken,
    all_named,
    optional_json,
    with_named_tokens,
)
from surgery.tokenizer.mapped import CODE, MappedModel, MappedModels

LANGUAGE_CODES = Path(__file__).with_name("language_codes.json")
"""Codes of languages that classes of transformers add to a vocabulary, in the order of ids."""

ROLES = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
"""Roles of special tokens, and the tokens that have them where no file says otherwise."""

M2M_CLASS = "M2M100Tokenizer"


def mapped_files(directory: Path) -> list[Path]:
    """Return the models of a tokenizer whose ids vocab.json gives: Marian's two, M2M-100's one.

    There are none where the directory has another tokenizer.
    """
    files = tokenizer_files(directory)
    for names in (MARIAN_NAMES, (M2M_NAME,)):
        models = [directory / name for name in names]
        if directory / VOCAB_NAME in files and {*models} <= {*files}:
            return models
    return []


def mapped_data(directory: Path) -> dict[str, Any]:
    """Return what tokenizer.json would say of the tokens: their ids, their scores, special ones.

    A token's score is that of the model in which it is likelier. No loader could tokenize with it:
    the models split text.

    Raises:
        TokenizerError: a file is damaged, vocab.json has no token for unknown text, or its ids are
            not 0, 1, 2 and so on.
    """
    where = directory / VOCAB_NAME
    vocab = read_json(where)
    tokens = _in_order(vocab, where)
    named = all_named(directory)
    roles = ROLES | {str(t.key): t.text for t in named if t.how == ROLE and t.text}
    for role in ("unk_token", "eos_token"):
        if roles[role] not in vocab:
            raise TokenizerError(where, f"lacks the {role}", expected=roles[role], fix=AMEND)
    paths = mapped_files(directory)
    models = MappedModels.open(paths).models
    codes = _codes(directory) if paths[0].name == M2M_NAME else []
    special = {t.text for t in named} | set(roles.values()) | set(filter(CODE.fullmatch, vocab))
    around = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": roles["eos_token"]}}]
    used = {roles["eos_token"]: vocab[roles["eos_token"]]}
    if codes:
        language = f"__{optional_json(directory / CONFIG_NAME).get('src_lang') or 'en'}__"
        if language not in codes:
            raise TokenizerError(
                f"{directory / CONFIG_NAME}: src_lang", "is no language of this tokenizer",
                found=language.strip("_"), fix=AMEND,
            )  # fmt: skip
        around = [{"SpecialToken": {"id": language}}, *around]
        used[language] = len(vocab) + codes.index(language)
    added = [
        NamedToken(ROLE, "", token).added(id_, special=True)
        for id_, token in enumerate(tokens)
        if token in special
    ]
    added += [
        NamedToken(ROLE, "", code).added(id_, special=True) | {"special": code in special}
        for id_, code in enumerate(codes, len(vocab))
    ]
    data = {
        "added_tokens": added,
        "pre_tokenizer": {"type": "Metaspace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": around,
            "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in used.items()},
        },
        "model": _model(models, tokens, roles["unk_token"]),
    }
    check_tokenizer(data, where)
    return with_named_tokens(data, directory)


def _in_order(vocab: Mapping[str, Any], where: Path) -> list[str]:
    """Return the tokens by id.

    Raises:
        TokenizerError: an id is missing, or there are two of one.
    """
    check_numbers(vocab, where)
    tokens = sorted(vocab, key=vocab.__getitem__)
    gap = next((i for i, token in enumerate(tokens) if vocab[token] != i), None)
    if gap is not None:
        raise TokenizerError(
            where, "has ids that are not 0, 1, 2 and so on", expected=gap, found=vocab[tokens[gap]],
            fix=SAVE,
        )  # fmt: skip
    return tokens


def _codes(directory: Path) -> list[str]:
    """Return the tokens of languages that M2M100Tokenizer adds after those of vocab.json.

    Raises:
        TokenizerError: another class reads these files, or its list of languages is unknown.
    """
    settings = optional_json(directory / CONFIG_NAME)
    class_ = settings.get("tokenizer_class") or M2M_CLASS
    if class_ != M2M_CLASS:
        raise TokenizerError(
            f"{directory / CONFIG_NAME}: tokenizer_class",
            f"is not one whose {M2M_NAME} and {VOCAB_NAME} can be pruned",
            expected=M2M_CLASS,
            found=class_,
            fix="keep the vocabulary whole",
        )
    lists: dict[str, list[str]] = read_json(LANGUAGE_CODES)[M2M_CLASS]
    name = settings.get("language_codes", "m2m100")
    if not isinstance(name, str) or name not in lists:
        raise TokenizerError(
            f"{directory / CONFIG_NAME}: language_codes",
            "is no list of languages that transformers has",
            expected=" or ".join(lists),
            found=name,
            fix=AMEND,
        )
    return [f"__{code}__" for code in lists[name]]


def _model(models: Sequence[MappedModel], tokens: Sequence[str], unknown: str) -> dict[str, Any]:
    """Return the entry ``model``: a BPE, if the one model is one; else Unigram."""
    ids = {token: id_ for id_, token in enumerate(tokens)}
    scores: dict[str, float] = {}
    for model in models:
        for piece in model.pieces:
            scores[piece.piece] = max(piece.score, scores.get(piece.piece, piece.score))
    if models[0].is_bpe and len(models) == 1:
        made = sorted(models[0].parents, key=lambda piece: -scores[piece])
        pairs = [models[0].parents[piece] for piece in made if piece in ids]
        merges = [list(pair) for pair in pairs if ids.keys() >= {*pair}]
        return {"type": "BPE", "unk_token": unknown, "vocab": ids, "merges": merges}
    least = min(scores.values(), default=0.0) - 1.0  # of tokens that no text has
    return {
        "type": "Unigram",
        "unk_id": ids[unknown],
        "vocab": [[token, scores.get(token, least)] for token in tokens],
    }
