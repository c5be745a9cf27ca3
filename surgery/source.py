"""MODEL on the command line: a local directory, or a checkpoint on the hub."""

import re
from pathlib import Path

from surgery.errors import CheckpointError

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>(?!/|.*\.\.)[\w./-]+))?")


def resolve_model(model: str) -> tuple[Path, str]:
    """Return the directory of ``model`` and the name that finds it again.

    Of a hub id everything but the weights is downloaded, with the user's token, mirror and offline
    settings; its name is then ``org/name@commit``.

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
    from surgery.hub import fetch_model

    directory, commit = fetch_model(match["repo"], match["revision"])
    return directory, f"{match['repo']}@{commit}"


def source_at_hand(source: str) -> Path | None:
    """Return the directory of a plan's source, or None where it is gone."""
    try:
        return resolve_model(source)[0]
    except CheckpointError:
        return None
