"""Calibration of the whole model on text as the pruned tokenizer tokenizes it."""

import json
from pathlib import Path

import numpy as np
import pytest

from calib.text.windows import digest, token_windows
from surgery.planning.plan import Plan
from surgery.stats.channel_stats import ChannelStats
from surgery.text.documents import read_documents
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.vocabulary.order import rarity_of
from tests.support import tiny
from tests.support.command import Run
from tests.support.plans import layout_of

V, SEQ_LEN = 400, 64
TAKE = ("--seq-len", SEQ_LEN, "--samples", 12)


def calibrated(run: Run, model: Path, text: Path, output: Path, *more: object) -> ChannelStats:
    result = run("calibrate", model, "--data", text, *TAKE, *more, "-o", output)
    assert result.exit_code == 0, result.output
    return ChannelStats.load(output)


def prune_vocabulary(run: Run, model: Path, output: Path) -> Path:
    """Prune the vocabulary to ``V`` and nothing else."""
    plan = output.with_suffix(".json")
    sizes = ("--vocab-size", V, "--intermediate-size", tiny.INTERMEDIATE_SIZE)
    assert run("plan", model, *sizes, "-o", plan, "--force").exit_code == 0
    assert run("apply", plan, "-o", output).exit_code == 0
    return output


def notes(run: Run, model: Path, stats: Path, vocab_size: int, width: int = 48) -> list[str]:
    plan = stats.with_suffix(".plan")
    sizes = ("--vocab-size", vocab_size, "--intermediate-size", width)
    result = run("plan", model, "--stats", stats, *sizes, "-o", plan, "--force")
    assert result.exit_code == 0, result.output
    found = Plan.load(plan).provenance.notes
    return [note for note in found if "rank them well" not in note]


@pytest.mark.parametrize("key", ["llama", "gemma3_text"])
def test_the_dense_model_sees_what_the_pruned_one_will(
    tmp_path: Path, text: Path, run: Run, key: str
) -> None:
    """If only the vocabulary is pruned, both have the same activations."""
    model = tiny.save(tmp_path / "model", key)
    before = calibrated(run, model, text, tmp_path / "before", "--vocab-size", V)
    pruned = prune_vocabulary(run, model, tmp_path / "pruned")
    after = calibrated(run, pruned, text, tmp_path / "after", "--vocab-sizes", V)
    kept = rarity_of(layout_of(model)).id_map(V).kept
    cut = load_tokenizer(pruned)
    windows = token_windows(read_documents(str(text)), cut, 12, SEQ_LEN)
    assert before.info.text_digest == digest([kept[window] for window in windows])
    assert (before.info.vocab_size, after.info.vocab_size) == (V, None)
    assert before.info.bucket_edges == [V, tiny.VOCAB_SIZE]
    assert np.array_equal(before.token_counts[kept], after.token_counts)
    assert before.token_counts.sum() == after.token_counts.sum() == before.info.tokens
    for one, other in zip(before.layers, after.layers, strict=True):
        sums, same = one["ffn"], other["ffn"]
        assert not sums.sum_sq[1].any()
        assert np.allclose(sums.sum_sq[0], same.sum_sq.sum(axis=0), rtol=1e-5)
        assert np.allclose(sums.sum_l2, same.sum_l2, rtol=1e-5)
    assert np.allclose(before.block_influence, after.block_influence, rtol=1e-5)


def test_text_of_fewer_tokens_is_other_text(
    tmp_path: Path, llama: Path, text: Path, run: Run
) -> None:
    plain = calibrated(run, llama, text, tmp_path / "plain", "--vocab-sizes", V)
    cut = calibrated(run, llama, text, tmp_path / "cut", "--vocab-size", V)
    assert plain.info.vocab_size is None
    assert cut.info.text_digest != plain.info.text_digest
    rare = np.setdiff1d(np.arange(tiny.VOCAB_SIZE), rarity_of(layout_of(llama)).id_map(V).kept)
    assert plain.token_counts[rare].sum() > 0 == cut.token_counts[rare].sum()
    both = ("stats", "merge", tmp_path / "plain", tmp_path / "cut", "-o", tmp_path / "out")
    result = run(*both)
    assert result.exit_code == 2
    assert "text that another vocabulary tokenized" in result.output
    assert "calibrate with the same --vocab-size" in result.output
    assert not (tmp_path / "out").exists()


def test_the_whole_vocabulary_is_none(tmp_path: Path, llama: Path, text: Path, run: Run) -> None:
    whole = calibrated(run, llama, text, tmp_path / "whole", "--vocab-size", tiny.VOCAB_SIZE)
    plain = calibrated(run, llama, text, tmp_path / "plain")
    assert (whole.info.vocab_size, whole.info.bucket_edges) == (None, [tiny.VOCAB_SIZE])
    assert whole.info.text_digest == plain.info.text_digest
    for found, expected in zip(whole.layers, plain.layers, strict=True):
        assert found.keys() == expected.keys()
        for axis, sums in expected.items():
            np.testing.assert_allclose(found[axis].sum_sq[0], sums.sum_sq.sum(axis=0))


def test_sizes_to_be_exact_for_are_apart(tmp_path: Path, llama: Path, text: Path, run: Run) -> None:
    both = ("--vocab-size", V, "--vocab-sizes", "512,450")
    stats = calibrated(run, llama, text, tmp_path / "stats", *both)
    assert stats.info.bucket_edges == [450, 512, tiny.VOCAB_SIZE]


def test_a_plan_for_another_size_has_a_note(
    tmp_path: Path, llama: Path, text: Path, run: Run
) -> None:
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    calibrated(run, llama, text, plain, "--vocab-sizes", V)
    calibrated(run, llama, text, cut, "--vocab-size", V)
    said = "the statistics are of text as {} rows cut it; calibrating with `vocab_size` {} "
    assert notes(run, llama, cut, V) == []
    assert notes(run, llama, plain, tiny.VOCAB_SIZE) == []
    assert [note for note in notes(run, llama, plain, V) if said.format(640, V) in note]
    assert [note for note in notes(run, llama, cut, 512) if said.format(V, 512) in note]
    assert notes(run, llama, plain, V, tiny.INTERMEDIATE_SIZE) == []  # no channel is removed


def test_prune_calibrates_on_what_its_result_will_see(
    tmp_path: Path, llama: Path, text: Path, run: Run
) -> None:
    out = tmp_path / "out"
    for vocab_size, recorded in ((V, V), (tiny.VOCAB_SIZE, None)):
        sizes = ("--vocab-size", vocab_size, "--intermediate-size", 48)
        result = run("prune", llama, "--data", text, *TAKE, *sizes, "-o", out / str(vocab_size))
        assert result.exit_code == 0, result.output
        stats = ChannelStats.load(out / f"{vocab_size}.stats.safetensors")
        assert stats.info.vocab_size == recorded
        said = Plan.load(out / f"{vocab_size}.plan.json").provenance.notes
        assert not any("statistics" in note for note in said)


@pytest.mark.parametrize("size", [-1, 0, 20, 641])
def test_sizes_out_of_reach_are_refused(
    tmp_path: Path, llama: Path, text: Path, run: Run, size: int
) -> None:
    out = tmp_path / "out"
    result = run("calibrate", llama, "--data", text, *TAKE, "--vocab-size", size, "-o", out)
    assert result.exit_code == 2
    assert "--vocab-size: is out of reach: expected" in result.output
    assert f"found {size}" in result.output
    assert len(result.output.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_cannot_be_cut_is_named(tmp_path: Path, text: Path, run: Run) -> None:
    model = tiny.save(tmp_path / "model")
    file = model / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data["model"]["end_of_word_suffix"] = "</w>"
    file.write_text(json.dumps(data), encoding="utf-8")
    out = tmp_path / "out"
    result = run("calibrate", model, "--data", text, *TAKE, "--vocab-size", V, "-o", out)
    assert result.exit_code == 2
    assert "tokenizer.json: this kind of vocabulary cannot be pruned" in result.output
    assert not out.exists()


def test_parts_of_pruned_text_merge(tmp_path: Path, llama: Path, text: Path, run: Run) -> None:
    whole = calibrated(run, llama, text, tmp_path / "whole", "--vocab-size", V)
    names = [tmp_path / f"part {number}" for number in (1, 2)]
    for number, name in enumerate(names, 1):
        calibrated(run, llama, text, name, "--vocab-size", V, "--part", f"{number}/2")
    assert run("stats", "merge", *names, "-o", tmp_path / "merged").exit_code == 0
    merged = ChannelStats.load(tmp_path / "merged")
    assert merged.info.vocab_size == V
    assert np.array_equal(merged.token_counts, whole.token_counts)
    assert np.allclose(merged.cosines, whole.cosines, rtol=1e-5)
