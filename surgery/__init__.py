"""Edit checkpoint files: headers, plans, vocabulary and channel surgery. Never runs a model."""

import logging
from typing import TYPE_CHECKING, Any

from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.api import (
        Model,
        apply_plan,
        export_gguf,
        make_plan,
        make_report,
        open_model,
        removed_tokens,
        verify_checkpoint,
    )
    from surgery.errors import SurgeryError
    from surgery.planning.plan import Plan
    from surgery.stats.channel_stats import ChannelStats
    from surgery.stats.merge import merge_stats
    from surgery.text.documents import Source


__all__ = [
    "ChannelStats",
    "Model",
    "Plan",
    "Source",
    "SurgeryError",
    "__version__",
    "apply_plan",
    "export_gguf",
    "make_plan",
    "make_report",
    "merge_stats",
    "open_model",
    "removed_tokens",
    "verify_checkpoint",
]

_HOMES = {
    "ChannelStats": "surgery.stats.channel_stats",
    "Plan": "surgery.planning.plan",
    "Source": "surgery.text.documents",
    "SurgeryError": "surgery.errors",
    "merge_stats": "surgery.stats.merge",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562), so that importing the package takes no time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "surgery.api")), name)
