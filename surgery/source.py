"""MODEL on the command line: a local directory, or a checkpoint on the hub."""

import re
import sys
from pathlib import Path

from surgery.errors import CheckpointError

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>(?!.*\.\.)[\w./-]+))?")

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*", "*.md"]
"""Files that pruning reads or carries over."""

IGNORED = ["*/*", "consolidated*"]
"""Folders, and weights a second time in another layout; "*" alone matches across folders."""


def resolve_model(model: str) -> tuple[Path, str]:
    """Return the directory of ``model`` and the name that finds it again.

    A hub id is downloaded into the user's own cache by huggingface_hub, with the user's token,
    mirror and offline settings; its name is then ``org/name@commit``.

    Raises:
        CheckpointError: neither a directory nor a checkpoint that the hub gives out.
    """
    path = Path(model)
    if path.is_dir():
        return path, str(path.resolve())
    match = HUB_ID.fullmatch(model)
    if not match or path.exists():
        raise CheckpointError(
            model,
            "is neither a directory nor a hub id",
            expected="DIR or org/name[@revision]",
            fix="check the spelling",
        )
    snapshot = _download(match["repo"], match["revision"])
    return snapshot, f"{match['repo']}@{snapshot.name}"


def local_source(source: str) -> Path | None:
    """Return the directory of a plan's source, if it is on this machine: nothing is downloaded."""
    path, match = Path(source), HUB_ID.fullmatch(source)
    if path.is_dir():
        return path
    if not match:
        return None
    try:
        return _snapshot(match["repo"], match["revision"], local_files_only=True)
    except (OSError, ValueError):
        return None


def _download(repo: str, revision: str | None) -> Path:
    # huggingface_hub's own errors are OSError or ValueError, whatever the HTTP client raises.
    try:
        return _snapshot(repo, revision, local_files_only=False)
    except (OSError, ValueError) as error:
        # "404 Client Error. (Request ID: …)", an empty line, then what it means
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        raise CheckpointError(
            f"{repo}@{revision or 'main'}",
            "cannot be had from the hub",
            found=reason,
            fix="check the name, your token and the connection, or name a local directory",
        ) from error


def _snapshot(repo: str, revision: str | None, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    path = snapshot_download(
        repo,
        revision=revision,
        allow_patterns=PATTERNS,
        ignore_patterns=IGNORED,
        local_files_only=local_files_only,
    )
    return Path(path)
