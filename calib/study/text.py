"""The text of a study: one part to choose channels by, one held-out part to score on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from calib.refit import GramSums
from calib.scoring.score import first_token
from calib.statistics.sums import ChannelSums, cosine_sum, weight_norms
from calib.streaming.batches import (
    NO_HOOKS,
    ChannelHook,
    LayerHooks,
    Routed,
    RoutedHook,
    Stream,
    Tokens,
)
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.empty_model import positions
from calib.streaming.ffn import ExpertKey, FfnModule
from calib.streaming.layers import not_finite
from calib.text.chat import documents_of
from calib.text.heldout import Encoded, split_documents
from calib.text.windows import byte_windows, token_windows, within_positions
from surgery.families.schema import EXPERT
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice
from surgery.process import Stopwatch
from surgery.stats.channel_stats import AxisSums
from surgery.text.documents import TextOptions
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.tokenizer_file import TokenizerFile, load_tokenizer, prune_tokenizer
from surgery.vocabulary.order import Rarity

GATE_EVERY = 8
"""One of so many windows judges whether a refitted down_proj is used; the others fit it."""


def has_one_ffn(ffn_modules: Sequence[FfnModule]) -> bool:
    """Whether a layer has a single FFN, through which all tokens pass.

    Such an FFN is refitted on the hidden states of the pruned layers before it. Experts, and
    several FFNs in one layer, are refitted on those of the dense model.
    """
    return len(ffn_modules) == 1 and not ffn_modules[0].routed


class CalibrationPass:
    """Windows that run through the dense model, and their statistics of one layer at a time."""

    def __init__(
        self,
        layout: Layout,
        windows: Sequence[np.ndarray],
        bucket_of: np.ndarray,
        edges: Sequence[int],
        *,
        refits: bool = False,
        chooses: bool = True,
    ) -> None:
        """Take ``windows`` of the source's ids.

        Args:
            layout: The model.
            windows: Token ids.
            bucket_of: int64 ``[V]``, the bucket of each token.
            edges: Ranks of rarity at which buckets end, ascending; the last is V.
            refits: Whether down_proj will be refitted. Then some windows only judge the result, and
                Gram matrices are taken in layers that do not have a single FFN.
            chooses: Whether channels, experts or layers are chosen by the statistics.
        """
        self._layout = layout
        self._buckets = torch.from_numpy(bucket_of)
        self._edges = np.array(edges)
        gate = [w for n, w in enumerate(windows) if refits and n % GATE_EVERY == GATE_EVERY - 1]
        fit = [w for n, w in enumerate(windows) if not refits or n % GATE_EVERY < GATE_EVERY - 1]
        self.streams = [Stream(part) for part in (fit, gate) if part]
        self._refits, self._chooses = refits, chooses
        self.watch = Stopwatch()
        """Seconds of "calibrate"."""
        self.sums: dict[str, AxisSums] = {}
        self.cosines: list[float] = []
        """Per layer passed, Σ cos(x_in, x_out) over the tokens."""
        self.grams: list[dict[ExpertKey, GramSums]] = []
        """Those to fit by, then those to judge by if the text has enough windows."""

    def weights(self, vocab_size: int) -> np.ndarray:
        """Return float64 ``[buckets]``: 1 for tokens kept at V' (paper eq. 5), which is an edge."""
        if len(self._edges) == 1:  # all tokens that occur are kept
            return np.ones(1)
        return (self._edges <= vocab_size).astype(np.float64)

    def measure(self, decoder: StreamedDecoder, index: int) -> None:
        """Run the windows through a layer and take its ``sums`` and ``grams``."""
        needed = self._refits and not has_one_ffn(decoder.ffn_modules(index))
        self.grams = [{} for _ in self.streams if needed]
        if not self._chooses:
            for stream, grams in zip_longest(self.streams, self.grams):
                hooks = LayerHooks(partial(_add_gram, grams)) if grams is not None else NO_HOOKS
                decoder.run(index, stream, hooks)
            return
        layout, device = self._layout, decoder.reader.device
        norms = weight_norms(decoder.layer(index), decoder.ffn_modules(index))
        sums = {
            axis: ChannelSums(
                len(self._edges), experts, layout.channels_of(axis), device, routed=axis == EXPERT
            )
            for axis, experts in layout.ffn_outputs[index].items()
        }
        self.cosines.append(0.0)
        for stream, grams in zip_longest(self.streams, self.grams):
            hooks = LayerHooks(self._hook(sums, grams), self._add_cosines, self._outputs_of(sums))
            decoder.run(index, stream, hooks)
        self.sums = {axis: each.numbers(norms[axis]) for axis, each in sums.items()}
        if not all(each.finite for each in self.sums.values()):
            raise not_finite(layout, index, decoder.layer(index), decoder.reader.dtype)

    def forget(self) -> None:
        """Free the statistics of the layer."""
        self.sums, self.grams = {}, []

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return sum(stream.tokens for stream in self.streams)

    @property
    def block_influence(self) -> np.ndarray:
        """float64 ``[L]``: 1 − mean cosine (ShortGPT, arXiv 2403.03853)."""
        return 1 - np.array(self.cosines) / self.tokens

    def _add_cosines(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self.cosines[-1] += cosine_sum(before, after)

    def _outputs_of(self, sums: dict[str, ChannelSums]) -> RoutedHook:
        """Return a hook that adds what routed experts put out to ``sums``."""

        def add(layer: int, expert: int, tokens: Tokens, routed: Routed) -> None:
            sums[EXPERT].add_outputs(expert, self._buckets[tokens.ids], routed)

        return add

    def _hook(
        self, sums: dict[str, ChannelSums], grams: dict[ExpertKey, GramSums] | None
    ) -> ChannelHook:
        """Return a hook that adds activations to ``sums``, and to ``grams`` if given."""

        def add(layer: int, axis: str, expert: int, tokens: Tokens, act: torch.Tensor) -> None:
            sums[axis].add(expert, tokens, self._buckets[tokens.ids], act)
            if grams is not None:
                _add_gram(grams, layer, axis, expert, tokens, act)

        return add


def _add_gram(
    grams: dict[ExpertKey, GramSums],
    layer: int,
    axis: str,
    expert: int,
    tokens: Tokens,
    act: torch.Tensor,
) -> None:
    """Add activations to the sums of their axis and expert."""
    if (axis, expert) not in grams:
        grams[axis, expert] = GramSums(act.shape[1], act.device)
    grams[axis, expert].add(act)


WINDOW_BYTES = 2048
"""Bytes of a window of held-out text."""


@dataclass(frozen=True, eq=False)
class StudyText:
    """Calibration text and held-out text, which any size of the vocabulary can tokenize."""

    layout: Layout
    rarity: Rarity
    tokenizer: TokenizerFile | None
    """None if the whole vocabulary is kept."""
    calibration: Iterable[str]
    """Documents to choose channels by."""
    heldout: Sequence[str]
    """Windows of text to score on."""
    samples: int
    """Most windows of calibration text."""
    seq_len: int
    _tokenizers: dict[int, tuple[Any, np.ndarray]] = field(default_factory=dict, init=False)
    _heldout: dict[int, Encoded] = field(default_factory=dict, init=False)

    @classmethod
    def split(
        cls,
        layout: Layout,
        choice: SizeChoice,
        text: TextOptions,
    ) -> "StudyText":
        """Hold out every fourth block of ``text``, and use at most ``text.windows`` windows of it.

        Raises:
            DataError: the text is too short.
        """
        calibration, heldout = split_documents(documents_of(layout, text))
        windows = byte_windows(heldout, text.windows, WINDOW_BYTES)
        rarity, tokenizer = choice.rarity, choice.tokenizer
        seq_len = within_positions(text.seq_len, positions(layout))
        return cls(layout, rarity, tokenizer, calibration, windows, text.samples, seq_len)

    def ids(self, vocab_size: int) -> IdMap:
        """Return the map to the ``vocab_size`` most common tokens."""
        return self.rarity.id_map(vocab_size)

    def encoded(self, vocab_size: int) -> Encoded:
        """Return the held-out text, tokenized by the vocabulary of this size."""
        if vocab_size not in self._heldout:
            tokenizer, old_ids = self.tokenizer_of(vocab_size)
            first = first_token(self.layout)
            self._heldout[vocab_size] = Encoded.of(
                self.heldout, tokenizer, old_ids, first, positions(self.layout)
            )
        return self._heldout[vocab_size]

    def calibration_pass(
        self,
        vocab_size: int,
        samples: int | None = None,
        *,
        edges: Sequence[int] = (),
        refits: bool = False,
        chooses: bool = True,
    ) -> CalibrationPass:
        """Return a pass over the calibration text, tokenized by the vocabulary of this size.

        Args:
            vocab_size: Rows of the vocabulary.
            samples: Most windows; None is ``self.samples``.
            edges: Sizes V' for which the statistics are to be exact (paper eq. 5).
            refits: Whether down_proj will be refitted.
            chooses: Whether channels, experts or layers are chosen by the statistics.
        """
        tokenizer, old_ids = self.tokenizer_of(vocab_size)
        count = min(samples or self.samples, self.samples)
        windows = token_windows(self.calibration, tokenizer, count, self.seq_len)
        ranks = sorted({*edges, self.layout.vocab_size})
        buckets = self.rarity.buckets(ranks)
        ids = [old_ids[w] for w in windows]
        return CalibrationPass(self.layout, ids, buckets, ranks, refits=refits, chooses=chooses)

    def tokenizer_of(self, vocab_size: int) -> tuple[Any, np.ndarray]:
        """Return the library's tokenizer, and the source's id for each of its ids."""
        if vocab_size not in self._tokenizers:
            ids = self.ids(vocab_size)
            if self.tokenizer is None or ids.identity:
                every = np.arange(self.layout.vocab_size + self.rarity.rowless)
                self._tokenizers[vocab_size] = load_tokenizer(self.layout.checkpoint.path), every
            else:
                self._tokenizers[vocab_size] = prune_tokenizer(self.tokenizer, ids)
        return self._tokenizers[vocab_size]
