"""One file of a model on the hub, by ranges or whole; requests are tried again."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from surgery.errors import CheckpointError
from surgery.files.atomic import move_into_place

Result = TypeVar("Result")

TRIES = 5
"""Attempts without any progress."""
FIRST_WAIT_SECONDS = 1.0
"""Doubled after each failure in a row, unless the hub says how long."""
MOST_WAIT_SECONDS = 300.0
"""The hub counts requests in windows of five minutes."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that a later attempt may not meet."""


class Garbled(Exception):
    """An answer that HTTP does not allow, or that ended early."""


class Attempts:
    """Failures in a row, and how long to wait after each."""

    def __init__(self, tries: int = TRIES) -> None:
        self.failures = 0
        self._tries = tries

    def wait(self, error: Exception) -> None:
        """Sleep after a failure that may pass; raise ``error`` where it will not, or often did."""
        response = getattr(error, "response", None)
        if response is not None and response.status_code not in PASSING:
            raise error
        self.failures += 1
        if self.failures >= self._tries:
            raise error
        told = _told_seconds(response.headers) if response is not None else None
        wait = FIRST_WAIT_SECONDS * 2 ** (self.failures - 1) if told is None else told
        time.sleep(min(wait, MOST_WAIT_SECONDS))


def retried(call: Callable[[], Result], tries: int = TRIES) -> Result:
    """Return what ``call`` returns, tried again after failures that may pass."""
    attempts, errors = Attempts(tries), (Garbled, client_errors())
    while True:
        try:
            return call()
        except errors as error:
            attempts.wait(error)


def client_errors() -> type[Exception]:
    """The base of the HTTP client's errors, whichever client huggingface_hub uses."""
    from huggingface_hub.utils import get_session

    client = import_module(type(get_session()).__module__.partition(".")[0])
    base: type[Exception] = client.HTTPError
    return base


def refused(where: object, error: Exception) -> CheckpointError:
    """What the hub's ``error`` means for the user, in one line."""
    return CheckpointError(
        where,
        "cannot be had from the hub",
        found=reason_of(error),
        fix="check the name, your token and the connection, or name a local directory",
    )


def reason_of(error: Exception) -> str:
    """The part of the hub's message that says what is wrong."""
    # "404 Client Error. (Request ID: …)", an empty line, then what it means
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _told_seconds(headers: Any) -> float | None:
    """Seconds to wait by Retry-After, or by the hub's own RateLimit where nothing remains."""
    told = headers.get("Retry-After", "")
    if re.fullmatch(r"\d+", told):
        return float(told)
    limit = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


BLOCK_BYTES = 1 << 20
"""Bytes of a file that are read at a time."""
INCOMPLETE = ".incomplete"
"""Behind the name of a file whose download goes on where it was cut."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a commit."""

    repo: str
    commit: str
    name: str
    size: int
    digest: str | None
    """SHA-256 of a large file, SHA-1 as git takes it of a small one; None where the hub has none.
    """

    @property
    def where(self) -> str:
        """What errors call it."""
        return f"{self.repo}@{self.commit}: {self.name}"

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` to ``stop``.

        Raises:
            CheckpointError: the hub does not give them out.
        """
        return b"".join(self.blocks(start, stop))

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from ``start`` to ``stop``; a connection that is cut is made again.

        Raises:
            CheckpointError: as ``read``.
        """
        attempts, errors = Attempts(), (Garbled, client_errors())
        while start < stop:
            try:
                for block in self._body(start, stop):
                    start += len(block)
                    attempts.failures = 0
                    yield block
            except errors as error:
                try:
                    attempts.wait(error)
                except errors as last:
                    raise refused(self.where, last) from last
            except OSError as error:  # offline by the user's settings
                raise refused(self.where, error) from error

    def download(self, path: Path, progress: Callable[[int], object] = lambda n: None) -> None:
        """Bring the whole file to ``path``, which appears when its digest is right.

        What an earlier attempt left beside it is continued.

        Args:
            path: Must not exist.
            progress: Called with the bytes of every block; what it raises ends the download.

        Raises:
            CheckpointError: as ``read``, or twice with another digest than the hub names.
        """
        partial = path.with_name(path.name + INCOMPLETE)
        for last in (False, True):
            digest = self._continue(partial, progress)
            if self.digest in (None, digest):
                move_into_place(partial, path)
                return
            partial.unlink()
            if last:
                raise CheckpointError(
                    self.where,
                    "arrived damaged, twice",
                    expected=f"digest {self.digest}",
                    found=digest,
                    fix="run again; if that does not help, the hub or your mirror is at fault",
                )

    def _continue(self, partial: Path, progress: Callable[[int], object]) -> str:
        """Append what is missing to ``partial``; return the digest of the whole."""
        digest = self._hash()
        with open(partial, "a+b", buffering=0) as file:
            if file.tell() > self.size:
                file.truncate(0)
            file.seek(0)
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
            for block in self.blocks(file.tell(), self.size):
                file.write(block)
                digest.update(block)
                progress(len(block))
        return str(digest.hexdigest())

    def _hash(self) -> Any:
        if self.digest is not None and len(self.digest) == 40:
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return hashlib.sha256()

    def _body(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of one answer, at most to ``stop``.

        Raises:
            Garbled: the answer holds other bytes, or ended early.
        """
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers(library_name="compact-surgery")
        headers["Accept-Encoding"] = "identity"
        if (start, stop) != (0, self.size):
            headers["Range"] = f"bytes={start}-{stop - 1}"
        url = hf_hub_url(self.repo, self.name, revision=self.commit)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        stream = get_session().stream("GET", url, headers=headers, timeout=timeout)
        with stream as response:
            hf_raise_for_status(response)
            skip, left = self._skipped(response, start), stop - start
            for block in response.iter_bytes():
                useful = block[skip : skip + left]
                skip -= min(skip, len(block))
                left -= len(useful)
                if useful:
                    yield useful
                if not left:
                    return
        raise Garbled(f"the answer ended {left:,} bytes early")

    def _skipped(self, response: Any, start: int) -> int:
        """Bytes of the body in front of ``start``: all of them where ranges are not served."""
        if response.status_code != 206:
            return start
        told = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", told)
        if not found or int(found[1]) != start or found[2] not in ("*", str(self.size)):
            raise Garbled(f"asked for bytes from {start} of {self.size}, was given {told!r}")
        return 0
