"""Write the table of model types again, from the installed transformers.

    python -m tools.derive            all types: what a new release of transformers needs
    python -m tools.derive TYPE...    these types; all other entries are kept

The diff of ``surgery/families/derived.json`` is what to review.
"""

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from surgery.families.default_ids import DERIVED
from surgery.families.table import BY_HAND, REFUSED
from tools.derive.configs import registered
from tools.derive.entry import derive

LINE = 100
"""Characters; lists and objects that fit in them take one line."""


def written(entries: dict[str, Any]) -> str:
    """Return the table as JSON, one line for each tensor."""
    text = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
    for _ in range(2):  # lists, then what holds them
        text = re.sub(r"[\[{]\n[^\[\]{}]*[\]}]", _on_one_line, text)
    return text


def _on_one_line(found: re.Match[str]) -> str:
    line = re.sub(r"\n *", " ", found[0])
    return f"{line[0]}{line[2:-2]}{line[-1]}" if len(line) <= LINE else found[0]


def main(types: Iterable[str], file: Path = DERIVED) -> None:
    """Derive ``types``, else all that are not by hand or refused; write ``file``."""
    warnings.filterwarnings("ignore")
    known = json.loads(file.read_text("utf-8"))
    apart = {*BY_HAND, *REFUSED}
    chosen = list(types) or [name for name in registered() if name not in apart]
    found = {}
    for name in chosen:
        try:
            found[name] = derive(name)
        except Exception as error:  # whatever a model's code makes of a config
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    kept = {n: found.get(n, old) for n, old in known.items() if n in found or n not in chosen}
    file.write_text(written(kept | found), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
