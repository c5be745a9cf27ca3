"""Tokenizers published as a SentencePiece model: XLM-R, mBART, T5, and M2M-100 with vocab.json."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, M2M100ForConditionalGeneration
from transformers.models.m2m_100 import tokenization_m2m_100
from transformers.models.mbart import tokenization_mbart
from transformers.models.mbart50 import tokenization_mbart50

from surgery.api import apply_plan, make_plan
from surgery.errors import TokenizerError
from surgery.planning.plan import PROVENANCE_NAME, Plan
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.mapped import MappedModel, last_merge
from surgery.tokenizer.marian import LANGUAGE_CODES
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.vocabulary.order import rarity_of
from tests.support import tiny_sentencepiece
from tests.support.command import Run
from tests.support.plans import layout_of
from tests.support.tiny_sentencepiece import MODELS, mapped_vocabulary, texts, trained

ALONE = [name for name in MODELS if name != "M2M100Tokenizer"]
M2M_ROWS = len(mapped_vocabulary()) + 100 + 8
"""Tokens, languages and the rows that fairseq made up."""


def id_map_of(output: Path) -> IdMap:
    return Plan.load(output / PROVENANCE_NAME).ids()


def assert_same_tokens(source: Path, output: Path, least: int) -> None:
    """By transformers: text whose tokens are all kept has the same; no text has more unknown."""
    old, new = (AutoTokenizer.from_pretrained(path) for path in (source, output))
    ids, same = id_map_of(output), 0
    for text in texts(220, seed=1):
        before, after = old(text).input_ids, new(text).input_ids
        mapped = [ids.new(id_) for id_ in before]
        unknown = before.count(old.unk_token_id)
        if None not in mapped and not unknown:
            assert after == mapped, text
            same += 1
        if not unknown:
            assert after.count(new.unk_token_id) == 0, text
            assert new.decode(after, skip_special_tokens=True) == old.decode(
                before, skip_special_tokens=True
            )
    assert same > least


@pytest.mark.parametrize("class_", ALONE)
def test_a_model_alone_is_pruned(class_: str, tmp_path: Path) -> None:
    """It is read as transformers reads it, and so is the pruned one."""
    made = tiny_sentencepiece.save(tmp_path / "source", class_, 1000)
    tokenizer, reference = TokenizerFile.open(made), AutoTokenizer.from_pretrained(made)
    assert tokenizer.token_ids == reference.get_vocab()
    library = tokenizer.library()
    for text in texts(60):
        assert library.encode(text).ids == reference(text).input_ids, text
    plan = make_plan(made, vocab_size=360 if class_ != "T5Tokenizer" else 620)
    apply_plan(plan, source=made, output=tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").exists()
    assert_same_tokens(made, tmp_path / "out", 30)
    new, kept = AutoTokenizer.from_pretrained(tmp_path / "out"), plan.ids()
    special = {*reference.all_special_tokens} | {t for t in reference.get_vocab() if "_" in t[:3]}
    special |= {t for t in ("<extra_id_0>", "<0x41>") if t in reference.get_vocab()}
    before, after = reference.get_vocab(), new.get_vocab()
    for token in special:
        assert after[token] == kept.new(before[token]), token


@pytest.fixture(scope="module")
def m2m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m2m") / "source"
    french = tokenization_m2m_100.FAIRSEQ_LANGUAGE_CODES["m2m100"].index("fr")
    forced = {"forced_bos_token_id": len(mapped_vocabulary()) + french}
    return tiny_sentencepiece.save(path, "M2M100Tokenizer", M2M_ROWS, forced)


def test_m2m_100_is_pruned_as_published(m2m: Path, tmp_path: Path, run: Run) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n".join(texts(80)), "utf-8")
    sizes = ("--vocab-size", 420, "--vocab-by", "frequency", "--data", text)
    path = tmp_path / "plan.json"
    steps = (
        ("plan", m2m, *sizes, "-o", path),
        ("apply", path, "-o", out),
        ("verify", out, "--source", m2m, "--forward"),
    )
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, result.output
    assert_same_tokens(m2m, out, 30)
    ids = id_map_of(out)
    old, new = (AutoTokenizer.from_pretrained(path) for path in (m2m, out))
    assert new.get_lang_id("zu") == ids.new(old.get_lang_id("zu")) == 419
    for code in ("af", "en", "fr"):
        assert new.get_lang_id(code) == ids.new(old.get_lang_id(code))
    forced = json.loads((out / "generation_config.json").read_text("utf-8"))
    assert forced["forced_bos_token_id"] == new.get_lang_id("fr")
    before, after = (
        load_file(path / "model.safetensors")["model.shared.weight"] for path in (m2m, out)
    )
    kept = torch.from_numpy(ids.kept)
    assert torch.equal(after, before[kept])
    given = torch.randint(0, 420, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        was, now = (
            M2M100ForConditionalGeneration.from_pretrained(path)
            .eval()(input_ids=x, decoder_input_ids=x.flip(0))
            .logits
            for path, x in ((m2m, kept[given]), (out, given))
        )
    assert torch.equal(now, was[..., kept])


def test_m2m_100_is_read_as_transformers_reads_it(m2m: Path) -> None:
    reference, library = AutoTokenizer.from_pretrained(m2m), TokenizerFile.open(m2m).library()
    for text in texts(60):
        assert library.encode(text).ids == reference(text).input_ids, text
        encoding = library.encode(text, add_special_tokens=False)
        for token, (start, stop) in zip(encoding.tokens, encoding.offsets, strict=True):
            assert text[start:stop].strip() == token.replace("▁", " ").strip()


def test_m2m_100_loses_its_last_merges_first(m2m: Path) -> None:
    """Whatever ids they have."""
    tokenizer = TokenizerFile.open(m2m)
    rarity = rarity_of(layout_of(m2m), tokenizer=tokenizer)
    scores = {p.piece: p.score for p in MappedModel.of(trained("bpe"), m2m).pieces}
    tokens = {id_: token for token, id_ in tokenizer.vocab.items()}
    later = [scores[tokens[i]] for i in rarity.order[rarity.must_keep : rarity.tokens].tolist()]
    assert len(later) > 200
    assert later == sorted(later, reverse=True)


def test_a_token_s_parents_are_those_that_sentencepiece_joins() -> None:
    model = MappedModel.of(trained("bpe"), Path("m"))
    scores = {p.piece: p.score for p in model.pieces if p.type == p.NORMAL}
    assert len(model.parents) > 400
    for piece, (left, right) in model.parents.items():
        assert left + right == piece
        assert {left, right} <= scores.keys()
    assert last_merge("a", scores) is None
    assert last_merge("abc", {"bc": -1.0, "ab": -2.0, "abc": -3.0}) == ("a", "bc")
    assert last_merge("aaaa", {"aa": -1.0, "aaaa": -2.0}) == ("aa", "aa")


def test_what_a_token_is_made_of_is_kept_though_a_piece_has_no_id() -> None:
    model, vocab = MappedModel.of(trained("bpe"), Path("m")), mapped_vocabulary(of_others=True)
    lost = model.without_id(vocab)
    kept = model.alphabet(vocab)
    made_of_lost = {piece for piece in lost if piece in vocab}
    assert made_of_lost
    assert kept >= {vocab[piece] for piece in made_of_lost}
    for piece in made_of_lost:
        assert all(vocab[part] in kept for part in model.parents[piece] if part in vocab)


def changed(source: Path, folder: Path, name: str, **settings: Any) -> Path:
    shutil.copytree(source, folder)
    old = json.loads((folder / name).read_text("utf-8"))
    (folder / name).write_text(json.dumps(old | settings), "utf-8")
    return folder


def test_others_are_refused_by_name(m2m: Path, tmp_path: Path, run: Run) -> None:
    config = "tokenizer_config.json"
    cases = {
        "class": (changed(m2m, tmp_path / "a", config, tokenizer_class="Speech2TextTokenizer"),
                  "tokenizer_class"),
        "codes": (changed(m2m, tmp_path / "b", config, language_codes="x"), "wmt21"),
        "language": (changed(m2m, tmp_path / "c", config, src_lang="xx"), "is no language"),
        "nllb": (changed(m2m, tmp_path / "d", config, tokenizer_class="NllbTokenizer"),
                 "no ids to NLLB's languages"),
    }  # fmt: skip
    (tmp_path / "d/vocab.json").unlink()
    for case, (path, message) in cases.items():
        refused = run("plan", path, "--vocab-size", 420, "-o", tmp_path / "plan.json")
        assert refused.exit_code == 2, (case, refused.output)
        assert message in refused.output


@pytest.mark.parametrize(
    ("class_", "settings", "message"),
    [
        ("T5Tokenizer", {"extra_ids": None}, "extra_ids: cannot be used"),
        ("T5Tokenizer", {"extra_ids": "100"}, "extra_ids: cannot be used"),
        ("MBartTokenizer", {"src_lang": ["en_XX"]}, "src_lang: cannot be used"),
        ("M2M100Tokenizer", {"language_codes": ["m2m100"]}, "is no list of languages"),
    ],
)
def test_settings_of_another_type_are_refused(
    class_: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = tiny_sentencepiece.save(tmp_path / "source", class_, M2M_ROWS)
    path = changed(made, tmp_path / "changed", "tokenizer_config.json", **settings)
    with pytest.raises(TokenizerError, match=message):
        TokenizerFile.open(path)


def test_a_model_that_sentencepiece_refuses_is_refused(m2m: Path, tmp_path: Path) -> None:
    """Its pieces can be read, but one occurs twice."""
    path = Path(shutil.copytree(m2m, tmp_path / "twice")) / "sentencepiece.bpe.model"
    messages: Any = sentencepiece_model_pb2  # a generated module without types
    model = messages.ModelProto.FromString(path.read_bytes())
    model.pieces.add().CopyFrom(model.pieces[20])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(TokenizerError, match=r"sentencepiece\.bpe\.model: is refused"):
        TokenizerFile.open(path.parent).library().encode("a text")


@pytest.mark.parametrize("class_", [name for name in ALONE if name != "T5Tokenizer"])
def test_a_model_without_its_first_pieces_is_refused(class_: str, tmp_path: Path) -> None:
    """The class would put its own tokens in the place of text's."""
    made = tiny_sentencepiece.save(tmp_path / "source", class_, 1000)
    path, messages = made / "sentencepiece.bpe.model", cast(Any, sentencepiece_model_pb2)
    model = messages.ModelProto.FromString(path.read_bytes())
    del model.pieces[1:3]
    path.write_bytes(model.SerializeToString())
    first = re.escape(", ".join(piece.piece for piece in model.pieces[:3]))
    with pytest.raises(TokenizerError, match=f"expected <unk>, <s>, </s>, found {first}"):
        TokenizerFile.open(made)


def test_language_codes_are_those_of_transformers() -> None:
    assert json.loads(LANGUAGE_CODES.read_text("utf-8")) == {
        "M2M100Tokenizer": tokenization_m2m_100.FAIRSEQ_LANGUAGE_CODES,
        "MBartTokenizer": {"mbart": tokenization_mbart.FAIRSEQ_LANGUAGE_CODES},
        "MBart50Tokenizer": {"mbart50": tokenization_mbart50.FAIRSEQ_LANGUAGE_CODES},
    }
