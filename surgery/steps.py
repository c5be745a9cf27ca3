"""The steps that commands are made of: open, choose sizes, calibrate, apply, compare."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.apply import apply_plan
from surgery.budget import Sizes, candidate_vocab_sizes, split
from surgery.checkpoint import Checkpoint
from surgery.companions import check_companions
from surgery.errors import BudgetError, TokenizerError
from surgery.layout import Layout
from surgery.plan import Plan, make_plan
from surgery.source import resolve_model
from surgery.stats import ChannelStats
from surgery.vocabulary import Rarity, identity_rarity, rarity_of

if TYPE_CHECKING:
    from calib.score import Score


def open_model(model: str) -> tuple[Layout, str]:
    """Return the layout of MODEL and the name that finds it again."""
    path, source = resolve_model(model)
    return Layout.of(Checkpoint.open(path)), source


def choose_sizes(
    layout: Layout, ratio: float | None, vocab_size: int | None, intermediate_size: int | None
) -> tuple[Rarity, Sizes]:
    """Return the order of rarity and (V', I') from ``--ratio`` or from the two sizes.

    A vocabulary that stays whole needs no tokenizer that can be cut.

    Raises:
        BudgetError: neither a ratio nor both sizes, or all of them.
    """
    if (ratio is None) == (vocab_size is None) or (vocab_size is None) != (
        intermediate_size is None
    ):
        raise BudgetError(
            "sizes",
            "are not clear",
            expected="--ratio, or --vocab-size and --intermediate-size",
            fix="give one or the other",
        )
    if vocab_size is not None and intermediate_size is not None:
        whole = vocab_size == layout.vocab_size
        rarity = identity_rarity(layout.vocab_size) if whole else rarity_of(layout)
        return rarity, Sizes(vocab_size, intermediate_size)
    assert ratio is not None
    rarity = rarity_of(layout)
    return rarity, split(layout, ratio, rarity.must_keep)


def calibrate_model(
    layout: Layout,
    vocab_sizes: list[int] | None,
    *,
    data: str,
    samples: int,
    seq_len: int,
    seed: int | None,
    device: str,
    dtype: str,
) -> ChannelStats:
    """Take statistics that are exact for ``vocab_sizes``, or for the usual ratios' sizes.

    A tokenizer that cannot be cut gives one bucket, which is right for a whole vocabulary.
    """
    from calib.calibrate import calibrate
    from calib.corpus import load_tokenizer, token_windows
    from calib.device import choose_device, choose_dtype
    from calib.documents import read_documents

    documents = read_documents(data, seed)
    windows = token_windows(documents, load_tokenizer(layout.checkpoint.path), samples, seq_len)
    rarity = _rarity_or_whole(layout)
    sizes = vocab_sizes or candidate_vocab_sizes(layout, rarity.must_keep)
    edges = sorted({*sizes, layout.vocab_size})
    where = choose_device(device)
    steps = layout.num_hidden_layers * len(windows)
    with progress_bar("calibrate", "window", steps) as progress:
        return calibrate(
            layout,
            windows,
            rarity.buckets(edges),
            edges,
            seq_len=seq_len,
            device=where,
            dtype=choose_dtype(dtype, layout.checkpoint, where),
            progress=progress,
        )


def plan_model(
    layout: Layout,
    source: str,
    chosen: tuple[Rarity, Sizes],
    stats: ChannelStats | None,
    criterion: str,
    ratio: float | None,
    output: Path | None,
) -> Plan:
    """Make the plan of a command; ``source`` and ``chosen`` come from the two steps above."""
    plan = make_plan(
        layout,
        *chosen,
        stats,
        criterion=criterion,
        source=source,
        output=str(output.absolute()) if output else None,
        ratio=ratio,
    )
    # What apply would refuse in the files beside the weights is refused now.
    check_companions(plan, layout.checkpoint)
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
    from calib.corpus import byte_windows, load_tokenizer
    from calib.device import choose_device, choose_dtype
    from calib.documents import read_documents
    from calib.score import score

    texts = byte_windows(read_documents(data, seed), samples, window_bytes)
    tokenizer = load_tokenizer(layout.checkpoint.path)
    where = choose_device(device)
    with progress_bar("score", "window", layout.num_hidden_layers * len(texts)) as progress:
        return score(
            layout,
            texts,
            tokenizer,
            device=where,
            dtype=choose_dtype(dtype, layout.checkpoint, where),
            progress=progress,
        )


def run_apply(plan: Plan, source: Path, output: Path, *, resume: bool, jobs: int) -> None:
    """Apply ``plan`` under a progress bar."""
    with progress_bar("apply", "B", plan.after.nbytes) as progress:
        apply_plan(plan, source, output, resume=resume, jobs=jobs, progress=progress)


def forward_faults(plan: Plan, source: Path, directory: Path, device: str) -> list[str]:
    """Compare the logits of ``directory`` with the masked dense model; return the fault, if any."""
    from calib.device import choose_device
    from calib.equality import TOLERANCE, compare_forward

    dense, pruned = (Layout.of(Checkpoint.open(path)) for path in (source, directory))
    result = compare_forward(plan, dense, pruned, choose_device(device))
    if result.ok:
        return []
    return [
        f"relative difference {result.largest:.2e} over {result.tokens} tokens, "
        f"expected at most {TOLERANCE:.0e}"
    ]


@contextmanager
def progress_bar(what: str, unit: str, total: int) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a bar on stderr; there is none where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(
        total=total, desc=what, unit=unit, unit_scale=True, disable=not sys.stderr.isatty()
    ) as bar:
        yield bar.update


def parse_vocab_sizes(text: str, layout: Layout) -> list[int]:
    """Return the sizes in "V,V,…".

    Raises:
        BudgetError: not numbers between 1 and V.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if not 1 <= min(sizes) <= max(sizes) <= layout.vocab_size:
        raise BudgetError(
            "--vocab-sizes",
            "are not sizes of this vocabulary",
            expected=f"numbers from 1 to {layout.vocab_size}, with commas",
            found=text,
            fix="correct them",
        )
    return sizes


def _rarity_or_whole(layout: Layout) -> Rarity:
    try:
        return rarity_of(layout)
    except TokenizerError:
        return identity_rarity(layout.vocab_size)
