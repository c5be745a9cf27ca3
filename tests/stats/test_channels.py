"""Channels that are ranked on too little text: it is said where they are chosen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

import surgery
from surgery.stats.channels import ENOUGH_TOKENS
from tests.support.command import Run
from tests.support.plans import layout_of, random_stats


@pytest.mark.parametrize(
    ("tokens", "sizes", "criterion", "said"),
    [
        (ENOUGH_TOKENS - 1, {"intermediate_size": 64}, "common-act2", True),
        (ENOUGH_TOKENS, {"intermediate_size": 64}, "common-act2", False),
        (1, {"intermediate_size": 64}, "random", False),
        (1, {"vocab_size": 512}, "common-act2", False),
    ],
)
def test_channels_ranked_on_little_text_are_said(
    llama: Path, tokens: int, sizes: dict[str, Any], criterion: str, said: bool
) -> None:
    stats = random_stats(layout_of(llama))
    stats = replace(stats, info=msgspec.structs.replace(stats.info, tokens=tokens))
    plan = surgery.make_plan(llama, stats=stats, criterion=criterion, **sizes)
    words = f"ranked on {tokens:,} tokens of text; it takes some {ENOUGH_TOKENS:,}"
    assert any(words in note for note in plan.provenance.notes) == said


@pytest.mark.parametrize(("more", "said"), [((), True), (("--part", "1/2"), False)])
def test_calibrate_says_that_its_text_is_short(
    llama: Path, text: Path, tmp_path: Path, run: Run, more: tuple[object, ...], said: bool
) -> None:
    options = ("--data", text, "--seq-len", 64, "--samples", 4, "-o", tmp_path / "stats")
    for dry_run in (("--dry-run",), ()):
        shown = run("calibrate", llama, *options, *more, *dry_run)
        assert shown.exit_code == 0, shown.output
        words = "channels are ranked on 256 tokens of text"
        assert (words in shown.stdout) == said
