"""The steps that commands are made of: open, choose sizes, calibrate, apply, compare."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.apply import apply_plan
from surgery.checkpoint import Checkpoint
from surgery.choices import Chosen
from surgery.companions import check_companions
from surgery.errors import BudgetError, UnknownTypeError
from surgery.layout import Layout
from surgery.options import ChannelOptions
from surgery.part import Division
from surgery.plan import Plan
from surgery.planning import make_plan
from surgery.probe import Proposal, propose, unknown_type
from surgery.process import moved_bytes, peak_rss_bytes
from surgery.resources import Running
from surgery.source import resolve_model
from surgery.stats import ChannelStats
from surgery.text_vocabulary import TextVocabulary
from surgery.tokenizer import load_tokenizer
from surgery.vocab_cost import vocabulary_cost

RETURNED = Running()
"""All windows, here, and the statistics are only returned."""

if TYPE_CHECKING:
    from calib.calibration import Calibration
    from calib.score import Score


def open_model(model: str, family: str | None = None) -> tuple[Layout, str]:
    """Return the layout of MODEL and the name that finds it again.

    Raises:
        UnknownTypeError: the table has no entry for its model type, and ``family`` is None.
    """
    path, source = resolve_model(model)
    checkpoint = Checkpoint.open(path, family)
    try:
        return Layout.of(checkpoint), source
    except UnknownTypeError as error:
        raise unknown_type(checkpoint, error) from error


def probe_model(model: str) -> Proposal:
    """Say what MODEL may be, whatever its model type; a local directory or a hub id."""
    return propose(Checkpoint.open(resolve_model(model)[0]))


def prepare_calibration(
    layout: Layout,
    vocabulary: TextVocabulary,
    *,
    data: str,
    samples: int,
    seq_len: int,
    seed: int | None,
    device: str,
    dtype: str,
    running: Running = RETURNED,
) -> "Calibration":
    """Prepare statistics over a text as ``vocabulary`` cuts it.

    ``running`` says which windows are used and where the statistics are written.
    """
    from calib.calibration import prepare
    from calib.corpus import check_windows, token_windows
    from calib.documents import read_documents

    check_channels(layout)
    documents = read_documents(data, seed)
    tokenizer, old_ids = vocabulary.tokenizer(layout)
    every = token_windows(documents, tokenizer, samples, seq_len)
    check_windows(every, seq_len)
    windows = running.division.choose(every)
    if old_ids is not None:
        windows = [old_ids[window] for window in windows]
    edges = vocabulary.edges(layout)
    return prepare(
        layout,
        windows,
        (vocabulary.rarity.buckets(edges), edges),
        vocab_size=vocabulary.pruned_size(layout),
        seq_len=seq_len,
        device=device,
        dtype=dtype,
        asked={
            "--samples": str(samples),
            "--seed": str(seed),
            "--part": str(running.division.part),
        },
        running=running if running.output else None,
    )


def check_channels(layout: Layout) -> None:
    """Refuse a model without channels to choose.

    Raises:
        BudgetError: that.
    """
    if not layout.widths:
        raise BudgetError(
            layout.checkpoint.path / "config.json",
            "has no key for the width of this model's FFN, so there are no channels to choose",
            fix="plan the vocabulary alone, with --vocab-size",
        )


def take_statistics(calibration: "Calibration") -> ChannelStats:
    """Run a calibration under a progress bar."""
    layout, windows = calibration.layout, len(calibration.windows)
    with weights_bar("calibrate", layout, windows) as progress:
        return calibration.take(progress)


def take_on_ray(
    calibration: "Calibration", division: Division, device: str, dtype: str
) -> ChannelStats:
    """Run a calibration as Ray tasks under a progress bar; each node chooses its device."""
    from calib.ray_engine import calibrate_on_ray

    made = calibration
    with weights_bar("calibrate", made.layout, len(made.windows)) as progress:
        return calibrate_on_ray(
            made.layout,
            list(made.windows),
            made.bucket_of,
            made.edges,
            division,
            vocab_size=made.vocab_size,
            seq_len=made.seq_len,
            device=device,
            dtype=dtype,
            progress=progress,
        )


def plan_model(
    layout: Layout,
    source: str,
    chosen: Chosen,
    stats: ChannelStats | None,
    *,
    channels: ChannelOptions,
    ratio: float | None,
    output: Path | None,
    vocab_by: str,
    documents: Iterable[str] = (),
) -> Plan:
    """Make the plan of a command; ``source`` and ``chosen`` come from the steps above.

    ``documents`` show what the cut of the vocabulary costs.
    """
    ids = chosen.rarity.id_map(chosen.sizes.vocab_size)
    cost = None
    if chosen.tokenizer is not None and not ids.identity:
        cost = vocabulary_cost(chosen.tokenizer, ids, vocab_by, documents)
    plan = make_plan(
        layout,
        chosen.rarity,
        chosen.sizes,
        stats,
        criterion=channels.criterion,
        least_tokens=channels.min_expert_tokens,
        source=source,
        output=str(output.absolute()) if output else None,
        ratio=ratio,
        vocabulary=cost,
    )
    # What apply would refuse in the files beside the weights is refused now.
    check_companions(plan, layout.checkpoint, chosen.tokenizer)
    return plan


def score_model(
    layout: Layout,
    *,
    data: str,
    samples: int,
    window_bytes: int,
    seed: int | None,
    device: str,
    dtype: str,
) -> "Score":
    """Score a model on the windows of a text."""
    from calib.corpus import byte_windows
    from calib.device import choose_device, choose_dtype
    from calib.documents import read_documents
    from calib.score import score

    texts = byte_windows(read_documents(data, seed), samples, window_bytes)
    tokenizer = load_tokenizer(layout.checkpoint.path)
    where = choose_device(device)
    with weights_bar("score", layout, len(texts)) as progress:
        return score(
            layout,
            texts,
            tokenizer,
            device=where,
            dtype=choose_dtype(dtype, layout.checkpoint, where),
            progress=progress,
        )


def run_apply(
    plan: Plan,
    source: Path,
    output: Path,
    *,
    resume: bool,
    jobs: int,
    engine: str = "local",
    checksum: bool = False,
) -> dict[str, Any]:
    """Apply ``plan`` under a progress bar; return what it took."""
    start, before = time.perf_counter(), moved_bytes()
    with progress_bar("apply", "B", plan.after.nbytes) as progress:
        stages = apply_plan(
            plan,
            source,
            output,
            resume=resume,
            jobs=jobs,
            engine=engine,
            checksum=checksum,
            progress=progress,
        )
    seconds, after = time.perf_counter() - start, moved_bytes()
    facts: dict[str, Any] = {"seconds": seconds, "stage_seconds": stages}
    if before and after:
        facts |= {key: after[key] - before[key] for key in after}
        facts["written_bytes_per_second"] = facts["written_bytes"] / seconds
    return facts | {"peak_rss_bytes": peak_rss_bytes()}


def forward_faults(plan: Plan, source: Path, directory: Path, device: str) -> list[str]:
    """Compare the logits of ``directory`` with the masked dense model; return the fault, if any."""
    from calib.device import choose_device
    from calib.equality import TOLERANCE, compare_forward

    dense, pruned = (Layout.of(Checkpoint.open(path, plan.family)) for path in (source, directory))
    result = compare_forward(plan, dense, pruned, choose_device(device))
    if result.ok:
        return []
    return [
        f"relative difference {result.largest:.2e} over {result.tokens} tokens, "
        f"expected at most {TOLERANCE:.0e}"
    ]


@contextmanager
def weights_bar(what: str, layout: Layout, windows: int) -> Iterator[Callable[[int], object]]:
    """Yield what counts windows that have passed a layer, for a bar of bytes of weights.

    A layer counts by the share of the ``windows`` that have passed it.
    """
    sizes = [sum(ref.nbytes for ref in layer.values()) for layer in layout.of_layer]
    passed, shown = 0, 0
    with progress_bar(what, "B", sum(sizes)) as advance:

        def count(more: int) -> None:
            nonlocal passed, shown
            passed += more
            layers, part = divmod(passed, windows)
            done = sum(sizes[:layers]) + (sizes[layers] * part // windows if part else 0)
            advance(done - shown)
            shown = done

        yield count


@contextmanager
def progress_bar(what: str, unit: str, total: int) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a bar on stderr; there is none where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(
        total=total, desc=what, unit=unit, unit_scale=True, disable=not sys.stderr.isatty()
    ) as bar:
        yield bar.update
