"""Run models one layer at a time: calibration, scores, equality. Never writes a checkpoint."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calib.api.measuring import answer, compare, compare_logits, score, search
    from calib.api.pruning import Pruned, calibrate, prune, read_documents
    from calib.api.training import recover, teach
    from calib.recovery.teach import Taught
    from calib.recovery.written import Recovered
    from calib.scoring.answers import Answers, Share
    from calib.scoring.logits import Equality
    from calib.scoring.score import Change, Score
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
    "calib.api.measuring": ("answer", "compare", "compare_logits", "score", "search"),
    "calib.api.pruning": ("Pruned", "calibrate", "prune", "read_documents"),
    "calib.api.training": ("recover", "teach"),
    "calib.recovery.teach": ("Taught",),
    "calib.recovery.written": ("Recovered",),
    "calib.scoring.answers": ("Answers", "Share"),
    "calib.scoring.logits": ("Equality",),
    "calib.scoring.score": ("Change", "Score"),
    "calib.study.search": ("SearchResult",),
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562): the package itself stays instant."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = next(module for module, names in _HOMES.items() if name in names)
    return getattr(import_module(home), name)
