"""Options of the vocabulary: order by counts, tokens and scripts to keep, and its cost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import TokenizerError
from surgery.layout.build import read_layout
from surgery.planning.plan import Plan
from surgery.tokenizer.tokenizer_file import TokenizerFile, prune_tokenizer
from surgery.vocabulary.cost import vocabulary_cost
from surgery.vocabulary.order import (
    BATCH_CHARACTERS,
    VocabularyChoice,
    VocabularyOptions,
    count_tokens,
    kept_tokens,
    order_rows,
    rarity_of,
)
from surgery.vocabulary.scripts import script_of
from tests.support import tiny
from tests.support.command import Run
from tests.support.languages import ARTICLE_1, SIZE, multilingual

RESERVED = ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<unused5>"]
SIZES = ("--vocab-size", 480, "--intermediate-size", 64)


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFile:
    """A byte-level BPE of SIZE tokens, trained on sixteen languages."""
    return multilingual(tmp_path_factory.mktemp("languages"))


@pytest.fixture
def reserving(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer has tokens for later use, named in a list of its config."""
    path = tiny.save(tmp_path / "reserving")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": RESERVED})
    tokenizer.save_pretrained(path)
    assert "<unused5>" in (path / "tokenizer_config.json").read_text()
    return path


def test_counts_are_those_of_the_tokenizer(languages: TokenizerFile) -> None:
    line = "All human beings are born free, 人人生而自由.\n"
    text = line * (BATCH_CHARACTERS // len(line) + 7)  # split at a line's end
    counts = count_tokens(languages.library(), [text, "", "x"], SIZE)
    expected = np.bincount(languages.library().encode(line).ids, minlength=SIZE)
    expected *= BATCH_CHARACTERS // len(line) + 7
    expected[languages.vocab["x"]] += 1
    assert np.array_equal(counts, expected)


def test_a_long_text_without_lines_is_counted_whole(languages: TokenizerFile) -> None:
    counts = count_tokens(languages.library(), ["z" * (2 * BATCH_CHARACTERS + 5)], SIZE)
    lengths = {id_: len(token) for token, id_ in languages.vocab.items()}
    assert sum(n * lengths[i] for i, n in enumerate(counts)) == 2 * BATCH_CHARACTERS + 5


def test_frequency_keeps_the_language_of_the_text(languages: TokenizerFile) -> None:
    counts = count_tokens(languages.library(), [ARTICLE_1["Cyrillic"]], SIZE)
    ids = order_rows(languages, SIZE, (), VocabularyChoice(counts=counts)).id_map(600)
    used = set(languages.library().encode(ARTICLE_1["Cyrillic"]).ids)
    assert len(used) > 20
    assert all(ids.new(id_) is not None for id_ in used)
    by_merges = order_rows(languages, SIZE, ()).id_map(600)
    assert any(by_merges.new(id_) is None for id_ in used)


def test_scripts_that_are_asked_for_are_kept_whole(languages: TokenizerFile) -> None:
    choice = VocabularyChoice(keep_scripts=("Han", "Thai"))
    rarity = order_rows(languages, SIZE, (), choice)
    cost = vocabulary_cost(languages, rarity, rarity.must_keep, VocabularyOptions())
    lost = {script.script for script in cost.scripts if script.tokens_after < script.tokens_before}
    assert {"Latin", "Cyrillic"} <= lost
    assert not {"Han", "Thai"} & lost


def test_a_text_of_several_tokens_keeps_them_all(languages: TokenizerFile) -> None:
    text = " beings umano 人人"
    ids = set(languages.library().encode(text, add_special_tokens=False).ids)
    assert len(ids) > 3
    kept = kept_tokens([text, ""], languages)
    assert kept == ids
    rarity = order_rows(languages, SIZE, (), VocabularyChoice(keep=kept))
    smallest = rarity.id_map(rarity.must_keep)
    pruned = prune_tokenizer(languages, smallest)[0]
    assert pruned.encode(text, add_special_tokens=False).tokens == (
        languages.library().encode(text, add_special_tokens=False).tokens
    )


def test_a_text_that_the_vocabulary_cannot_spell_is_refused(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "a": 1, "b": 2, "##b": 3}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    file = TokenizerFile.open(tmp_path)
    assert kept_tokens(["ab b"], file) == {1, 2, 3}
    with pytest.raises(TokenizerError, match="item 2: is not made of tokens of this vocabulary"):
        kept_tokens(["a", "ac"], file)


def test_tokens_to_keep_are_named_by_spelling_or_text(
    languages: TokenizerFile, tmp_path: Path
) -> None:
    texts = map(languages.kind.text, languages.vocab)
    word = next(text for text in texts if text and len(text) > 2 and script_of(text) == "Cyrillic")
    (tmp_path / "keep.txt").write_text(f"Ġhuman\n beings\n\n{word}\n", encoding="utf-8")
    spelled = next(token for token in languages.vocab if languages.kind.text(token) == " beings")
    kept = kept_tokens(tmp_path / "keep.txt", languages)
    assert languages.vocab["Ġhuman"] in kept
    assert languages.vocab[spelled] in kept
    assert len(kept) == 3
    rarity = order_rows(languages, SIZE, (), VocabularyChoice(keep=kept))
    ids = rarity.id_map(rarity.must_keep)
    assert all(ids.new(id_) is not None for id_ in kept)
    (tmp_path / "keep.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="is not UTF-8"):
        kept_tokens(tmp_path / "keep.txt", languages)


def test_cost_is_counted_line_by_line(languages: TokenizerFile) -> None:
    rarity = order_rows(languages, SIZE, ())
    ids = rarity.id_map(700)
    texts = ["\n".join(ARTICLE_1.values()), ARTICLE_1["Thai"]]
    cost = vocabulary_cost(languages, rarity, 700, VocabularyOptions(), texts)
    new = Tokenizer.from_str(json.dumps(languages.rewrite(ids)))
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    before = sum(len(languages.library().encode(line).ids) for line in lines)
    after = sum(len(new.encode(line).ids) for line in lines)
    assert cost.text_bytes == sum(len(text.encode()) for text in texts)
    assert cost.tokens_per_byte_before == pytest.approx(before / cost.text_bytes)
    assert cost.tokens_per_byte_after == pytest.approx(after / cost.text_bytes)
    thai = next(script for script in cost.scripts if script.script == "Thai")
    assert thai.text_tokens_before < thai.text_tokens_after
    assert sum(script.text_tokens_after for script in cost.scripts) == after
    assert sum(script.tokens_before for script in cost.scripts) == SIZE
    assert sum(script.tokens_after for script in cost.scripts) == 700
    warned = [line for line in cost.warnings() if line.startswith("Thai text grows by ")]
    assert (thai.growth > 0.25) == bool(warned)
    assert cost.warnings()


def test_reserved_tokens_are_removed_where_asked(reserving: Path, tmp_path: Path, run: Run) -> None:
    plan = tmp_path / "plan.json"
    everything = ("--intermediate-size", tiny.INTERMEDIATE_SIZE)  # so that no statistics are needed
    for options, kept in (((), 3), (("--drop-reserved",), 0)):
        run("plan", reserving, "--vocab-size", 480, *everything, *options, "-o", plan, "--force")
        out = tmp_path / f"out{kept}"
        result = run("apply", plan, "-o", out)
        assert result.exit_code == 0, result.output
        assert run("verify", out).exit_code == 0
        for name in ("tokenizer.json", "tokenizer_config.json"):
            text = (out / name).read_text()
            assert sum(token in text for token in RESERVED) == kept, name
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert len(tokenizer) == 480
        assert tokenizer.encode("<s>a</s>", add_special_tokens=False)[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("where", ["role", "template file", "template key", "named template"])
def test_a_reserved_token_that_is_used_is_kept(reserving: Path, where: str) -> None:
    used = "<|reserved_special_token_1|>"
    template = "{{ messages }}" + used
    config = json.loads((reserving / "tokenizer_config.json").read_text())
    if where == "role":
        config["pad_token"] = used
    elif where == "template file":
        (reserving / "chat_template.jinja").write_text(template)
    else:
        named = [{"name": "default", "template": template}]
        config["chat_template"] = template if where == "template key" else named
    (reserving / "tokenizer_config.json").write_text(json.dumps(config))
    layout = read_layout(Checkpoint.open(reserving))
    rarity = rarity_of(layout, VocabularyChoice(drop_reserved=True))
    ids = rarity.id_map(rarity.must_keep)
    names = TokenizerFile.open(reserving).token_ids
    assert [ids.new(names[token]) is not None for token in RESERVED] == [False, True, False]


def test_prune_by_frequency(llama: Path, text: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    options: tuple[Any, ...] = ("--data", text, "--samples", 4, "--seq-len", 32)
    result = run("prune", llama, *options, *SIZES, "--vocab-by", "frequency", "-o", out)
    assert result.exit_code == 0, result.output
    assert "tokens per byte of the text" in result.output
    assert "inside a bucket" not in result.output  # the statistics follow the same order
    plan = Plan.load(tmp_path / "out.plan.json")
    assert plan.vocabulary is not None
    assert plan.vocabulary.order == "frequency"
    assert plan.vocabulary.text_bytes > 0
    by_merges = rarity_of(read_layout(Checkpoint.open(llama))).id_map(480)
    assert not np.array_equal(plan.ids().kept, by_merges.kept)


def test_inspect_vocab(llama: Path, tmp_path: Path, run: Run) -> None:
    found = json.loads(run("inspect", llama, "--vocab", "--json").output)
    assert (found["rows"], found["tokens"]) == (tiny.VOCAB_SIZE, tiny.TOKENS)
    assert found["kinds"]["special"] == len(tiny.SPECIAL)
    assert found["kinds"]["alphabet"] >= 256
    assert sum(found["kinds"].values()) == tiny.TOKENS
    picture = tmp_path / "vocab.png"
    assert "padding rows" in run("inspect", llama, "--vocab", "--plot", picture).output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_size_that_another_program_misreads_is_named(tmp_path: Path, run: Run) -> None:
    path = tiny.save(tmp_path / "model", vocab_size=32_100)
    options = ("--intermediate-size", tiny.INTERMEDIATE_SIZE, "-o", tmp_path / "plan.json")
    for size, named in ((32_016, True), (32_000, False)):
        result = run("plan", path, "--vocab-size", size, *options, "--force")
        assert result.exit_code == 0, result.output
        assert ("the converter takes 32016 for CodeLlama" in result.output) == named
