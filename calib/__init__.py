"""Run models one layer at a time: calibration, scores, equality. Never writes a checkpoint."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calib.api import (
        Pruned,
        answer,
        calibrate,
        compare,
        compare_logits,
        prune,
        read_documents,
        recover,
        score,
        search,
        teach,
    )
    from calib.recovery.run import Recovered
    from calib.recovery.teach import Taught
    from calib.scoring.logits import Equality
    from calib.scoring.score import Change, Score
    from calib.scoring.tasks import Answers, Share
    from calib.study.search import SearchResult


__all__ = [
    "Answers",
    "Change",
    "Equality",
    "Pruned",
    "Recovered",
    "Score",
    "SearchResult",
    "Share",
    "Taught",
    "answer",
    "calibrate",
    "compare",
    "compare_logits",
    "prune",
    "read_documents",
    "recover",
    "score",
    "search",
    "teach",
]

_HOMES = {
    "Answers": "calib.scoring.tasks",
    "Change": "calib.scoring.score",
    "Equality": "calib.scoring.logits",
    "Recovered": "calib.recovery.run",
    "Score": "calib.scoring.score",
    "SearchResult": "calib.study.search",
    "Share": "calib.scoring.tasks",
    "Taught": "calib.recovery.teach",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562): the package itself stays instant."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "calib.api")), name)
