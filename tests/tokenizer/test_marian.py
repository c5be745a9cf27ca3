"""Marian's tokenizer, of two SentencePiece models and vocab.json, loses tokens like any other."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, MarianMTModel

from surgery.api import apply_plan, make_plan
from surgery.planning.plan import PROVENANCE_NAME, Plan
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.tokenizer_file import TokenizerFile, load_tokenizers, prune_tokenizer
from surgery.vocabulary.order import rarity_of
from tests.support import tiny_marian
from tests.support.command import Run
from tests.support.plans import layout_of
from tests.support.tiny_marian import LANGUAGES, lines

SMALLER = 420


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_marian.save(tmp_path_factory.mktemp("marian") / "source")


def id_map_of(output: Path) -> IdMap:
    return Plan.load(output / PROVENANCE_NAME).ids()


def ids_of(tokenizer: Any, text: str, number: int) -> list[int]:
    """Of a text of the language that is read (0) or written (1)."""
    given = {"text_target": text} if number else {"text": text}
    ids: list[int] = tokenizer(**given).input_ids
    return ids


@pytest.fixture(scope="module")
def small(source: Path) -> Path:
    """The source with a smaller vocabulary."""
    plan = make_plan(source, vocab_size=SMALLER)
    apply_plan(plan, source=source, output=source.with_name("small"))
    return source.with_name("small")


def test_all_that_is_kept_is_the_source_s(source: Path, small: Path, run: Run) -> None:
    result = run("verify", small, "--source", source, "--forward")
    assert result.exit_code == 0, result.output
    out, ids = small, id_map_of(small)
    kept = torch.from_numpy(ids.kept)
    old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(new["model.shared.weight"], old["model.shared.weight"][kept])
    assert torch.equal(new["final_logits_bias"], old["final_logits_bias"][:, kept])
    vocab = json.loads((out / "vocab.json").read_text("utf-8"))
    source_vocab = json.loads((source / "vocab.json").read_text("utf-8"))
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert all(ids.new(source_vocab[token]) == id_ for token, id_ in vocab.items())
    assert vocab.keys() >= {*LANGUAGES, "</s>", "<unk>", "<pad>"}
    config = json.loads((out / "config.json").read_text("utf-8"))
    made = json.loads((out / "generation_config.json").read_text("utf-8"))
    pad = vocab["<pad>"]
    assert config["pad_token_id"] == config["decoder_start_token_id"] == pad
    assert made["bad_words_ids"] == [[pad]]
    assert made["forced_eos_token_id"] == vocab["</s>"]
    given = torch.randint(0, len(vocab), (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (
            MarianMTModel.from_pretrained(path)
            .eval()(input_ids=x, decoder_input_ids=x.flip(0))
            .logits
            for path, x in ((source, kept[given]), (out, given))
        )
    assert torch.equal(after, before[..., kept])


def test_transformers_splits_text_as_before(source: Path, small: Path) -> None:
    ids, made = id_map_of(small), random.Random(0)
    old, new = (AutoTokenizer.from_pretrained(path) for path in (source, small))
    same = [0, 0]
    for number in (0, 1):
        words = " ".join(lines(number)).split()
        texts = [" ".join(made.choices(words, k=made.randint(1, 5))) for _ in range(500)]
        characters = sorted({*"".join(words), *" \n\té中🙂"})
        texts += ["".join(made.choices(characters, k=made.randint(1, 9))) for _ in range(200)]
        for text in texts:
            text = made.choice(["", ">>fra<<", ">>deu<< "]) + text
            before, after = ids_of(old, text, number), ids_of(new, text, number)
            mapped = [ids.new(id_) for id_ in before]
            unknown = before.count(old.unk_token_id)
            assert after.count(new.unk_token_id) <= unknown
            if not unknown:
                assert new.decode(after) == old.decode(before)
                if None not in mapped:
                    assert after == mapped
                    same[number] += 1
    assert min(same) > 70


def test_text_is_split_by_the_model_of_its_language(source: Path) -> None:
    """As transformers splits it, told the language; where its own marks are, in characters."""
    reference, library = AutoTokenizer.from_pretrained(source), TokenizerFile.open(source).library()
    right = 0
    for number in (0, 1):
        alone = load_tokenizers(source)[number]
        for line in lines(number)[:100]:
            text = f">>fra<< {line} é中"
            encoding = alone.encode(text)
            assert encoding.ids == ids_of(reference, text, number)
            right += library.encode(text).ids == encoding.ids
            for token, (start, stop) in zip(encoding.tokens, encoding.offsets, strict=True):
                assert text[start:stop].strip() == token.replace("▁", " ").strip().replace(
                    "</s>", ""
                )
    assert right > 190
    for text in ("</s>", "", "<pad></s>", ">>xxx<<", "word</s>"):
        assert library.encode(text).ids == ids_of(reference, text, 0)


def test_text_whose_tokens_are_kept_keeps_its_model(source: Path) -> None:
    layout = layout_of(source)
    tokenizer = TokenizerFile.open(source)
    rarity = rarity_of(layout, tokenizer=tokenizer)
    ids = rarity.id_map(rarity.must_keep + 120)
    old = tokenizer.library()
    new, old_ids = prune_tokenizer(tokenizer, ids)
    made, same = random.Random(1), 0
    words = [word for number in (0, 1) for word in " ".join(lines(number)).split()]
    for _ in range(800):
        text = " ".join(made.choices(words, k=made.randint(1, 4)))
        before = old.encode(text).ids
        if all(ids.new(id_) is not None for id_ in before) and 1 not in before:
            assert old_ids[new.encode(text).ids].tolist() == before
            same += 1
    assert same > 50


def test_text_of_both_languages_chooses_tokens(source: Path, tmp_path: Path, run: Run) -> None:
    """And calibrate counts them, so that both FFNs lose channels as well."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(lines(0)[:60] + lines(1)[:60]), "utf-8")
    data = ("--data", text, "--vocab-by", "frequency")
    widths = ("--width", "encoder_ffn_dim=64", "--width", "decoder_ffn_dim=32")
    sizes = ("--vocab-size", SMALLER, *widths)
    stats, samples = tmp_path / "stats.safetensors", ("--samples", 8, "--seq-len", 24)
    result = run("calibrate", source, *data, *sizes, *samples, "-o", stats)
    assert result.exit_code == 0, result.output
    path, out = tmp_path / "plan.json", tmp_path / "out"
    steps: list[tuple[object, ...]] = [
        ("plan", source, *sizes, *data, "--stats", stats, "-o", path),
        ("apply", path, "-o", out),
        ("verify", out),
    ]
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, result.output
    plan = Plan.load(path)
    assert layout_of(out).widths == {"encoder_ffn_dim": 64, "decoder_ffn_dim": 32}
    assert plan.vocabulary is not None
    assert plan.vocabulary.order == "frequency"
    kept = set(json.loads((out / "vocab.json").read_text("utf-8")))
    for number in (0, 1):
        library = load_tokenizers(source)[number]
        counts = Counter(t for line in lines(number)[:60] for t in library.encode(line).tokens)
        common = {token for token, _ in counts.most_common(40)}
        assert len(common - kept) < 8


def damaged(source: Path, folder: Path, name: str, content: bytes) -> Path:
    shutil.copytree(source, folder)
    (folder / name).write_bytes(content)
    return folder


def test_other_files_are_refused_by_name(source: Path, tmp_path: Path, run: Run) -> None:
    vocab = json.loads((source / "vocab.json").read_text("utf-8"))
    gap, unknown = ({t: i for t, i in vocab.items() if t != left} for left in ("▁", "<unk>"))
    files = {
        "gap": ("vocab.json", json.dumps(gap).encode(), "0, 1, 2 and so on"),
        "unknown": ("vocab.json", json.dumps({**unknown, "x.": 1}).encode(), "lacks the unk_token"),
        "bpe": ("target.spm", tiny_marian.trained(1, "bpe"), "a model of type BPE"),
        "damaged": ("source.spm", tiny_marian.trained(0)[:900], "source.spm"),
        "two": ("target_vocab.json", b"{}", "vocabulary of its own"),
    }
    for case, (name, content, message) in files.items():
        path = damaged(source, tmp_path / case, name, content)
        refused = run("plan", path, "--vocab-size", SMALLER, "-o", tmp_path / "plan.json")
        assert refused.exit_code == 2, (case, refused.output)
        assert message in refused.output
    rows = ("--vocab-size", len(vocab))
    for case in ("bpe", "two"):
        plan, out = tmp_path / "plan.json", tmp_path / f"{case}-out"
        for step in (("plan", tmp_path / case, *rows, "-o", plan), ("apply", plan, "-o", out)):
            result = run(*step)
            assert result.exit_code == 0, result.output
        assert (out / "target.spm").read_bytes() == (tmp_path / case / "target.spm").read_bytes()
        plan.unlink()
