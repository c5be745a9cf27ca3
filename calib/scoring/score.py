"""Bits per byte on held-out text; unlike perplexity, comparable between vocabularies."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.empty_model import positions
from calib.streaming.layers import weights_stage
from calib.streaming.settings import ComputeOptions, PassSettings
from calib.streaming.weights import WeightReader, choose_settings
from calib.text.chat import documents_of
from calib.text.windows import byte_windows, scored_windows
from surgery.errors import CheckpointError
from surgery.families.default_ids import fill_defaults
from surgery.layout.layout import Layout
from surgery.process import Progress
from surgery.text.documents import TextOptions
from surgery.tokenizer.tokenizer_file import load_tokenizer

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """The bits that a model needs for a text."""

    bits: float
    """Σ −log2 p(token | earlier tokens of the window)."""
    bytes: int
    """UTF-8 bytes of all windows."""
    tokens: int
    """Predicted tokens, without the leading bos."""
    windows: int
    lossy_windows: int
    """Windows that the tokenizer cannot decode to the same text. Their bits are too low."""

    @property
    def bits_per_byte(self) -> float:
        """Σ bits / Σ bytes."""
        return self.bits / self.bytes

    @property
    def finite(self) -> bool:
        """Whether the model's logits gave a finite number of bits."""
        return math.isfinite(self.bits)


def score_windows(
    layout: Layout,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    settings: PassSettings,
    progress: Progress | None = None,
) -> Score:
    """Score ``texts``, each preceded by bos (eos where there is none), through streamed layers.

    Args:
        layout: The model.
        texts: Windows of text.
        tokenizer: The model's tokenizer.
        settings: How the layers compute.
        progress: Called with "score", the bytes of weights that are done with, and their total.
    """
    first, most = first_token(layout), positions(layout)
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    split = [scored_windows(first, np.array(ids, dtype=np.int64), most) for ids in encoded]
    stream = Stream([window for windows in split for window in windows])
    lossy = sum(
        tokenizer.decode(ids, skip_special_tokens=False) != text
        for ids, text in zip(encoded, texts, strict=True)
    )

    with WeightReader(layout.checkpoint, settings.device, settings.dtype) as reader:
        decoder = StreamedDecoder(layout, reader, settings)
        decoder.embed([stream])
        if long := sum(len(windows) > 1 for windows in split):
            LOG.info(
                "note: %d windows have more tokens than the model has positions (%s); "
                "each is scored in several",
                long,
                f"{most:,}",
            )
        advance = weights_stage(progress, "score", layout, len(stream.windows))
        decoder.run_layers([stream], progress=advance)
        (bits,) = token_bits(decoder, [(stream, np.arange(layout.vocab_size))])
    return Score(
        bits=sum(float(window.sum()) for window in bits),
        bytes=sum(len(text.encode("utf-8")) for text in texts),
        tokens=sum(len(window) - 1 for window in stream.windows),
        windows=len(texts),
        lossy_windows=lossy,
    )


def score_model(
    layout: Layout,
    text: TextOptions,
    window_bytes: int,
    compute: ComputeOptions,
    progress: Progress | None = None,
) -> Score:
    """Score a model on windows of ``window_bytes`` bytes of a text.

    Raises:
        DataError: there is no text.
    """
    texts = byte_windows(documents_of(layout, text), text.samples, window_bytes)
    tokenizer = load_tokenizer(layout.checkpoint.path)
    settings = choose_settings(compute, layout.checkpoint)
    return score_windows(layout, texts, tokenizer, settings, progress)


@torch.no_grad()
def token_bits(
    decoder: StreamedDecoder, streams: Sequence[tuple[Stream, np.ndarray]]
) -> list[list[np.ndarray]]:
    """Return per stream and window −log2 softmax of each next token, float64 ``(tokens - 1,)``.

    The head is read once, block by block, and the log-sum-exp is added up over the blocks.

    Args:
        decoder: All streams have passed its layers.
        streams: Each with the ascending ids of its vocabulary.
    """
    windows = [
        _WindowBits(ids, states, rows) for s, rows in streams for _, ids, states in s.hidden()
    ]
    for index, part, logits in decoder.logits([(each.states, each.rows) for each in windows]):
        windows[index].add(part, logits[0].float())
    bits = iter(windows)
    result = []
    for stream, _ in streams:
        order = [index for index, _, _ in stream.hidden()]
        found = {index: next(bits).bits() for index in order}
        result.append([found[index] for index in sorted(found)])
    return result


class _WindowBits:
    """Adds up one window's log-sum-exp and collects the logits of its next tokens."""

    def __init__(self, ids: torch.Tensor, states: torch.Tensor, rows: np.ndarray) -> None:
        self.states = states[None, :-1]
        self.rows = rows
        self._targets = torch.from_numpy(np.searchsorted(rows, ids[1:].numpy()))
        self._total = torch.full(self._targets.shape, -math.inf)
        self._chosen = torch.zeros(self._targets.shape)

    def add(self, part: slice, logits: torch.Tensor) -> None:
        """Add ``logits`` ``(tokens, rows)`` of the ``part`` of the vocabulary."""
        self._total = torch.logaddexp(self._total, logits.logsumexp(-1).cpu())
        inside = (self._targets >= part.start) & (self._targets < part.stop)
        index = (self._targets[inside] - part.start).to(logits.device)
        self._chosen[inside] = (
            logits[inside.to(logits.device)].gather(-1, index[:, None])[:, 0].cpu()
        )

    def bits(self) -> np.ndarray:
        """Return the bits of each next token, float64 ``(tokens - 1,)``."""
        return (self._total - self._chosen).double().numpy() / math.log(2)


def first_token(layout: Layout) -> int:
    """Return the id of bos, else of eos, from config.json or generation_config.json."""
    checkpoint = layout.checkpoint
    filled = fill_defaults(checkpoint.config, lambda old: old, checkpoint.family)
    generation = checkpoint.json("generation_config.json")
    for key in ("bos_token_id", "eos_token_id"):
        for config in (layout.config, generation, layout.family.text_config(filled)):
            value = config.get(key)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int):
                return value
    raise CheckpointError(
        checkpoint.path / "config.json",
        "names neither bos_token_id nor eos_token_id, one of which begins every window",
        fix="add one of them",
    )
