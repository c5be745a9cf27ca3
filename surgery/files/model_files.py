"""The files of a model directory by name: weights, their index, the tokenizer."""

import os
import re
from pathlib import Path
from typing import Any

from surgery.errors import AMEND, CheckpointError
from surgery.files.strict_json import read_json_value

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
LEGACY_NAMES = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""A tokenizer without tokenizer.json is built from these; the first two are required."""

SENTENCEPIECE_NAMES = (
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spiece.model",
    "spm.model",
)
"""Names of the SentencePiece protobuf beside tokenizer.json."""

SETTINGS_NAME = "tokenizer_config.json"
CONFIG_NAME = "config.json"
GLINER_NAME = "gliner_config.json"
"""What GLiNER reads in place of config.json: its encoder's config is a part of it."""

MARIAN_NAMES = ("source.spm", "target.spm")
"""SentencePiece models of Marian's tokenizer, whose ids vocab.json gives."""

TARGET_NAME = "target_vocab.json"
"""Marian's vocabulary of the language that is written, where it is another one."""

M2M_NAME = "sentencepiece.bpe.model"
"""M2M-100's SentencePiece model, whose ids vocab.json gives."""

ALONE_NAMES = (M2M_NAME, "spiece.model")
"""SentencePiece models that may be the whole tokenizer: a piece's place gives its id."""

WORDPIECE_NAME = "vocab.txt"
"""WordPiece's tokens, one a line, in the order of their ids."""

DOCUMENTS = (
    CONFIG_NAME,
    GLINER_NAME,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "processor_config.json",
)
"""JSON files that loaders read and that may refer to tokens: rewritten, and compared."""

TOKEN_TABLES = ("vocab.json", "added_tokens.json")
"""JSON files of token → id."""

PROMPTS_NAME = "config_sentence_transformers.json"
MODULES_NAME = "modules.json"
"""Names the folders with what sentence-transformers runs after the model, such as its pooling."""

SENTENCE_NAMES = (
    MODULES_NAME,
    PROMPTS_NAME,
    *(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "xlm-roberta", "distilbert")),
)
"""JSON files of sentence-transformers; no token's id is in them."""

COPIED_JSON = ("configuration.json", "normalizer.json", "tekken.json", *SENTENCE_NAMES)
"""Other JSON files that loaders read; they are never parsed here."""

JSON_NAMES = (TOKENIZER_NAME, INDEX_NAME, *DOCUMENTS, *TOKEN_TABLES, *COPIED_JSON)
"""Every JSON file that belongs to a model. Any other may hold anything, and speaks of the source:
the state of its training, its scores, a pipeline around it."""

ADAPTER_NAME = "adapter_config.json"
"""Of an adapter beside the weights, which transformers would add to them."""

MODELOPT_NAME = "hf_quant_config.json"
"""What ModelOpt says of its quantized weights; newer versions say it in config.json, too."""

TEMPLATE_FOLDER = "additional_chat_templates"
TEMPLATE = re.compile(rf"{TEMPLATE_FOLDER}/\w[\w .-]*\.jinja")
"""Chat templates that a caller asks for by name, such as ``tool_use``; the file's name is its."""

MODULE_FILE = re.compile(r"(\w[\w.-]*/)+\w[\w.-]*\.(json|safetensors)")
"""Files of a module of sentence-transformers, such as ``1_Pooling/config.json``."""

MODULE_FOLDER = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
PICKLES = (".bin", ".pt", ".pth", ".pkl")

EMPTY_MODULE = "Normalize"
"""The type of module that has no files: its folder may be missing."""


def config_path(directory: Path) -> Path:
    """Return the config of the model in ``directory``; GLiNER reads its own, whatever is beside."""
    of_gliner = directory / GLINER_NAME
    return of_gliner if of_gliner.exists() else directory / CONFIG_NAME


def module_types(modules: Any, where: object) -> dict[str, str]:
    """Return folder → type of each module in ``modules``, the content of ``MODULES_NAME``.

    The folder of the model itself is "", and is left out.

    Raises:
        CheckpointError: it is no list of modules, or a path leads out of the model.
    """
    found = {}
    for index, module in enumerate(modules if isinstance(modules, list) else [modules]):
        fields = module if isinstance(module, dict) else {}
        path, kind = fields.get("path"), fields.get("type")
        if not isinstance(modules, list) or not isinstance(path, str) or not isinstance(kind, str):
            raise CheckpointError(
                f"{where}: module {index}",
                "has an unknown form",
                expected="a list of objects with a path and a type",
                found=repr(module)[:80],
                fix=AMEND,
            )
        if path and not MODULE_FOLDER.fullmatch(path):
            raise CheckpointError(
                f"{where}: module {index}: path",
                "is no folder within the model",
                found=repr(path)[:80],
                fix="do not use this checkpoint",
            )
        found[path] = kind
    return {path: kind for path, kind in found.items() if path}


def modules_of(directory: Path) -> dict[str, str]:
    """Return folder → type of the modules that ``MODULES_NAME`` makes part of a model.

    Raises:
        CheckpointError: as ``module_types``; or the file is no JSON.
    """
    path = directory / MODULES_NAME
    return module_types(read_json_value(path), path) if os.path.lexists(path) else {}


def module_files(directory: Path) -> list[str]:
    """Return the files in the folders of ``directory`` that are modules of the model.

    Raises:
        CheckpointError: a module is missing, is a link, or has its weights only as a pickle.
    """
    if leaves_model(directory / MODULES_NAME, directory):
        raise link_error(directory / MODULES_NAME)
    found: list[str] = []
    for name, kind in modules_of(directory).items():
        files = _files_of_module(directory, name)
        if not files and kind.rpartition(".")[2] != EMPTY_MODULE:
            raise CheckpointError(
                directory / name,
                f"is missing, or has no files, though {MODULES_NAME} names it",
                fix=f"download the model again, or remove the module from {MODULES_NAME}",
            )
        found += files
    return sorted(dict.fromkeys(found))


def _files_of_module(directory: Path, name: str) -> list[str]:
    found = []
    if leaves_model(directory / name, directory):
        raise link_error(directory / name)
    for folder, folders, files in os.walk(directory / name):
        linked = [Path(folder, each) for each in folders if Path(folder, each).is_symlink()]
        paths = [Path(folder, file) for file in sorted(files)]
        weighty = any(path.suffix == ".safetensors" for path in paths)
        for path in [*linked, *paths]:
            inner = path.relative_to(directory).as_posix()
            if path.suffix in PICKLES and not weighty:
                raise CheckpointError(
                    path,
                    "weights are pickled, and a pickle can run code",
                    expected=SINGLE_NAME,
                    fix="save the model again with sentence-transformers, which writes safetensors",
                )
            if path in linked or (MODULE_FILE.fullmatch(inner) and not path.is_file()):
                raise link_error(path)
            if MODULE_FILE.fullmatch(inner):
                if leaves_model(path, directory):
                    raise link_error(path)
                found.append(inner)
    return found


def leaves_model(path: Path, directory: Path) -> bool:
    """Whether a file is, or lies behind, a link out of the model in ``directory``.

    The hub's cache keeps a model's files in a folder of blobs beside its snapshots.
    """
    target, model = Path(os.path.realpath(path)), directory.resolve()
    blobs = model.parent.parent / "blobs"
    return not (
        target.is_relative_to(model)
        or (model.parent.name == "snapshots" and target.parent == blobs)
    )


def link_error(path: Path) -> CheckpointError:
    """A file or folder that the model needs is a link to something else."""
    return CheckpointError(
        path,
        "is no file of the model, but a link or a device",
        fix="copy what it leads to into the model's directory",
    )


def named_templates(directory: Path) -> list[str]:
    """Return the files in ``directory`` that hold chat templates with names, as ``TEMPLATE``."""
    found = sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))
    names = (f"{TEMPLATE_FOLDER}/{path.name}" for path in found if path.is_file())
    return [name for name in names if TEMPLATE.fullmatch(name)]


def weight_map_of(path: Path, index: dict[str, Any]) -> dict[str, str]:
    """Return the ``weight_map`` (tensor → shard) of the index of directory ``path``.

    Raises:
        CheckpointError: there is none, or it names a file outside the directory.
    """
    where = path / INDEX_NAME
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            where,
            "has no weight_map",
            expected="tensor name → file",
            fix="use the index that belongs to the shards",
        )
    for tensor, name in weight_map.items():
        # A plain name, so that the index cannot reach outside the directory.
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.\-]*\.safetensors", name):
            raise CheckpointError(
                f"{where}: tensor {tensor}",
                "index points outside the directory or at no safetensors file",
                expected="a plain file name",
                found=repr(name),
                fix="do not use this checkpoint",
            )
    return weight_map


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the files of the tokenizer: tokenizer.json, or what a loader makes one of.

    That is vocab.json and merges.txt, SentencePiece models and vocab.json, or such a model alone.
    """
    if (directory / TOKENIZER_NAME).exists():
        return [directory / TOKENIZER_NAME]
    found = [directory / name for name in LEGACY_NAMES if (directory / name).exists()]
    if [path.name for path in found[:2]] == list(LEGACY_NAMES[:2]):
        return found
    if (directory / TARGET_NAME).exists():
        return []
    mapped = (directory / LEGACY_NAMES[0]).exists()
    sets = [MARIAN_NAMES, (M2M_NAME,)] if mapped else [(name,) for name in ALONE_NAMES]
    for names in sets:
        models = [directory / name for name in names]
        if all(path.exists() for path in models):
            return [*models, *found]
    return []
