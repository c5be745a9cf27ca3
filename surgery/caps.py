"""Caps on memory, kept by what is in memory at a time."""

from collections.abc import Iterator
from dataclasses import replace

from surgery.errors import BudgetError
from surgery.layout import Layout
from surgery.prediction import MB, Settings, Text, predict
from surgery.resources import Resources


def within_caps(layout: Layout, text: Text, settings: Settings, resources: Resources) -> Settings:
    """Return the fastest settings whose prediction keeps the caps.

    Hidden states go to a file first, then the windows that run together become fewer, and last
    the next layer waits on the disk until this one is done.

    Raises:
        BudgetError: no settings do, naming what would be needed.
    """
    least: dict[str, int] = {}
    for choice in _choices(settings, resources):
        made = predict(layout, text, choice)
        asked = {
            "`max_memory`": (made.peak_memory, resources.max_memory),
            "`max_gpu_memory`": (made.peak_device, resources.max_gpu_memory),
        }
        over = [name for name, (need, cap) in asked.items() if cap is not None and need > cap]
        if not over:
            return choice
        for name in asked:
            least[name] = min(least.get(name, asked[name][0]), asked[name][0])
    name = over[0]
    raise BudgetError(
        f"{name} {(asked[name][1] or 0) / MB:,.0f}MB",
        "cannot be kept",
        expected=f"at least {least[name] / MB + 1:,.0f}MB",
        fix="give more, fewer or shorter windows, or a smaller `dtype`",
    )


def _choices(settings: Settings, resources: Resources) -> Iterator[Settings]:
    """Settings from the fastest to the smallest."""
    places = ["memory", "file"] if resources.spill is None else ["file"]
    if settings.device != "cpu" and resources.spill is None:
        places.insert(0, "device")
    if not settings.journal and resources.spill is None:
        places.remove("file")
    for prefetch in (True, False):
        for values in (settings.micro_batch_values, 1):
            for place in places:
                yield replace(settings, hidden=place, micro_batch_values=values, prefetch=prefetch)
