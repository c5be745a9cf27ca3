"""A teacher as files: the dense model's likeliest tokens, from one streamed pass."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from calib.estimate import MB, Prediction, WindowLengths, predict
from calib.recovery.options import TeachOptions, TrainingError
from calib.recovery.text import hold_out, training_windows
from calib.scoring.score import check_predicts, first_token
from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.empty_model import positions
from calib.streaming.settings import ComputeOptions
from calib.streaming.weights import WeightReader, choose_settings
from calib.text.chat import documents_of
from calib.text.windows import within_positions
from surgery.apply.output_directory import check_output_path, check_space
from surgery.errors import BudgetError, OutputError, PlanError
from surgery.files.atomic import PARTIAL, check_no_partial, new_file, write_atomic
from surgery.files.strict_json import read_file
from surgery.hub.fetch import source_at_hand
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.process import Progress, stage
from surgery.text.documents import TextOptions
from surgery.tokenizer.tokenizer_file import TokenizerFile, load_tokenizer, prune_tokenizer
from surgery.verify.files import plan_within

LOG = logging.getLogger(__name__)

IDS, TOP, LOGPROBS, REST = "input_ids", "target_token_ids", "target_logprobs", "target_rest"
"""Columns: see docs/train-it-back.md."""

PRECISIONS = {"float16": torch.float16, "float32": torch.float32}

PART_BYTES = 1 << 28
"""Hidden states and likeliest tokens of the windows that pass through the model together."""

SETTINGS, WINDOWS, HELD = "settings.json", "windows.npy", "heldout.json"
PART = "part-{:05d}.parquet"


class TeacherInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """settings.json of a teacher's directory."""

    fingerprint: str
    """Of the dense model."""
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


@dataclass(frozen=True)
class Taught:
    """What ``teach`` wrote."""

    output: Path
    tokens: int
    nbytes: int
    """Of the files."""
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {**asdict(self), "output": str(self.output)}


class Teaching:
    """A checked request to write a teacher's files, and what it takes."""

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        text: TextOptions,
        compute: ComputeOptions,
        options: TeachOptions,
    ) -> None:
        """Check the request; read no text and no weights.

        Raises:
            SurgeryError: the model predicts no token, the plan is another one's, or the output
                cannot be written.
        """
        if find_spec("pyarrow") is None:
            fix = "pip install 'compact-surgery[recover]'"
            raise TrainingError("pyarrow", "is not installed", fix=fix)
        check_predicts(layout)
        if plan.before.vocab_size != layout.vocab_size:
            raise PlanError(
                "`plan`",
                "was made for a model with another vocabulary",
                expected=layout.vocab_size,
                found=plan.before.vocab_size,
                fix="name the plan of this model",
            )
        if options.top_k > plan.after.vocab_size:
            raise BudgetError(
                "`top_k`",
                "is more than the tokens that are kept",
                expected=f"at most {plan.after.vocab_size:,}",
                found=options.top_k,
                fix="choose fewer",
            )
        check_output_path(options.output, layout.checkpoint.path)
        check_no_partial(options.output, resume=options.resume)
        self.layout, self.plan, self.text, self.options = layout, plan, text, options
        self.settings = choose_settings(compute, layout.checkpoint)
        self.seq_len = within_positions(text.seq_len, positions(layout))
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Refuse a plan for other tokens, or one without the token that begins a text."""
        path, ids, first = self.layout.checkpoint.path, self.plan.ids(), first_token(self.layout)
        if ids.new(first) is None:
            raise PlanError(
                f"`plan`: token {first}",
                "begins each text of this model, and is not kept",
                fix="name the plan of this model",
            )
        if self.plan.fingerprint == self.layout.checkpoint.fingerprint:
            return
        if (source := source_at_hand(self.plan.source)) is None:
            return  # recover compares the tokens
        own, other = (load_tokenizer(each).get_vocab() for each in (path, source))
        for token, row in sorted(other.items(), key=lambda item: item[1]):
            if row < ids.old_size and ids.new(row) is not None and own.get(token) != row:
                raise PlanError(
                    f"`plan`: token {token!r}",
                    f"has another id in {path} than in the plan's source",
                    expected=row,
                    found=own.get(token),
                    fix="name the plan of this model, or a model with the same tokenizer",
                )

    @property
    def info(self) -> TeacherInfo:
        """What the directory will say of itself, with as many windows as are asked for."""
        options, plan = self.options, self.plan
        width = self.layout.by_name[self.layout.family.embedding].shape[1]
        of_token = 2 * width * self.settings.dtype.itemsize + 12 * options.top_k
        return TeacherInfo(
            self.layout.checkpoint.fingerprint,
            plan.kept_tokens,
            plan.after.vocab_size,
            max(1, options.tokens // self.seq_len),
            self.seq_len,
            options.top_k,
            options.precision,
            vocabulary_digest(self._tokenizer[0], plan.after.vocab_size),
            ", ".join(each.name for each in self.text.data),
            max(1, PART_BYTES // (of_token * self.seq_len)),
        )

    def prediction(self) -> Prediction:
        """Predict what a pass of one part takes."""
        info = self.info
        windows = min(info.windows, info.windows_of_part)
        text = WindowLengths.full(windows, self.seq_len, info.vocab_size)
        return predict(self.layout, text, self.settings, buckets=0, journal=False)

    @cached_property
    def _tokenizer(self) -> tuple[Any, np.ndarray]:
        """The pruned tokenizer, and the dense model's id for each of its ids."""
        ids, path = self.plan.ids(), self.layout.checkpoint.path
        if ids.identity:
            return load_tokenizer(path), np.arange(ids.old_size)
        return prune_tokenizer(TokenizerFile.reopen(path), ids)

    def _read_text(self) -> tuple[np.ndarray, list[str]]:
        documents, held = hold_out(documents_of(self.layout, self.text), self.text.windows)
        first = self.plan.ids().new(first_token(self.layout))
        assert first is not None  # checked
        tokenizer, _ = self._tokenizer
        return training_windows(documents, tokenizer, first, self.seq_len, self.info.windows), held

    def run(self, progress: Progress | None = None) -> Taught:
        """Write the directory, part by part; it gets its name when all are there.

        Raises:
            SurgeryError: the disk is too small, or the run to continue was another one.
        """
        start, output = time.perf_counter(), self.options.output
        partial = output.with_name(output.name + PARTIAL)
        LOG.info("%s of files, without compression", f"{self.info.nbytes / MB:,.0f} MB")
        check_space(output, self.info.nbytes)
        partial.mkdir(parents=True, exist_ok=True)
        info = self._begun(partial)
        tokens = info.windows * info.seq_len
        advance = stage(progress, "teach", tokens)
        for number in range(info.parts):
            path, first = partial / PART.format(number), number * info.windows_of_part
            if not path.exists():
                windows = np.load(partial / WINDOWS, mmap_mode="r")
                chosen = windows[first : first + info.windows_of_part]
                self._write_part(path, np.array(chosen, dtype=np.int64), info)
            advance(info.windows_in(number) * info.seq_len)
        (partial / WINDOWS).unlink(missing_ok=True)  # gone if a run was killed after this line
        partial.rename(output)
        nbytes = sum(path.stat().st_size for path in output.glob("*.parquet"))
        return Taught(output, tokens, nbytes, time.perf_counter() - start)

    def _begun(self, partial: Path) -> TeacherInfo:
        """Return the settings, of the run to continue if there is one."""
        path, expected = partial / SETTINGS, self.info
        if not path.exists():
            ids, held = self._read_text()
            with new_file(partial / WINDOWS) as made:
                np.save(made.file, ids)
            write_atomic(partial / HELD, json.dumps(held).encode())
            expected = msgspec.structs.replace(expected, windows=len(ids))
            write_atomic(path, msgspec.json.encode(expected))
        found = msgspec.json.decode(read_file(path), type=TeacherInfo)
        if msgspec.structs.replace(self.info, windows=found.windows) != found:
            raise OutputError(
                path,
                "is of a run with another model, plan, text or options",
                fix="give the same ones, or delete the directory and begin anew",
            )
        return found

    def _write_part(self, path: Path, windows: np.ndarray, info: TeacherInfo) -> None:
        """Run some windows through the model, and write the likeliest tokens of each position."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        _, old_ids = self._tokenizer
        stream = Stream([old_ids[window] for window in windows])
        with WeightReader(self.layout.checkpoint, self.settings.device, self.settings.dtype) as r:
            decoder = StreamedDecoder(self.layout, r, self.settings)
            decoder.embed([stream])
            decoder.run_layers([stream])
            found = list(likeliest(decoder, stream, self.plan.ids().kept, info.top_k))
        number = np.uint16 if info.vocab_size <= 1 << 16 else np.uint32
        float_type = np.float16 if info.precision == "float16" else np.float32
        schema = _schema(info)
        with new_file(path) as made, pq.ParquetWriter(made.file, schema) as writer:
            for window, (top, logprobs, rest) in zip(windows, found, strict=True):
                row = [
                    _list(pa.array(window.astype(np.int32))),
                    _list(_rows(top.astype(number))),
                    _list(_rows(logprobs.astype(float_type))),
                    _list(pa.array(rest.astype(float_type))),
                ]
                writer.write_table(pa.table(row, schema=schema))


def _schema(info: TeacherInfo) -> Any:
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


def _list(values: Any) -> Any:
    """Return a column of one row, which is the list of ``values``."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _rows(values: np.ndarray) -> Any:
    """Return an Arrow array of the rows of ``values``."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


@torch.no_grad()
def likeliest(
    decoder: StreamedDecoder, stream: Stream, rows: np.ndarray, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, for each window, the likeliest of ``rows`` at each position.

    The head is read once, block by block; each block leaves the ``count`` best logits so far.

    Yields:
        Positions in ``rows`` ``(tokens, count)``, likeliest first; their ln p over ``rows``; and
        the ln of the probability that is left over, −inf where nothing is.
    """
    windows = [_Likeliest(states, count) for _, _, states in stream.hidden()]
    for index, part, logits in decoder.logits([(each.states[None], rows) for each in windows]):
        windows[index].add(part, logits[0].float())
    for each in windows:
        yield each.result(len(rows))


class _Likeliest:
    """Adds up one window's log-sum-exp, and keeps its largest logits."""

    def __init__(self, states: torch.Tensor, count: int) -> None:
        self.states, self._count = states, count
        self._total = torch.full(states.shape[:1], -torch.inf)
        self._best = torch.empty(len(states), 0)
        self._ids = torch.empty(len(states), 0, dtype=torch.int64)

    def add(self, part: slice, logits: torch.Tensor) -> None:
        """Add ``logits`` ``(tokens, rows)`` of the ``part`` of the vocabulary."""
        self._total = torch.logaddexp(self._total, logits.logsumexp(-1).cpu())
        found, ids = logits.topk(min(self._count, logits.shape[-1]), -1)
        best = torch.cat([self._best, found.cpu()], -1)
        every = torch.cat([self._ids, ids.cpu() + part.start], -1)
        self._best, order = best.topk(min(self._count, best.shape[-1]), -1)
        self._ids = every.gather(-1, order)

    def result(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids, ln p and the ln of what is left over."""
        logprobs = self._best - self._total[:, None]
        rest = torch.log1p(-logprobs.double().exp().sum(-1).clamp(max=1)).float()
        if self._count == rows:
            rest = torch.full_like(rest, -torch.inf)
        return self._ids.numpy(), logprobs.numpy(), rest.numpy()


class TaughtWindows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows with their teacher's likeliest tokens, read from the files as they are used."""

    def __init__(self, directory: Path) -> None:
        """Open the directory that ``teach`` wrote.

        Raises:
            TrainingError: it is none, or a file is missing or damaged.
        """
        try:
            raw = read_file(directory / SETTINGS)
            self.info = msgspec.json.decode(raw, type=TeacherInfo)
            self.heldout = msgspec.json.decode(read_file(directory / HELD), type=list[str])
            if not any(self.heldout):
                raise ValueError(f"no text in {HELD}")
        except (OSError, ValueError) as error:
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
        if not path.exists():
            raise TrainingError(path, "is missing", fix="run teach again")
        try:
            found = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise TrainingError(path, "is damaged", found=error, fix="run teach again") from error
        if found.num_row_groups != expected or not found.schema_arrow.equals(_schema(self.info)):
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


def vocabulary_digest(tokenizer: Tokenizer, vocab_size: int) -> str:
    """Return the SHA-256 of the tokens of the first ``vocab_size`` ids."""
    rows = sorted((row, t) for t, row in tokenizer.get_vocab().items() if row < vocab_size)
    return hashlib.sha256(msgspec.json.encode(rows)).hexdigest()


def is_taught(name: str | Path | None) -> bool:
    """Whether ``name`` is a directory that ``teach`` wrote, not a model."""
    return name is not None and (Path(name) / PART.format(0)).exists()
