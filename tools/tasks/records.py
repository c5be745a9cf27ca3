"""The records of a task file, as lm-evaluation-harness takes them: `custom_dataset` in the YAML."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
KINDS = ("science", "physical", "endings", "words", "continuation")


def read(kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind: ``context``, ``choices`` and the index ``answer``."""
    lines = (FOLDER / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def load(*, kind: str, **_: Any) -> dict[str, Any]:
    """Return the one split of a task; found beside this module, whatever the working directory.

    The harness adds its own metadata to the arguments.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list(read(kind))}
