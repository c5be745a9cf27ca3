"""SHA-256 of source shards: find the known digests, and compare."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Lock

from surgery.errors import CheckpointError
from surgery.files.shard_file import ShardFile
from surgery.files.strict_json import read_file

SUMS_NAME = "SHA256SUMS"
SHA256 = re.compile(r"[0-9a-f]{64}")
DOWNLOAD_AGAIN = "download it again, then run again with `resume`"

WINDOW_BYTES = 1 << 20
"""Bytes that are read at a time, at most."""

HUB_METADATA = ".cache/huggingface/download"
"""Where huggingface_hub notes the digests of files that it downloaded to a directory."""


class Checksums:
    """Compares each shard with its known SHA-256 once, whichever threads need it first."""

    def __init__(self, directory: Path, digests: Mapping[str, str]) -> None:
        """Take the shards of ``directory`` and their ``digests``; others are not compared."""
        self._directory, self._digests = directory, digests
        self._locks: defaultdict[str, Lock] = defaultdict(Lock)
        self._found: dict[str, CheckpointError | None] = {}

    def check(self, names: Collection[str]) -> None:
        """Return when every one of the shards ``names`` has been read and compared.

        Raises:
            CheckpointError: as ``check_digest``.
        """
        for name in sorted(self._digests.keys() & set(names)):
            with self._locks[name]:
                if name not in self._found:
                    self._found[name] = self._compare(name)
            if (error := self._found[name]) is not None:
                raise error

    def _compare(self, name: str) -> CheckpointError | None:
        try:
            check_digest(self._directory / name, self._digests[name])
        except CheckpointError as error:
            return error
        return None


def known_digests(directory: Path, names: Collection[str]) -> dict[str, str]:
    """Return file name → known SHA-256 for each of ``names``.

    It is read from SHA256SUMS in ``directory``, as sha256sum writes it. Otherwise it is
    huggingface_hub's: the name of a file in its cache, or a note in the directory.

    Raises:
        CheckpointError: the digest of a file is not known.
    """
    listed = _listed(directory / SUMS_NAME)
    digests = {name: listed.get(name) or _of_hub(directory, name) for name in names}
    for name, digest in digests.items():
        if digest is None:
            raise CheckpointError(
                directory / name,
                "has no known checksum",
                expected=f"a line in {SUMS_NAME}, or a download by huggingface_hub",
                fix=f"run sha256sum *.safetensors > {SUMS_NAME} there while the files are good",
            )
    return {name: digest for name, digest in digests.items() if digest is not None}


def check_digest(path: Path, expected: str, fix: str = DOWNLOAD_AGAIN) -> None:
    """Read the whole file ``path`` and compare its SHA-256 with ``expected``.

    Raises:
        CheckpointError: they differ.
    """
    found = file_digest(path)
    if found != expected:
        raise CheckpointError(
            path,
            "is damaged: its checksum differs",
            expected=f"SHA-256 {expected[:12]}",
            found=found[:12],
            fix=fix,
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in small windows."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with ShardFile(path) as shard:
        for window in shard.windows(0, size, WINDOW_BYTES):
            digest.update(window)
    return digest.hexdigest()


def _listed(path: Path) -> dict[str, str]:
    """Parse sha256sum's lines: a digest, a space, a space or an asterisk, a name."""
    if not path.exists():
        return {}
    try:
        lines = read_file(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            path, "cannot be read", found=error, fix="make it again with sha256sum"
        ) from error
    parts = (re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line) for line in lines)
    return {part[2]: part[1].lower() for part in parts if part}


def _of_hub(directory: Path, name: str) -> str | None:
    """The hub's SHA-256 of a large file; small files have a shorter digest (None here)."""
    path = directory / name
    if path.is_symlink():
        return _digest(path.readlink().name)
    metadata = directory / HUB_METADATA / f"{name}.metadata"
    if not metadata.is_file():
        return None
    # three lines: the commit, the etag (the digest), the time of the download
    lines = read_file(metadata).decode("utf-8", "replace").splitlines()
    return _digest(lines[1]) if len(lines) > 1 else None


def _digest(text: str) -> str | None:
    return text if SHA256.fullmatch(text) else None
