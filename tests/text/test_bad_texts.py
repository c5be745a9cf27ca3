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
    Case("text not there", nothing, f"{CALIBRATE} absent.txt",
         ("absent.txt", "does not exist", "name a .txt")),
    Case("text of another kind", write("text.csv", "a,b"), f"{SCORE} text.csv",
         ("text.csv", "not of a kind", "expected .txt, .jsonl, .parquet", "rename or convert")),
    Case("text not UTF-8", write("latin.txt", "Süß".encode("latin-1")), f"{SCORE} latin.txt",
         ("latin.txt", "cannot be read", "found", "UTF-8")),
    Case("jsonl line is no JSON", write("a.jsonl", '{"text": "a"}\n\n{"text"'),
         f"{SCORE} a.jsonl --strict",
         ("a.jsonl", "line 3", "not a record", 'expected {"text"', "found", "correct the line")),
    Case("jsonl line without text", write("a.jsonl", '{"body": "a"}'), f"{SCORE} a.jsonl",
         ("a.jsonl", "line 1", "no field 'text' or 'messages'", "fields body", "--field")),
    Case("jsonl line without the field", write("a.jsonl", '{"text": "a"}'),
         f"{SCORE} a.jsonl --field body",
         ("a.jsonl", "line 1", "no field 'body'", "fields text", "name the one", "--field")),
    Case("jsonl line is a list", write("a.jsonl", "[1]"), f"{SCORE} a.jsonl",
         ("a.jsonl", "line 1", "not a record", 'expected {"text"', "correct the line")),
    Case("jsonl text is a number", write("a.jsonl", '{"text": 1}'), f"{SCORE} a.jsonl",
         ("a.jsonl", "line 1", "not a string", "found int", "correct the row")),
    Case("jsonl text is half a character", write("a.jsonl", '{"text": "\\ud800"}'),
         f"{SCORE} a.jsonl", ("a.jsonl", "line 1", "half a char", "correct the row")),
    Case("jsonl text is half a character, for tokens", write("a.jsonl", '{"text": "\\ud800"}'),
         f"{CALIBRATE} a.jsonl", ("a.jsonl", "line 1", "half a char", "correct the row")),
    Case("chats without a template",
         write("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}'), f"{SCORE} a.jsonl",
         ("model", "no chat template", "expected chat_template.jinja", "add the model's")),
    Case("no .gz file", write("a.txt.gz", "text"), f"{CALIBRATE} a.txt.gz",
         ("a.txt.gz", "damaged, or not a .gz file", "check its name")),
    Case("no .zst file", write("a.jsonl.zst", "text"), f"{SCORE} a.jsonl.zst",
         ("a.jsonl.zst", "damaged, or not a .zst file", "check its name")),
    Case("no .parquet file", write("a.parquet", "text"), f"{SCORE} a.parquet",
         ("a.parquet", "damaged, or not a .parquet file", "check its name")),
    Case("compressed file of another kind", write("a.csv.gz", "a,b"), f"{SCORE} a.csv.gz",
         ("a.csv.gz", "not of a kind", "rename or convert")),
    Case("weight of nothing", nothing, f"{SCORE} text.txt=0",
         ("text.txt", "weight", "found 0", "correct it")),
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
