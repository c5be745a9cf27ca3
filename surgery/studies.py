"""The steps that search and compare are made of: a study opened, its passes under a bar."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.budget import Sizes, pairs_at, split
from surgery.candidates import MOST, parse_candidates
from surgery.choices import Chosen, allowed_steps, main_width
from surgery.comparison import LAYER_METHODS, METHODS, Row
from surgery.depth import check_layers
from surgery.errors import BudgetError, SurgeryError
from surgery.layout import Layout
from surgery.options import ChannelOptions
from surgery.plan import Plan
from surgery.process import peak_rss_bytes
from surgery.size_options import Target
from surgery.steps import (
    check_channels,
    plan_model,
    prepare_calibration,
    progress_bar,
    take_statistics,
)
from surgery.text_vocabulary import TextVocabulary

WINDOWS = 64
"""Of held-out text, where none are asked for."""

if TYPE_CHECKING:
    from calib.study import Study


def open_study(
    layout: Layout,
    chosen: Chosen,
    *,
    data: str,
    samples: int,
    seq_len: int,
    seed: int | None,
    device: str,
    dtype: str,
    windows: int = WINDOWS,
    spill: Path | None = None,
) -> "Study":
    """Divide a text and choose where to compute.

    Raises:
        BudgetError: the model has no channels to choose.
    """
    from calib.device import choose_device, choose_dtype
    from calib.documents import read_documents
    from calib.material import Material
    from calib.study import Study

    check_channels(layout)
    material = Material.split(
        layout,
        chosen.rarity,
        chosen.tokenizer,
        read_documents(data, seed),
        windows=windows,
        samples=samples,
        seq_len=seq_len,
    )
    where = choose_device(device)
    return Study(material, where, choose_dtype(dtype, layout.checkpoint, where), spill)


def repair_plan(plan: Plan, plan_path: Path, layout: Layout, chosen: Chosen, **text: Any) -> Plan:
    """Refit what ``plan`` leaves of each down_proj into a file beside ``plan_path``.

    ``text`` is what ``open_study`` takes.
    """
    from calib.repair import repair, repair_cost

    if any(len(group) > 1 for group in plan.layers):
        raise BudgetError(
            "--repair",
            "does not go with collapsed layers: no text has passed them",
            fix="leave out --repair, or let layers go instead",
        )
    if plan.after.widths == plan.before.widths:
        return plan
    study = open_study(layout, chosen, **text)
    path = plan_path.with_name(plan_path.name.removesuffix(".json") + ".repair.safetensors")

    predicted = repair_cost(plan, study)
    click.echo(f"repair: about {predicted.peak_memory / 1e6:,.0f} MB of memory", err=True)
    with progress_bar("repair", "window", study.windows(2)) as progress:
        made = repair(plan, study, path, progress=progress)
    if (peak := peak_rss_bytes()) is not None:
        click.echo(f"repair: {peak / 1e6:,.0f} MB at its peak", err=True)
    return made


def calibrated_plan(
    layout: Layout,
    source: str,
    chosen: Chosen,
    plan_path: Path,
    *,
    channels: ChannelOptions,
    ratio: float | None,
    vocab_by: str,
    output: Path | None = None,
    stats_path: Path | None = None,
    **text: Any,
) -> Plan:
    """Calibrate on text as the pruned tokenizer cuts it, plan, repair if asked; save all of it.

    ``text`` is what ``open_study`` takes. What a plan would refuse is refused before the work.
    """
    from calib.documents import read_documents

    planned = partial(
        plan_model,
        layout,
        source,
        chosen,
        channels=channels,
        ratio=ratio,
        output=output,
        vocab_by=vocab_by,
    )
    planned(None)
    plan_path.absolute().parent.mkdir(parents=True, exist_ok=True)
    stats = None
    if layout.widths:
        vocabulary = TextVocabulary(chosen.rarity, chosen.sizes.vocab_size)
        ours = {name: value for name, value in text.items() if name not in ("windows", "spill")}
        stats = take_statistics(prepare_calibration(layout, vocabulary, **ours))
        if stats_path is not None:
            stats.save(stats_path)
    made = planned(stats, documents=read_documents(text["data"]))
    if channels.repair != "none":
        made = repair_plan(made, plan_path, layout, chosen, **text)
    made.save(plan_path)
    return made


def search_pairs(
    study: "Study",
    chosen: Chosen,
    target: Target,
    candidates: str | None,
    channels: ChannelOptions,
) -> tuple[list[Row], Sizes]:
    """Try the pairs that meet ``target``, or ``candidates``; return the rows and the best."""
    from calib.search import search

    layout, rarity = study.material.layout, chosen.rarity
    if candidates is None:
        steps = allowed_steps(layout, target)
        pairs = pairs_at(layout, target.ratio or 0.0, rarity.must_keep, steps)
    else:
        pairs = parse_candidates(candidates, layout, main_width(layout))
    rows, best = search(
        study,
        pairs,
        chosen.sizes,
        most=MOST if candidates is None else len(pairs),
        criterion=channels.criterion,
        repair=channels.repair != "none",
        progress=passes("search"),
    )
    return rows, replace(best, dequantize=target.dequantize)


def usable_methods(layout: Layout) -> list[str]:
    """All methods that there are for this model; says which are left out, and why."""
    try:
        check_layers(layout, [[layer] for layer in range(1, layout.num_hidden_layers)])
    except SurgeryError as error:
        click.echo(f"note: without {' and '.join(LAYER_METHODS)}: {error}", err=True)
        return [method for method in METHODS if method not in LAYER_METHODS]
    return list(METHODS)


def compare_methods(
    study: "Study", ratios: Sequence[float], target: Target, methods: Sequence[str]
) -> dict[float, list[Row]]:
    """Try ``methods`` at each of ``ratios``."""
    from calib.compare import Target as Ratio
    from calib.compare import compare

    layout, smallest = study.material.layout, study.material.rarity.must_keep
    if {*methods} & {*LAYER_METHODS}:
        check_layers(layout, [[layer] for layer in range(1, layout.num_hidden_layers)])
    steps = allowed_steps(layout, target)
    targets = [Ratio(ratio, pairs_at(layout, ratio, smallest, steps)) for ratio in ratios]
    return compare(study, targets, methods, passes("compare"))


def compare_samples(
    study: "Study", ratio: float, target: Target, counts: Sequence[int]
) -> dict[int, Row]:
    """Try the paper's method at the rule of thumb's pair, calibrated on so many windows each."""
    from calib.compare import by_samples
    from calib.study import Recipe

    layout, smallest = study.material.layout, study.material.rarity.must_keep
    sizes = split(layout, ratio, smallest, allowed_steps(layout, target))
    recipe = Recipe("compact", sizes, retokenize=False)
    return by_samples(study, recipe, counts, passes("compare"))


def passes(what: str) -> Callable[[int], AbstractContextManager[Callable[[int], object]]]:
    """Return what makes a bar of windows for each pass."""
    return lambda total: progress_bar(what, "window", total)
