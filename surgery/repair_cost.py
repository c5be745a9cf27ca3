"""What a repair takes of memory, predicted from headers and windows."""

from collections.abc import Mapping
from dataclasses import replace

from surgery.family import EXPERT
from surgery.layout import Layout
from surgery.prediction import Prediction, Settings, Text, predict

ROWS = 1024
"""Of down_proj that are solved for at a time (``calib.gram.ROWS``)."""


def predict_repair(
    layout: Layout, widths: Mapping[str, int], text: Text, settings: Settings
) -> Prediction:
    """Predict a pass that refits every down_proj, one at a time.

    Args:
        layout: The model.
        widths: Key of config.json → I'.
        text: All windows: those that fit, through the dense model and through the pruned one,
            and the held-out ones, without and with the repair.
        settings: How the layers compute.
    """
    pass_alone = predict(layout, text, settings)
    depth = layout.by_name[layout.family.embedding].shape[1]
    longest = max(text.lengths)
    beside = 0
    for axis, width in layout.family.widths.items():
        if width.key not in widths or not layout.channels_of(axis):
            continue
        full, kept = layout.channels_of(axis), widths[width.key] * layout.times(axis)
        experts = layout.experts if axis == EXPERT else 1
        matrix, cut = depth * full, depth * kept
        sums = 4 * (full**2 + matrix) if experts == 1 else 8 * experts * full**2
        equations = sums + 8 * kept**2 + 4 * kept * (full - kept) + 4 * cut
        solving = 16 * kept**2 + 8 * cut + 16 * ROWS * kept
        weights = 2 * experts * matrix * settings.itemsize
        activations = 2 * longest * full * settings.itemsize
        beside = max(beside, max(equations, solving) + weights + activations)
    if pass_alone.device:
        return replace(pass_alone, device={**pass_alone.device, "refitting": beside})
    return replace(pass_alone, memory={**pass_alone.memory, "refitting": beside})
