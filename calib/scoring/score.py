"""Bits per byte on held-out text; unlike perplexity, comparable between vocabularies."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer

from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.empty_model import positions
from calib.streaming.layers import weights_stage
from calib.streaming.settings import PassSettings
from calib.streaming.weights import WeightReader
from calib.text.chat import documents_of
from calib.text.windows import byte_windows, scored_windows
from surgery.errors import CheckpointError, DataError, FamilyError
from surgery.families.default_ids import fill_defaults
from surgery.families.schema import DECODER
from surgery.layout.layout import Layout
from surgery.plot import html_table
from surgery.process import Progress, spoken
from surgery.text.documents import TextOptions

LOG = logging.getLogger(__name__)


RESAMPLES, SEED = 2000, 0
"""How often the windows are drawn anew, and the seed, so that a margin is the same every time."""

DRAWN_TOGETHER = 1 << 20
"""Windows or items that are drawn at a time: 8 MiB of indices."""

LEAST_WINDOWS = 8
"""Fewer windows, or items of a task, than this do not show how much chance there is in them."""

CHANCE = 5
"""Per cent of differences that chance alone would make larger than a margin."""


@dataclass(frozen=True)
class Change:
    """How many more bits a model needs than another one for the same windows."""

    share: float
    """Σ bits / Σ bits of the reference − 1."""
    margin: float | None
    """Half of the interval that holds 95 % of the shares of windows drawn anew (bootstrap, the
    same windows of both models). None for fewer than ``LEAST_WINDOWS`` windows."""

    @property
    def clear(self) -> bool | None:
        """Whether the change is larger than chance makes it; None where that is not known."""
        return None if self.margin is None else abs(self.share) > self.margin


@dataclass(frozen=True)
class Score:
    """The bits that a model needs for a text."""

    window_bits: tuple[float, ...]
    """For each window of text, Σ −log2 p(token | earlier tokens of the window)."""
    window_bytes: tuple[int, ...]
    """UTF-8 bytes of each window."""
    text_digest: str
    """SHA-256 of the windows' text."""
    tokens: int
    """Predicted tokens, without the leading bos."""
    lossy_windows: int
    """Windows that the tokenizer cannot decode to the same text. Their bits are too low."""

    @property
    def bits(self) -> float:
        """Of all windows."""
        return sum(self.window_bits)

    @property
    def bytes(self) -> int:
        """Of all windows."""
        return sum(self.window_bytes)

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self.window_bytes)

    @property
    def bits_per_byte(self) -> float:
        """Σ bits / Σ bytes."""
        return self.bits / self.bytes

    @property
    def margin(self) -> float | None:
        """By how much scores of two such texts may differ by chance, in bits per byte.

        √2 times half of the interval that holds 95 % of the scores of windows drawn anew. Two
        models on the same windows differ by chance far less: see ``change_from``.
        """
        half = half_interval(self.window_bits, self.window_bytes)
        return None if half is None else math.sqrt(2) * half

    @property
    def finite(self) -> bool:
        """Whether the model's logits gave a finite number of bits."""
        return math.isfinite(self.bits)

    def change_from(self, reference: "Score") -> Change:
        """Return how many more bits this model needs than that of ``reference``.

        Example:
            >>> before, after = (calib.score(m, data=text) for m in ("my-model", "smaller"))
            >>> after.change_from(before).share

        Raises:
            DataError: the two scores are not of the same windows of text.
        """
        if self.text_digest != reference.text_digest:
            raise _other_text()
        half = half_interval(self.window_bits, reference.window_bits)
        return Change(self.bits / reference.bits - 1, half)

    def _repr_html_(self) -> str:
        margin = None if self.margin is None else f"{self.margin:.4f}"
        row = ("held-out text", f"{self.bits_per_byte:.4f}", margin, self.bytes, self.windows)
        heads = ("", "bits per byte", "±", "bytes", "windows")
        return html_table("score", heads, [row])

    def facts(self) -> dict[str, Any]:
        """Return the figures for JSON, without those of each window."""
        names = ("bits_per_byte", "margin", "bytes", "tokens", "windows", "lossy_windows")
        return {name: getattr(self, name) for name in names}


def score_table(rows: Sequence[tuple[str, Score, float]]) -> str:
    """Return scores of the same windows as text for people.

    Args:
        rows: Name of a model, its score, and the seconds that took. The first is the reference.
    """
    name, first, took = rows[0]
    size = f"{first.windows:,} windows, {first.bytes:,} bytes"
    if len(rows) == 1:
        margin = "" if first.margin is None else f" ± {first.margin:.4f}"
        lines = [
            f"{first.bits_per_byte:.4f}{margin} bits per byte "
            f"({size}, {first.tokens:,} tokens, {spoken(took)})"
        ]
        if margin:
            lines.append(
                "±: scores of two such texts differ by less, in 95 of 100 cases. Two models on the "
                "same text differ by far less: score them together"
            )
        return "\n".join(lines)
    wide = 2 + max(len(name) for name, _, _ in rows)
    heads = ("bits/byte", "tokens", "time", "change", "±")
    lines = [" " * wide + "".join(f"{head:>12}" for head in heads)]
    for name, score, took in rows:
        cells = [f"{score.bits_per_byte:.4f}", f"{score.tokens:,}", spoken(took)]
        note = ""
        if score is not first:
            change = score.change_from(first)
            cells.append(f"{change.share:+.2%}")
            cells.append("?" if change.margin is None else f"{change.margin:.2%}")
            note = "" if change.clear is not False else "  may be chance"
        lines.append(f"{name:<{wide}}" + "".join(f"{cell:>12}" for cell in cells) + note)
    lines.append(f"change: bits over those of {rows[0][0]}, on the same {size}")
    lines.append(
        f"±: not known from fewer than {LEAST_WINDOWS} windows"
        if first.windows < LEAST_WINDOWS
        else "±: other windows of such text move a change by less, in 95 of 100 cases; "
        "a change that is smaller may be chance"
    )
    return "\n".join(lines)


def half_interval(
    above: Sequence[float], below: Sequence[float], groups: Sequence[int] = ()
) -> float | None:
    """Return half of the interval that holds 95 % of Σ above / Σ below over pairs drawn anew.

    This is the percentile bootstrap (Efron and Tibshirani 1993, section 13.3). None for too few
    pairs, and where a ratio is not finite.

    Args:
        above: Numbers of windows or items.
        below: Those of the same windows or items that they are divided by.
        groups: How many pairs each group has, from which as many are drawn; empty is one group.
    """
    pairs = np.array([above, below], dtype=np.float64)
    sizes = groups or (pairs.shape[1],)
    if min(sizes) < LEAST_WINDOWS or not np.isfinite(pairs).all():
        return None
    sums = np.zeros((RESAMPLES, 2))
    for part in np.split(pairs, np.cumsum(sizes)[:-1], axis=1):
        draws, count = np.random.default_rng(SEED), part.shape[1]
        for each in np.array_split(sums, -(-RESAMPLES * count // DRAWN_TOGETHER)):
            drawn = draws.integers(0, count, (len(each), count))
            each += part[:, drawn].sum(axis=2).T
    if not sums[:, 1].all():
        return None
    low, high = np.percentile(sums[:, 0] / sums[:, 1], (CHANCE / 2, 100 - CHANCE / 2))
    return float(high - low) / 2


def _other_text() -> DataError:
    return DataError(
        "`data`",
        "is not the same text for both models, so their scores cannot be compared",
        found="other windows, as of another text or of chats under another chat template",
        fix="score both models on the same plain text",
    )


class Asked(Protocol):
    """A text that passes through a model, with the predictions that are asked of it."""

    stream: Stream

    def predictions(self) -> "list[Predictions]":
        """Return what the head is to count; the text has passed the layers."""
        ...


def run_asked(
    layout: Layout,
    asked: Sequence[Asked],
    settings: PassSettings,
    progress: Progress | None = None,
) -> None:
    """Run all texts through streamed layers and the head, in one pass.

    Args:
        layout: The model.
        asked: Its texts.
        settings: How the layers compute.
        progress: Called with "score", the bytes of weights that are done with, and their total.
    """
    streams = [each.stream for each in asked]
    with WeightReader(layout.checkpoint, settings.device, settings.dtype) as reader:
        decoder = StreamedDecoder(layout, reader, settings)
        decoder.embed(streams)
        windows = sum(len(stream.windows) for stream in streams)
        decoder.run_layers(streams, progress=weights_stage(progress, "score", layout, windows))
        count_bits(decoder, [each for text in asked for each in text.predictions()])


class AskedText:
    """Windows of text, each preceded by bos (eos where there is none), whose bits are counted."""

    def __init__(self, layout: Layout, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        """Tokenize ``texts`` by the model's own ``tokenizer``."""
        first, most = first_token(layout), positions(layout)
        encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        split = [scored_windows(first, np.array(ids, dtype=np.int64), most) for ids in encoded]
        self.stream = Stream([window for windows in split for window in windows])
        self._texts, self._parts = texts, [len(windows) for windows in split]
        self._rows = np.arange(layout.vocab_size)
        self._lossy = sum(
            tokenizer.decode(ids, skip_special_tokens=False) != text
            for ids, text in zip(encoded, texts, strict=True)
        )
        self._most = most

    def predictions(self) -> "list[Predictions]":
        """As ``Asked``."""
        self._predicted = predictions_of(self.stream, self._rows)
        return list(self._predicted.values())

    def score(self) -> Score:
        """Return the score; the predictions have been counted."""
        if long := sum(parts > 1 for parts in self._parts):
            LOG.info(
                "note: %d windows have more tokens than the model has positions (%s); "
                "each is scored in several",
                long,
                f"{self._most:,}",
            )
        left = iter(each.bits() for _, each in sorted(self._predicted.items()))
        return Score(
            tuple(sum(float(part.sum()) for part in islice(left, n)) for n in self._parts),
            tuple(len(text.encode("utf-8")) for text in self._texts),
            _digest(self._texts),
            tokens=sum(len(window) - 1 for window in self.stream.windows),
            lossy_windows=self._lossy,
        )


def score_windows(
    layout: Layout, texts: Sequence[str], tokenizer: Tokenizer, settings: PassSettings
) -> Score:
    """Score ``texts`` alone, as ``run_asked`` does."""
    asked = AskedText(layout, texts, tokenizer)
    run_asked(layout, [asked], settings)
    return asked.score()


def _digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 of windows of text and their lengths."""
    result = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8")
        result.update(len(raw).to_bytes(8, "little") + raw)
    return result.hexdigest()


def texts_of(layouts: Sequence[Layout], text: TextOptions, window_bytes: int) -> list[str]:
    """Return the windows of ``window_bytes`` bytes that all models are scored on.

    Raises:
        DataError: there is no text; or chats become another text under another model's template.
    """
    every = [byte_windows(documents_of(each, text), text.samples, window_bytes) for each in layouts]
    if any(texts != every[0] for texts in every):
        raise _other_text()
    return every[0]


def check_predicts(layout: Layout) -> None:
    """Refuse a model that predicts no next token, so that there are no bits to count.

    Raises:
        FamilyError: it is an encoder, or was saved without its head.
    """
    if not layout.predicts:
        kind = layout.checkpoint.config.get("model_type")
        made = layout.family.kind
        what = "was saved without its head" if made == DECODER else f"is an {made}"
        raise FamilyError(
            layout.checkpoint.path,
            f"{kind} {what}, which is not scored: bits count what a decoder alone predicts",
            fix="prune with sizes, and compare the two models on a task of your own",
        )


def predictions_of(stream: Stream, rows: np.ndarray) -> "dict[int, Predictions]":
    """Return, by window, the predictions of all its tokens but the first."""
    return {
        index: Predictions(states[:-1], ids[1:].numpy(), rows)
        for index, ids, states in stream.hidden()
    }


@torch.no_grad()
def count_bits(decoder: StreamedDecoder, asked: "Sequence[Predictions]") -> None:
    """Let the head count the bits of all predictions.

    The head is read once, block by block, and the log-sum-exp is added up over the blocks.
    """
    hidden = [(each.states, each.rows) for each in asked]
    for index, part, logits in decoder.logits(hidden):
        asked[index].add(part, logits[0].float())


class Predictions:
    """Adds up the log-sum-exp of some hidden states and collects the logits of their tokens."""

    def __init__(self, states: torch.Tensor, tokens: np.ndarray, rows: np.ndarray) -> None:
        """Take ``states`` ``(n, D)`` after the last layer, and the tokens ``(n,)`` they predict.

        ``rows`` are the ascending ids of the vocabulary.
        """
        self.states = states[None]
        self.rows = rows
        self._targets = torch.from_numpy(np.searchsorted(rows, tokens))
        self._total = torch.full(self._targets.shape, -math.inf)
        self._chosen = torch.zeros(self._targets.shape)

    def add(self, part: slice, logits: torch.Tensor) -> None:
        """Add ``logits`` ``(n, rows)`` of the ``part`` of the vocabulary."""
        self._total = torch.logaddexp(self._total, logits.logsumexp(-1).cpu())
        inside = (self._targets >= part.start) & (self._targets < part.stop)
        index = (self._targets[inside] - part.start).to(logits.device)
        self._chosen[inside] = (
            logits[inside.to(logits.device)].gather(-1, index[:, None])[:, 0].cpu()
        )

    def bits(self) -> np.ndarray:
        """Return −log2 softmax of each token, float64 ``(n,)``."""
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
        checkpoint.config_path,
        "names neither bos_token_id nor eos_token_id, one of which begins every window",
        fix="add one of them",
    )
