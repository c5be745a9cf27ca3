"""Text that the dense model writes itself: the data set of self-data distillation."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig

from calib.recovery.model import load_model, loadable_name
from calib.scoring.score import first_token
from calib.streaming.settings import PassSettings
from surgery.errors import DataError
from surgery.files.atomic import write_atomic
from surgery.files.strict_json import read_file
from surgery.layout.layout import Layout
from surgery.process import Progress, stage
from surgery.tokenizer.tokenizer_file import load_tokenizer

LOG = logging.getLogger(__name__)

BATCH = 16
"""Texts that transformers writes together."""
VLLM_BATCH = 256
"""Texts that vLLM is given together; how many run at once is its choice."""

Draw = Callable[[Sequence[int], int], list[list[int]]]
"""Returns the ids of one text for each first token, which it begins with; the second argument is
the seed."""


@dataclass(frozen=True)
class Writing:
    """How much is written, and where: some ``tokens``, or for some ``seconds``."""

    path: Path
    """A .jsonl file."""
    tokens: int | None
    """By the dense tokenizer."""
    seconds: float | None
    """Of writing; one batch is written at least."""
    clock: Path
    """File of the seconds that were spent; a run that continues adds to them."""
    seq_len: int
    """Most tokens of a text."""
    seed: int
    """Of what is drawn."""

    @property
    def spent(self) -> float:
        """Seconds that were spent so far."""
        return seconds_of(self.clock)

    def is_done(self, tokens: int) -> bool:
        """Whether ``tokens`` are enough, or the time is up."""
        if self.tokens is not None:
            return tokens >= self.tokens
        return tokens > 0 and self.spent >= (self.seconds or 0)


def seconds_of(clock: Path) -> float:
    """Return the seconds that a file of them holds; 0 where there is none."""
    return float(json.loads(read_file(clock))) if clock.exists() else 0.0


def write_self_data(
    teacher: Layout,
    documents: Iterable[str],
    writing: Writing,
    settings: PassSettings,
    progress: Progress | None = None,
) -> None:
    """Let the dense model write text at temperature 1, in vLLM where that is installed.

    Each text begins with the first token of a document and ends where the model ends it, or after
    ``seq_len`` tokens (paper, appendix A.4). Lines that an earlier run has written stay: a run that
    was killed goes on after them. With ``tokens`` it ends with the same file.

    Args:
        teacher: The dense model, which is in memory whole.
        documents: Their first tokens are used in turn, as often as needed.
        writing: How much is written, and where.
        settings: Where and in what dtype the model computes.
        progress: Called with "self-data", tokens written, and tokens to write; by time with
            "writing" and seconds.

    Raises:
        DataError: there is no document.
    """
    tokenizer, first = load_tokenizer(teacher.checkpoint.path), first_token(teacher)
    starts = cycle(_starts(documents, tokenizer, first))
    draw, batch = _drawer(teacher, settings, writing.seq_len)
    written = _complete_lines(writing.path, batch)
    count, done = len(written), sum(line["tokens"] for line in written)
    advance = _progress(writing, progress)
    advance(done)
    next(islice(starts, count, count), None)
    with open(writing.path, "a", encoding="utf-8") as file:
        while not writing.is_done(done):
            began = time.perf_counter()
            for row in draw(list(islice(starts, batch)), writing.seed + count // batch):
                ids = row[: row.index(first)] if first in row else row
                text = tokenizer.decode(ids, skip_special_tokens=True)
                file.write(json.dumps({"text": text, "tokens": len(ids)}, ensure_ascii=False))
                file.write("\n")
                done += len(ids)
            file.flush()
            count += batch
            spent = writing.spent + time.perf_counter() - began
            write_atomic(writing.clock, json.dumps(spent).encode())
            advance(done)
    LOG.info("the teacher wrote %s tokens in %.0f s", f"{done:,}", writing.spent)


def _progress(writing: Writing, progress: Progress | None) -> Callable[[int], None]:
    """Return what is called with the tokens written so far."""
    if writing.tokens is not None:
        name, total = "self-data", writing.tokens
    else:
        name, total = "writing", max(1, round(writing.seconds or 0))
    advance, known = stage(progress, name, total), 0

    def report(tokens: int) -> None:
        nonlocal known
        now = min(total, tokens if writing.tokens is not None else int(writing.spent))
        advance(now - known)
        known = now

    return report


def _drawer(teacher: Layout, settings: PassSettings, seq_len: int) -> tuple[Draw, int]:
    """Return what writes texts, and how many it writes together."""
    if find_spec("vllm") is not None:
        try:
            return _in_vllm(teacher, settings, seq_len), VLLM_BATCH
        except (ImportError, RuntimeError, ValueError) as error:
            LOG.info("note: transformers writes the text, for vLLM does not: %s", error)
    return _in_transformers(teacher, settings, seq_len), BATCH


def _in_vllm(teacher: Layout, settings: PassSettings, seq_len: int) -> Draw:
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    first, kind = first_token(teacher), settings.device.type
    if current_platform.device_type != kind:
        raise RuntimeError(f"it runs on {current_platform.device_type}, not on {kind}")
    name, revision = loadable_name(teacher.checkpoint)
    dtype = str(settings.dtype).removeprefix("torch.")
    model = LLM(name, revision=revision, dtype=dtype, max_model_len=max(3, seq_len))

    def draw(starts: Sequence[int], seed: int) -> list[list[int]]:
        prompts = [{"prompt_token_ids": [first, start]} for start in starts]
        how = [
            SamplingParams(
                temperature=1.0,
                max_tokens=max(1, seq_len - 2),
                seed=seed * VLLM_BATCH + number,
                detokenize=False,
            )
            for number in range(len(starts))
        ]
        found = model.generate(prompts, how, use_tqdm=False)
        made = zip(starts, found, strict=True)
        return [[start, *each.outputs[0].token_ids] for start, each in made]

    return draw


def _in_transformers(teacher: Layout, settings: PassSettings, seq_len: int) -> Draw:
    first, model = first_token(teacher), _model(teacher, settings)
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(  # the file's own may have penalties
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(1, seq_len - 2),
        eos_token_id=ends,
        pad_token_id=first,
    )

    def draw(starts: Sequence[int], seed: int) -> list[list[int]]:
        begin = torch.tensor([[first, start] for start in starts], device=settings.device)
        seen = torch.ones_like(begin)  # or ``first``, which pads, would be masked
        torch.manual_seed(seed)
        with torch.no_grad():
            found: list[list[int]] = model.generate(begin, attention_mask=seen)[:, 1:].tolist()
        return found

    return draw


def _model(teacher: Layout, settings: PassSettings) -> Any:
    return load_model(teacher, settings.dtype).eval().to(settings.device)


def _starts(documents: Iterable[str], tokenizer: Tokenizer, first: int) -> Iterator[int]:
    """Yield the first token of each document, after ``first`` where that begins it."""
    count = 0
    for document in documents:
        ids = tokenizer.encode(document[:64], add_special_tokens=False).ids
        start = next((id_ for id_ in ids if id_ != first), None)
        if start is not None:
            count += 1
            yield start
    if not count:
        raise DataError("`data`", "has no document", fix="give text with words in it")


def _complete_lines(path: Path, batch: int) -> list[dict[str, int]]:
    """Return the lines of whole batches, and cut off what a kill left after them."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    lines = raw.split(b"\n")[:-1]
    whole = lines[: len(lines) // batch * batch]
    size = sum(len(line) + 1 for line in whole)
    with open(path, "r+b") as file:
        file.truncate(size)
    return [json.loads(line) for line in whole]
