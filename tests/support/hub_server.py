"""A hub on 127.0.0.1: as much of its HTTP interface as this project needs, and its bad days."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub_push import listing, take

API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+(/[^/]+)?)"
    r"(/(?P<what>revision|tree)/(?P<revision>[^/]+)(/(?P<folder>.+))?)?"
)
FILE = re.compile(
    r"(?P<cdn>/cdn)?/((?P<kind>datasets)/)?(?P<repo>[^/]+(/[^/]+)?)"
    r"/resolve/(?P<revision>[^/]+)/(?P<name>.+)"
)
BLOCK_BYTES = 1 << 18


@dataclass
class Repo:
    """A model or data set on the hub, or the status with which the hub refuses it."""

    directory: Path
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    refusal: tuple[int, str] | None = None
    """HTTP status and X-Error-Code."""
    token: str | None = None
    """Only who sends it is let in."""
    answer: object = None
    """What is said of it, if not the truth."""
    sparse: bool = False
    """Its shards are holes that nobody downloads: their digests are made up."""

    def files(self, folder: str) -> list[Path]:
        """Every file below ``folder``."""
        return sorted(p for p in (self.directory / folder).rglob("*") if p.is_file())

    def etag(self, path: Path) -> str:
        """Name the content of ``path`` as the hub does."""
        if not _is_large(path):
            return git_sha1(path)
        return "0" * 64 if self.sparse else sha256(path)

    def facts(self, path: Path) -> dict[str, object]:
        """What a listing says of a file."""
        size = path.stat().st_size
        if not _is_large(path):
            return {"size": size, "blobId": self.etag(path)}
        lfs = {"size": size, "sha256": self.etag(path), "pointerSize": 134}
        return {"size": size, "blobId": "0" * 40, "lfs": lfs}

    def knows(self, revision: str) -> bool:
        """Whether there is such a branch or commit."""
        return revision in ("main", self.commit)


@dataclass
class Fault:
    """What goes wrong with some requests."""

    path: str
    """Regular expression; found in the request's path."""
    status: int | None = None
    """Answer this, with ``headers``."""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    """Close the connection after so many bytes of a body."""
    shifted: bool = False
    """Answer a range with the one a byte later."""
    whole: bool = False
    """Take no notice of ranges."""
    stall: bool = False
    """Send nothing at all until the server ends."""
    damage: bool = False
    """Flip a bit of the first byte that is sent."""
    times: int = 1
    """Requests that it hits."""


@dataclass
class Hub:
    """A running server."""

    url: str
    repos: dict[str, Repo]
    """By models/org/name or datasets/org/name."""
    cdn: str | None = None
    """Where requests for shards are sent on to."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and path of every request, in order."""
    sent: Counter[str] = field(default_factory=Counter)
    """Path → bytes of bodies."""
    authorized: list[str] = field(default_factory=list)
    """Paths of requests that had a token."""
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """org/name → the files that a push left there."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 → large files that were uploaded."""
    lock: Lock = field(default_factory=Lock)
    over: Event = field(default_factory=Event)
    """Set when the server ends."""

    def fault(self, path: str) -> Fault:
        """What goes wrong with this request; a fault without effect where nothing does."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return Fault("")

    def forget(self) -> None:
        """Count from zero."""
        self.requests.clear()
        self.sent.clear()
        self.authorized.clear()
        self.faults.clear()


class Handler(BaseHTTPRequestHandler):
    """Answers for the ``hub`` of its server."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        """Answer like GET, without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer a listing or a file."""
        path = self._begin()
        self._fail(path)
        match = API.fullmatch(path) or FILE.fullmatch(path)
        kind = match["kind"] or "models" if match else ""
        repo = self.hub.repos.get(f"{kind}/{match['repo']}") if match else None
        if self.failing.status is not None:
            self._answer(self.failing.status, b'{"error": "trouble"}', self.failing.headers)
        elif match and match["repo"] in self.hub.pushed:
            self._json(listing(self.hub, match["repo"], tree=match["what"] == "tree"))
        elif not match or repo is None:
            self._refuse(404, "RepoNotFound")
        elif (refusal := self._refusal(repo, match)) is not None:
            self._refuse(*refusal)
        elif match.re is FILE:
            self._file(repo, unquote(match["name"]), path, on_cdn=bool(match["cdn"]))
        elif match["what"] == "tree":
            self._tree(repo, unquote(match["folder"] or ""))
        else:
            self._info(repo, match["repo"])

    def do_POST(self) -> None:
        """Take what a push sends, from who has a token."""
        path = self._begin()
        self._fail(path)
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.failing.status is not None:
            self._answer(self.failing.status, b'{"error": "trouble"}', self.failing.headers)
        elif "Authorization" not in self.headers:
            self._refuse(401, "")
        else:
            answer = take(self.hub, path, body)
            self._json(answer) if answer is not None else self._refuse(404, "RepoNotFound")

    def do_PUT(self) -> None:
        """Take a large file, at an address that is signed and needs no token."""
        path = self._begin()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(body).hexdigest()
        if path.rpartition("/")[2] != digest:
            self._refuse(400, "")
            return
        self.hub.objects[digest] = body
        self._json({})

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def _begin(self) -> str:
        """Take note of the request and return its path."""
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            if "Authorization" in self.headers:
                self.hub.authorized.append(path)
        return path

    def _fail(self, path: str) -> None:
        """Find out what goes wrong with this request; wait where nothing is to be answered."""
        self.failing = self.hub.fault(path)
        if self.failing.stall:
            self.hub.over.wait()

    def _refusal(self, repo: Repo, match: re.Match[str]) -> tuple[int, str] | None:
        if repo.refusal is not None:
            return repo.refusal
        on_cdn = match.re is FILE and match["cdn"]  # whose addresses are signed
        if (
            repo.token
            and not on_cdn
            and self.headers.get("Authorization") != f"Bearer {repo.token}"
        ):
            return 401, ""
        known = repo.knows(unquote(match["revision"] or "main"))
        return None if known else (404, "RevisionNotFound")

    def _info(self, repo: Repo, name: str) -> None:
        siblings: list[dict[str, object]] = []
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        for path in repo.files(""):
            entry: dict[str, object] = {"rfilename": str(path.relative_to(repo.directory))}
            siblings.append(entry | (repo.facts(path) if blobs else {}))
        self._json(repo.answer or {"id": name, "sha": repo.commit, "siblings": siblings})

    def _tree(self, repo: Repo, folder: str) -> None:
        entries: dict[str, dict[str, object]] = {}
        for path in repo.files(folder):
            inside = path.relative_to(repo.directory / folder)
            name = str(path.relative_to(repo.directory))
            if len(inside.parts) > 1 and "recursive=true" not in self.path.lower():
                name = str(Path(folder) / inside.parts[0])
                entries[name] = {"type": "directory", "path": name, "oid": "0" * 40}
            else:
                size = path.stat().st_size
                entries[name] = {"type": "file", "path": name, "size": size, "oid": git_sha1(path)}
        self._json(list(entries.values()))

    def _file(self, repo: Repo, name: str, url: str, *, on_cdn: bool) -> None:
        path = repo.directory / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        size, headers = path.stat().st_size, {"ETag": f'"{repo.etag(path)}"'}
        headers |= {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if self.hub.cdn and not on_cdn and _is_large(path):
            headers |= {"Location": f"{self.hub.cdn}/cdn{url}", "X-Linked-Size": str(size)}
            self._answer(302, b"", headers | {"X-Linked-Etag": headers["ETag"]})
            return
        start, stop = 0, size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is not None and not self.failing.whole:
            start, stop = int(wanted[1]), min(int(wanted[2] or size - 1) + 1, size)
            if start >= size:
                self._refuse(416, "")
                return
            shift = 1 if self.failing.shifted else 0
            headers["Content-Range"] = f"bytes {start + shift}-{stop - 1}/{size}"
        self._send_file(path, start, stop, headers)

    def _send_file(self, path: Path, start: int, stop: int, headers: dict[str, str]) -> None:
        self._start(206 if "Content-Range" in headers else 200, stop - start, headers)
        if self.command != "GET":
            return
        limit = stop if self.failing.cut is None else min(stop, start + self.failing.cut)
        with open(path, "rb") as file:
            file.seek(start)
            first = True
            while block := file.read(min(BLOCK_BYTES, limit - file.tell())):
                if first and self.failing.damage:
                    block = bytes([block[0] ^ 1]) + block[1:]
                first = False
                self._send(block)
        self.close_connection = limit < stop

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._answer(status, b'{"error": "refused"}', headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._start(status, len(body), headers)
        if self.command != "HEAD":
            self._send(body)

    def _start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, block: bytes) -> None:
        try:
            self.wfile.write(block)
        except (BrokenPipeError, ConnectionResetError):  # who asked has enough
            self.close_connection = True
            return
        with self.hub.lock:
            self.hub.sent[urlsplit(self.path).path] += len(block)


def sha256(path: Path) -> str:
    """SHA-256 of a file, for as long as it is not written again."""
    return _digest(path, path.stat().st_mtime_ns)


def git_sha1(path: Path) -> str:
    """SHA-1 as git takes it."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


_DIGESTS: dict[tuple[Path, int], str] = {}


def _digest(path: Path, changed: int) -> str:
    if (path, changed) not in _DIGESTS:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        _DIGESTS[path, changed] = digest.hexdigest()
    return _DIGESTS[path, changed]


def _is_large(path: Path) -> bool:
    """Whether git-lfs has it."""
    return path.suffix == ".safetensors"


@contextmanager
def serve(repos: dict[str, Repo]) -> Iterator[Hub]:
    """Serve ``repos``, named like ``Hub.repos``, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", repos)
    server.RequestHandlerClass = type("HubHandler", (Handler,), {"hub": hub})
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
