"""What a page needs to tokenize text as the source's tokenizer does: tables, and steps before."""

import gzip
import json
import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.tokenizer.kinds import BYTE_LEVEL, WORDPIECE
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.vocabulary.scripts import SCRIPTS

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the pre-tokenizer ``ByteLevel`` splits by, unless ``use_regex`` is off."""

BEHAVIORS = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext")

FORMS = ("NFC", "NFD", "NFKC", "NFKD")

_SURROGATE = re.compile("[\ud800-\udfff]")

LEVEL = 6
"""Of gzip. Level 9 takes five times as long for 1 % less."""

Step = dict[str, Any]
"""One step of the page's tokenizer; its single key says which."""


class _UnknownStep(Exception):
    """A step that the page does not know; its name."""


@dataclass(frozen=True, eq=False)
class Spelling:
    """How the page tokenizes text, or why it does not."""

    settings: dict[str, Any]
    """The type of model, the steps before it, and the added tokens. ``cannot`` names what the page
    lacks; where it is empty, the page tokenizes as the library does."""
    tables: dict[str, str]
    """Name → packed table: the tokens by id, and the merges by rank."""

    @property
    def able(self) -> bool:
        """Whether the page tokenizes text."""
        return not self.settings["cannot"]


def packed(data: bytes) -> str:
    """Return ``data`` compressed and as text; equal data give equal text."""
    return b64encode(gzip.compress(data, LEVEL, mtime=0)).decode()


def packed_numbers(numbers: np.ndarray, dtype: str = "<i4") -> str:
    """Return numbers packed as ``dtype``; those of ``<i4`` as differences, which take less."""
    if dtype == "<i4":
        numbers = np.diff(np.asarray(numbers, dtype=np.int64), prepend=0)
    return packed(np.ascontiguousarray(numbers.astype(dtype)).tobytes())


def packed_json(value: Any) -> str:
    """Return ``value`` as packed JSON, whatever texts it holds."""
    return packed(_json(value).encode())


def script_json(value: Any) -> str:
    """Return JSON that may stand in a script element, whatever texts it holds.

    What could end the element is written as numbers, and so are lone surrogates.
    """
    text = _json(value)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def spelling_of(tokenizer: TokenizerFile, rows: int) -> Spelling:
    """Return the tables and steps of a tokenizer whose embedding has ``rows`` rows."""
    model, cannot = tokenizer.data["model"], list[str]()
    before = _steps("normalizer", tokenizer, _normalizer, cannot)
    splits = _steps("pre_tokenizer", tokenizer, _pre_tokenizer, cannot)
    added = [each for each in tokenizer.data.get("added_tokens") or [] if each["content"]]
    if any(each.get("single_word") for each in added):
        cannot.append("added tokens that are whole words")
    if model["type"] != "BPE":
        cannot.append(f"the model {model['type']}")
    settings = {
        "cannot": cannot,
        "bytes": tokenizer.kind is BYTE_LEVEL,
        "wordpiece": tokenizer.kind is WORDPIECE,
        "byte_fallback": bool(model.get("byte_fallback")),
        "ignore_merges": tokenizer.ignore_merges,
        "fuse_unk": bool(model.get("fuse_unk")),
        "unknown": tokenizer.token_ids.get(model.get("unk_token") or ""),
        "normalizer": before,
        "pre_tokenizer": splits,
        "added": [each["id"] for each in added],
        "lstrip": [each["id"] for each in added if each.get("lstrip")],
        "rstrip": [each["id"] for each in added if each.get("rstrip")],
    }
    names = [""] * (1 + max(rows - 1, *tokenizer.token_ids.values()))
    for token, id_ in tokenizer.token_ids.items():
        names[id_] = token
    tables = {"tokens": packed_json(names)}
    if model["type"] == "BPE":
        units = np.array([len(name.encode("utf-16-le", "surrogatepass")) // 2 for name in names])
        tables["products"] = packed_numbers(tokenizer.merges[:, 2])
        tables["lefts"] = packed_numbers(units[tokenizer.merges[:, 0]], "<u2")
    return Spelling(settings, tables)


def _steps(
    name: str, tokenizer: TokenizerFile, convert: Callable[[Any], list[Step]], cannot: list[str]
) -> list[Step]:
    """Return the steps of a part of tokenizer.json; add what the page lacks to ``cannot``."""
    part = tokenizer.data.get(name)
    try:
        return convert(part) if part else []
    except _UnknownStep as error:
        cannot.append(f"the {name} {error}")
        return []


def _normalizer(part: dict[str, Any]) -> list[Step]:
    type_ = part.get("type")
    if type_ == "Sequence":
        return [step for each in part["normalizers"] for step in _normalizer(each)]
    if type_ == "Replace":
        return [{"replace": [_pattern(part["pattern"]), part["content"]]}]
    if type_ == "Prepend":
        return [{"prepend": part["prepend"]}]
    if type_ in FORMS:
        return [{"form": type_}]
    if type_ == "Lowercase":
        return [{"lowercase": True}]
    raise _UnknownStep(type_)


def _pre_tokenizer(part: dict[str, Any]) -> list[Step]:
    type_ = part.get("type")
    if type_ == "Sequence":
        return [step for each in part["pretokenizers"] for step in _pre_tokenizer(each)]
    if type_ == "ByteLevel":
        steps: list[Step] = [{"prefix": " "}] if part.get("add_prefix_space", True) else []
        if part.get("use_regex", True):
            steps.append({"split": [javascript_regex(GPT2), "Isolated", False]})
        return [*steps, {"bytes": True}]
    if type_ == "Split" and part["behavior"] in BEHAVIORS:
        return [{"split": [_pattern(part["pattern"]), part["behavior"], bool(part.get("invert"))]}]
    if type_ == "Digits":
        single = r"\p{N}" if part.get("individual_digits") else r"\p{N}+"
        return [{"split": [single, "Isolated", False]}]
    if type_ == "Metaspace" and part.get("prepend_scheme", "always") in ("always", "never"):
        mark = part.get("replacement", "\u2581")
        steps = [{"mark": mark}]
        steps += [{"prefix": mark}] * (part.get("prepend_scheme", "always") == "always")
        if part.get("split", True):
            steps.append({"split": [_escaped(mark), "MergedWithNext", False]})
        return steps
    raise _UnknownStep(type_)


def _pattern(pattern: dict[str, str]) -> str:
    if "String" in pattern:
        return _escaped(pattern["String"])
    return javascript_regex(pattern["Regex"])


def _escaped(text: str) -> str:
    return re.sub(r"[\\^$.*+?()[\]{}|/]", r"\\\g<0>", text)


_PARTS = r"\\p\{(?P<property>\w+)\}|\\(?P<escape>.)"
_OUTSIDE = re.compile(
    r"\(\?i:(?P<folded>[^()\\[\]]*)\)|"
    + _PARTS
    + r"|(?P<refused>[?*+}]\+|\(\?(?![:!=])|\[\^?\[|[.$^])|(?P<class>\[\^?)|(?P<rest>.)",
    re.DOTALL,
)
_INSIDE = re.compile(_PARTS + r"|(?P<refused>\[|&&)|(?P<end>\])|(?P<rest>.)", re.DOTALL)
_SPACES = {"s": r"\p{White_Space}", "S": r"\P{White_Space}", "d": r"\p{Nd}"}
_PLAIN = frozenset("rntfv/-[]\\{}()*+?.^$|")
_FOLDED = {"s": "sSſ", "k": "kK\u212a"}


def javascript_regex(pattern: str) -> str:
    r"""Return a pattern of the tokenizers library as JavaScript (flag u) reads it.

    ``\s`` is Unicode's White_Space, and ``(?i:…)`` names both cases of each letter.

    Raises:
        _UnknownStep: it has something else that JavaScript reads otherwise.
    """
    found, read, position = [], _OUTSIDE, 0
    while match := read.match(pattern, position):
        position, text, kind = match.end(), match[0], match.lastgroup
        if kind == "class":
            read = _INSIDE
        elif kind == "end":
            read = _OUTSIDE
        elif kind == "folded":
            text = "(?:" + "".join(map(_both_cases, match["folded"])) + ")"
        elif kind == "property" and match["property"] in SCRIPTS:
            text = f"\\p{{Script={match['property']}}}"
        elif kind == "escape":
            text = _escape(match["escape"])
        if kind == "refused" or not text:
            raise _UnknownStep(f"Split by {pattern}")
        found.append(text)
    return "".join(found)


def _escape(char: str) -> str:
    """Return what a backslash and ``char`` mean, for JavaScript; empty where it is unknown."""
    if char in _SPACES:
        return _SPACES[char]
    if char in _PLAIN:
        return f"\\{char}"
    return "" if char.isalnum() else char


def _both_cases(char: str) -> str:
    if not (char.isascii() and char.isalpha()):
        return char
    return f"[{_FOLDED.get(char.lower(), char.lower() + char.upper())}]"
