"""Whisper and Qwen 3.5 at half their vocabulary: kept text tokenizes as before.

Their tokens are in the directory that COMPACT_SURGERY_TOKENIZERS names, or are fetched with pip;
where it cannot, the tests are skipped. Qwen 3.5's 248,000 tokens are pruned with
COMPACT_SURGERY_EVERY_PRUNE=1 alone: that takes half a minute.
"""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from surgery.files.strict_json import dump_table
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.vocabulary.order import VocabularyChoice, count_tokens, order_rows
from tests.support.published_tokenizers import EMOJI, Cut, real_texts
from tests.support.ranked_tokenizers import QWEN_SPLIT, from_ranks, whisper_tokens
from tools import real_tokenizers

QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
NAMES = ["whisper"] + ["qwen3_5"] * bool(os.environ.get("COMPACT_SURGERY_EVERY_PRUNE"))
SIZES = {"whisper": 51_865, "qwen3_5": 248_044 + len(QWEN_TOKENS)}


@pytest.fixture(scope="module", params=NAMES)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, TokenizerFile]:
    """A tokenizer made of the published ranks."""
    named, name = os.environ.get("COMPACT_SURGERY_TOKENIZERS"), request.param
    if named:
        folder = Path(named)
    else:
        assert request.config.cache is not None
        folder = request.config.cache.mkdir("real_tokenizers")
    try:
        path = real_tokenizers.fetch_ranks(name, folder)
    except real_tokenizers.FetchError as error:
        pytest.skip(f"needs published tokens: {error.message}")
    special = {"whisper": (whisper_tokens(), None), "qwen3_5": (QWEN_TOKENS, QWEN_SPLIT)}
    made = from_ranks(path, *special[name])
    directory = tmp_path_factory.mktemp(name)
    made.save(str(directory / "tokenizer.json"))
    assert made.get_vocab_size() == SIZES[name]
    return made, TokenizerFile.open(directory)


@pytest.mark.parametrize("order", ["merge-order", "frequency"])
def test_half_of_the_vocabulary(published: tuple[Tokenizer, TokenizerFile], order: str) -> None:
    source, file = published
    texts = [*real_texts()[::3], *EMOJI]
    rows = source.get_vocab_size()
    counts = count_tokens(source, texts[::3], rows) if order == "frequency" else None
    rarity = order_rows(file, rows, (), VocabularyChoice(counts=counts))
    after = Tokenizer.from_buffer(dump_table(file.rewrite(rarity.id_map(rows // 2))))
    pair = Cut.of(source, after, rows=rows // 2, rowless=0, drops_reserved=False)
    assert pair.assert_same(texts) > len(texts) / 3
