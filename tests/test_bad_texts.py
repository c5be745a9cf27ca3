"""Text that cannot be read is refused in one line."""

from pathlib import Path

import pytest

from tests.support.command import Run
from tests.support.damage import (
    CALIBRATE,
    SCORE,
    Case,
    assert_refused_and_nothing_written,
    directory,
    nothing,
    write,
)

CASES = [
    Case("no full window", nothing, f"{CALIBRATE} text.txt --seq-len 100000",
         ("--data", "no full window", "expected a document of 100000 tokens", "--seq-len")),
    Case("text not there", nothing, f"{CALIBRATE} gone.txt",
         ("gone.txt", "does not exist", "name a .txt")),
    Case("text of another kind", write("text.csv", "a,b"), f"{SCORE} text.csv",
         ("text.csv", "not text", "expected .txt or .jsonl", "rename or convert")),
    Case("text not UTF-8", write("latin.txt", "Süß".encode("latin-1")), f"{SCORE} latin.txt",
         ("latin.txt", "cannot be read", "found", "UTF-8")),
    Case("jsonl line is no JSON", write("a.jsonl", '{"text": "a"}\n\n{"text"'), f"{SCORE} a.jsonl",
         ("a.jsonl", "line 3", "no record", 'expected {"text"', "found", "correct the line")),
    Case("jsonl line without text", write("a.jsonl", '{"body": "a"}'), f"{SCORE} a.jsonl",
         ("a.jsonl", "line 1", "no record", 'expected {"text"', "correct the line")),
    Case("jsonl line is a list", write("a.jsonl", "[1]"), f"{SCORE} a.jsonl",
         ("a.jsonl", "line 1", "no record", 'expected {"text"', "correct the line")),
    Case("jsonl text is a number", write("a.jsonl", '{"text": 1}'), f"{SCORE} a.jsonl",
         ("a.jsonl", "line 1", "not a string", "correct the line")),
    Case("jsonl text is half a character", write("a.jsonl", '{"text": "\\ud800"}'),
         f"{SCORE} a.jsonl", ("a.jsonl", "line 1", "correct the line")),
    Case("jsonl text is half a character, for tokens", write("a.jsonl", '{"text": "\\ud800"}'),
         f"{CALIBRATE} a.jsonl", ("a.jsonl", "line 1", "correct the line")),
    Case("empty text", write("empty.txt", ""), f"{SCORE} empty.txt",
         ("empty.txt", "no text", "expected documents", "give")),
    Case("blank text", write("blank.txt", "\n \n\n"), f"{CALIBRATE} blank.txt",
         ("blank.txt", "no text", "expected documents", "give")),
    Case("directory without text", directory("empty"), f"{SCORE} empty",
         ("empty", "no text", "expected documents", "give")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    assert_refused_and_nothing_written(case, bench, run)
