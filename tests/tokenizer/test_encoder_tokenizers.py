"""Tokenizers of encoders: kept text encodes as before, any text decodes as before."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from surgery.api import apply_plan
from surgery.errors import TokenizerError
from surgery.files.strict_json import parse_json
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.kinds import UNIGRAM, WORDPIECE, alphabet
from surgery.tokenizer.tokenizer_file import TokenizerFile, prune_tokenizer
from surgery.vocabulary.order import order_rows
from tests.support import tiny, tiny_encoders
from tests.support.plans import random_plan

KINDS = ("bert", "xlm-roberta", "roberta")
"""One encoder for each kind of tokenizer."""


@cache
def pair(key: str) -> tuple[TokenizerFile, Tokenizer, IdMap]:
    """The source's tokenizer, and what is left of it: 60 % of its tokens, or more."""
    source = TokenizerFile(Path("tokenizer.json"), loads(tiny_encoders.tokenizer(key)))
    rarity = order_rows(source, tiny_encoders.TOKENS, [])
    ids = rarity.id_map(max(rarity.must_keep + 60, 380))
    return source, prune_tokenizer(source, ids)[0], ids


def loads(tokenizer: Tokenizer) -> dict[str, object]:

    return parse_json(tokenizer.to_str().encode(), Path("tokenizer.json"))


texts = st.lists(
    st.sampled_from([*tiny.prose(20_000).split(), "Привет", "東京", "è", "Ψ≠", "🎉", "##", "\n"]),
    max_size=12,
).map(" ".join)


@pytest.mark.parametrize("key", KINDS)
@given(text=texts | st.text(max_size=30))
def test_any_text_is_no_less_known_than_before(key: str, text: str) -> None:
    source, pruned, ids = pair(key)
    library, unknown = source.library(), source.unknown
    before = library.encode(text).ids
    after = [int(ids.kept[new]) for new in pruned.encode(text).ids]
    assert library.decode(after) == library.decode(before)
    assert sum(i in unknown for i in after) == sum(i in unknown for i in before)
    if all(ids.new(old) is not None for old in before):
        assert after == before


def test_a_piece_whose_characters_are_no_tokens_must_be_kept() -> None:
    words = {t: i for i, t in enumerate(["a", "##b", "ab", "ax", "##xb", "##bb", "##b##"])}
    must = {"a", "##b", "ax", "##xb", "##b##"}
    assert alphabet(WORDPIECE, words, byte_fallback=False) == {words[token] for token in must}
    pieces = {t: i for i, t in enumerate(["▁", "a", "b", "▁ab", "▁abx", "ba"])}
    must = {"▁", "a", "b", "▁abx"}
    assert alphabet(UNIGRAM, pieces, byte_fallback=False) == {pieces[token] for token in must}


def test_the_least_likely_piece_stays_for_it_prices_the_unknown() -> None:
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -0.5), ("ba", -30.0), ("aa", -3.0)]
    library = Tokenizer(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    source = TokenizerFile(Path("tokenizer.json"), loads(library))
    rarity = order_rows(source, len(pieces), [])
    kept = rarity.id_map(rarity.must_keep).kept.tolist()
    assert kept == [0, 1, 2, 4]


@pytest.mark.parametrize("key", ["bert", "mpnet", "deberta-v2", "modernbert"])
def test_transformers_reads_what_is_written(tmp_path: Path, key: str) -> None:
    source, out = tiny_encoders.save(tmp_path / "source", key), tmp_path / "out"
    words = tiny_encoders.tokenizer(key).get_vocab()
    if tiny_encoders.kind_of(key) == tiny_encoders.WORDPIECE:
        lines = "".join(f"{token}\n" for token in sorted(words, key=words.__getitem__))
        (source / "vocab.txt").write_text(lines, "utf-8")
    plan = random_plan(source, 400, 1.0)
    apply_plan(plan, source=source, output=out)
    old, new = (AutoTokenizer.from_pretrained(path) for path in (source, out))
    kept = plan.ids().kept
    assert new.mask_token_id == plan.ids().new(old.mask_token_id)
    assert new.pad_token_id == plan.ids().new(old.pad_token_id)
    for line in tiny.prose(3000).splitlines():
        back = kept[np.array(new(line)["input_ids"])].tolist()
        assert old.decode(back) == old.decode(old(line)["input_ids"])
    if (source / "vocab.txt").exists():
        tokens = (out / "vocab.txt").read_text("utf-8").splitlines()
        assert tokens == [old.convert_ids_to_tokens(int(i)) for i in kept if i < len(words)]


def test_a_list_of_words_of_another_model_is_refused(tmp_path: Path) -> None:
    source = tiny_encoders.save(tmp_path / "source", "bert")
    (source / "vocab.txt").write_text("[PAD]\nstranger\n", "utf-8")
    plan = random_plan(source, 400, 1.0)
    with pytest.raises(TokenizerError, match=r"'stranger'.*another id than in"):
        apply_plan(plan, source=source, output=tmp_path / "out")


@pytest.mark.parametrize("key", ["roberta", "xlm-roberta", "mpnet"])
def test_the_padding_token_keeps_its_id(tmp_path: Path, key: str) -> None:
    """Positions are counted from it; here an ordinary token comes before it."""
    source = tiny_encoders.save(tmp_path / "source", key, pad_token_id=9)
    plan = random_plan(source, 400, 1.0)
    assert plan.ids().kept[:10].tolist() == list(range(10))
