"""JSON files changed in place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Edit = Callable[[Any], object]
"""Changes parsed JSON in place."""


def change(path: Path, edit: Edit) -> None:
    data = json.loads(path.read_text("utf-8"))
    edit(data)
    path.write_text(json.dumps(data), "utf-8")


def put(**changes: Any) -> Edit:
    return lambda data: data.update(changes)
