"""The study behind the rule of thumb: a search judged on text that it did not see."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from surgery.api import open_layout
from surgery.layout.layout import Layout
from tests.support import tiny
from tools import splits

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 512,
    "vocab_size": 1536,
    "tied": True,
}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    path = tiny.save(tmp_path_factory.mktemp("splits") / "model", **SIZES)
    return open_layout(path)


@pytest.mark.parametrize("repair", [False, True])
def test_the_pair_found_is_held_against_the_others(
    layout: Layout, tmp_path: Path, repair: bool
) -> None:
    prose = tiny.prose(40_000)
    data, unseen = tmp_path / "data.txt", tmp_path / "unseen.txt"
    data.write_text(prose[:24_000], encoding="utf-8")
    unseen.write_text(prose[24_000:], encoding="utf-8")
    sizes = ("--samples", "8", "--seq-len", "128", "--windows", "4", "--most", "3")
    texts = ("--data", data, "--unseen", unseen, "--ratio", "0.2", "--json")
    arguments = [layout.checkpoint.path, *texts, *sizes, *(["--repair"] if repair else [])]
    result = CliRunner().invoke(splits.main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    judged = {row["name"]: row for row in facts["unseen"]}
    assert list(judged) == ["search", "channels", "vocabulary", "rule"]
    assert judged["channels"]["vocab_size"] == max(r["vocab_size"] for r in facts["tried"])
    assert judged["vocabulary"]["vocab_size"] == min(r["vocab_size"] for r in facts["tried"])
    best = min(facts["tried"], key=lambda row: row["loss"])
    assert judged["search"]["vocab_size"] == best["vocab_size"]
    assert judged["search"]["loss"] != best["loss"], "the same text"
    assert facts["forwards_per_pair"] > 0
