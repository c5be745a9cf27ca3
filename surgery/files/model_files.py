"""The files of a model directory by name: weights, their index, the tokenizer."""

import re
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError

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

WORDPIECE_NAME = "vocab.txt"
"""WordPiece's tokens, one a line, in the order of their ids."""

DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "processor_config.json",
)
"""JSON files that transformers reads and that may refer to tokens: rewritten, and compared."""

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

TEMPLATE_FOLDER = "additional_chat_templates"
TEMPLATE = re.compile(rf"{TEMPLATE_FOLDER}/\w[\w .-]*\.jinja")
"""Chat templates that a caller asks for by name, such as ``tool_use``; the file's name is its."""


MODULE_FILE = re.compile(r"[0-9]+_[A-Za-z]\w*/(config\.json|model\.safetensors)")
"""Files of a module of sentence-transformers, such as ``1_Pooling`` and ``2_Dense``."""


def module_files(directory: Path) -> list[str]:
    """Return the files in folders of ``directory`` that ``MODULES_NAME`` makes part of a model.

    Raises:
        CheckpointError: one of them has its weights only as a pickle.
    """
    if not (directory / MODULES_NAME).exists():
        return []
    for pickle in sorted(directory.glob("[0-9]*_*/pytorch_model.bin")):
        if not pickle.with_name(SINGLE_NAME).exists():
            raise CheckpointError(
                pickle,
                "weights are pickled, and a pickle can run code",
                expected=SINGLE_NAME,
                fix="save the model again with sentence-transformers, which writes safetensors",
            )
    found = sorted(path for path in directory.glob("[0-9]*_*/*") if path.is_file())
    names = (f"{path.parent.name}/{path.name}" for path in found)
    return [name for name in names if MODULE_FILE.fullmatch(name)]


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
    """The files of the tokenizer: tokenizer.json, or those of ``LEGACY_NAMES``."""
    if (directory / TOKENIZER_NAME).exists():
        return [directory / TOKENIZER_NAME]
    found = [directory / name for name in LEGACY_NAMES if (directory / name).exists()]
    return found if [path.name for path in found[:2]] == list(LEGACY_NAMES[:2]) else []
