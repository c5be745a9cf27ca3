"""A directory that stands for a model on the hub: all its files, of the shards only the headers."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from surgery.errors import CheckpointError
from surgery.files.atomic import FileLock, write_atomic
from surgery.files.safetensors_header import Header, check_reference, header_length, parse_header
from surgery.files.strict_json import MAX_BYTES, read_file
from surgery.hub.remote_file import RemoteFile

OWN = ".hub"
"""Folder of what the model itself does not have."""
MANIFEST = "manifest.json"
LIBRARY = "compact-surgery"
"""Folder of all skeletons among the assets of huggingface_hub's cache."""
WORKERS = 8
"""Requests at a time."""
GUESSED_BYTES = 1 << 14
"""Read of a shard at first: the whole header, where it has some hundred tensors."""


class Manifest(msgspec.Struct, frozen=True):
    """What the hub said of the shards."""

    repo: str
    commit: str
    shards: dict[str, tuple[int, str | None]]
    """Name → bytes, digest."""


@dataclass(frozen=True)
class Skeleton:
    """A complete one; shards are in it only while they are used."""

    path: Path
    shards: dict[str, RemoteFile]

    @classmethod
    def at(cls, path: Path) -> "Skeleton | None":
        """Return the skeleton in directory ``path``, or None where its files are the model's own.

        One is only where ``build`` puts them: shards of a skeleton are deleted when they are used,
        and a manifest in any other place came with a checkpoint.

        Raises:
            CheckpointError: damaged.
        """
        place = path / OWN / MANIFEST
        if not place.exists() or not _is_ours(path):
            return None
        try:
            manifest = msgspec.json.decode(read_file(place), type=Manifest)
        except (OSError, msgspec.MsgspecError) as error:
            raise _damaged(path, error) from error
        shards = {
            name: RemoteFile(manifest.repo, manifest.commit, name, size, digest)
            for name, (size, digest) in manifest.shards.items()
        }
        return cls(path, shards)

    def raw_header(self, name: str) -> bytes:
        """The JSON at the start of shard ``name``."""
        try:
            return _header_path(self.path, name).read_bytes()
        except OSError as error:
            raise _damaged(self.path, error) from error

    def header(self, name: str) -> Header:
        """The validated header of shard ``name``.

        Raises:
            CheckpointError: as ``read_header``.
        """
        return parse_header(self.path / name, self.raw_header(name), self.shards[name].size)

    @classmethod
    def build(
        cls, path: Path, files: Sequence[RemoteFile], shards: Sequence[RemoteFile]
    ) -> "Skeleton":
        """Fill directory ``path`` with ``files`` and the headers of ``shards``; resumes itself.

        Raises:
            CheckpointError: the hub does not give them out, or a header is damaged.
        """
        (path / OWN).mkdir(parents=True, exist_ok=True)
        with FileLock(path / OWN / "lock"):
            download_small(path, files)
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(lambda shard: _fetch_header(path, shard), shards))
            facts = {shard.name: (shard.size, shard.digest) for shard in shards}
            manifest = Manifest(shards[0].repo, shards[0].commit, facts)
            write_atomic(path / OWN / MANIFEST, msgspec.json.encode(manifest))
        return cls(path, {shard.name: shard for shard in shards})


def download_small(path: Path, files: Sequence[RemoteFile]) -> None:
    """Download those of ``files`` that are not in ``path`` yet.

    Raises:
        CheckpointError: one is larger than any file that is read whole.
    """
    for file in files:
        if file.size > MAX_BYTES:
            raise CheckpointError(
                file.where,
                "is larger than a file beside the weights can be",
                expected=f"at most {MAX_BYTES:,} bytes",
                found=f"{file.size:,}",
                fix="download the model without it and name that directory",
            )
    missing = [file for file in files if not (path / file.name).exists()]
    for file in missing:
        (path / file.name).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda file: file.download(path / file.name), missing))


def _fetch_header(path: Path, shard: RemoteFile) -> None:
    """Keep the header of ``shard``, read by ranges and checked."""
    place = _header_path(path, shard.name)
    if place.exists():
        return
    start = shard.read(0, min(shard.size, GUESSED_BYTES))
    stop = 8 + header_length(path / shard.name, start[:8], shard.size)
    raw = (start + (shard.read(len(start), stop) if stop > len(start) else b""))[:stop]
    parse_header(path / shard.name, raw[8:], shard.size)
    stand_in = place.with_name(place.name + ".sparse")
    try:
        with open(stand_in, "wb") as file:  # takes up the disk space of the header alone
            file.write(raw)
            file.truncate(shard.size)
        check_reference(stand_in)
    finally:
        stand_in.unlink(missing_ok=True)
    write_atomic(place, raw[8:])


def _is_ours(path: Path) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_ASSETS_CACHE) / LIBRARY).resolve() in path.resolve().parents


def _header_path(path: Path, name: str) -> Path:
    return path / OWN / f"{name}.header"


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        path, "is a damaged copy of a model on the hub", found=error, fix="delete it and run again"
    )
