"""The task files: records well formed, answers balanced, nothing twice, continuation as made."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import TEXT
from tools.tasks import continuation
from tools.tasks.records import FOLDER, KINDS, read

CHOICES = dict.fromkeys(KINDS, 4) | {"physical": 2}
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_file_is_a_kind_with_its_task_and_its_line_in_the_readme() -> None:
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == set(KINDS)
    for kind in KINDS:
        assert (FOLDER / f"{kind}.yaml").is_file()
        assert f"| `{kind}.jsonl` | {len(read(kind))} | {CHOICES[kind]} |" in README


def test_records_are_well_formed(kind: str) -> None:
    records = read(kind)
    assert 80 <= len(records) <= 120
    for record in records:
        assert list(record) == ["context", "choices", "answer"]
        choices = record["choices"]
        assert len(set(choices)) == len(choices) == CHOICES[kind]
        assert record["answer"] in range(len(choices))
        for text in (record["context"], *choices):
            # Per character, as the harness normalizes, is per byte.
            assert text.isascii()
            assert text == text.strip() != ""


def test_no_answer_s_place_is_a_better_guess(kind: str) -> None:
    places = Counter(record["answer"] for record in read(kind))
    assert set(places) == set(range(CHOICES[kind]))
    assert max(places.values()) - min(places.values()) <= 8


def test_no_item_occurs_twice() -> None:
    contexts = [record["context"] for kind in KINDS for record in read(kind)]
    assert not [context for context, count in Counter(contexts).items() if count > 1]


def test_continuation_is_what_its_script_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "continuation.jsonl"
    monkeypatch.setattr(continuation, "OUTPUT", made)
    continuation.main()
    assert made.read_bytes() == (FOLDER / "continuation.jsonl").read_bytes()


def test_continuation_has_the_words_that_follow() -> None:
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    for record in read("continuation"):
        follows = [f"{record['context']} {choice}" in text for choice in record["choices"]]
        assert follows == [n == record["answer"] for n in range(4)]


def test_continuation_s_passages_are_right_once_and_wrong_thrice() -> None:
    records: list[dict[str, Any]] = read("continuation")
    right = Counter(record["choices"][record["answer"]] for record in records)
    shown = Counter(choice for record in records for choice in record["choices"])
    assert set(right.values()) == {1}
    assert set(shown.values()) == {4}


def test_records_are_one_json_object_a_line(kind: str) -> None:
    text = (FOLDER / f"{kind}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
