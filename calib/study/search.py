"""Find the sizes that lose least at a ratio by trying several (V', E', I'), coarse to fine."""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from calib.scoring.score import check_predicts
from calib.study.study import Candidate, Study
from calib.study.table import (
    WITHIN,
    Row,
    best_for,
    legend,
    plot_frontier,
    plot_sizes,
    rows_html,
    table,
)
from surgery.errors import BudgetError
from surgery.families.schema import VOCAB
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice, choose_vocabulary, layers_at
from surgery.planning.layers import check_removable, format_layers, pattern_layers
from surgery.planning.request import (
    EXPERTS,
    LAYERS,
    CutRequest,
    SizeRequest,
    allowed_steps,
    fixed_sizes,
    main_width,
)
from surgery.planning.serving import QUALITY
from surgery.planning.shapes import blocks, check_experts, expert_choices, unprunable
from surgery.planning.sizes import FixedSizes, Sizes, check_sizes, nearest_to_rule, sizes_at, whole
from surgery.process import Progress, stage
from surgery.stats.channels import RECONSTRUCT

LOG = logging.getLogger(__name__)

MOST = 8
"""Sizes that are tried in one pass, besides the rule of thumb's; each costs a forward pass."""

Item = TypeVar("Item")


def coarse(found: Sequence[Sizes], also: Sequence[Sizes] = (), most: int = MOST) -> list[Sizes]:
    """Return ``most`` of ``found`` at equal distances, with both ends, and ``also``.

    Where they have several numbers of experts, some of these are at equal distances, and so are the
    V' of each.
    """
    if len(found) <= most:
        return list(found)
    lines: dict[int, list[Sizes]] = {}
    for sizes in found:
        lines.setdefault(sizes.experts, []).append(sizes)
    counts = _evenly(list(lines), max(1, most // 2))
    chosen = []
    for line in map(lines.__getitem__, counts):
        ends = _evenly(line, most // len(counts))
        chosen += [sizes for sizes in line if sizes in ends or sizes in also]
    return chosen


def _evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Return ``most`` of ``items`` at equal distances, with both ends."""
    indices = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[index] for index in sorted(set(indices.tolist()))]


def fine(
    found: Sequence[Sizes], tried: Sequence[Sizes], best: Sizes, most: int = MOST
) -> list[Sizes]:
    """Return about ``most`` untried sizes between the neighbours of ``best``, on every axis."""
    counts = [_experts(sizes) for sizes in tried]
    rows = [sizes.vocab_size for sizes in tried if sizes.experts == best.experts]
    between = [
        sizes
        for sizes in found
        if sizes not in tried
        and _near(_experts(sizes), counts, _experts(best))
        and _near(sizes.vocab_size, rows, best.vocab_size)
    ]
    return coarse(between, most=most) if between else []


def _near(size: int, tried: Sequence[int], best: int) -> bool:
    """Whether ``size`` is no farther from ``best`` than the next that was tried on its side."""
    low = max((other for other in tried if other < best), default=0)
    high = min((other for other in tried if other > best), default=sys.maxsize)
    return low <= size <= high


def _experts(sizes: Sizes) -> int:
    """Return the number of experts, to order sizes by."""
    return sizes.experts or sys.maxsize


def _order(sizes: Sizes) -> tuple[int, int]:
    return _experts(sizes), sizes.vocab_size


def parse_candidates(text: str, layout: Layout, main_width: str) -> list[Sizes]:
    """Return the sizes in "V:I,V:E:I,…". I is that of ``main_width``; other widths shrink alike.

    Raises:
        BudgetError: they are no sizes, or not within the model's.
    """
    found: list[Sizes] = []
    full = layout.widths[main_width]
    for part in text.split(","):
        numbers = part.split(":")
        positive = all(number.isdecimal() and int(number) for number in numbers)
        if len(part) > 29 or len(numbers) not in (2, 3) or not positive:
            raise BudgetError(
                "`candidates`",
                "are no pairs of sizes, each at least 1",
                expected="V:I,V:I,… such as 32768:864,24576:928; of a mixture also V:E:I,…",
                found=part[:40],
                fix="correct them",
            )
        vocab_size, *experts, width = map(int, numbers)
        widths = {key: max(1, round(width / full * n)) for key, n in layout.widths.items()}
        sizes = Sizes(vocab_size, widths | {main_width: width})
        check_sizes(layout, sizes)
        for count in experts:
            check_experts(layout, count)
            sizes = replace(sizes, experts=0 if count == layout.experts else count)
        if sizes not in found:
            found.append(sizes)
    return sorted(found, key=_order)


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """The sizes among which a search looks."""

    choice: SizeChoice
    """The order of rarity, and the request; its sizes are the source's."""
    sizes: Sequence[Sizes]
    """All of them, by E', then by V'."""
    most: int
    """Sizes in a pass, besides the rule of thumb's; 0 where layers are searched."""


def search_space(
    layout: Layout,
    request: CutRequest,
    candidates: str | None = None,
    documents: Iterable[str] | None = None,
) -> SearchSpace:
    """Return the sizes that meet the request's ratio, or ``candidates`` such as "32768:864,…".

    ``only`` limits what the ratio is taken from. Without it, that is the vocabulary, the channels
    and the experts, whatever the model allows. Layers are searched alone.

    Raises:
        FamilyError: the model is not scored.
        BudgetError: there are both a ratio and candidates, or neither; the ratio is out of reach;
            or the candidates are not within the model's sizes.
        DataError, TokenizerError: as ``choose_sizes``.
    """
    check_predicts(layout)
    asked = request.sizes
    if (asked.ratio is None) == (candidates is None):
        raise BudgetError(
            "`ratio`",
            "and `candidates` exclude each other" if candidates else "is not given",
            fix="give one of them" if candidates else "give one, such as 0.2, or `candidates`",
        )
    if LAYERS in asked.parts:
        return _layer_space(layout, request)
    if candidates is not None:
        sizes = parse_candidates(candidates, layout, main_width(layout))
        smallest = min(each.vocab_size for each in sizes)
        choice = choose_vocabulary(layout, request, smallest, documents)
        most = len(sizes)
    else:
        fixed, most = _fixed(layout, request), MOST
        choice = choose_vocabulary(layout, request, fixed.vocab_size, documents)
        sizes = sizes_at(
            layout,
            asked.ratio or 0.0,
            choice.rarity.must_keep,
            allowed_steps(layout, asked),
            fixed,
            expert_counts(layout, asked),
        )
    found = [replace(each, dequantize=asked.dequantize) for each in sizes]
    return SearchSpace(choice, found, most)


def _layer_space(layout: Layout, request: CutRequest) -> SearchSpace:
    """Return the space of a search for layers, and refuse what it does not look at."""
    asked = request.sizes
    idle = {
        "repair": request.channels.repair != "none",
        "aim": asked.aim != QUALITY,
        "multiple_of": asked.multiple_of is not None,
        "target": asked.target is not None,
        "dequantize": asked.dequantize,
    }
    if names := [f"`{name}`" for name, given in idle.items() if given]:
        problem = "has no effect where layers are searched"
        raise BudgetError(", ".join(names), problem, fix="leave it out")
    check_removable(layout)
    return SearchSpace(choose_vocabulary(layout, request, layout.vocab_size), [], 0)


def _fixed(layout: Layout, request: CutRequest) -> FixedSizes:
    """Return the sizes that stay: of parts that are not named, and of weights only moved whole."""
    asked = request.sizes
    fixed, full = fixed_sizes(request, layout), whole(layout)
    if asked.dequantize:
        return fixed
    moved = {*unprunable(layout), *({VOCAB} & blocks(layout).keys())}
    widths = {key: size for key, size in full.widths.items() if key in moved}
    vocab_size = full.vocab_size if VOCAB in moved else fixed.vocab_size
    return FixedSizes(vocab_size, {**fixed.widths, **widths})


def expert_counts(layout: Layout, asked: SizeRequest) -> list[int]:
    """Return the numbers of experts to try, as in ``Sizes``.

    Raises:
        BudgetError: experts are asked for, and cannot be removed.
    """
    if not (EXPERTS in asked.parts if asked.parts else layout.experts):
        return [0]
    try:
        counts = list(expert_choices(layout))
        check_experts(layout, counts[0])
    except BudgetError as error:
        if asked.parts:
            raise
        LOG.info("note: all experts are kept: %s", error)
        return [0]
    return [0 if count == layout.experts else count for count in counts]


@dataclass(frozen=True)
class SearchResult:
    """The sizes that a search tried."""

    dense: Row
    """The model itself."""
    rows: Sequence[Row]
    """One for each choice of sizes, in order of E', then of V'."""
    best: Sizes
    """Those that lose least, or those that serve the aim and lose little more."""
    aim: str = QUALITY
    """What they serve."""

    def table(self) -> str:
        """Return the rows as text for people, with a legend; the best are marked."""
        rows, aim = [self.dense, *self.rows], self.aim
        return f"{table(rows, aim=aim)}\n\n{legend(self.dense, aim=aim)}"

    def _repr_html_(self) -> str:
        return rows_html("search", [self.dense, *self.rows])

    def plot(self, path: Path, model: str = "") -> None:
        """Draw the loss of each row over its V', or over its E' where these differ.

        With an aim other than quality, draw it over the bytes that count for that. The title names
        ``model``.
        """
        if self.aim == QUALITY:
            plot_sizes(self.rows, path, model)
        else:
            plot_frontier(self.rows, self.aim, path, model)


def search_sizes(
    study: Study, space: SearchSpace, progress: Progress | None = None
) -> SearchResult:
    """Try the sizes of ``space``, coarse to fine, in two passes at most.

    Args:
        study: The text, compute settings, and tasks, which all sizes answer. The answers choose
            nothing.
        space: The sizes, and how channels and experts are chosen.
        progress: Called with "search", finished windows × layers of a pass, and their total.
    """
    layout, request = study.text.layout, space.choice.request
    if not space.most:
        return _search_layers(study, request.sizes.ratio or 0.0, progress)
    channels, ratio, aim = request.channels, request.sizes.ratio, request.sizes.aim
    usual = []
    if ratio is not None:
        of_experts = [[s for s in space.sizes if s.experts == n] for n in _counts(space.sizes)]
        usual = [nearest_to_rule(layout, ratio, pairs) for pairs in of_experts]
    like = Candidate(
        "",
        space.choice.sizes,
        channels.criterion,
        repair=channels.repair != "none",
        reconstruct=channels.repair == RECONSTRUCT,
        expert_criterion=channels.expert_criterion,
    )

    def attempt(chosen: Sequence[Sizes]) -> list[tuple[Row, Sizes]]:
        candidates = [replace(like, name=_name(layout, sizes), sizes=sizes) for sizes in chosen]
        return list(zip(_rows(study, candidates, progress), chosen, strict=True))

    first = coarse(space.sizes, usual, space.most)
    tried = attempt(first)
    if second := fine(space.sizes, first, _best(tried, aim), space.most):
        tried += attempt(second)
    tried.sort(key=lambda pair: _order(pair[1]))
    return SearchResult(study.dense, [row for row, _ in tried], _best(tried, aim), aim)


def _search_layers(study: Study, ratio: float, progress: Progress | None) -> SearchResult:
    """Try the layers of largest influence, and those of them that keep the model's pattern.

    The latter are preferred where they lose little more: engines that count layers run them, too.
    """
    layout = study.text.layout
    advance = stage(progress, "search", study.windows(1))
    study.rows([Candidate("all", whole(layout), influence=True)], advance)
    assert study.block_influence is not None
    groups = layers_at(layout, ratio, study.block_influence)
    kept = pattern_layers(layout, len(groups), study.block_influence)
    chosen = {format_layers(groups): groups}
    if kept is not None:
        chosen.setdefault(format_layers(kept), kept)
    sizes = [replace(whole(layout), layers=layers) for layers in chosen.values()]
    candidates = [Candidate(n, s) for n, s in zip(chosen, sizes, strict=True)]
    tried = _rows(study, candidates, progress)
    best = tried.index(best_for(QUALITY, tried))
    if kept is not None and tried[-1].loss <= tried[best].loss + WITHIN:
        best = len(tried) - 1
    return SearchResult(study.dense, tried, sizes[best])


def _rows(study: Study, candidates: Sequence[Candidate], progress: Progress | None) -> list[Row]:
    """Try ``candidates`` in one pass; they answer the study's tasks."""
    asked = [candidate.name for candidate in candidates] if study.tasks else []
    advance = stage(progress, "search", study.windows(len(candidates), answers=bool(asked)))
    return study.rows(candidates, advance, answers=asked)


def _counts(found: Sequence[Sizes]) -> list[int]:
    return list(dict.fromkeys(sizes.experts for sizes in found))


def _best(tried: Sequence[tuple[Row, Sizes]], aim: str) -> Sizes:
    best = best_for(aim, [row for row, _ in tried])
    return next(sizes for row, sizes in tried if row is best)


def _name(layout: Layout, sizes: Sizes) -> str:
    experts = [sizes.experts or layout.experts] * bool(layout.experts)
    return ":".join(map(str, (sizes.vocab_size, *experts, *sizes.widths.values())))
