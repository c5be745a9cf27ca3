"""What a smaller vocabulary loses: counts, examples, advice that works, and a list of it all."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.planning.plan import Plan
from surgery.tokenizer.kinds import BYTE_CHARACTERS, BYTE_LEVEL, SENTENCEPIECE, WORDPIECE, readable
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.vocabulary.cost import (
    EXAMPLES,
    LINE,
    VocabularyCost,
    list_removed,
    token_lines,
    vocabulary_cost,
)
from surgery.vocabulary.order import VocabularyChoice, VocabularyOptions, order_rows
from tests.support import tiny
from tests.support.command import Run, assert_refused
from tests.support.languages import ARTICLE_1, SIZE, multilingual

BY_MERGES = VocabularyOptions()


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFile:
    """A byte-level BPE of SIZE tokens, trained on sixteen languages."""
    return multilingual(tmp_path_factory.mktemp("languages"))


def cost_of(
    languages: TokenizerFile, size: int, keep: tuple[str, ...] = (), drop: tuple[str, ...] = ()
) -> VocabularyCost:
    choice = VocabularyChoice(keep_scripts=keep, drop_scripts=drop)
    rarity = order_rows(languages, SIZE, (), choice)
    options = VocabularyOptions(keep_scripts=keep, drop_scripts=drop)
    return vocabulary_cost(languages, rarity, size, options, ["\n".join(ARTICLE_1.values())])


# --- tokens as people read them ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "kind", "text"),
    [
        ("Ġthe", BYTE_LEVEL, "␣the"),
        ("ä¸", BYTE_LEVEL, "<0xE4><0xB8>"),
        ("Ġð", BYTE_LEVEL, "␣<0xF0>"),
        ("ĊĊ", BYTE_LEVEL, "\\n\\n"),
        ("\\frac", BYTE_LEVEL, "\\\\frac"),
        ("<|im start|>", BYTE_LEVEL, "<|im␣start|>"),
        ("▁the", SENTENCEPIECE, "␣the"),
        ("<0xE4>", SENTENCEPIECE, "<0xE4>"),
        ("<0x0A>", SENTENCEPIECE, "\\n"),
        ("\u202eevil\x1b[31m", SENTENCEPIECE, "\\u202eevil\\u001b[31m"),
        ("##ing", WORDPIECE, "##ing"),
    ],
)
def test_tokens_are_readable(token: str, kind: object, text: str) -> None:
    assert readable(token, kind) == text  # type: ignore[arg-type]


@given(st.text(max_size=12), st.sampled_from([BYTE_LEVEL, SENTENCEPIECE, WORDPIECE]))
def test_any_token_is_safe_for_a_terminal(token: str, kind: object) -> None:
    text = readable(token, kind)  # type: ignore[arg-type]
    assert text.isprintable()
    assert " " not in text


@given(st.binary(min_size=1, max_size=12))
def test_no_two_byte_level_tokens_read_alike(raw: bytes) -> None:
    token = "".join(c for byte in raw for c, b in BYTE_CHARACTERS.items() if b == byte)
    text = readable(token, BYTE_LEVEL)
    if "<0x" not in text and "\\u" not in text and "\\U" not in text:
        plain = text.replace("␣", " ").replace("\\\\", "\0")
        plain = plain.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
        assert plain.replace("\0", "\\").encode() == raw


@given(st.lists(st.text("ab中", min_size=1, max_size=9)), st.integers(10, 40))
def test_lines_hold_all_tokens_and_no_more_than_fits(texts: list[str], width: int) -> None:
    lines = token_lines(texts, width)
    assert [token for line in lines for token in line.split()] == texts
    wide = [sum(1 + (char == "中") for char in line) for line in lines]
    assert all(n <= width or " " not in line for n, line in zip(wide, lines, strict=True))


# --- the cost in a plan -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [300, 700, 1500])
def test_counts_are_those_of_what_is_kept(languages: TokenizerFile, size: int) -> None:
    cost = cost_of(languages, size)
    ids = order_rows(languages, SIZE, ()).id_map(size)
    removed = list_removed(languages, ids)
    assert sum(script.tokens_before for script in cost.scripts) == SIZE
    assert sum(script.tokens_after for script in cost.scripts) == size
    assert len(removed.tokens) == SIZE - size
    for script in cost.scripts:
        lost = removed.of(script.script)
        assert len(lost) == script.tokens_before - script.tokens_after
        assert all(ids.new(token.id) is None for token in lost)
        assert len(script.examples) == min(len(lost), EXAMPLES)
        assert set(script.examples) <= {token.text for token in lost}


def test_the_most_common_come_first(languages: TokenizerFile) -> None:
    text = "\n".join(ARTICLE_1.values())
    ids = order_rows(languages, SIZE, ()).id_map(500)
    counts = np.bincount(languages.library().encode(text).ids, minlength=SIZE)
    for token in (removed := list_removed(languages, ids, counts=counts)).tokens:
        assert token.count == counts[token.id]
    for script in removed.removed:
        found = [token.count or 0 for token in removed.of(script)]
        assert found == sorted(found, reverse=True)
    by_merges = [token.id for token in list_removed(languages, ids).of("Latin")]
    assert by_merges == sorted(by_merges), "the trainer gives ids in the order of merges"


@pytest.mark.parametrize("size", range(300, 1000, 100))
def test_every_advice_to_keep_a_script_can_be_followed(languages: TokenizerFile, size: int) -> None:
    cost = cost_of(languages, size)
    warned = {line.split()[0]: line for line in cost.warnings()}
    grown = [script for script in cost.scripts if script.grows]
    assert set(warned) == {script.script for script in grown}
    for script in grown:
        advised = f"`keep_scripts` {script.script}" in warned[script.script]
        asked = VocabularyChoice(keep_scripts=(script.script,))
        assert advised == (order_rows(languages, SIZE, (), asked).must_keep <= size)


def test_advice_depends_on_what_was_asked(languages: TokenizerFile) -> None:
    assert any("`keep_scripts` Thai," in line for line in cost_of(languages, 700).warnings())
    dropped = cost_of(languages, 700, drop=("Thai",))
    (line,) = (line for line in dropped.warnings() if line.startswith("Thai"))
    assert line.endswith("), as `drop_scripts` asks for")
    counted = msgspec.structs.replace(cost_of(languages, 700), order="frequency")
    assert not any("frequency" in line for line in counted.warnings())


def test_what_is_dropped_alone_is_not_called_rare(languages: TokenizerFile) -> None:
    rarity = order_rows(languages, SIZE, (), VocabularyChoice(drop_scripts=("Thai",)))
    alone = rarity.tokens - rarity.dropped
    for size, rare in ((alone, False), (alone - 1, True)):
        assert cost_of(languages, size, drop=("Thai",)).by_rarity == rare


# --- the tables -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of many languages, of which 512 rows are kept as ``out``."""
    root = tmp_path_factory.mktemp("model")
    path = tiny.save(root / "model", vocab_size=SIZE, bos_token_id=None, eos_token_id=None)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (path / name).unlink(missing_ok=True)
    config = json.loads((path / "config.json").read_text())
    ids = [key for key in config if key.endswith("_token_id")]
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ids}))
    multilingual(path)
    plan = surgery.make_plan(path, vocab_size=512, keep_scripts=["Thai"])
    plan.save(root / "plan.json")
    surgery.apply_plan(plan, output=root / "out")
    return path


def test_a_plan_and_the_census_count_alike(model: Path, run: Run) -> None:
    census = json.loads(run("inspect", model, "--vocab", "--json").output)
    plan = Plan.load(model.with_name("plan.json"))
    assert plan.vocabulary is not None
    counted = {script.script: script.tokens_before for script in plan.vocabulary.scripts}
    assert {**census["scripts"], "alphabet": census["kinds"]["alphabet"]} == counted


def test_the_table_shows_what_is_lost_and_what_is_kept(model: Path) -> None:
    table = Plan.load(model.with_name("plan.json")).table()
    lines = table.splitlines()
    (kept,) = (line.split() for line in lines if line.startswith("Thai "))
    assert kept[-1] == "kept"
    assert kept[1] == kept[2]
    start = next(n for n, line in enumerate(lines) if line.startswith("removed tokens of"))
    (latin,) = (n for n, line in enumerate(lines) if n > start and line.startswith("Latin "))
    end = next(n for n in range(latin + 1, len(lines)) if not lines[n].startswith(" "))
    assert len(" ".join(lines[latin:end])[20:].split()) == EXAMPLES
    assert max(len(line) for line in lines if not line.startswith("note: ")) <= LINE + 2
    assert lines.index("note: `data` shows how much longer text becomes") > latin


# --- the commands -----------------------------------------------------------------------------


def test_inspect_lists_what_an_output_lost(model: Path, tmp_path: Path, run: Run) -> None:
    out, plan = model.with_name("out"), model.with_name("plan.json")
    result = run("inspect", out, "--removed")
    assert result.exit_code == 0, result.output
    assert result.output == run("inspect", plan, "--removed").output
    lines = result.output.splitlines()
    assert lines[-1] == f"{SIZE - 512:,} of {SIZE:,} tokens are removed"
    assert not any(line.startswith("Thai:") for line in lines)
    (head,) = (line for line in lines if line.startswith("Latin:"))
    assert head.endswith(" tokens removed, the 20 most common")
    latin = json.loads(run("inspect", out, "--removed", "--script", "latn", "--json").output)
    assert list(latin) == ["Latin"]
    assert len(latin["Latin"]["tokens"]) == latin["Latin"]["removed"] > 20
    assert {token["count"] for token in latin["Latin"]["tokens"]} == {None}
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    kept = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    for token in latin["Latin"]["tokens"]:
        assert vocab[token["token"]] == token["id"]
        assert token["token"] not in kept


def test_inspect_counts_lost_tokens_in_a_text(model: Path, tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text(ARTICLE_1["Cyrillic"] * 3, encoding="utf-8")
    options = ("--script", "Cyrillic", "--limit", 3, "--json")
    found = run("inspect", model.with_name("out"), "--removed", "--data", text, *options)
    tokens = json.loads(found.output)["Cyrillic"]["tokens"]
    assert len(tokens) == 3
    assert tokens[0]["count"] >= tokens[1]["count"] >= tokens[2]["count"] > 0
    listed = surgery.removed_tokens(model.with_name("plan.json"), data=text)
    assert [vars(token) for token in listed.of("Cyrillic", 3)] == tokens
    shown = run("inspect", model.with_name("out"), "--removed", "--data", text, *options[:-1])
    assert f"{tokens[0]['text']} {tokens[0]['count']}" in shown.output


def test_what_keeps_all_tokens_lost_none(model: Path, tmp_path: Path, run: Run) -> None:
    plan = tmp_path / "plan.json"
    run("plan", model, "--layers", "0,2", "-o", plan)
    assert run("inspect", plan, "--removed").output == "all tokens are kept\n"
    assert json.loads(run("inspect", plan, "--removed", "--json").output) == {}
    assert run("inspect", plan, "--channels").output == "all channels are kept\n"


def test_a_source_that_is_gone_or_another_is_named(
    model: Path, llama: Path, tmp_path: Path, run: Run
) -> None:
    plan = Plan.load(model.with_name("plan.json"))
    moved = tmp_path / "moved.json"
    msgspec.structs.replace(plan, source=str(tmp_path / "gone")).save(moved)
    assert_refused(run("inspect", moved, "--removed"), "is not at hand", "name it with --source")
    found = run("inspect", moved, "--removed", "--source", model)
    assert found.output == run("inspect", model.with_name("plan.json"), "--removed").output
    other = run("inspect", moved, "--removed", "--source", llama)
    assert_refused(other, "is not the checkpoint that the plan was made for")
    assert_refused(run("inspect", model, "--removed"), "holds no plan, so it is no output of apply")
    assert_refused(run("inspect", tmp_path / "none.json", "--channels"), "cannot be read")
    wrong = run("inspect", model.with_name("out"), "--removed", "--script", "Klingon")
    assert_refused(wrong, "--script: is not a script of Unicode")
