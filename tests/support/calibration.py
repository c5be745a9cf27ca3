"""Statistics and studies of a tiny checkpoint on a little text."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calib.statistics.calibrate import Calibration, take_statistics
from calib.streaming.settings import PassSettings
from calib.study.study import Study
from calib.study.text import StudyText
from calib.text.windows import token_windows
from surgery.stats.channel_stats import ChannelStats
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.vocabulary.order import open_vocabulary, rarity_of
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


def study_of(path: Path) -> Study:
    """A study of a tiny checkpoint on a little text."""
    layout = layout_of(path)
    documents, heldout = [tiny.prose(4_000)], [tiny.prose(300)]
    text = StudyText(layout, rarity_of(layout), open_vocabulary(layout), documents, heldout, 6, 64)
    return Study(text, SETTINGS)


def bits_of(model: Any, windows: list[np.ndarray]) -> float:
    """The bits that the library's own model takes for windows, without their first tokens."""
    total = 0.0
    for window in windows:
        ids = torch.from_numpy(window)[None]
        logs = tiny.logits_of(model, ids)[0].double().log_softmax(-1)
        total -= float(logs[:-1].gather(1, ids[0, 1:, None]).sum())
    return total / math.log(2)
