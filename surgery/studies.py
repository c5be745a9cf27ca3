"""The steps that search and compare are made of: a study opened, its passes under a bar."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.budget import Sizes, pairs_at
from surgery.candidates import MOST, parse_candidates
from surgery.choices import Chosen, allowed_steps, main_width
from surgery.comparison import Row
from surgery.errors import BudgetError
from surgery.layout import Layout
from surgery.options import Target
from surgery.steps import progress_bar

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
    windows: int,
    device: str,
    dtype: str,
) -> "Study":
    """Divide a text and choose where to compute.

    Raises:
        BudgetError: the model has no channels to choose.
    """
    from calib.device import choose_device, choose_dtype
    from calib.documents import read_documents
    from calib.material import Material
    from calib.study import Study

    if not layout.widths:
        raise BudgetError(
            layout.checkpoint.path / "config.json",
            "has no key for the width of this model's FFN, so there is no split to choose",
            fix="plan the vocabulary alone, with --vocab-size",
        )
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
    return Study(material, where, choose_dtype(dtype, layout.checkpoint, where))


def search_pairs(
    study: "Study",
    chosen: Chosen,
    target: Target,
    candidates: str | None,
    *,
    criterion: str,
    repair: bool,
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
        criterion=criterion,
        repair=repair,
        progress=passes("search"),
    )
    return rows, replace(best, dequantize=target.dequantize)


def passes(what: str) -> Callable[[int], AbstractContextManager[Callable[[int], object]]]:
    """Return what makes a bar of windows for each pass."""
    return lambda total: progress_bar(what, "window", total)
