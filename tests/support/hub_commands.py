"""Commands in processes of their own, with a hub of ours: its settings are read at import."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.hub_server import Repo

Result = subprocess.CompletedProcess[str]

COMMIT = Repo(Path()).commit
HURRY = (
    "import surgery.hub.remote_file, surgery.hub.shards; "
    "surgery.hub.remote_file.FIRST_WAIT_SECONDS = 0.01; surgery.hub.shards.SMALL_BYTES = 256; "
)
"""Code in front of a command that meets failures, and tensors that are tiny."""
SIZES = ("--vocab-size", "512", "--intermediate-size", "96")
"""A cut of the vocabulary only, which needs no statistics."""


def command(url: str, home: Path, *arguments: object, **settings: str) -> Result:
    """Run the command line in a process of its own: the hub's settings are read at import."""
    return child(
        url, home, f"{HURRY}from surgery.cli.main import main; main()", *arguments, **settings
    )


def child(url: str, home: Path, code: str, *arguments: object, **settings: str) -> Result:
    """Run Python code with ``url`` as the hub."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(url, home) | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def started(url: str, home: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """Start a command and do not wait for it."""
    code = f"{HURRY}from surgery.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment(url, home)
    )


def environment(url: str, home: Path) -> dict[str, str]:
    """What tells huggingface_hub of ``url`` and ``home`` and of nothing else."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    kept |= {name: "" for name in kept if name.lower().endswith("_proxy")}
    return kept | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
    }


def assert_refused(result: Result, *words: str) -> None:
    assert result.returncode == 2, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]!r}"
