"""The paper's numbers from headers alone: Para (M) of Tables 2, 3 and 6 at the sizes of Table 8."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.layout.build import read_layout
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice
from surgery.planning.plan import Plan
from surgery.planning.planner import plan_cut
from surgery.planning.sizes import (
    CANDIDATE_RATIOS,
    TOLERANCE,
    Sizes,
    split,
    vocabulary_first,
    whole,
)
from surgery.vocabulary.order import Rarity
from tests.support.command import Run
from tools.paper import TABLE_6, TABLE_8, Row, layout_of, parameters, printed
from tools.published import PUBLISHED, llama_config
from tools.shapes import write_headers_only, write_tokenizer

GEMMA_SURPLUS = 9_000_000
"""The paper counts about 9 M more for Gemma-3-1B than the public shapes have (1,009 for 999.9)."""

SMOLLM2 = llama_config(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True)
GEMMA = PUBLISHED["Gemma-3-1B"] | {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
}
"""SmolLM2-135M and Gemma 3 270M."""


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Layout]:
    directory = tmp_path_factory.mktemp("published")
    return {model: layout_of(model, directory) for model in PUBLISHED}


def plan_of(layout: Layout, row: Row) -> Plan:
    rarity = Rarity(np.arange(layout.vocab_size), 1, layout.vocab_size, 0)
    return plan_cut(layout, SizeChoice(rarity, row.sizes))


@pytest.mark.parametrize(
    "row", [*TABLE_8, *TABLE_6], ids=lambda r: f"{r.model}-{r.vocab_size}-{r.intermediate_size}"
)
def test_plan_counts_what_the_paper_prints(layouts: dict[str, Layout], row: Row) -> None:
    plan = plan_of(layouts[row.model], row)
    surplus = GEMMA_SURPLUS if row.model == "Gemma-3-1B" else 0
    assert printed(plan.after.parameters + surplus) == row.parameters
    assert plan.after.nbytes == 2 * plan.after.parameters  # bf16, tied embeddings stored once


def test_plan_command_reproduces_table_8_on_a_real_size_tokenizer(tmp_path: Path, run: Run) -> None:
    row = next(r for r in TABLE_8 if r.model == "Llama-3.1-70B" and r.ratio == 0.35)
    config = PUBLISHED[row.model]
    model = write_tokenizer(write_headers_only(tmp_path / "model", config, shards=30), config)
    sizes = ("--vocab-size", row.vocab_size, "--intermediate-size", row.intermediate_size)
    result = run("plan", model, *sizes, "-o", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    plan = msgspec.json.decode((tmp_path / "plan.json").read_bytes(), type=Plan)
    assert printed(plan.after.parameters) == row.parameters
    assert f"{1 - plan.after.parameters / plan.before.parameters:.2%}" == "35.00%"


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("ratio", [*CANDIDATE_RATIOS, 0.05, 0.123, 0.6])
def test_ratio_alone_hits_the_target(layouts: dict[str, Layout], model: str, ratio: float) -> None:
    layout = layouts[model]
    sizes = split(layout, ratio, 1024)
    reached = 1 - parameters(layout, sizes) / parameters(layout, whole(layout))
    assert abs(reached - ratio) <= TOLERANCE
    assert sizes.vocab_size % 128 == sizes.widths["intermediate_size"] % 128 == 0


@pytest.mark.parametrize(
    "row", [r for r in TABLE_8 if r.ratio], ids=lambda r: f"{r.model}-{r.ratio}"
)
def test_the_rule_splits_like_the_sweeps_of_table_8(layouts: dict[str, Layout], row: Row) -> None:
    """Of what is removed, the vocabulary's share lies within 22 points of the sweep's."""
    layout = layouts[row.model]
    total = parameters(layout, whole(layout))

    def share(sizes: Sizes) -> float:
        removed = total - parameters(layout, sizes)
        channels_only = layout.parameters(layout.vocab_size, sizes.widths)
        return 1 - (total - channels_only) / removed

    assert share(split(layout, row.ratio, 1024)) == pytest.approx(share(row.sizes), abs=0.22)


@pytest.mark.parametrize(
    ("config", "ratio", "found"),
    [
        (SMOLLM2, 0.1, (37376, 1408)),
        (SMOLLM2, 0.2, (36992, 1152)),
        (SMOLLM2, 0.35, (24960, 896)),
        (GEMMA, 0.2, (178304, 2048)),
        (GEMMA, 0.35, (115584, 2048)),
    ],
)
def test_the_rule_splits_as_searches_found_best(
    tmp_path: Path,
    config: dict[str, Any],
    ratio: float,
    found: tuple[int, int],
) -> None:
    """What ``tools.splits`` and the compare of docs/search-repair-compare.md have found."""
    layout = read_layout(Checkpoint.open(write_headers_only(tmp_path / "model", config)))
    sizes = split(layout, ratio, 1024)
    assert (sizes.vocab_size, sizes.widths["intermediate_size"]) == found


def test_small_models_lose_vocabulary_first_and_large_ones_channels(
    layouts: dict[str, Layout],
) -> None:
    shares = []
    for model in ("Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B"):
        layout = layouts[model]
        removed = 0.2 * parameters(layout, whole(layout))
        shares.append(vocabulary_first(layout, removed) / removed)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.05
