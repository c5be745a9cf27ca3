"""A hub on 127.0.0.1: as much of its HTTP interface as downloads of models and data sets need."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
    r"(/(?P<what>revision|tree)/(?P<revision>[^/]+)(/(?P<folder>.+))?)?"
)
FILE = re.compile(
    r"/((?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"
)


@dataclass
class Repo:
    """A model or data set on the hub, or the status with which the hub refuses it."""

    directory: Path
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    refusal: tuple[int, str] | None = None
    """HTTP status and X-Error-Code."""

    def files(self, folder: str) -> list[Path]:
        """Every file below ``folder``."""
        return sorted(p for p in (self.directory / folder).rglob("*") if p.is_file())

    def knows(self, revision: str) -> bool:
        """Whether there is such a branch or commit."""
        return revision in ("main", self.commit)


@dataclass
class Hub:
    """A running server."""

    url: str
    repos: dict[str, Repo]
    """By models/org/name or datasets/org/name."""
    requests: list[str] = field(default_factory=list)
    """Method and path of every request, in order."""


class Handler(BaseHTTPRequestHandler):
    """Answers for the ``hub`` of its server."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        """Answer like GET, without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer a listing or a file."""
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        match = API.fullmatch(path) or FILE.fullmatch(path)
        kind = match["kind"] or "models" if match else ""
        repo = self.hub.repos.get(f"{kind}/{match['repo']}") if match else None
        if not match or repo is None:
            self._refuse(404, "RepoNotFound")
        elif repo.refusal is not None:
            self._refuse(*repo.refusal)
        elif not repo.knows(unquote(match["revision"] or "main")):
            self._refuse(404, "RevisionNotFound")
        elif match.re is FILE:
            self._file(repo, unquote(match["name"]))
        elif match["what"] == "tree":
            self._tree(repo, unquote(match["folder"] or ""))
        else:
            siblings = [{"rfilename": str(p.relative_to(repo.directory))} for p in repo.files("")]
            self._json({"id": match["repo"], "sha": repo.commit, "siblings": siblings})

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

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
                entries[name] = {"type": "file", "path": name, "size": size, "oid": etag(path)}
        self._json(list(entries.values()))

    def _file(self, repo: Repo, name: str) -> None:
        path = repo.directory / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content, headers = path.read_bytes(), {"ETag": f'"{etag(path)}"'}
        headers |= {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, content, headers)
            return
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._answer(206, content[start:stop], headers)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._answer(status, b'{"error": "refused"}', headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def etag(path: Path) -> str:
    """Name the content of ``path``."""
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


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
        server.shutdown()
        server.server_close()
        thread.join()
