"""The hub benchmark: a hub on this machine, in a process of its own, and how much disk is in use.

python -m tools.bench.hub serve MODEL      print the address, then serve org/model until killed
python -m tools.bench.hub download         bring org/model into the cache by huggingface_hub
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from tests.support.hub_server import Repo, serve
from tools.bench.child import ROOT, python_module

NAME = "org/model"
COMMIT = Repo(Path()).commit
PAUSE_SECONDS = 0.01
"""Between two looks at the disk."""

Command = list[str | Path]


@contextmanager
def running_hub(model: Path) -> Iterator[str]:
    """Serve directory ``model`` as org/model from another process; yield the address."""
    command = [str(part) for part in python_module("hub", "serve", model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def on_hub(url: str, home: Path, command: Sequence[str | Path]) -> Command:
    """Return ``command`` with ``url`` as its hub and ``home`` as its cache."""
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": home,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
    }
    return ["env", *(f"{name}={value}" for name, value in settings.items()), *command]


class PeakDisk:
    """The most bytes that files below some directories took up on the disk together."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.peak_bytes = 0
        self._directories = directories
        self._over = Event()
        self._thread = Thread(target=self._look)

    def __enter__(self) -> "PeakDisk":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(PAUSE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, sum(map(_used, self._directories)))


def _used(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(Path(parent) / name).st_blocks * 512
            except FileNotFoundError:  # deleted since it was listed
                continue
    return total


def _serve(model: Path) -> None:
    repo = Repo(model)
    for path in repo.files(""):
        repo.etag(path)  # known before the first request, as on the hub
    with serve({f"models/{NAME}": repo}) as hub:
        print(hub.url, flush=True)
        Event().wait()


def _download() -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(NAME, revision=COMMIT)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(Path(sys.argv[2]))
    else:
        _download()
