"""A directory that stands for a model on the hub: all its files, but only the shards' headers."""

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

HUB_FOLDER = ".hub"
"""Folder in a skeleton for files that are not the model's: manifest, headers, locks."""
MANIFEST = "manifest.json"
LIBRARY = "compact-surgery"
"""Folder of all skeletons, in the assets folder of huggingface_hub's cache."""
WORKERS = 8
"""Requests at a time."""
GUESSED_BYTES = 1 << 14
"""The first read of a shard: the whole header if it has up to some hundred tensors."""


class Manifest(msgspec.Struct, frozen=True):
    """Size and digest of each shard, as the hub lists them."""

    repo: str
    commit: str
    shards: dict[str, tuple[int, str | None]]
    """Name → size in bytes, digest."""


@dataclass(frozen=True)
class Skeleton:
    """A complete skeleton; shards are in it only while they are used."""

    path: Path
    shards: dict[str, RemoteFile]

    @classmethod
    def at(cls, path: Path) -> "Skeleton | None":
        """Return the skeleton in directory ``path``, or None where its files are the model's own.

        A skeleton's shards are deleted after their use. So only a directory where ``build`` puts
        skeletons counts as one: a manifest anywhere else came with a checkpoint.

        Raises:
            CheckpointError: the manifest is damaged.
        """
        manifest_path = path / HUB_FOLDER / MANIFEST
        if not manifest_path.exists() or not _is_ours(path):
            return None
        try:
            manifest = msgspec.json.decode(read_file(manifest_path), type=Manifest)
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
        """Download ``files`` and the headers of ``shards`` into directory ``path``.

        Files that an interrupted call has downloaded are kept.

        Raises:
            CheckpointError: the hub refuses one, or a header is damaged.
        """
        (path / HUB_FOLDER).mkdir(parents=True, exist_ok=True)
        with FileLock(path / HUB_FOLDER / "lock"):
            download_small(path, files)
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(lambda shard: _fetch_header(path, shard), shards))
            facts = {shard.name: (shard.size, shard.digest) for shard in shards}
            manifest = Manifest(shards[0].repo, shards[0].commit, facts)
            write_atomic(path / HUB_FOLDER / MANIFEST, msgspec.json.encode(manifest))
        return cls(path, {shard.name: shard for shard in shards})


def download_small(path: Path, files: Sequence[RemoteFile]) -> None:
    """Download those of ``files`` that are not in ``path`` yet.

    Raises:
        CheckpointError: one is larger than ``MAX_BYTES``.
    """
    for file in files:
        if file.size > MAX_BYTES:
            raise CheckpointError(
                file.where,
                "is too large for a file beside the weights",
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
    """Read the header of ``shard`` by ranges, check it and write it to the skeleton."""
    header_path = _header_path(path, shard.name)
    if header_path.exists():
        return
    start = shard.read(0, min(shard.size, GUESSED_BYTES))
    stop = 8 + header_length(path / shard.name, start[:8], shard.size)
    raw = (start + (shard.read(len(start), stop) if stop > len(start) else b""))[:stop]
    parse_header(path / shard.name, raw[8:], shard.size)
    sparse = header_path.with_name(header_path.name + ".sparse")
    try:
        with open(sparse, "wb") as file:  # only the header takes disk space
            file.write(raw)
            file.truncate(shard.size)
        check_reference(sparse)
    finally:
        sparse.unlink(missing_ok=True)
    write_atomic(header_path, raw[8:])


def _is_ours(path: Path) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_ASSETS_CACHE) / LIBRARY).resolve() in path.resolve().parents


def _header_path(path: Path, name: str) -> Path:
    return path / HUB_FOLDER / f"{name}.header"


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        path, "is a damaged copy of a model on the hub", found=error, fix="delete it and run again"
    )
