"""A split for decoding, for memory or for quality, at the same ratio."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.study.table import DENSE, WITHIN, Row, best_for, table
from surgery.errors import BudgetError
from surgery.layout.layout import Layout
from surgery.planning.choice import choose_sizes
from surgery.planning.plan import Plan
from surgery.planning.request import CutRequest, SizeRequest
from surgery.planning.serving import (
    AIMS,
    CHANNEL_CAP,
    DECODE,
    MARGIN,
    MEMORY,
    QUALITY,
    served_bytes,
)
from surgery.planning.sizes import TOLERANCE, VOCAB_CAP, Sizes
from tests.support import tiny, tiny_encoders
from tests.support.command import Run, assert_refused
from tests.support.plans import layout_of

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 512, "vocab_size": 1536}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return layout_of(tiny.save(tmp_path_factory.mktemp("models") / "untied", **SIZES))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return layout_of(tiny.save(tmp_path_factory.mktemp("models") / "tied", tied=True, **SIZES))


def chosen(layout: Layout, ratio: float, aim: str) -> Sizes:
    return choose_sizes(layout, CutRequest(SizeRequest(ratio, multiple_of=8, aim=aim))).sizes


def row(name: str, loss: float, decoded: int = 0, memory: int = 0) -> Row:
    counted: dict[str, Any] = {"decoded_bytes": decoded, "memory_bytes": memory}
    return Row(name, 9, {"i": 9}, 1, 9, 0.1, 1.0, loss, 1, 1, **counted)


@settings(deadline=None, max_examples=25)
@given(ratio=st.floats(0.05, 0.45), aim=st.sampled_from([DECODE, MEMORY]))
def test_an_aim_keeps_the_ratio_and_takes_no_more_bytes(
    untied: Layout, ratio: float, aim: str
) -> None:
    sizes, usual = chosen(untied, ratio, aim), chosen(untied, ratio, QUALITY)
    full = untied.parameters(untied.vocab_size, untied.widths)
    reached = 1 - untied.parameters(sizes.vocab_size, sizes.widths) / full
    assert abs(reached - ratio) <= TOLERANCE
    if sizes != usual:
        assert sizes.vocab_size >= min(usual.vocab_size, (1 - VOCAB_CAP) * untied.vocab_size)
        (channels,), (of_rule,) = sizes.widths.values(), usual.widths.values()
        assert channels >= min(of_rule, (1 - CHANNEL_CAP) * 512)
        most = served_bytes(untied, usual, aim) * (1 + MARGIN) * (1 + 2 * TOLERANCE / (1 - ratio))
        assert served_bytes(untied, sizes, aim) <= most


def test_rows_that_are_looked_up_stay_for_decoding_and_go_for_memory(untied: Layout) -> None:
    decode, memory = (chosen(untied, 0.2, aim) for aim in (DECODE, MEMORY))
    assert decode.vocab_size > memory.vocab_size
    assert decode.widths["intermediate_size"] < memory.widths["intermediate_size"]
    assert served_bytes(untied, decode, DECODE) < served_bytes(untied, memory, DECODE)
    assert served_bytes(untied, memory, MEMORY) < served_bytes(untied, decode, MEMORY)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35])
def test_a_tied_table_is_read_whole_so_that_the_rule_decides(tied: Layout, ratio: float) -> None:
    assert chosen(tied, ratio, DECODE) == chosen(tied, ratio, QUALITY)


def test_what_leaves_nothing_to_choose_is_refused(untied: Layout, tmp_path: Path) -> None:
    for asked in (
        SizeRequest(0.2, vocab_size=800, aim=DECODE),
        SizeRequest(0.1, only="channels", aim=MEMORY),
        SizeRequest(vocab_size=800, aim=DECODE),
    ):
        with pytest.raises(BudgetError, match="has nothing to choose"):
            choose_sizes(untied, CutRequest(asked))
    encoder = layout_of(tiny_encoders.save(tmp_path / "bert", "bert", "masked"))
    with pytest.raises(BudgetError, match="no bytes read"):
        chosen(encoder, 0.1, DECODE)


def test_the_note_of_a_plan_says_what_is_saved(untied: Layout, tmp_path: Path, run: Run) -> None:
    path, out = untied.checkpoint.path, tmp_path / "plan.json"
    options = ("--ratio", 0.2, "--multiple-of", 8, "-o", out)
    result = run("plan", path, *options, "--for", "memory")
    assert result.exit_code == 0, result.output
    assert "split for memory: " in result.output
    assert "the rule of thumb's split for quality (V' " in result.output
    assert Plan.load(out).after.vocab_size == chosen(untied, 0.2, MEMORY).vocab_size
    same = run("plan", path, *options[:-1], tmp_path / "decode.json", "--for", "decode")
    assert "no other split of this ratio saves notably more" in same.output
    assert "--ratio 0.2 --for decode" in same.output.splitlines()[-1]
    refused = run("plan", path, "--vocab-size", 800, "--for", "memory", "-o", tmp_path / "p.json")
    assert_refused(refused, "--for memory: has nothing to choose")


def test_of_rows_that_lose_little_more_the_one_of_fewest_bytes_is_chosen() -> None:
    best, near = row("best", 0.10, 300, 9), row("near", 0.10 + WITHIN / 2, 200, 9)
    far, dense = row("far", 0.10 + 2 * WITHIN, 100, 9), row(DENSE, 0.0, 50, 5)
    rows = [dense, best, near, far]
    assert [best_for(aim, rows).name for aim in AIMS] == ["best", "near", "best"]
    lines = table(rows, aim=DECODE).splitlines()
    assert "read MB" in lines[0]
    assert [line.split()[0] for line in lines if line.endswith("  for decode")] == ["near"]
    assert [line.split()[0] for line in lines if line.endswith("  best")] == ["best"]


def test_memory_counts_the_caches_that_there_are(tmp_path: Path, run: Run) -> None:
    """An encoder's layers keep nothing; a decoder beside one keeps its own and the encoder's."""
    for key, head, counted in (
        ("t5", "text", "with the cache and logits of 2,048 positions"),
        ("bert", "masked", "with logits of 2,048 positions"),
    ):
        path = tiny_encoders.save(tmp_path / key, key, head)
        request = ("--ratio", 0.1, "--multiple-of", 8, "--for", "memory")
        result = run("plan", path, *request, "-o", tmp_path / f"{key}.json")
        assert result.exit_code == 0, result.output
        assert f"fewer bytes in memory {counted}" in result.output
    layout = layout_of(tmp_path / "t5")
    sizes = [Sizes(size, layout.widths) for size in (640, 512)]
    found = [served_bytes(layout, each, MEMORY) for each in sizes]
    one = layout.by_name["shared.weight"].nbytes // 640
    assert found[0] - found[1] == 128 * (one + 2048 * 4)
    assert found[0] == layout.checkpoint.nbytes + 2048 * (128 + 128 + 640 * 4)


def test_search_for_memory_draws_the_frontier(tied: Layout, tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.prose(24_000), encoding="utf-8")
    options = ("--data", text, "--seq-len", 128, "--samples", 6, "--ratio", 0.2)
    more = ("--multiple-of", 64, "--for", "memory", "--plot", tmp_path / "p.png", "--json")
    result = run("search", tied.checkpoint.path, *options, *more, "-o", tmp_path / "best.json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[0])
    least = min(each["loss"] for each in rows) + WITHIN
    close = [each for each in rows if each["loss"] <= least]
    bytes_of = {each["vocab_size"]: each["memory_bytes"] for each in close}
    found = Plan.load(tmp_path / "best.json").after.vocab_size
    assert bytes_of[found] <= min(bytes_of.values()) * (1 + MARGIN)
    assert (tmp_path / "p.png").stat().st_size > 5000
