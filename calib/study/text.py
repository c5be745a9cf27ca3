"""The text that all cuts of a study share: what they are chosen by, and scored on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from calib.refit import Gram
from calib.scoring.score import first_token
from calib.statistics.sums import ChannelSums, cosine_sum, weight_norms
from calib.streaming.batches import ChannelHook, LayerHooks, Stream, Tokens
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.ffn import ExpertKey, FfnModule
from calib.text.chat import documents_of
from calib.text.heldout import Encoded, split_documents
from calib.text.windows import byte_windows, token_windows
from surgery.layout.layout import Layout
from surgery.planning.request import SizeChoice
from surgery.stats.channel_stats import AxisSums
from surgery.text.documents import TextOptions
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.tokenizer_file import TokenizerFile, load_tokenizer, prune_tokenizer
from surgery.vocabulary.order import Rarity

GATE_EVERY = 8
"""One window in so many decides whether a refitted down_proj is used; the others fit it."""


def has_one_ffn(ffn_modules: Sequence[FfnModule]) -> bool:
    """Whether a layer has one FFN that all tokens see.

    Such a layer is refitted on what the layers before it have become; experts, and FFNs beside one
    another, on what the dense model gives them.
    """
    return len(ffn_modules) == 1 and not ffn_modules[0].routed


class CalibrationPass:
    """Windows as one vocabulary cuts them; what they show is kept for one layer at a time."""

    def __init__(
        self,
        layout: Layout,
        windows: Sequence[np.ndarray],
        bucket_of: np.ndarray,
        edges: Sequence[int],
        *,
        refits: bool = False,
    ) -> None:
        """Take ``windows`` of ids of the source.

        Args:
            layout: The model.
            windows: Token ids.
            bucket_of: int64 ``[V]``, the bucket of each token.
            edges: Ranks of rarity at which buckets end, ascending; the last is V.
            refits: Whether some windows are to judge refitted matrices, and Gram matrices are
                taken in layers that do not have one FFN.
        """
        self._layout = layout
        self._buckets = torch.from_numpy(bucket_of)
        self._edges = np.array(edges)
        gate = [w for n, w in enumerate(windows) if refits and n % GATE_EVERY == GATE_EVERY - 1]
        fit = [w for n, w in enumerate(windows) if not refits or n % GATE_EVERY < GATE_EVERY - 1]
        self.streams = [Stream(part) for part in (fit, gate) if part]
        self._refits = refits
        self.sums: dict[str, AxisSums] = {}
        self.cosines: list[float] = []
        """Per layer passed, Σ cos(x_in, x_out) over the tokens."""
        self.grams: list[dict[ExpertKey, Gram]] = []
        """For fitting, and for the gate where the text is long enough to have one."""

    def weights(self, vocab_size: int) -> np.ndarray:
        """float64 ``[buckets]``: 1 for tokens that stay at V' (paper eq. 5), one of the edges."""
        if len(self._edges) == 1:  # all tokens that there are stay
            return np.ones(1)
        return (self._edges <= vocab_size).astype(np.float64)

    def measure(self, decoder: StreamedDecoder, index: int) -> None:
        """Carry the windows through a layer and take ``sums`` and ``grams`` of it."""
        layout, device = self._layout, decoder.reader.device
        norms = weight_norms(decoder.layer(index), decoder.ffn_modules(index))
        sums = {
            axis: ChannelSums(len(self._edges), experts, layout.channels_of(axis), device)
            for axis, experts in layout.ffn_outputs[index].items()
        }
        needed = self._refits and not has_one_ffn(decoder.ffn_modules(index))
        self.grams = [{} for _ in self.streams if needed]
        self.cosines.append(0.0)
        for stream, grams in zip_longest(self.streams, self.grams):
            hooks = LayerHooks(self._hook(sums, grams), self._compare)
            decoder.run(index, stream, hooks)
        self.sums = {axis: each.numbers(norms[axis]) for axis, each in sums.items()}

    def forget(self) -> None:
        """Free what the layer has shown."""
        self.sums, self.grams = {}, []

    @property
    def block_influence(self) -> np.ndarray:
        """float64 ``[L]``: 1 − mean cosine (ShortGPT, arXiv 2403.03853)."""
        return 1 - np.array(self.cosines) / sum(stream.tokens for stream in self.streams)

    def _compare(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self.cosines[-1] += cosine_sum(before, after)

    def _hook(
        self, sums: dict[str, ChannelSums], grams: dict[ExpertKey, Gram] | None
    ) -> ChannelHook:
        """What adds up activations to ``sums``, and to ``grams`` where there are some."""

        def see(layer: int, axis: str, expert: int, tokens: Tokens, act: torch.Tensor) -> None:
            sums[axis].add(expert, tokens, self._buckets[tokens.ids], act)
            if grams is None:
                return
            if (axis, expert) not in grams:
                grams[axis, expert] = Gram(act.shape[1], act.device)
            grams[axis, expert].add(act)

        return see


WINDOW_BYTES = 2048
"""Of a window of held-out text."""


@dataclass(frozen=True, eq=False)
class StudyText:
    """Text in two parts, cut by whichever vocabulary is asked for."""

    layout: Layout
    rarity: Rarity
    tokenizer: TokenizerFile | None
    """None where the vocabulary stays whole."""
    calibration: Iterable[str]
    """Documents."""
    heldout: Sequence[str]
    """Windows of text."""
    samples: int
    """Windows of calibration text, at most."""
    seq_len: int
    _cut: dict[int, tuple[Any, np.ndarray]] = field(default_factory=dict, init=False)
    _heldout: dict[int, Encoded] = field(default_factory=dict, init=False)

    @classmethod
    def split(
        cls,
        layout: Layout,
        choice: SizeChoice,
        text: TextOptions,
    ) -> "StudyText":
        """Hold out every fourth block of ``text``, at most ``text.windows`` windows of it.

        Raises:
            DataError: the text is too short for that.
        """
        kept, held = split_documents(documents_of(layout, text))
        texts = byte_windows(held, text.windows, WINDOW_BYTES)
        rarity, tokenizer = choice.rarity, choice.tokenizer
        return cls(layout, rarity, tokenizer, kept, texts, text.samples, text.seq_len)

    def ids(self, vocab_size: int) -> IdMap:
        """The map to the ``vocab_size`` most common tokens."""
        return self.rarity.id_map(vocab_size)

    def encoded(self, vocab_size: int) -> Encoded:
        """The held-out text as a vocabulary of this size cuts it."""
        if vocab_size not in self._heldout:
            tokenizer, old_ids = self._tokenizer(vocab_size)
            first = first_token(self.layout)
            self._heldout[vocab_size] = Encoded.of(self.heldout, tokenizer, old_ids, first)
        return self._heldout[vocab_size]

    def reading(
        self,
        vocab_size: int,
        samples: int | None = None,
        *,
        edges: Sequence[int] = (),
        refits: bool = False,
    ) -> CalibrationPass:
        """The calibration text as a vocabulary of this size cuts it, at most ``samples`` windows.

        ``edges`` are sizes V' for which the source's own tokens are counted apart (paper eq. 5).
        """
        tokenizer, old_ids = self._tokenizer(vocab_size)
        count = min(samples or self.samples, self.samples)
        windows = token_windows(self.calibration, tokenizer, count, self.seq_len)
        ranks = sorted({*edges, self.layout.vocab_size})
        buckets = self.rarity.buckets(ranks)
        return CalibrationPass(
            self.layout, [old_ids[w] for w in windows], buckets, ranks, refits=refits
        )

    def _tokenizer(self, vocab_size: int) -> tuple[Any, np.ndarray]:
        """The library's tokenizer and the source's id of each of its ids."""
        if vocab_size not in self._cut:
            ids = self.ids(vocab_size)
            if self.tokenizer is None or ids.identity:
                every = np.arange(self.layout.vocab_size + self.rarity.rowless)
                self._cut[vocab_size] = load_tokenizer(self.layout.checkpoint.path), every
            else:
                self._cut[vocab_size] = prune_tokenizer(self.tokenizer, ids)
        return self._cut[vocab_size]
