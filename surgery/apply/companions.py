"""The files beside the weights: copied, rewritten through the id map, or left out."""

import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.config.rewrite import (
    CODE,
    check_patterns,
    dequantized_config,
    remove_tokens,
    rename_modules,
    rewrite_config,
    untied_config,
)
from surgery.config.token_ids import visit_ids
from surgery.errors import SAVE_WITH_GLINER, CheckpointError, TokenizerError
from surgery.families.schema import EXPERT_KEYS, GLINER, Family, renumbered
from surgery.families.table import family_of
from surgery.files.model_files import (
    CONFIG_NAME,
    DOCUMENTS,
    GLINER_NAME,
    INDEX_NAME,
    JSON_NAMES,
    MARIAN_NAMES,
    SENTENCEPIECE_NAMES,
    SETTINGS_NAME,
    TEMPLATE_FOLDER,
    TOKEN_TABLES,
    TOKENIZER_NAME,
    WORDPIECE_NAME,
    leaves_model,
    link_error,
    module_files,
    modules_of,
    named_templates,
)
from surgery.files.safetensors_header import read_header
from surgery.files.strict_json import (
    PIECE_BYTES,
    dump_json,
    dump_table,
    open_regular,
    read_file,
    read_json,
    table_pieces,
)
from surgery.planning.layers import layer_keys
from surgery.planning.plan import Plan
from surgery.tokenizer.id_map import IdMap, KeptTokens
from surgery.tokenizer.legacy import is_legacy
from surgery.tokenizer.mapped import MappedModel
from surgery.tokenizer.marian import mapped_files
from surgery.tokenizer.sentencepiece_model import is_sentencepiece, prune_sentencepiece
from surgery.tokenizer.tokenizer_file import TokenizerFile

CARRIED = re.compile(
    r".+\.jinja|.+\.spm|merges\.txt|(LICENSE|NOTICE|USE_POLICY|COPYRIGHT).*",
    re.IGNORECASE,
)
"""Files that an output may have besides ``JSON_NAMES``; all others are left out
(``files_left_out``)."""

PLAIN = (*SENTENCEPIECE_NAMES, *MARIAN_NAMES, WORDPIECE_NAME)
"""Vocabulary files that are no JSON."""

SHADOWING = ("tekken.json", *SENTENCEPIECE_NAMES)
"""Vocabulary files that other loaders prefer silently; none may stay stale beside a pruned one."""

EXPERT_OF = re.compile(r"\.experts\.([0-9]+)(?:\.|$)")

LAYER_OF = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.([0-9]+)(?:\.|$)")

Content = bytes | Iterator[bytes]
"""Content of a file, whole or in pieces."""

OWN = (CONFIG_NAME, GLINER_NAME, INDEX_NAME, "README.md", "compact_surgery.json")
"""Files that apply writes itself."""


def files_left_out(checkpoint: Checkpoint, ids: IdMap) -> list[str]:
    """Return the names in the directory of ``checkpoint`` that the output will not have.

    Its shards are not named: what they hold is in the output's.
    """
    directory = checkpoint.path
    own = {*OWN} - {CONFIG_NAME, GLINER_NAME} | {checkpoint.config_path.name}
    included = {*own, *checkpoint.shards, *_carried(directory, ids), *module_files(directory)}
    folders = {
        directory,
        directory / TEMPLATE_FOLDER,
        *map(directory.joinpath, modules_of(directory)),
    }
    folders |= {directory / folder for name in included for folder in Path(name).parents}
    found = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    paths = [path for path in found if path not in folders]
    names = {path.relative_to(directory).as_posix(): path for path in sorted(paths)}
    return [
        name
        for name, path in names.items()
        if name not in included and not path.name.startswith(".")
    ]


def companion_files(plan: Plan, checkpoint: Checkpoint) -> dict[str, Content]:
    """Return name → content of every file beside the weights except those in ``OWN``.

    tokenizer.json may be large, so it is made piece by piece as it is written.

    Raises:
        TokenizerError: a removed id is needed, or two files contradict each other.
    """
    directory, ids = checkpoint.path, plan.ids()
    names = _carried(directory, ids)
    files: dict[str, Content] = {
        name: _pieces(directory / name) for name in _checked_modules(directory, ids)
    }
    if ids.identity:
        return files | {name: _copy(directory / name) for name in names}
    source = TokenizerFile.reopen(directory)
    tokens = ChainMap(source.added, source.vocab)
    names.sort(key=SENTENCEPIECE_NAMES.__contains__)  # last: it takes much memory
    files |= {
        name: _rewrite(directory / name, tokens, ids)
        for name in names
        if name not in FROM_TOKENIZER
    }
    pruned = source.rewrite(ids)
    return files | {name: FROM_TOKENIZER[name](pruned) for name in names if name in FROM_TOKENIZER}


def check_companions(plan: Plan, checkpoint: Checkpoint, source: TokenizerFile | None) -> None:
    """Refuse during planning what ``companion_files`` would refuse later.

    Args:
        plan: The plan.
        checkpoint: The plan's source.
        source: Its tokenizer; None where the whole vocabulary is kept.

    Raises:
        TokenizerError: as ``companion_files``.
    """
    directory, ids = checkpoint.path, plan.ids()
    pruned_config(plan, checkpoint)
    if checkpoint.family == GLINER and not (directory / SETTINGS_NAME).exists():
        raise TokenizerError(
            directory / SETTINGS_NAME,
            "is missing, and without it GLiNER reads the tokenizer of another model",
            expected="the tokenizer of this one",
            found=checkpoint.config.get("model_name"),
            fix=SAVE_WITH_GLINER,
        )
    _checked_modules(directory, ids)
    names = _carried(directory, ids)
    if ids.identity or source is None:
        return
    for path in (directory / name for name in names):
        if path.name in (*DOCUMENTS, *TOKEN_TABLES, *PLAIN):
            _rewrite(path, source.token_ids, ids)


def rewrite_document(path: Path, tokens: Mapping[str, int], ids: IdMap) -> dict[str, Any]:
    """Return a JSON file of the source with new ids of ``tokens``, and without pointers to code.

    Raises:
        TokenizerError: a removed id or token is needed.
    """

    def is_removed(token: str) -> bool:
        return token in tokens and ids.new(tokens[token]) is None

    data = visit_ids(remove_tokens(read_json(path), is_removed, path), ids.new, path)
    if path.name == "tokenizer_config.json" and type(data.get("vocab_size")) is int:
        sizes = {ids.old_size: ids.new_size, len(tokens): len(KeptTokens(tokens, ids))}
        data["vocab_size"] = sizes.get(data["vocab_size"], data["vocab_size"])
    return {key: value for key, value in data.items() if key not in CODE}


def pruned_config(plan: Plan, checkpoint: Checkpoint) -> bytes:
    """Return config.json of the output; the source's own bytes when nothing changes."""
    path = checkpoint.config_path
    family = family_of(checkpoint.config, path, checkpoint.family)
    changes = config_changes(plan, family, family.text_config(checkpoint.config))
    config = rewrite_config(checkpoint.config, family, plan.ids(), changes, path)
    if plan.after.experts != plan.before.experts:  # copies beside the language model's section
        copies = [key for key in EXPERT_KEYS if config.get(key) == plan.before.experts]
        config |= dict.fromkeys(copies, plan.after.experts)
    if plan.layers:
        config = relayered_config(config, family, plan, path)
    if plan.layers or plan.kept_experts:
        if not plan.dequantize:
            check_patterns(family.text_config(config).get("quantization_config"), path)
            check_patterns(config.get("quantization_config"), path)
        config = rename_modules(config, partial(_renumbered, plan))
    if plan.dequantize:
        config = dequantized_config(config, family)
    if plan.untie:
        config = untied_config(config, family)
    return read_file(path) if config == checkpoint.config else dump_json(config)


def config_changes(plan: Plan, family: Family, text: Mapping[str, Any]) -> dict[str, int]:
    """Return key of config.json → new number: changed widths, the number of experts under each of
    its names, and 0 layers that predict ahead."""
    changes = {k: n for k, n in plan.after.widths.items() if n != plan.before.widths.get(k)}
    changes |= {family.rounds: False} if changes and family.rounds else {}
    if plan.after.experts != plan.before.experts and family.experts is not None:
        names = [key for key in EXPERT_KEYS if key in text] or [family.experts.key]
        changes |= dict.fromkeys(names, plan.after.experts)
    drafts = plan.dropped and family.draft_layers
    return changes | ({family.draft_layers: 0} if drafts else {})


def relayered_config(
    config: dict[str, Any], family: Family, plan: Plan, where: object
) -> dict[str, Any]:
    """Return config.json with the new number of layers and their entries; its key order is kept."""
    text = dict(family.text_config(config))
    text |= layer_keys(text, family, plan.layers, plan.before.num_hidden_layers, where)
    return {**config, family.section: text} if family.section else text


def _renumbered(plan: Plan, name: str) -> str | None:
    """Return a module's name in the output; None where its layer or its expert is removed."""
    layer, expert = LAYER_OF.search(name), EXPERT_OF.search(name)
    if layer is None:
        return name
    groups = plan.layers or [[n] for n in range(plan.before.num_hidden_layers)]
    numbers = [number for number, group in enumerate(groups) if group[0] == int(layer[1])]
    if not numbers:
        return None
    if expert is None or not plan.kept_experts:
        return renumbered(name, *numbers)
    kept = plan.experts(numbers[0]).tolist()
    old = int(expert[1])
    return renumbered(name, *numbers, kept.index(old)) if old in kept else None


def _carried(directory: Path, ids: IdMap) -> list[str]:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    names += named_templates(directory)
    if not ids.identity and is_legacy(directory):
        names.append(TOKENIZER_NAME)  # a pruned vocabulary always has one
    return [
        name
        for name in names
        if (name in (*JSON_NAMES, *PLAIN) or CARRIED.fullmatch(name))
        and name not in OWN
        and not name.endswith(".safetensors")
        and _may_be_carried(directory / name, directory)
        and (ids.identity or not _shadows(name) or _can_be_pruned(directory / name))
    ]


def _may_be_carried(path: Path, directory: Path) -> bool:
    """Whether a file belongs to the model; one behind a link out of it would be published unread.

    Raises:
        CheckpointError: it does not, and the model needs it.
    """
    if not leaves_model(path, directory):
        return True
    if path.name in (TOKENIZER_NAME, *DOCUMENTS, *TOKEN_TABLES):
        raise link_error(path)
    return False


TOKEN_MODULES = ("SparseStaticEmbedding", "WordWeights", "WordEmbeddings", "BoW")
"""Modules of sentence-transformers that hold a number or a row for each token."""


def _checked_modules(directory: Path, ids: IdMap) -> list[str]:
    """Return the files of the modules, which are copied as they are.

    Raises:
        CheckpointError: one is damaged, or holds something for each token and tokens are removed.
    """
    names, kinds = module_files(directory), modules_of(directory)
    for name in names:
        path, weighty = directory / name, name.endswith(".safetensors")
        shapes = [tensor.shape for tensor in read_header(path).tensors] if weighty else []
        kind = next(kind for folder, kind in kinds.items() if name.startswith(f"{folder}/"))
        by_token = any(each in f"{kind} {name}" for each in TOKEN_MODULES)
        if not ids.identity and (by_token or any(ids.old_size in shape for shape in shapes)):
            raise CheckpointError(
                path,
                "holds values by the token's id, and tokens are removed",
                fix="keep the vocabulary whole, or remove the module",
            )
    return names


def _shadows(name: str) -> bool:
    """Whether loaders prefer the file silently, so that it must not stay stale."""
    return name in SHADOWING or name.endswith(".spm")


def _can_be_pruned(path: Path) -> bool:
    """Whether ``path`` is a SentencePiece model; other kinds of file have the same name."""
    if path.name in MARIAN_NAMES:
        return path in mapped_files(path.parent)
    return path.name in SENTENCEPIECE_NAMES and is_sentencepiece(read_file(path))


def _copy(path: Path) -> bytes:
    """Return the file unchanged, except that a pointer to code is removed."""
    raw = read_file(path)
    if path.name not in DOCUMENTS or not any(key.encode() in raw for key in CODE):
        return raw
    return dump_json({key: value for key, value in read_json(path).items() if key not in CODE})


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, which may be weights, in pieces."""
    with open_regular(path) as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _merge_lines(tokenizer: dict[str, Any]) -> Iterator[bytes]:
    yield b"#version: 0.2\n"
    for merge in tokenizer["model"]["merges"]:
        yield f"{merge if isinstance(merge, str) else ' '.join(merge)}\n".encode()


FROM_TOKENIZER: dict[str, Callable[[dict[str, Any]], Iterator[bytes]]] = {
    TOKENIZER_NAME: table_pieces,
    "merges.txt": _merge_lines,
}
"""File → how it is made of the pruned tokenizer.json."""


def _rewrite(path: Path, tokens: Mapping[str, int], ids: IdMap) -> bytes:
    if path.name in TOKEN_TABLES:
        return dump_table(_rewrite_table(path, tokens, ids))
    if path in mapped_files(path.parent):
        return MappedModel.of(read_file(path), path).pruned(tokens, ids)
    if path.name in SENTENCEPIECE_NAMES:
        return prune_sentencepiece(read_file(path), path, tokens, ids)
    if path.name == WORDPIECE_NAME:
        return _rewrite_lines(path, tokens, ids)
    if path.name in DOCUMENTS:
        return dump_json(rewrite_document(path, tokens, ids))
    return read_file(path)


def _rewrite_lines(path: Path, tokens: Mapping[str, int], ids: IdMap) -> bytes:
    """Keep the lines of vocab.txt whose tokens are kept; each must stand at its token's id."""
    lines = read_file(path).decode("utf-8", "replace").removesuffix("\n").split("\n")
    for old, line in enumerate(lines):
        if tokens.get(line.removesuffix("\r")) != old:
            raise _contradicts(path, line.removesuffix("\r"), old, tokens)
    kept = (f"{line}\n" for old, line in enumerate(lines) if ids.new(old) is not None)
    return "".join(kept).encode()


def _contradicts(
    path: Path, token: str, found: object, tokens: Mapping[str, int]
) -> TokenizerError:
    return TokenizerError(
        f"{path}: token {token!r}",
        "has another id than in tokenizer.json",
        expected=tokens.get(token),
        found=found,
        fix="save the tokenizer again with transformers' AutoTokenizer",
    )


def _rewrite_table(path: Path, tokens: Mapping[str, int], ids: IdMap) -> dict[str, int]:
    """Map the ids in a file of token → id, which must agree with tokenizer.json."""
    table = read_json(path)
    for token, old in table.items():
        if tokens.get(token) != old:
            raise _contradicts(path, token, old, tokens)
    return {token: new for token, old in table.items() if (new := ids.new(old)) is not None}
