"""A checkpoint directory as its headers and JSON files describe it, validated once."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.checkpoint.quantization import Fp8, Opaque, opaque_of, quantization_of
from surgery.errors import SAVE_WITH_GLINER, CheckpointError, did_you_mean
from surgery.families.schema import GLINER
from surgery.files.model_files import (
    GLINER_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    config_path,
    tokenizer_files,
    weight_map_of,
)
from surgery.files.safetensors_header import Header, TensorRef, read_header
from surgery.files.shard_file import ShardFile
from surgery.files.strict_json import file_pieces, read_file, read_json
from surgery.hub.skeleton import Skeleton

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")

SAMPLES, SAMPLED_BYTES = 8, 1 << 12
"""Pieces of a shard that tell it from another of the same shapes: all training moves them."""


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model directory. Holds headers and config.json; never a weight."""

    path: Path
    config: dict[str, Any]
    shards: dict[str, Header]
    """File name → header, in the order of the files' first mention in the index."""
    index: dict[str, Any] | None
    """model.safetensors.index.json, or None for a single file."""
    family: str | None = None
    """The model type that it is treated as; None is config.json's own."""
    quantization: Fp8 | None = None
    """How FP8 weights are scaled; None where none is quantized."""
    origin: str | None = None
    """Finds the checkpoint again where its path does not: a hub id ``org/name@commit``."""
    opaque: Opaque | None = None
    """How weights are stored that are only moved whole; None where there are none."""

    @classmethod
    def open(
        cls, path: Path, family: str | None = None, *, origin: str | None = None
    ) -> "Checkpoint":
        """Read the headers and config.json of directory ``path``, to be treated as ``family``.

        Args:
            path: The directory.
            family: Model type that it is treated as; None is config.json's own.
            origin: As the field.

        Raises:
            CheckpointError: a file is missing, damaged or pickled, or the weights are quantized,
                but not in FP8 with block scales.
        """
        if not path.is_dir():
            raise CheckpointError(
                path,
                "is not a directory",
                fix=f"{did_you_mean(path)}name a model's directory",
            )
        where = config_path(path)
        if not where.exists():
            raise CheckpointError(
                path,
                "is no Hugging Face checkpoint, for it has no config.json",
                found="GGUF, which is not read" if any(path.glob("*.gguf")) else None,
                fix="name the directory that has config.json and the weights",
            )
        config = read_json(where)
        family = GLINER if where.name == GLINER_NAME else family
        opaque = opaque_of(config)
        quantization = None if opaque else quantization_of(config, where)
        remote = Skeleton.at(path)
        if _has_shard(path, SINGLE_NAME, remote):
            single = {SINGLE_NAME: _header(path, SINGLE_NAME, remote)}
            return cls(path, config, single, None, family, quantization, origin, opaque)
        if not (path / INDEX_NAME).exists():
            _refuse_missing_weights(path, family)
        index = read_json(path / INDEX_NAME)
        weight_map = weight_map_of(path, index)
        for tensor, name in weight_map.items():
            if not _has_shard(path, name, remote):
                raise CheckpointError(
                    f"{path / INDEX_NAME}: tensor {tensor}",
                    "shard is missing",
                    expected=path / name,
                    fix="download the missing shard",
                )
        names = dict.fromkeys(weight_map.values())
        shards = {name: _header(path, name, remote) for name in names}
        _check_index(path, weight_map, shards)
        return cls(path, config, shards, index, family, quantization, origin, opaque)

    @property
    def config_path(self) -> Path:
        """The file of ``config``: config.json, or GLiNER's own."""
        return config_path(self.path)

    @property
    def source(self) -> str:
        """The name that finds the checkpoint again: its hub id, or its absolute path."""
        return self.origin or str(self.path.resolve())

    @property
    def notes(self) -> list[str]:
        """What the user should know of its files, one sentence each."""
        notes = []
        if self.index is None and (self.path / INDEX_NAME).exists():
            notes.append(
                f"{SINGLE_NAME} is read; {INDEX_NAME} beside it names a second set of weights, "
                "which is left out"
            )
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        if self.quantization is not None and self.quantization.dtype not in dtypes:
            notes.append(
                f"config.json has a quantization_config, but no tensor is {self.quantization.dtype}"
                "; where the model fails to load for it, remove that key"
            )
        return notes

    @cached_property
    def tensors(self) -> dict[str, TensorRef]:
        """Every tensor by name, shard by shard in the order of their bytes."""
        return {tensor.name: tensor for shard in self.shards.values() for tensor in shard.tensors}

    def opaque_weight(self, codes: str) -> str:
        """Return the name that an opaque weight has once it is decoded, for that of its codes."""
        return self.opaque.base_of(codes) + self.opaque.weight if self.opaque else codes

    def scales_of(self, weight: TensorRef) -> TensorRef | None:
        """The scales of an FP8 weight; None for every other tensor."""
        if self.quantization is None or weight.dtype != self.quantization.dtype:
            return None
        return self.tensors.get(self.quantization.scales_of(weight.name))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json, tokenizer and headers; plans and statistics record it."""
        digest = hashlib.sha256(read_file(self.config_path))
        for path in tokenizer_files(self.path):
            for piece in file_pieces(path):
                digest.update(piece)
        for name, shard in sorted(self.shards.items()):
            digest.update(name.encode())
            digest.update(shard.raw)
        return digest.hexdigest()

    @cached_property
    def weights(self) -> str:
        """Digest of some of the weights, as ``<kind>:<SHA-256>``; plans and statistics record it.

        It tells two checkpoints of the same shapes apart. On the disk it is over ``SAMPLES`` pieces
        of each shard. Of a model on the hub, whose shards are not here, it is over the hub's
        digests. Only digests of the same kind can be compared.

        Raises:
            CheckpointError: a shard cannot be read.
        """
        digest, remote = hashlib.sha256(), Skeleton.at(self.path)
        for name, shard in sorted(self.shards.items()):
            if remote is not None:
                digest.update(str(remote.shards[name].digest).encode())
            else:
                for piece in _sampled(self.path / name, shard.tensors):
                    digest.update(piece)
        return f"{'sample' if remote is None else 'hub'}:{digest.hexdigest()}"

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON file ``name`` beside the weights, or an empty object if absent."""
        return read_json(self.path / name) if (self.path / name).exists() else {}


def _refuse_missing_weights(path: Path, family: str | None) -> None:
    pickles = [name for name in PICKLES if (path / name).exists()]
    if pickles:
        raise CheckpointError(
            path / pickles[0],
            "weights are pickled, and a pickle can run code",
            expected="safetensors",
            fix=SAVE_WITH_GLINER
            if family == GLINER
            else "convert them once with transformers: AutoModelForCausalLM.from_pretrained(dir)"
            ".save_pretrained(new_dir)",
        )
    raise CheckpointError(
        path,
        "has no weights",
        expected=f"{SINGLE_NAME} or {INDEX_NAME}",
        fix="name a directory that has them",
    )


def same_weights(first: str | None, second: str | None) -> bool | None:
    """Whether two ``Checkpoint.weights`` are equal; None where they cannot be compared."""
    kinds = [value.partition(":")[0] for value in (first, second) if value is not None]
    return first == second if len(kinds) == 2 and kinds[0] == kinds[1] else None


def _sampled(path: Path, tensors: Sequence[TensorRef]) -> Iterator[memoryview]:
    """Yield pieces at the same distance from each other, of all bytes of the tensors."""
    if not tensors:
        return
    start, end = tensors[0].start, tensors[-1].start + tensors[-1].nbytes
    with ShardFile(path) as file:
        for offset in range(start, end, max(-(-(end - start) // SAMPLES), SAMPLED_BYTES)):
            yield from file.windows(offset, min(SAMPLED_BYTES, end - offset), SAMPLED_BYTES)


def _has_shard(path: Path, name: str, remote: Skeleton | None) -> bool:
    """Whether the model has the shard, on the disk or on the hub."""
    return name in remote.shards if remote is not None else (path / name).exists()


def _header(path: Path, name: str, remote: Skeleton | None) -> Header:
    return remote.header(name) if remote is not None else read_header(path / name)


def _check_index(path: Path, weight_map: dict[str, str], shards: dict[str, Header]) -> None:
    """Check that every tensor is in the one shard that the index names."""
    found: dict[str, str] = {}
    for name, shard in shards.items():
        for tensor in (ref.name for ref in shard.tensors):
            if weight_map.get(tensor) != name:
                raise CheckpointError(
                    f"{path / name}: tensor {tensor}",
                    "index and shard disagree",
                    expected=f"index entry {name}",
                    found=weight_map.get(tensor, "no entry"),
                    fix="download the index and the shard again",
                )
            found[tensor] = name
    for tensor, name in weight_map.items():
        if tensor not in found:
            raise CheckpointError(
                f"{path / name}: tensor {tensor}",
                "is in the index but not in the shard",
                fix="download the index and the shard again",
            )
