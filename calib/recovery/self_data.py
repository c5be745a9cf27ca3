"""Text that the dense model writes itself: the data set of self-data distillation."""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig

from calib.recovery.model import load_model
from calib.scoring.score import first_token
from calib.streaming.settings import PassSettings
from surgery.errors import DataError
from surgery.layout.layout import Layout
from surgery.process import Progress, stage
from surgery.tokenizer.tokenizer_file import load_tokenizer

LOG = logging.getLogger(__name__)

BATCH = 16
"""Texts that are written together."""


@dataclass(frozen=True)
class Writing:
    """How much is written, and where."""

    path: Path
    """A .jsonl file."""
    tokens: int
    """By the dense tokenizer."""
    seq_len: int
    """Most tokens of a text."""
    seed: int
    """Of what is drawn."""


def write_self_data(
    teacher: Layout,
    documents: Iterable[str],
    writing: Writing,
    settings: PassSettings,
    progress: Progress | None = None,
) -> None:
    """Let the dense model write text at temperature 1.

    Each text begins with the first token of a document and ends where the model ends it, or after
    ``seq_len`` tokens (paper, appendix A.4). Lines that an earlier run has written stay: a run that
    was killed goes on after them, and ends with the same file.

    Args:
        teacher: The dense model, which is in memory whole.
        documents: Their first tokens are used in turn, as often as needed.
        writing: How much is written, and where.
        settings: Where and in what dtype the model computes.
        progress: Called with "self-data", tokens written, and tokens to write.

    Raises:
        DataError: there is no document.
    """
    tokenizer, first = load_tokenizer(teacher.checkpoint.path), first_token(teacher)
    path, tokens = writing.path, writing.tokens
    starts = cycle(_starts(documents, tokenizer))
    advance = stage(progress, "self-data", tokens)
    written = _complete_lines(path)
    done = sum(line["tokens"] for line in written)
    advance(min(done, tokens))
    if done >= tokens:
        return
    model = load_model(teacher, settings.dtype).eval().to(settings.device)
    drawn = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(1, writing.seq_len - 2),
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=first,
    )
    batches = len(written) // BATCH
    next(islice(starts, batches * BATCH, batches * BATCH), None)
    with open(path, "a", encoding="utf-8") as file:
        while done < tokens:
            begin = torch.tensor([[first, next(starts)] for _ in range(BATCH)])
            torch.manual_seed(writing.seed + batches)
            with torch.no_grad():
                found = model.generate(begin.to(settings.device), generation_config=drawn)
            for row in found[:, 1:].tolist():
                ids = row[: row.index(first)] if first in row else row
                text = tokenizer.decode(ids, skip_special_tokens=True)
                file.write(json.dumps({"text": text, "tokens": len(ids)}, ensure_ascii=False))
                file.write("\n")
                advance(min(len(ids), max(0, tokens - done)))
                done += len(ids)
            file.flush()
            batches += 1


def _starts(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[int]:
    """Yield the first token of each document."""
    count = 0
    for document in documents:
        ids = tokenizer.encode(document[:64], add_special_tokens=False).ids
        if ids:
            count += 1
            yield ids[0]
    if not count:
        raise DataError("`data`", "has no document", fix="give text with words in it")


def _complete_lines(path: Path) -> list[dict[str, int]]:
    """Return the lines of whole batches, and cut off what a kill left after them."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    lines = raw.split(b"\n")[:-1]
    whole = lines[: len(lines) // BATCH * BATCH]
    size = sum(len(line) + 1 for line in whole)
    with open(path, "r+b") as file:
        file.truncate(size)
    return [json.loads(line) for line in whole]
