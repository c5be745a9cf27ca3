"""A calibration: its text and settings are chosen, then it runs, here or on a Ray cluster."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np

from calib.estimate import WindowLengths, within_caps
from calib.statistics.calibrate import Calibration, take_statistics
from calib.statistics.options import CalibrationOptions
from calib.streaming.empty_model import check_runs, positions
from calib.streaming.layers import weights_stage
from calib.streaming.settings import ComputeOptions, PassSettings
from calib.streaming.weights import choose_device, choose_dtype, choose_settings
from calib.text.chat import documents_of
from calib.text.windows import Part, check_windows, shortfall, token_windows, within_positions
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.cluster import RETRIES, cluster, results, task_slots
from surgery.errors import BudgetError, DataError
from surgery.files.atomic import check_file, check_no_partial
from surgery.layout.build import read_layout
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice, choose_sizes, rarity_or_whole
from surgery.planning.request import CutRequest
from surgery.planning.sizes import candidate_vocab_sizes
from surgery.process import Advance, Progress, no_advance, reuse_freed_memory
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.merge import merge_stats
from surgery.text.documents import TextOptions
from surgery.tokenizer.tokenizer_file import load_tokenizer, prune_tokenizer
from surgery.vocabulary.order import Rarity, open_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer


LOG = logging.getLogger(__name__)


def choose_before_calibration(layout: Layout, request: CutRequest, text: TextOptions) -> SizeChoice:
    """Choose the sizes of a model that will be calibrated for them.

    The layers of largest block influence are not known yet. As many evenly spread ones stand for
    them, for the sizes depend on their number. ``calibrated_plan`` chooses them by the statistics.
    """
    depth = layout.num_hidden_layers
    count = min(max(request.sizes.num_hidden_layers or depth, 1), depth)
    spread = np.zeros(depth)
    spread[np.linspace(0, depth - 1, count).round().astype(int)] = 1.0
    choice = choose_sizes(layout, request, documents_or_none(layout, text), spread)
    if not text.data and (choice.needs_statistics(layout) or request.channels.repair != "none"):
        raise DataError(
            "`data`",
            "is needed to choose channels, experts or layers, and to repair",
            fix="give a text of the kind that the model is for",
        )
    return choice


def documents_or_none(layout: Layout, text: TextOptions) -> Iterable[str] | None:
    """Return the documents; None where there is no text."""
    return documents_of(layout, text) if text.data else None


def open_calibration(
    layout: Layout, text: TextOptions, compute: ComputeOptions, options: CalibrationOptions
) -> Calibration:
    """Prepare a calibration for a later plan with the same sizes and vocabulary options.

    Raises:
        OutputError: the output cannot be written, is inside the model's directory, is read, or is
            there already; or an interrupted run is.
        SurgeryError: as ``prepare_calibration``.
    """
    options.check(compute)
    if options.output is not None:
        read = [layout.checkpoint.path, *text.files, *options.vocabulary.files]
        check_file(options.output, read, force=options.force or options.resume)
        check_no_partial(options.output, resume=options.resume)
    if options.sizes.empty:
        rarity = rarity_or_whole(layout, options.vocabulary, documents_of(layout, text))
        return prepare_calibration(layout, rarity, text, compute, options)
    choice = choose_before_calibration(layout, CutRequest(options.sizes, options.vocabulary), text)
    vocab_size = choice.sizes.vocab_size
    return prepare_calibration(layout, choice.rarity, text, compute, options, vocab_size)


def prepare_calibration(
    layout: Layout,
    rarity: Rarity,
    text: TextOptions,
    compute: ComputeOptions,
    options: CalibrationOptions,
    vocab_size: int | None = None,
) -> Calibration:
    """Tokenize ``text``, and choose device, dtype and settings.

    Args:
        layout: The model.
        rarity: The order of its vocabulary, which decides the bucket of each token.
        text: Text to calibrate on.
        compute: Device, dtype and caps on memory.
        options: All other options.
        vocab_size: V' of the pruned tokenizer that tokenizes the text; None is the source's own.

    Raises:
        BudgetError: a cap on memory cannot be kept, or there are no channels to choose.
        DataError: there is no text.
        EngineError: options do not work together.
    """
    options.check(compute)
    check_channels(layout)
    text = replace(text, seq_len=within_positions(text.seq_len, positions(layout)))
    size = None if vocab_size == layout.vocab_size else vocab_size
    windows = _windows(layout, rarity, text, size)
    if options.part is not None:
        windows = Part.parse(options.part).choose(windows)
    edges = _bucket_edges(layout, rarity, size, options.vocab_sizes)
    output = options.output if options.engine == "local" else None
    return Calibration(
        layout=layout,
        windows=windows,
        seq_len=text.seq_len,
        bucket_of=rarity.buckets(edges),
        bucket_edges=edges,
        settings=_settings(layout, windows, compute, buckets=len(edges), journal=bool(output)),
        vocab_size=size,
        output=output,
        resume=options.resume,
        force=options.force,
        asked={
            "`samples`": str(text.samples),
            "`seed`": str(text.seed),
            "`part`": str(options.part),
        },
    )


def run_calibration(
    calibration: Calibration,
    compute: ComputeOptions,
    options: CalibrationOptions,
    progress: Progress | None = None,
) -> ChannelStats:
    """Take the statistics of a prepared calibration on this machine or on a cluster."""
    advance = weights_stage(progress, "calibrate", calibration.layout, len(calibration.windows))
    if options.engine == "local":
        return take_statistics(calibration, advance)
    output = options.output or Path("stats.safetensors")
    stats = calibrate_on_ray(calibration, compute, options.parts, output.absolute().parent, advance)
    if options.output is not None:
        stats.save(options.output)
    return stats


@dataclass(frozen=True)
class PartTask:
    """What a node needs to take the statistics of some windows."""

    model: Path
    family: str | None
    windows: Sequence[np.ndarray]
    seq_len: int
    vocab_size: int | None
    compute: ComputeOptions
    """Each node chooses its device and dtype by these options."""
    folder: Path
    """A directory that all nodes can write to."""


def calibrate_on_ray(
    calibration: Calibration,
    compute: ComputeOptions,
    parts: int | None,
    folder: Path,
    progress: Advance = no_advance,
) -> ChannelStats:
    """Take the statistics of a calibration in parts, each a task with a whole node or a GPU.

    If a node is lost, its part starts again on another node. If all nodes compute alike, the result
    is bit for bit that of merging parts K/N which were taken separately.

    Args:
        calibration: Its settings are not used; each node chooses its own.
        compute: The options by which a node chooses.
        parts: Number of tasks, at most one for each window; None is one for each node or GPU.
        folder: A directory that all nodes can write to.
        progress: Called with windows × layers of each finished part.

    Raises:
        SurgeryError: as ``results``, or nodes took statistics in different dtypes.
    """
    layout, windows = calibration.layout, calibration.windows
    layers = layout.num_hidden_layers
    with (
        cluster() as ray,
        TemporaryDirectory(".parts", "stats.", folder, ignore_cleanup_errors=True) as own,
    ):
        number, resources = task_slots(ray, gpus=compute.device != "cpu")
        count = min(parts or number, len(windows))
        task = ray.remote(max_retries=RETRIES, scheduling_strategy="SPREAD", **resources)(part_task)
        whole = PartTask(
            layout.checkpoint.path.absolute(),
            layout.checkpoint.family,
            windows,
            calibration.seq_len,
            calibration.vocab_size,
            compute,
            Path(own),
        )
        buckets = ray.put((calibration.bucket_of, list(calibration.bucket_edges)))
        chosen = {f"part {k}/{count}": Part(k, count).choose(windows) for k in range(1, count + 1)}
        tasks = {
            task.remote(replace(whole, windows=part), buckets): name
            for name, part in chosen.items()
        }
        paths: list[Path] = []

        def done(name: str, path: Path) -> None:
            paths.append(path)
            progress(len(chosen[name]) * layers)

        results(ray, tasks, done)
        return merge_stats(paths)


def part_task(part: PartTask, buckets: tuple[np.ndarray, list[int]]) -> Path:
    """Take the statistics of a part, write them into its folder, and return the file.

    Each attempt writes a file of its own, because a lost node may still be running.
    """
    layout = read_layout(Checkpoint.open(part.model, part.family))
    device = choose_device(part.compute.device)
    dtype = choose_dtype(part.compute.dtype, layout.checkpoint, device)
    reuse_freed_memory()
    stats = take_statistics(
        Calibration(
            layout,
            part.windows,
            part.seq_len,
            *buckets,
            PassSettings(device, dtype),
            part.vocab_size,
        )
    )
    path = part.folder / uuid4().hex
    stats.save(path)
    return path


def check_channels(layout: Layout) -> None:
    """Refuse a model without channels to choose.

    Raises:
        BudgetError: it has none.
    """
    check_runs(layout)
    if not layout.widths:
        raise BudgetError(
            layout.checkpoint.config_path,
            "describes a model without channels to choose: "
            f"{layout.family.only_vocabulary or 'no layer has an FFN'}",
            fix="plan the vocabulary alone, with `vocab_size`",
        )


def _windows(
    layout: Layout, rarity: Rarity, text: TextOptions, size: int | None
) -> Sequence[np.ndarray]:
    """Return windows of source ids, tokenized by the vocabulary pruned to ``size`` rows."""
    tokenizer: Tokenizer
    old_ids = None
    if size is None:
        tokenizer = load_tokenizer(layout.checkpoint.path)
    else:
        tokenizer, old_ids = prune_tokenizer(open_vocabulary(layout), rarity.id_map(size))
    windows = token_windows(documents_of(layout, text), tokenizer, text.samples, text.seq_len)
    check_windows(windows)
    if short := shortfall(windows, text.samples, text.seq_len):
        LOG.info("note: %s", short)
    return windows if old_ids is None else [old_ids[window] for window in windows]


def _bucket_edges(
    layout: Layout, rarity: Rarity, size: int | None, vocab_sizes: str | None
) -> list[int]:
    """Return the rarity ranks at which buckets of tokens end."""
    exact = _vocab_sizes(vocab_sizes, layout) if vocab_sizes else []
    usual = [size] if size else candidate_vocab_sizes(layout, rarity.must_keep)
    return sorted({*(exact or usual), layout.vocab_size})


def _vocab_sizes(sizes: str, layout: Layout) -> list[int]:
    """Return the sizes in "V,V,…".

    Raises:
        BudgetError: a size is no number between 1 and V.
    """
    try:
        found = [int(part) for part in sizes.split(",")]
    except ValueError:
        found = [0]
    if not 1 <= min(found) <= max(found) <= layout.vocab_size:
        raise BudgetError(
            "`vocab_sizes`",
            "are not sizes of this vocabulary",
            expected=f"numbers from 1 to {layout.vocab_size}, with commas",
            found=sizes,
            fix="correct them",
        )
    return found


def _settings(
    layout: Layout,
    windows: Sequence[np.ndarray],
    compute: ComputeOptions,
    *,
    buckets: int,
    journal: bool,
) -> PassSettings:
    fastest = replace(choose_settings(compute, layout.checkpoint), hidden="memory")
    lengths = WindowLengths.of(windows)
    return within_caps(layout, lengths, fastest, compute, buckets=buckets, journal=journal)
