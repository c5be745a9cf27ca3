"""What tokenizer.json lacks and the files beside it say: tokens, or the whole tokenizer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from surgery.errors import AMEND, TokenizerError
from surgery.files.index_sets import MAX_SIZE
from surgery.files.model_files import (
    LEGACY_NAMES,
    SENTENCEPIECE_NAMES,
    TARGET_NAME,
    TOKENIZER_NAME,
    tokenizer_files,
)
from surgery.files.strict_json import read_file, read_json
from surgery.tokenizer.checks import check_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import PostProcessor


_, _, CONFIG_NAME, ADDED_NAME, SPECIAL_NAME = LEGACY_NAMES

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of tokenizer_config.json that name a special token, in the order of their ids."""

EXTRA, EXTRA_BEFORE_5 = "extra_special_tokens", "additional_special_tokens"
"""Keys that list more special tokens."""

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


NLLB = "NllbTokenizer"

SAVE = "save it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"


@dataclass(frozen=True)
class TokenizerClass:
    """How a class of transformers builds a tokenizer from the two files."""

    default_roles: tuple[str, ...]
    """Roles of <|endoftext|> where tokenizer_config.json says nothing about them."""
    split: str | None = None
    """Regex that splits NFC text before the byte level; None for the byte level's own."""
    plain_special: bool = False
    """Whether special tokens lose flags such as lstrip."""


def special_settings(directory: Path) -> tuple[dict[str, Any], list[Any]]:
    """Return tokenizer_config.json and the list of extra special tokens.

    Where transformers reads special_tokens_map.json, its entries replace those of the config.
    """
    settings = optional_json(directory / CONFIG_NAME)
    if not settings.get(EXTRA) and EXTRA_BEFORE_5 in settings:
        settings[EXTRA] = settings.pop(EXTRA_BEFORE_5)
    shared = {} if "added_tokens_decoder" in settings else optional_json(directory / SPECIAL_NAME)
    found = [part.get(key) for part in (settings, shared) for key in (EXTRA, EXTRA_BEFORE_5)]
    lists = [entry for entry in found if entry is not None and entry != {}]
    unknown = [
        key
        for key, value in {**settings, **shared}.items()
        if key.endswith("_token") and key not in ROLES and isinstance(value, str | dict)
    ]
    if unknown or any(entry != lists[0] or isinstance(entry, dict) for entry in lists):
        raise TokenizerError(
            directory / CONFIG_NAME,
            "names special tokens that transformers 4 and 5 treat differently",
            expected=f"{EXTRA} and {', '.join(ROLES)}",
            found=unknown[0] if unknown else " and ".join(map(str, lists)),
            fix=SAVE,
        )
    settings |= {key: _token(value) for key, value in shared.items() if key != EXTRA_BEFORE_5}
    return settings, lists[0] if lists else []


def add_tokens(
    tokenizer: "Tokenizer",
    directory: Path,
    class_: TokenizerClass,
    settings: Mapping[str, Any],
    extra: list[Any],
) -> dict[str, str]:
    """Add special and other added tokens; return role → special token."""
    from tokenizers import AddedToken

    where, declared = _declared(directory, settings)
    by_text = {token.content: token for _, token in declared}
    roles = _roles(class_, settings, by_text)
    special = [*roles.values(), *map(_token, extra)]
    tokens = [token for _, token in declared]
    for token in special:
        if str(token) not in by_text and token not in tokens:
            tokens.append(token)
    named = {str(token) for token in roles.values()}
    tokens = [AddedToken(t, special=True) if isinstance(t, str) else t for t in tokens]
    for token in tokens:
        token.special = token.special or token.content in named
    tokenizer.add_tokens(tokens)
    if class_.plain_special:
        tokenizer.add_tokens([AddedToken(str(token), special=True) for token in special])
    for id_, token in declared:
        if tokenizer.token_to_id(token.content) != id_:
            raise TokenizerError(
                f"{where}: token {token.content!r}",
                "has another id than transformers will give it",
                expected=tokenizer.token_to_id(token.content),
                found=id_,
                fix=SAVE,
            )
    return {role: str(token) for role, token in roles.items()}


def _declared(
    directory: Path, settings: Mapping[str, Any]
) -> tuple[Path, list[tuple[int, "AddedToken"]]]:
    """Return the file that gives added tokens their ids, and these tokens in the order of ids."""
    from tokenizers import AddedToken

    if "added_tokens_decoder" in settings:
        where, entries = directory / CONFIG_NAME, settings["added_tokens_decoder"].items()
        found = [(int(id_), _token(entry)) for id_, entry in entries]
    else:
        where = directory / ADDED_NAME
        names = [*(settings.get(role) for role in ROLES), *(settings.get(EXTRA) or [])]
        special = set(map(str, names))
        found = [
            (id_, AddedToken(text, normalized=text not in special, special=text in special))
            for text, id_ in optional_json(where).items()
        ]
    return where, sorted(found, key=lambda pair: pair[0])


def _roles(
    class_: TokenizerClass, settings: Mapping[str, Any], declared: Mapping[str, "AddedToken"]
) -> dict[str, Any]:
    """Role → special token, a string or an AddedToken, in the order of ``ROLES``."""
    default = dict.fromkeys(class_.default_roles, "<|endoftext|>")
    named = {role: _token({**default, **settings}.get(role)) for role in ROLES}
    return {
        role: declared.get(str(token), token) for role, token in named.items() if token is not None
    }


def post_processor(
    tokenizer: "Tokenizer", settings: Mapping[str, Any], roles: Mapping[str, str]
) -> "PostProcessor":
    """Return the post-processor: it adds bos and eos to a text where the settings ask for it."""
    from tokenizers.processors import TemplateProcessing

    bos, eos = (settings.get(f"add_{key}") and roles.get(key) for key in ("bos_token", "eos_token"))
    first = " ".join(f"{piece}:0" for piece in (bos, "$A", eos) if piece)
    second = " ".join(f"{piece}:1" for piece in (bos, "$B", eos) if piece)
    ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    return TemplateProcessing(single=first, pair=f"{first} {second}", special_tokens=ids)


def _token(entry: Any) -> Any:
    """A special token as transformers passes it on: a string or an AddedToken."""
    from tokenizers import AddedToken

    if not isinstance(entry, dict):
        return entry
    flags = {flag: entry[flag] for flag in FLAGS if flag in entry}
    return AddedToken(entry["content"], **flags)


def optional_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty where there is no such file."""
    return read_json(path) if path.exists() else {}


VOCAB_NAME, MERGES_NAME = LEGACY_NAMES[:2]

KNOWN_CLASSES = {
    "GPT2Tokenizer": TokenizerClass(("bos_token", "eos_token", "unk_token")),
    "Qwen2Tokenizer": TokenizerClass(
        ("eos_token", "unk_token", "pad_token"),
        split=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        plain_special=True,
    ),
}
"""tokenizer_class, without Fast → how it builds a tokenizer."""

CLASS_OF_TYPE = {"qwen2": "Qwen2Tokenizer"}
"""model_type → the class that transformers 5 takes, whatever tokenizer_config.json says."""


def is_legacy(directory: Path) -> bool:
    """Whether the tokenizer has to be built: vocab.json and merges.txt, no tokenizer.json."""
    return directory / MERGES_NAME in tokenizer_files(directory)


def build_tokenizer(directory: Path) -> dict[str, Any]:
    """Return the tokenizer.json that ``directory`` lacks.

    Raises:
        TokenizerError: vocab.json or merges.txt is absent, the files contradict each other, or
            their tokenizer_class is unknown.
        CheckpointError: one of the files is not a JSON object.
    """
    if not is_legacy(directory):
        _refuse_sentencepiece(directory)
        alone = [name for name in (VOCAB_NAME, MERGES_NAME) if (directory / name).exists()]
        raise TokenizerError(
            directory / TOKENIZER_NAME,
            "is missing",
            found=f"{alone[0]} alone" if alone else None,
            fix="save the tokenizer with transformers' AutoTokenizer, or keep the vocabulary whole",
        )
    vocab = read_json(directory / VOCAB_NAME)
    try:
        settings, extra = special_settings(directory)
        class_ = _known_class(directory, settings.get("tokenizer_class"))
        tokenizer = _byte_level_bpe(directory, vocab, class_, settings)
        roles = add_tokens(tokenizer, directory, class_, settings, extra)
        tokenizer.post_processor = post_processor(tokenizer, settings, roles)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a part has another form
        where = directory / CONFIG_NAME
        raise TokenizerError(where, "cannot be read", found=repr(error), fix=SAVE) from error
    data: dict[str, Any] = msgspec.json.decode(tokenizer.to_str())
    data["model"]["vocab"] = vocab  # the library keeps only one of two tokens with the same id
    check_tokenizer(data, directory / VOCAB_NAME)
    return data


def _refuse_sentencepiece(directory: Path) -> None:
    """Refuse a tokenizer of other SentencePiece models, or of two vocabularies.

    Raises:
        TokenizerError: there is such a model.
    """
    if (directory / TARGET_NAME).exists():
        raise TokenizerError(
            directory / TARGET_NAME,
            "gives the language that is written a vocabulary of its own, and one id means two "
            "tokens",
            fix="keep the vocabulary whole",
        )
    class_ = str(optional_json(directory / CONFIG_NAME).get("tokenizer_class"))
    if class_.startswith(NLLB):
        raise TokenizerError(
            directory / TOKENIZER_NAME,
            "is missing, and without it transformers 5 gives no ids to NLLB's languages",
            fix="take it from the hub, or save the tokenizer with transformers 4's "
            "NllbTokenizerFast",
        )
    found = [path.name for path in sorted(directory.glob("*.spm"))]
    found += [name for name in SENTENCEPIECE_NAMES if (directory / name).exists()]
    if found:
        raise TokenizerError(
            directory / TOKENIZER_NAME,
            f"is missing: the tokens are made by {' and '.join(found)}, which is pruned only "
            "together with it",
            fix="where transformers can make one, save it with AutoTokenizer; else keep the "
            "vocabulary whole",
        )


def _known_class(directory: Path, named: Any) -> TokenizerClass:
    name = str(named).removesuffix("Fast")
    model_type = str(optional_json(directory / "config.json").get("model_type"))
    expected = CLASS_OF_TYPE.get(model_type, name)
    if name not in KNOWN_CLASSES or name != expected:
        raise TokenizerError(
            f"{directory / CONFIG_NAME}: tokenizer_class",
            "is not one that a tokenizer.json can be built for",
            expected=expected if name in KNOWN_CLASSES else " or ".join(KNOWN_CLASSES),
            found=named or "none",
            fix=SAVE,
        )
    return KNOWN_CLASSES[name]


def _byte_level_bpe(
    directory: Path, vocab: dict[str, Any], class_: TokenizerClass, settings: Mapping[str, Any]
) -> "Tokenizer":
    """The tokenizer without its added tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # The library counts up to the largest id when it writes the tokenizer.
    if not all(type(id_) is int and 0 <= id_ < MAX_SIZE for id_ in vocab.values()):
        raise TokenizerError(directory / VOCAB_NAME, "has an id that is not a number", fix=AMEND)
    merges = _merges(directory / MERGES_NAME)
    no_affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **no_affixes))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            directory / MERGES_NAME, f"does not fit {VOCAB_NAME}", found=error, fix=AMEND
        ) from error
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space")), use_regex=class_.split is None
    )
    tokenizer.pre_tokenizer = byte_level
    if class_.split is not None:
        split = pre_tokenizers.Split(Regex(class_.split), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _merges(path: Path) -> list[tuple[str, str]]:
    """The rules of merges.txt. A line ends only at a newline: tokens may hold other line ends."""
    try:
        text = read_file(path).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            path, "is not UTF-8", found=error, fix="download the file again"
        ) from error
    merges = []
    for number, line in enumerate(text.split("\n") if text else (), 1):
        if line.startswith("#version"):
            continue
        parts = line.removesuffix("\r").split(" ")
        if len(parts) != 2:
            raise TokenizerError(
                f"{path}: line {number}",
                "is not a pair of tokens",
                found=repr(line[:80]),
                fix=AMEND,
            )
        merges.append((parts[0], parts[1]))
    return merges


DECLARED, ROLE, OF_MODEL, LISTED = range(4)
"""How a file names a token: with its id, by a known role, by another role, in a list."""


@dataclass(frozen=True)
class NamedToken:
    """A token that a file beside tokenizer.json names."""

    how: int
    """DECLARED, ROLE, OF_MODEL or LISTED: the order in which transformers 5 adds them."""
    key: object
    """The key that names it; its id, where that is declared."""
    entry: Any
    """Its text, or an object that describes it."""

    @property
    def text(self) -> str:
        """The token, or "" where the file names none."""
        text = self.entry.get("content") if isinstance(self.entry, dict) else self.entry
        return text if isinstance(text, str) else ""

    def added(self, id_: int, *, special: bool) -> dict[str, Any]:
        """The entry of tokenizer.json's added_tokens that transformers makes of it."""
        given = self.entry if isinstance(self.entry, dict) else {}
        special = special or bool(given.get("special", self.how != DECLARED))
        flags = dict.fromkeys(FLAGS, False) | {"normalized": not special}
        flags |= {flag: bool(given[flag]) for flag in FLAGS if flag in given}
        return {"id": id_, "content": self.text, **flags, "special": special}


def named_tokens(data: Mapping[str, Any], directory: Path) -> list[dict[str, Any]]:
    """Return entries of added_tokens for the tokens that only the files beside it name.

    transformers adds them as it loads the tokenizer, and gives each the id after the last.

    Args:
        data: A tokenizer.json that has been checked.
        directory: Where it lies.

    Raises:
        TokenizerError: a file gives one of them another id, or transformers 4 and 5 do.
    """
    vocab = data["model"]["vocab"]
    added = {entry["content"] for entry in data.get("added_tokens") or []} - {""}
    named = all_named(directory)
    candidates: dict[str, NamedToken] = {}
    for token in named:
        if token.text and token.text not in added:
            candidates.setdefault(token.text, token)
    if not candidates:
        return []
    pieces = vocab if isinstance(vocab, dict) else {piece[0] for piece in vocab}
    missing = [token for text, token in candidates.items() if text not in pieces]
    first = len(vocab) + sum(token not in pieces for token in added)
    in_both = {OF_MODEL, LISTED} <= {token.how for token in missing}
    for id_, token in enumerate(missing, first):
        if (token.how == DECLARED and token.key != id_) or (token.how == OF_MODEL and in_both):
            raise TokenizerError(
                f"{directory / CONFIG_NAME}: token {token.text!r}",
                "is not in tokenizer.json, and loaders give it different ids",
                expected=id_,
                found=token.key,
                fix=SAVE,
            )
    roles = {token.text for token in named if token.how in (ROLE, OF_MODEL)}
    return [t.added(id_, special=t.text in roles) for id_, t in enumerate(missing, first)]


def with_named_tokens(data: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return tokenizer.json with ``named_tokens``, as transformers loads it.

    Raises:
        TokenizerError: as ``named_tokens``.
    """
    missing = named_tokens(data, directory)
    return (
        {**data, "added_tokens": [*(data.get("added_tokens") or []), *missing]} if missing else data
    )


def all_named(directory: Path) -> list[NamedToken]:
    """Every token that a file beside tokenizer.json names; one may occur several times."""
    settings = optional_json(directory / CONFIG_NAME)
    declared, shared = settings.get("added_tokens_decoder"), dict[str, Any]()
    ids = {int(i): entry for i, entry in _items(declared) if re.fullmatch("[0-9]{1,15}", i)}
    if declared is None:
        shared = optional_json(directory / SPECIAL_NAME)
        table = optional_json(directory / ADDED_NAME)
        ids = {id_: text for text, id_ in table.items() if type(id_) is int}
    found = [NamedToken(DECLARED, id_, ids[id_]) for id_ in sorted(ids)]
    roles = {**settings, **shared}
    found += [NamedToken(ROLE, role, roles.get(role)) for role in ROLES]
    others = [(k, v) for k, v in roles.items() if k.endswith("_token") and k not in ROLES]
    lists = [part.get(key) for part in (settings, shared) for key in (EXTRA, EXTRA_BEFORE_5)]
    others += [pair for part in lists for pair in _items(part)]
    found += [NamedToken(OF_MODEL, key, entry) for key, entry in others]
    entries = [entry for part in lists if isinstance(part, list) for entry in part]
    return found + [NamedToken(LISTED, EXTRA, entry) for entry in entries]


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []
