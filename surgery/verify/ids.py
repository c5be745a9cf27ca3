"""Checks that every id in an output's JSON files belongs to the same token as in the source."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.apply.companions import config_changes, rewrite_document
from surgery.config.rewrite import remove_tokens, rewrite_config
from surgery.config.token_ids import JsonPath, id_paths
from surgery.errors import TokenizerError
from surgery.families.table import family_of
from surgery.files.model_files import DOCUMENTS, TOKEN_TABLES, TOKENIZER_NAME, config_path
from surgery.files.strict_json import read_json
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.tokenizer.checks import walk_processor
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.legacy import named_tokens, with_named_tokens
from surgery.tokenizer.tokenizer_file import tokenizer_data


@dataclass(frozen=True)
class Origin:
    """The source that a plan was applied to."""

    path: Path
    plan: Plan

    @cached_property
    def ids(self) -> IdMap:
        """Map from the source's ids to those of the output."""
        return self.plan.ids()

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """The source's tokenizer.json, or an empty object.

        Where the vocabulary was pruned, it has the tokens that only the files beside it name.
        """
        data = tokenizer_data(self.path)
        return data if self.ids.identity else with_named_tokens(data, self.path)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Token → id in the source."""
        return token_ids(self.tokenizer)

    @cached_property
    def removed(self) -> set[str]:
        """Tokens of the source that the output does not have."""
        return {token for token, old in self.tokens.items() if self.new(old) is None}

    def new(self, old: Any) -> int | None:
        """Return the output's id for ``old``; None where it is removed or is no id."""
        if type(old) is not int:
            return None
        return old if self.ids.identity else self.ids.new(old)

    def expected_ids(self, name: str) -> dict[JsonPath, int]:
        """Return JSON path → id that the output's file ``name`` must have, by the source's file."""
        path = self.path / name
        if not path.exists():
            return {}
        data = read_json(path)
        if path == config_path(self.path):
            family = family_of(data, path, self.plan.family)
            changes = config_changes(self.plan, family, family.text_config(data))
            data = rewrite_config(data, family, self.ids, changes, path)
        elif not self.ids.identity:
            data = rewrite_document(path, self.tokens, self.ids)
        return id_paths(data, name)


def id_faults(layout: Layout, origin: Origin | None) -> list[str]:
    """Return a line for each id that is out of range, or belongs to no token or to another one.

    Without ``origin``, ids that belong to another token are not found.
    """
    directory, rows = layout.checkpoint.path, layout.vocab_size
    data = tokenizer_data(directory)
    tokens = token_ids(data)
    copied = not tokens or (origin is not None and origin.ids.identity)
    owner = {id_: token for token, id_ in tokens.items()} or dict.fromkeys(range(rows), "")
    faults = _row_faults(data, tokens, rows) + _processor_faults(data, owner, origin)
    faults += [] if copied else _named_faults(directory, data, rows, origin)
    for path in (directory / name for name in TOKEN_TABLES):
        faults += _table_faults(path, tokens) if path.exists() and not copied else []
    for path in (directory / name for name in sorted(DOCUMENTS)):
        faults += _document_faults(path, owner, origin) if path.exists() else []
    return faults


def token_ids(data: dict[str, Any]) -> dict[str, int]:
    """Return token → id of a tokenizer.json, whose vocabulary is a table or a list of pieces.

    Raises:
        TokenizerError: the file has no vocabulary.
    """
    try:
        vocab = data["model"]["vocab"] if data else {}
        table = vocab if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        tokens = {**table, **added}
        if not all(isinstance(t, str) and type(id_) is int for t, id_ in tokens.items()):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise TokenizerError(
            TOKENIZER_NAME, "has no readable vocabulary", fix="apply the plan again"
        ) from error
    return tokens


def _row_faults(data: dict[str, Any], tokens: dict[str, int], rows: int) -> list[str]:
    """Return faults of ids beyond the rows; only added tokens may have ids right after the last."""
    added = {token["content"] for token in data.get("added_tokens") or []}
    limit = rows + sum(tokens[token] >= rows for token in added)
    return [
        f"{TOKENIZER_NAME}: {token!r}: expected an id below {rows}, found {id_}"
        for token, id_ in tokens.items()
        if not 0 <= id_ < (limit if token in added else rows)
    ]


def _named_faults(
    directory: Path, data: dict[str, Any], rows: int, origin: Origin | None
) -> list[str]:
    """Return faults of the tokens that a loader adds because other files name them.

    Tokens that were removed have faults of their own.
    """
    try:
        named = named_tokens(data, directory)
    except TokenizerError as error:
        return [str(error)]
    faults = []
    for token in named:
        text, id_ = token["content"], token["id"]
        if origin and text in origin.removed:
            continue
        expected = origin.new(origin.tokens.get(text)) if origin else id_
        if id_ >= rows or id_ != expected:
            wanted = f"an id below {rows}" if id_ >= rows else f"id {expected}"
            faults.append(f"{TOKENIZER_NAME} lacks {text!r}: expected {wanted}, found {id_}")
    return faults


def _processor_faults(
    data: dict[str, Any], owner: dict[int, str], origin: Origin | None
) -> list[str]:
    """Return faults of the ids that padding and the post-processor insert into every text."""
    found = _inserted_ids(data)
    if origin is None:
        return [
            f"{TOKENIZER_NAME}: {key}: expected ids of tokens, found {ids}"
            for key, ids in found.items()
            if any(id_ not in owner for id_ in ids)
        ]
    source = _inserted_ids(origin.tokenizer)
    expected = {key: [origin.new(old) for old in ids] for key, ids in source.items()}
    return [
        f"{TOKENIZER_NAME}: {key}: expected ids {expected[key]}, found {ids}"
        for key, ids in found.items()
        if ids != expected[key]
    ]


def _inserted_ids(data: dict[str, Any]) -> dict[str, list[Any]]:
    padding, found = data.get("padding"), list[Any]()
    walk_processor(data.get("post_processor"), found.append)
    pads = [padding.get("pad_id")] if isinstance(padding, dict) else []
    return {"post_processor": found, "padding.pad_id": pads}


def _table_faults(path: Path, tokens: dict[str, int]) -> list[str]:
    return [
        f"{path.name}: {token!r}: expected id {tokens.get(token, 'of no token')}, found {id_}"
        for token, id_ in read_json(path).items()
        if tokens.get(token) != id_
    ]


def _document_faults(path: Path, owner: dict[int, str], origin: Origin | None) -> list[str]:
    """Return faults of a file that refers to tokens; ``owner`` maps id → token."""
    data = read_json(path)
    try:
        found = id_paths(data, path.name)
        removed = origin.removed if origin else set[str]()
        kept = remove_tokens(data, removed.__contains__, path.name)
    except TokenizerError as error:
        return [str(error)]
    expected = origin.expected_ids(path.name) if origin else {}
    faults = [
        f"{_joined(key_path)}: expected id {id_}, found {found.get(key_path, 'none')}"
        for key_path, id_ in expected.items()
        if found.get(key_path) != id_
    ]
    faults += [
        f"{_joined(key_path)}: expected the id of a token, found {id_}"
        for key_path, id_ in found.items()
        if key_path not in expected and id_ not in owner
    ]
    faults += [
        f"{path.name}: {key}: names a removed token, which a loader would add again"
        for key in data
        if kept[key] != data[key]
    ]
    return faults + _decoder_faults(path.name, data.get("added_tokens_decoder"), owner)


def _decoder_faults(name: str, decoder: Any, owner: dict[int, str]) -> list[str]:
    """Return faults of entries of added_tokens_decoder whose text is not that of the token."""
    entries = decoder.items() if isinstance(decoder, dict) else ()
    faults = []
    for id_, token in entries:
        text = token.get("content") if isinstance(token, dict) else token
        expected = owner.get(int(id_), "")
        if expected and text != expected:
            faults.append(
                f"{name}: added_tokens_decoder: {id_}: expected {expected!r}, found {text!r}"
            )
    return faults


def _joined(key_path: JsonPath) -> str:
    return ": ".join(map(str, key_path))
