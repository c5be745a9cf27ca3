"""Added and special tokens of a checkpoint without tokenizer.json, as transformers 5 adds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import TokenizerError
from surgery.jsonfile import read_json
from surgery.model_files import LEGACY_NAMES

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import PostProcessor

_, _, CONFIG_NAME, ADDED_NAME, SPECIAL_NAME = LEGACY_NAMES

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of tokenizer_config.json that name a special token, in the order of their ids."""

EXTRA, EXTRA_BEFORE_5 = "extra_special_tokens", "additional_special_tokens"
"""Keys that list more special tokens."""

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


SAVE = "save it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"


@dataclass(frozen=True)
class Recipe:
    """How a class of transformers makes a tokenizer of the two files."""

    default_roles: tuple[str, ...]
    """Roles of <|endoftext|> where tokenizer_config.json says nothing about them."""
    split: str | None = None
    """Regex that cuts NFC text before the byte level; None for the byte level's own."""
    plain_special: bool = False
    """Whether special tokens lose flags such as lstrip."""


def special_settings(directory: Path) -> tuple[dict[str, Any], list[Any]]:
    """tokenizer_config.json, under special_tokens_map.json where that is read; extra tokens."""
    settings = optional_json(directory / CONFIG_NAME)
    if not settings.get(EXTRA) and EXTRA_BEFORE_5 in settings:
        settings[EXTRA] = settings.pop(EXTRA_BEFORE_5)
    shared = {} if "added_tokens_decoder" in settings else optional_json(directory / SPECIAL_NAME)
    found = [part.get(key) for part in (settings, shared) for key in (EXTRA, EXTRA_BEFORE_5)]
    lists = [entry for entry in found if entry is not None and entry != {}]
    own = [
        key
        for key, value in {**settings, **shared}.items()
        if key.endswith("_token") and key not in ROLES and isinstance(value, str | dict)
    ]
    if own or any(entry != lists[0] or isinstance(entry, dict) for entry in lists):
        raise TokenizerError(
            directory / CONFIG_NAME,
            "names special tokens that transformers 4 and 5 treat differently",
            expected=f"{EXTRA} and {', '.join(ROLES)}",
            found=own[0] if own else " and ".join(map(str, lists)),
            fix=SAVE,
        )
    settings |= {key: _token(value) for key, value in shared.items() if key != EXTRA_BEFORE_5}
    return settings, lists[0] if lists else []


def add_tokens(
    tokenizer: "Tokenizer",
    directory: Path,
    recipe: Recipe,
    settings: Mapping[str, Any],
    extra: list[Any],
) -> dict[str, str]:
    """Add special and other added tokens; return role → special token."""
    from tokenizers import AddedToken

    where, declared = _declared(directory, settings)
    by_text = {token.content: token for _, token in declared}
    roles = _roles(recipe, settings, by_text)
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
    if recipe.plain_special:
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
    """The file that gives added tokens their ids, and these tokens by id."""
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
    recipe: Recipe, settings: Mapping[str, Any], declared: Mapping[str, "AddedToken"]
) -> dict[str, Any]:
    """Role → special token, a string or an AddedToken, in the order of ``ROLES``."""
    default = dict.fromkeys(recipe.default_roles, "<|endoftext|>")
    named = {role: _token({**default, **settings}.get(role)) for role in ROLES}
    return {
        role: declared.get(str(token), token) for role, token in named.items() if token is not None
    }


def post_processor(
    tokenizer: "Tokenizer", settings: Mapping[str, Any], roles: Mapping[str, str]
) -> "PostProcessor":
    """What puts bos and eos around a text, or nothing."""
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
