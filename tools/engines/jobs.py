"""What the scripts of all engines share: files of jobs, and greedy texts with log-probabilities.

A file of jobs is JSON with ``model`` (a directory or a file), ``prompts`` (lists of token ids) and
``new_tokens``. The results are written into it: ``completions``, the ids that follow each prompt by
greedy choice, and ``top``, for each of these ids the ``TOP`` likeliest ones with their
log-probabilities, the best first; where the engine fails, ``error``. End-of-text tokens do not end
a completion. What an engine does not show of log-probabilities is empty in ``top``.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOP = 5

Step = list[tuple[int, float]]
"""The likeliest ids at one place with their log-probabilities, the best first."""

Jobs = dict[str, Any]


def run(paths: Sequence[str], engine: Callable[[Jobs], Jobs]) -> None:
    """Let ``engine`` do each file of jobs and write what it returns; one that fails stops none."""
    for path in map(Path, paths):
        jobs: Jobs = json.loads(path.read_text(encoding="utf-8"))
        try:
            jobs |= engine(jobs)
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(str(error).split()) or type(error).__name__
            jobs["error"] = reason[:300]
        path.write_text(json.dumps(jobs), encoding="utf-8")


def best(logits: Any) -> Step:
    """Return the likeliest ids of one place; ``logits`` are numpy's, ``[tokens]``."""
    import numpy as np

    values = np.asarray(logits, np.float64)
    ids = np.argsort(-values, kind="stable")[:TOP]
    largest = values.max()
    total = largest + np.log(np.exp(values - largest).sum())
    return [(int(id_), float(values[id_] - total)) for id_ in ids]


def results(steps: Sequence[Sequence[Step]]) -> Jobs:
    """Return the results of greedy steps, one sequence for each prompt."""
    completions = [[step[0][0] for step in of_prompt] for of_prompt in steps]
    return {"completions": completions, "top": [list(of_prompt) for of_prompt in steps]}
