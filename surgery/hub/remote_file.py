"""One file of a model on the hub, read by ranges or whole; failed requests are repeated."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from surgery.errors import CheckpointError
from surgery.files.atomic import move_into_place

Result = TypeVar("Result")

TRIES = 5
"""Attempts in a row without any progress."""
FIRST_WAIT_SECONDS = 1.0
"""Doubled after each failure in a row, unless the hub names a time."""
MOST_WAIT_SECONDS = 300.0
"""The hub counts requests in windows of five minutes."""
TEMPORARY = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that may be temporary."""


class BadResponse(Exception):
    """A response that does not match the request, or that ended early."""


class Attempts:
    """Failures in a row, and how long to wait after each."""

    def __init__(self, tries: int = TRIES, unanswered: int = TRIES) -> None:
        """Take at most ``tries`` attempts, and ``unanswered`` ones if there is no answer at all."""
        self.failures = 0
        self._tries, self._unanswered = tries, unanswered

    def wait(self, error: Exception) -> None:
        """Sleep after a temporary failure; raise ``error`` if it is permanent or the last try."""
        response = getattr(error, "response", None)
        if response is not None and response.status_code not in TEMPORARY:
            raise error
        self.failures += 1
        if self.failures >= min(self._tries, self._unanswered if response is None else self._tries):
            raise error
        asked = _seconds_asked_for(response.headers) if response is not None else None
        wait = FIRST_WAIT_SECONDS * 2 ** (self.failures - 1) if asked is None else asked
        time.sleep(min(wait, MOST_WAIT_SECONDS))


def retried(call: Callable[[], Result], tries: int = TRIES, unanswered: int = TRIES) -> Result:
    """Return what ``call`` returns; call it again after temporary failures, as ``Attempts``."""
    attempts, errors = Attempts(tries, unanswered), (BadResponse, client_errors())
    while True:
        try:
            return call()
        except errors as error:
            attempts.wait(error)


def client_errors() -> type[Exception]:
    """The base class of errors of the HTTP client that huggingface_hub uses."""
    from huggingface_hub.utils import get_session

    client = import_module(type(get_session()).__module__.partition(".")[0])
    base: type[Exception] = client.HTTPError
    return base


def hub_error(where: object, error: Exception) -> CheckpointError:
    """Turn an ``error`` of the hub into a CheckpointError of one line."""
    return CheckpointError(
        where,
        "cannot be read from the hub",
        found=reason_of(error),
        fix="check the name, your token and the connection, or name a local directory",
    )


def reason_of(error: Exception) -> str:
    """The part of the hub's message that explains the error."""
    # "404 Client Error. (Request ID: …)", an empty line, then the explanation
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _seconds_asked_for(headers: Any) -> float | None:
    """Seconds to wait: Retry-After, or the hub's RateLimit header where no requests remain."""
    seconds = headers.get("Retry-After", "")
    if re.fullmatch(r"\d+", seconds):
        return float(seconds)
    limit = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


BLOCK_BYTES = 1 << 20
"""Bytes that are read from a file at a time."""
INCOMPLETE = ".incomplete"
"""Suffix of an unfinished download, which the next attempt continues."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a commit."""

    repo: str
    commit: str
    name: str
    size: int
    digest: str | None
    """SHA-256 of a large file, git's SHA-1 of a small one; None where the hub has neither."""

    @property
    def where(self) -> str:
        """Its name in errors."""
        return f"{self.repo}@{self.commit}: {self.name}"

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` to ``stop``.

        Raises:
            CheckpointError: the hub refuses, or does not answer.
        """
        return b"".join(self.blocks(start, stop))

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from ``start`` to ``stop``; reconnect when the connection breaks.

        Raises:
            CheckpointError: as ``read``.
        """
        attempts, errors = Attempts(), (BadResponse, client_errors())
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
                    raise hub_error(self.where, last) from last
            except OSError as error:  # the user's settings are offline
                raise hub_error(self.where, error) from error

    def download(self, path: Path, progress: Callable[[int], object] = lambda n: None) -> None:
        """Download the whole file to ``path``, which appears after its digest was checked.

        An unfinished download of an earlier attempt is continued.

        Args:
            path: Must not exist.
            progress: Called with the size of every block; its errors end the download.

        Raises:
            CheckpointError: as ``read``, or the digest was wrong twice.
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
                    "arrived damaged twice",
                    expected=f"digest {self.digest}",
                    found=digest,
                    fix="run again; if that does not help, the hub or your mirror is at fault",
                )

    def _continue(self, partial: Path, progress: Callable[[int], object]) -> str:
        """Append the missing bytes to ``partial``; return the digest of the whole file."""
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

    def gives_ranges(self) -> bool:
        """Whether the server sends a part of the file alone; an error counts as no."""
        try:
            with self._response(1, 2) as response:
                return bool(response.status_code == 206)
        except (OSError, client_errors()):
            return False

    @contextmanager
    def _response(self, start: int, stop: int) -> Iterator[Any]:
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
            yield response

    def _body(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of one response, up to ``stop``.

        Raises:
            BadResponse: the response has other bytes, or ended early.
        """
        with self._response(start, stop) as response:
            skip, missing = self._bytes_before(start, response), stop - start
            for block in response.iter_bytes():
                useful = block[skip : skip + missing]
                skip -= min(skip, len(block))
                missing -= len(useful)
                if useful:
                    yield useful
                if not missing:
                    return
        raise BadResponse(f"the response ended {missing:,} bytes early")

    def _bytes_before(self, start: int, response: Any) -> int:
        """Bytes of the body before ``start``: all that precede it if the server ignores ranges."""
        if response.status_code != 206:
            return start
        content_range = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
        if not found or int(found[1]) != start or found[2] not in ("*", str(self.size)):
            raise BadResponse(f"asked for bytes from {start} of {self.size}, got {content_range!r}")
        return 0
