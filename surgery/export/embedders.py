"""Encoders that embed text, in GGUF: how they pool, and their tokenizers, WordPiece and Unigram."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import AMEND, CheckpointError, TokenizerError
from surgery.files.model_files import (
    EMPTY_MODULE,
    MODULES_NAME,
    PROMPTS_NAME,
    SENTENCE_NAMES,
    modules_of,
)
from surgery.files.strict_json import read_json
from surgery.layout.layout import Layout
from surgery.tokenizer.tokenizer_file import TokenizerFile

POOLING = {"mean": 1, "cls": 2, "lasttoken": 3}
"""How sentence-transformers makes one vector of many → its number in GGUF."""

SEGMENTS = "embeddings.token_type_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
PAD_OF_ROBERTA = 1
"""What the config classes of RoBERTa's kin take where config.json names no padding token."""

LOWERCASE = "normalizer.lowercase"
"""Key below ``tokenizer.ggml.``: of WordPiece alone."""

SERVE = "serve it with sentence-transformers"


def encoder_values(layout: Layout) -> dict[str, Any]:
    """Return the keys of an encoder, but for its sizes: positions, and how its output is pooled.

    Raises:
        CheckpointError: sentence-transformers makes of the output what llama.cpp does not.
    """
    positions = layout.by_name[POSITIONS].shape[0] - first_position(layout)
    values: dict[str, Any] = {"context_length": positions, "attention.causal": False}
    pooling = read_pooling(layout.checkpoint.path)
    return values if pooling is None else {**values, "pooling_type": POOLING[pooling]}


def first_position(layout: Layout) -> int:
    """Return the row of the table of positions that a text's first token has."""
    if not layout.family.positions_after_pad:
        return 0
    pad = layout.config.get("pad_token_id")
    return 1 + (PAD_OF_ROBERTA if pad is None else int(pad))


def segments(layout: Layout) -> int:
    """Return the rows of the table of segments; 1 where there is none."""
    return layout.by_name[SEGMENTS].shape[0] if SEGMENTS in layout.by_name else 1


def encoder_notes(layout: Layout) -> list[str]:
    """Return what the user of an encoder should know, one sentence each."""
    notes = ["poolers and heads of tasks are left out: the file gives embeddings"]
    if read_pooling(layout.checkpoint.path) is None:
        notes.append(f"no {MODULES_NAME} says how to pool: name mean or cls to llama.cpp")
    return notes


def text_note(layout: Layout, *, lowercased: bool) -> list[str]:
    """Return, as one note, what sentence-transformers does to a text and the file does not hold.

    ``lowercased`` says whether the file holds that text is lowercased.
    """
    directory, path = layout.checkpoint.path, layout.checkpoint.path / PROMPTS_NAME
    prompts = read_json(path).get("prompts") if path.exists() else None
    prompts = prompts if isinstance(prompts, dict) else {}
    named = sorted(name for name, text in prompts.items() if text)
    settings, positions = _text_settings(directory), layout.by_name[POSITIONS].shape[0]
    most = settings.get("max_seq_length")
    found = [f"puts prompts before texts ({', '.join(named)})"] if named else []
    if settings.get("do_lower_case") and not lowercased:
        found.append("lowercases texts")
    if type(most) is int and 0 < most < positions - first_position(layout):
        found.append(f"cuts texts after {most:,} tokens")
    what = f"{', '.join(found[:-1])} and {found[-1]}" if found[1:] else "".join(found)
    return [f"sentence-transformers {what}; the file does not"] if found else []


def _text_settings(directory: Path) -> dict[str, Any]:
    """Return what sentence-transformers says of texts: the first of its files that is there."""
    paths = (directory / name for name in SENTENCE_NAMES if name.startswith("sentence_"))
    found = next((path for path in paths if path.exists()), None)
    return read_json(found) if found is not None else {}


def read_pooling(directory: Path) -> str | None:
    """Return how sentence-transformers pools, one of ``POOLING``; None where nothing says it.

    Raises:
        CheckpointError: it pools otherwise, or runs another module after the model.
    """
    found = None
    for folder, kind in modules_of(directory).items():
        name = kind.rpartition(".")[2]
        if name == "Pooling" and found is None:
            found = _mode(directory / folder / "config.json")
        elif name != EMPTY_MODULE:
            raise _cannot(directory / MODULES_NAME, f"Pooling and {EMPTY_MODULE}", kind)
    return found


def _mode(path: Path) -> str:
    config = read_json(path)
    modes = {key.removeprefix("pooling_mode_") for key, on in config.items() if on is True}
    modes = {mode.removesuffix("_tokens").removesuffix("_token") for mode in modes} - {
        "include_prompt"
    }
    if isinstance(config.get("pooling_mode"), str):
        modes = {config["pooling_mode"]}
    if len(modes) != 1 or not modes <= POOLING.keys():
        raise _cannot(path, f"one of {', '.join(POOLING)}", ", ".join(sorted(modes)))
    return modes.pop()


def _cannot(where: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        where,
        "llama.cpp does not do this to the output of the model",
        expected=expected,
        found=found,
        fix=SERVE,
    )


def phantom_spaces(texts: np.ndarray, normal: np.ndarray, path: Path) -> None:
    """Rewrite WordPiece's tokens as llama.cpp has them: ``▁`` begins a word, ``##`` nothing.

    Args:
        texts: Objects by id: str; changed in place.
        normal: Ids of the tokens that are neither special nor added.
        path: Of the tokenizer.

    Raises:
        TokenizerError: two tokens become one.
    """
    for id_ in normal.tolist():
        token = texts[id_]
        texts[id_] = token[2:] if token.startswith("##") else f"\u2581{token}"
    seen: dict[str, int] = {}
    for id_, text in enumerate(texts.tolist()):
        if text and seen.setdefault(text, id_) != id_:
            raise TokenizerError(
                path,
                "two tokens are one in llama.cpp",
                found=f"ids {seen[text]} and {id_}, {text!r}",
                fix=SERVE,
            )


def wordpiece_settings(
    data: Mapping[str, Any], settings: Mapping[str, Any], path: Path
) -> dict[str, bool]:
    """Return how WordPiece's text is normalized, by the tokenizer or before it.

    Raises:
        TokenizerError: otherwise than BERT's, which is all that llama.cpp knows; or ``settings``
            say that no tokens are put around a text.
    """
    if not (settings["add_bos_token"] and settings["add_eos_token"]):
        raise _unknown_form(path, "a token before each text, and one after it", "none")
    parts = {key: data.get(key) or {} for key in ("normalizer", "pre_tokenizer")}
    found = {key: part.get("type") for key, part in parts.items()}
    normalizer = parts["normalizer"]
    plain = all(normalizer.get(key, True) for key in ("clean_text", "handle_chinese_chars"))
    expected = {"normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer"}
    if found != expected or not plain:
        raise _unknown_form(path, "BERT's, which cleans text and splits Chinese", normalizer)
    lower = bool(normalizer.get("lowercase", True))
    accents = normalizer.get("strip_accents")
    strip = lower if accents is None else bool(accents)
    before = bool(_text_settings(path.parent).get("do_lower_case"))
    return {LOWERCASE: lower or before, "normalizer.strip_accents": strip}


def unigram_settings(parts: list[dict[str, Any]], path: Path) -> tuple[dict[str, bool], bytes]:
    """Return how spaces are treated, and SentencePiece's table of characters, empty without one.

    ``parts`` are those of the normalizer and the pre-tokenizer.

    Raises:
        TokenizerError: the text is normalized otherwise than by such a table.
    """
    table, merged = b"", False
    for part in parts:
        kind, pattern = part.get("type"), (part.get("pattern") or {})
        if kind == "Precompiled" and not table:
            try:
                table = base64.b64decode(part.get("precompiled_charsmap") or "", validate=True)
            except (binascii.Error, TypeError, ValueError) as error:
                raise TokenizerError(path, "is damaged", found=error, fix=AMEND) from error
        elif kind == "WhitespaceSplit" or (kind == "Replace" and pattern == {"Regex": " {2,}"}):
            merged = True
        elif kind not in ("Metaspace", "Strip"):
            raise _unknown_form(path, "Precompiled, spaces replaced, Metaspace", part)
    return {"remove_extra_whitespaces": merged}, table


def _unknown_form(path: Path, expected: str, found: Any) -> TokenizerError:
    return TokenizerError(
        path,
        "llama.cpp prepares text otherwise than this tokenizer",
        expected=expected,
        found=found,
        fix=SERVE,
    )


def unigram_scores(tokenizer: TokenizerFile, rows: int, least: float) -> np.ndarray:
    """Return float32 by id: the pieces' log probabilities; ``least`` for rows without a piece."""
    scores = np.full(rows, least, np.float32)
    given = tokenizer.scores
    assert given is not None
    scores[: min(rows, len(given))] = given[:rows]
    return scores
