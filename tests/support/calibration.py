"""Statistics of a tiny checkpoint on a little text."""

from pathlib import Path

import numpy as np
import torch

from calib.statistics.calibrate import Calibration, take_statistics
from calib.streaming.settings import PassSettings
from calib.text.windows import token_windows
from surgery.stats.channel_stats import ChannelStats
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.vocabulary.order import rarity_of
from tests.support import tiny
from tests.support.plans import layout_of

CPU = torch.device("cpu")
SETTINGS = PassSettings(CPU, torch.float32)
EDGES = [400, 512, tiny.VOCAB_SIZE]
SEQ_LEN = 48


def sample_windows(path: Path) -> list[np.ndarray]:
    """Full windows and rests of three lengths, without "!", which tiny models take for an image."""
    text = tiny.prose(2600).replace("!", ".")
    documents = [text[:900], text[900:2500], text[2500:]]
    return token_windows(documents, load_tokenizer(path), 30, SEQ_LEN)


def take_stats(path: Path, edges: list[int] = EDGES) -> ChannelStats:
    layout = layout_of(path)
    buckets = rarity_of(layout).buckets(edges)
    return take_statistics(
        Calibration(layout, sample_windows(path), SEQ_LEN, buckets, edges, SETTINGS)
    )
