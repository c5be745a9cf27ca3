"""Bits per byte on held-out text: comparable between vocabularies, unlike perplexity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from calib.batches import Batch
from calib.decoder import StreamedDecoder
from calib.weights import WeightReader
from surgery.default_ids import fill_defaults
from surgery.errors import CheckpointError
from surgery.layout import Layout


@dataclass(frozen=True)
class Score:
    """What a text costs under a model."""

    bits: float
    """Σ −log2 p(token | window so far)."""
    bytes: int
    """Of UTF-8, over all windows."""
    tokens: int
    """Predicted ones: the leading bos is not."""
    windows: int
    lossy_windows: int
    """Windows that the tokenizer does not give back: it drops bytes, whose cost is missing."""

    @property
    def bits_per_byte(self) -> float:
        """Σ bits / Σ bytes."""
        return self.bits / self.bytes

    @property
    def finite(self) -> bool:
        """Whether the model gave numbers at all."""
        return math.isfinite(self.bits)


def score(
    layout: Layout,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], object] = lambda windows: None,
) -> Score:
    """Score ``texts``, each preceded by bos (eos where there is none), through streamed layers."""
    first = _first_token(layout)
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    windows = [np.array([first, *ids]) for ids in encoded if ids]
    lossy = sum(
        tokenizer.decode(ids, skip_special_tokens=False) != text
        for ids, text in zip(encoded, texts, strict=True)
    )

    with WeightReader(layout.checkpoint, device, dtype) as reader:
        decoder = StreamedDecoder(layout, reader)
        batches = decoder.embed(windows)
        decoder.run_layers(batches, lambda *_: None, progress=progress)
        bits = _bits(decoder, batches, layout.vocab_size)
    return Score(
        bits=bits,
        bytes=sum(len(text.encode("utf-8")) for text in texts),
        tokens=sum(len(window) - 1 for window in windows),
        windows=len(texts),
        lossy_windows=lossy,
    )


@torch.no_grad()
def _bits(decoder: StreamedDecoder, batches: Sequence[Batch], vocab_size: int) -> float:
    """Σ −log2 softmax at the next token, log-sum-exp taken block by block of the head."""
    hidden = [batch.hidden[i : i + 1, :-1] for batch in batches for i in range(len(batch.ids))]
    targets = [batch.ids[i : i + 1, 1:] for batch in batches for i in range(len(batch.ids))]
    total = [torch.full(target.shape, -math.inf) for target in targets]
    chosen = [torch.zeros(target.shape) for target in targets]
    for place, start, logits in decoder.logits(hidden, np.arange(vocab_size)):
        block = logits.float()
        total[place] = torch.logaddexp(total[place], block.logsumexp(-1).cpu())
        local = targets[place] - start
        inside = (local >= 0) & (local < block.shape[-1])
        index = local.clamp(0, block.shape[-1] - 1).unsqueeze(-1).to(block.device)
        chosen[place][inside] = block.gather(-1, index).squeeze(-1).cpu()[inside]
    nats = sum(float((t - c).double().sum()) for t, c in zip(total, chosen, strict=True))
    return nats / math.log(2)


def _first_token(layout: Layout) -> int:
    """The id of bos, or of eos where there is none, by config.json or generation_config.json."""
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
