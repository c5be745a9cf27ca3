"""The files of a teacher: settings, columns, and their windows as a training reads them."""

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import log_softmax

from calib.recovery.options import TrainingError
from surgery.files.strict_json import read_file
from surgery.layout.layout import Layout
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.verify.files import plan_within

IDS, TOP, LOGPROBS, REST = "input_ids", "target_token_ids", "target_logprobs", "target_rest"
"""Columns: see docs/train-it-back.md."""

LEAST = 1e-12
"""Least probability that a student leaves over for all tokens which a teacher's file omits."""

PRECISIONS = {"float16": torch.float16, "float32": torch.float32}

SETTINGS, HELD = "settings.json", "heldout.json"
PART = "part-{:05d}.parquet"


class TeacherInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """settings.json of a teacher's directory."""

    fingerprint: str
    """Of the dense model."""
    weights: str
    """Digest of some of its weights."""
    kept_tokens: str
    """As in the plan: the dense model's rows that the ids count."""
    vocab_size: int
    """V′."""
    windows: int
    seq_len: int
    top_k: int
    precision: str
    tokenizer: str
    """Digest of the tokens by their ids."""
    data: str
    """Name of the text."""
    windows_of_part: int
    """Windows of each file but the last."""
    format: int = 1

    def __post_init__(self) -> None:
        counts = (self.vocab_size, self.windows, self.seq_len, self.top_k, self.windows_of_part)
        if min(counts) < 1 or self.precision not in PRECISIONS:
            raise ValueError("a count below 1, or an unknown precision")

    @property
    def parts(self) -> int:
        """How many files there are."""
        return -(-self.windows // self.windows_of_part)

    def windows_in(self, part: int) -> int:
        """Return how many windows a file holds."""
        return min(self.windows_of_part, self.windows - part * self.windows_of_part)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, without their headers and before compression."""
        ids = 2 if self.vocab_size <= 1 << 16 else 4
        number = PRECISIONS[self.precision].itemsize
        of_token = 4 + number + self.top_k * (ids + number)
        return self.windows * self.seq_len * of_token


def schema_of(info: TeacherInfo) -> Any:
    """Return the columns of a part."""
    import pyarrow as pa

    number = pa.uint16() if info.vocab_size <= 1 << 16 else pa.uint32()
    float_type = pa.float16() if info.precision == "float16" else pa.float32()
    return pa.schema(
        [
            (IDS, pa.list_(pa.int32())),
            (TOP, pa.list_(pa.list_(number, info.top_k))),
            (LOGPROBS, pa.list_(pa.list_(float_type, info.top_k))),
            (REST, pa.list_(float_type)),
        ]
    )


class TaughtWindows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows with their teacher's likeliest tokens, read from the files as they are used."""

    def __init__(self, directory: Path) -> None:
        """Open the directory that ``teach`` wrote.

        Raises:
            TrainingError: it is none, or a file is missing or damaged.
        """
        self.directory = directory
        try:
            raw = read_file(directory / SETTINGS)
            self.info = msgspec.json.decode(raw, type=TeacherInfo)
            self.heldout = msgspec.json.decode(read_file(directory / HELD), type=list[str])
            if not any(self.heldout):
                raise ValueError(f"no text in {HELD}")
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise _unreadable(error.filename or directory, error) from error
            raise TrainingError(
                directory, "is no directory that teach wrote", found=error, fix="run teach again"
            ) from error
        self._paths = [directory / PART.format(n) for n in range(self.info.parts)]
        self._open = [self._opened(number) for number in range(self.info.parts)]

    def _opened(self, number: int) -> Any:
        """Open a file and check that it is what the settings say; read none of its windows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, expected = self._paths[number], self.info.windows_in(number)
        try:
            found = pq.ParquetFile(path)
        except FileNotFoundError as error:
            raise TrainingError(path, "is missing", fix="run teach again") from error
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno:
                raise _unreadable(path, error) from error
            raise TrainingError(path, "is damaged", found=error, fix="run teach again") from error
        if found.num_row_groups != expected or not found.schema_arrow.equals(schema_of(self.info)):
            raise TrainingError(
                path,
                f"is not as {SETTINGS} says",
                expected=f"{expected:,} windows, {self.info.top_k} tokens at each position",
                found=f"{found.num_row_groups:,} windows",
                fix="run teach again",
            )
        return found

    def __len__(self) -> int:
        return self.info.windows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        part, row = divmod(index, self.info.windows_of_part)
        group = self._open[part].read_row_group(row)
        found = {}
        for name in (IDS, TOP, LOGPROBS, REST):
            values = group.column(name).combine_chunks().values
            if name in (TOP, LOGPROBS):
                flat = values.values.to_numpy(zero_copy_only=False)
                array = flat.reshape(-1, self.info.top_k)
            else:
                array = values.to_numpy(zero_copy_only=False)
            kind = np.int64 if name in (IDS, TOP) else np.float32
            found[name] = torch.from_numpy(array.astype(kind))
        return found

    def check(self, student: Layout) -> None:
        """Refuse a teacher whose ids are not those of the student.

        Raises:
            TrainingError: it was made for another vocabulary, or for other tokens.
        """
        path, vocab_size = student.checkpoint.path, student.vocab_size
        plan = plan_within(path)
        kept = plan.kept_tokens if plan is not None else self.info.kept_tokens
        if (kept, vocab_size) != (self.info.kept_tokens, self.info.vocab_size):
            raise TrainingError(
                "`teacher`",
                "was written for another vocabulary",
                expected=f"{vocab_size:,} rows, those that the model's plan keeps",
                found=f"{self.info.vocab_size:,} rows",
                fix="run teach with the plan of the model that is trained",
            )
        if vocabulary_digest(load_tokenizer(path), vocab_size) != self.info.tokenizer:
            raise TrainingError(
                "`teacher`",
                f"was written by a model whose tokens have other ids than in {path}",
                fix="run teach with the model that it was pruned from",
            )


def _unreadable(path: Path | str, error: OSError) -> TrainingError:
    """Return the error for a file that the system does not let us read; it may well be whole."""
    found = os.strerror(error.errno) if error.errno else error
    fix = "check its permissions, and its disk"
    return TrainingError(path, "cannot be read", found=found, fix=fix)


def vocabulary_digest(tokenizer: Tokenizer, vocab_size: int) -> str:
    """Return the SHA-256 of the tokens of the first ``vocab_size`` ids."""
    rows = sorted((row, t) for t, row in tokenizer.get_vocab().items() if row < vocab_size)
    return hashlib.sha256(msgspec.json.encode(rows)).hexdigest()


def is_taught(name: str | Path | None) -> bool:
    """Whether ``name`` is a directory that ``teach`` wrote, not a model."""
    return name is not None and (Path(name) / PART.format(0)).exists()


def divergence_from_top(
    student: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, rest: torch.Tensor
) -> torch.Tensor:
    """Return ``divergence`` where only the teacher's likeliest tokens are known.

    All other tokens count as one, whose probability is what these leave over. If the teacher's file
    names all tokens, both are equal.

    Args:
        student: Logits ``(windows, tokens, V')``.
        ids: int64 ``(windows, tokens, k)``, the likeliest tokens.
        logprobs: Their ln p, float ``(windows, tokens, k)``.
        rest: The ln of the probability that is left over, ``(windows, tokens)``; −inf where nothing
            is.
    """
    found = log_softmax(student.float(), -1).gather(-1, ids)
    wanted = logprobs.float()
    known = (wanted.exp() * (wanted - found)).sum(-1)
    some = rest > -torch.inf
    left = (1 - found.exp().sum(-1)).clamp(min=LEAST).log()
    unnamed = rest.exp() * (rest.where(some, left) - left)
    return (known + unnamed.where(some, torch.zeros_like(unnamed))).mean()
