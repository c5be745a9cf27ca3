"""Damaged tokenizers, and kinds that cannot be pruned, are refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Run
from tests.support.damage import (
    PLAN,
    SCORE,
    Case,
    assert_refused_and_nothing_written,
    change,
    cut,
    model_key,
    nothing,
    remove,
    replace,
    tokenizer,
    write,
)


def swap_ids(data: Any) -> None:
    """Give the first two added tokens each other's id."""
    first, second = data["added_tokens"][:2]
    first["id"], second["id"] = second["id"], first["id"]


def prepend(path: Path, head: bytes) -> None:
    path.write_bytes(head + path.read_bytes())


def gap_under_added(data: Any) -> None:
    """One token fewer, so that the loader gives an added token the id of the last one."""
    del data["model"]["merges"][-1]
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].get)
    del data["model"]["vocab"][last]
    data["added_tokens"].append(dict(data["added_tokens"][0], id=620, content="<late>"))


def two_tokens_one_id(data: Any) -> None:
    vocab = data["model"]["vocab"]
    vocab["Ġthe"] = vocab["Ġa"]


KIND = ("tokenizer.json", "cannot be pruned", "expected BPE on bytes", "keep the vocabulary whole")
"""Words in every refusal of a kind of tokenizer."""


CASES = [
    Case("tokenizer missing", remove("model/tokenizer.json"), PLAN,
         ("tokenizer.json", "missing", "keep the vocabulary whole")),
    Case("tokenizer missing for text", remove("model/tokenizer.json"), f"{SCORE} text.txt",
         ("tokenizer.json", "is missing", "AutoTokenizer")),
    Case("WordLevel tokenizer", model_key(type="WordLevel"), PLAN,
         (*KIND, "found WordLevel model")),
    Case("WordPiece with another prefix",
         model_key(type="WordPiece", continuing_subword_prefix="@@"), PLAN,
         (*KIND, "found WordPiece with continuing_subword_prefix '@@'")),
    Case("BPE with a suffix", model_key(end_of_word_suffix="</w>"), PLAN,
         (*KIND, "found BPE with end_of_word_suffix '</w>'")),
    Case("BPE with dropout", model_key(dropout=0.1), PLAN,
         (*KIND, "found BPE with dropout 0.1")),
    Case("BPE on words",
         tokenizer(lambda data: data.update(pre_tokenizer={"type": "Whitespace"}, decoder=None)),
         PLAN, (*KIND, "found BPE without a byte-level")),
    Case("Unigram with a table", model_key(type="Unigram"), PLAN,
         ("tokenizer.json", "model.vocab is not that of a Unigram model", "published")),
    Case("Unigram piece without a score",
         model_key(type="Unigram", vocab=[["<unk>", 0.0], ["a"]], unk_id=0), PLAN,
         ("tokenizer.json", "piece 1", "not a piece with a score", "found ['a']", "published")),
    Case("Unigram piece twice",
         model_key(type="Unigram", vocab=[["a", 0.0], ["a", -1.0]], unk_id=0), PLAN,
         ("tokenizer.json", "piece 'a'", "twice", "found ids 0 and 1", "published")),
    Case("merges in two forms",
         tokenizer(lambda data: data["model"]["merges"].append("t h")), PLAN,
         ("tokenizer.json", "merge 't h'", "not of the form of the first", "published")),
    Case("tokens to keep in no file", nothing, f"{PLAN} --keep-tokens none.txt",
         ("none.txt", "No such file")),
    Case("script that is none", nothing, f"{PLAN} --keep-script Cirillic",
         ("--keep-script", "found 'Cirillic'", "did you mean Cyrillic?")),
    Case("frequency without text", nothing, f"{PLAN} --vocab-by frequency",
         ("--vocab-by frequency", "needs a text", "give --data")),
    Case("tokenizer with a key twice",
         replace("model/tokenizer.json", '"model": {', '"model": {"type": "BPE",'), PLAN,
         ("tokenizer.json", "not valid JSON", "'type' twice", "published")),
    Case("tokenizer with a BOM",
         lambda root: prepend(root / "model/tokenizer.json", b"\xef\xbb\xbf"), PLAN,
         ("tokenizer.json", "not valid JSON", "BOM", "download")),
    Case("tokenizer with NaN", model_key(extra=float("nan")), PLAN,
         ("tokenizer.json", "not valid JSON", "NaN", "published")),
    Case("tokenizer cut short", cut("model/tokenizer.json", -200), PLAN,
         ("tokenizer.json", "not valid JSON", "download")),
    Case("tokenizer 100,000 deep", write("model/tokenizer.json", '{"model":' + "[" * 100_000),
         PLAN, ("tokenizer.json", "nested too deeply", "published")),
    Case("tokenizer with a lone surrogate",
         tokenizer(lambda data: data["model"]["vocab"].update({"\ud800": 620})), PLAN,
         ("tokenizer.json", "not valid JSON", "surrogates", "published")),
    Case("two added tokens on one id", tokenizer(
         lambda data: data["added_tokens"].append(dict(data["added_tokens"][0], content="<x>"))),
         PLAN, ("tokenizer.json", "added token '<x>'", "expected 620", "found 0", "save")),
    Case("id gap that collides", tokenizer(gap_under_added), PLAN,
         ("tokenizer.json", "added token '<late>'", "expected 619", "found 620", "save")),
    Case("two tokens on one id", tokenizer(two_tokens_one_id), PLAN,
         ("tokenizer.json", "id ", "two tokens", "found 'Ġ", "published")),
    Case("token id is text", tokenizer(lambda data: data["model"]["vocab"].update(the="7")), PLAN,
         ("tokenizer.json", "not a number", "published")),
    Case("added token with another id", tokenizer(swap_ids), PLAN,
         ("tokenizer.json", "added token '<unk>'", "expected 0", "found 1", "save the tokenizer")),
    Case("added token without content",
         tokenizer(lambda data: data["added_tokens"].append({"id": 620})), PLAN,
         ("tokenizer.json", "added token", "published")),
    Case("merge with a missing parent",
         tokenizer(lambda data: data["model"]["merges"].append(["q", "zzz"])), PLAN,
         ("tokenizer.json", "merge 'q' 'zzz'", "vocabulary lacks", "expected 'zzz'", "published")),
    Case("merge of three",
         tokenizer(lambda data: data["model"]["merges"].append(["a", "b", "c"])), PLAN,
         ("tokenizer.json", "merge ['a', 'b', 'c']", "not a pair", "published")),
    Case("merge of a token with a space",
         tokenizer(lambda data: data["model"].update(merges=["a b c"])), PLAN,
         ("tokenizer.json", "merge 'a b c'", "not a pair", "published")),
    Case("more tokens than rows",
         tokenizer(lambda data: data["model"]["vocab"].update(zzz=700)), PLAN,
         ("tokenizer.json", "without a row", "expected ids below 640", "found 700", "belongs")),
    Case("stale id in the post-processor",
         tokenizer(lambda data: data["post_processor"]["special_tokens"]["<s>"].update(ids=[639])),
         PLAN, ("tokenizer.json", "post_processor", "id 639", "correct it")),
    Case("padding without an id", tokenizer(lambda data: data.update(padding={"pad_id": None})),
         PLAN, ("tokenizer.json", "pad", "published")),
    Case("vocab.json disagrees", write("model/vocab.json", '{"Ġthe": 1}'), PLAN,
         ("vocab.json", "token 'Ġthe'", "another id", "expected", "found 1", "save the tokenizer")),
    Case("added_tokens_decoder names a padding row",
         change("model/tokenizer_config.json",
                lambda data: data.update(added_tokens_decoder={"639": {"content": "<x>"}})),
         PLAN, ("tokenizer_config.json", "token '<x>'", "expected 620", "found 639", "save it")),
    Case("added_tokens_decoder without numbers",
         change("model/tokenizer_config.json",
                lambda data: data.update(added_tokens_decoder={"x": {"content": "<x>"}})),
         PLAN, ("tokenizer_config.json", "added_tokens_decoder", "x", "correct")),
    Case("generation config cut", cut("model/generation_config.json", 40), PLAN,
         ("generation_config.json", "not valid JSON", "found", "download")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    assert_refused_and_nothing_written(case, bench, run)
