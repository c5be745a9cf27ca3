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


def weight_map_of(path: Path, index: dict[str, Any]) -> dict[str, str]:
    """Return the ``weight_map`` (tensor → shard) of the index of directory ``path``.

    Raises:
        CheckpointError: there is none, or it names a file outside the directory.
    """
    where = path / INDEX_NAME
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            where, "has no weight_map", expected="tensor name → file", fix="download it again"
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
