"""Trials equal the checkpoints they stand for; text is divided and counted without loss."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.scoring.logits import compare_logits
from calib.scoring.score import run_asked, score_windows
from calib.scoring.tasks import AskedTasks, read_tasks
from calib.statistics.calibrate import Calibration, take_statistics
from calib.streaming.settings import PassSettings
from calib.study.repair import _entries, parts_by_source, plain_variant, refit_hook
from calib.study.study import Candidate, Study
from calib.study.text import StudyText
from calib.study.trial import Trial, Variant, try_all
from calib.text.heldout import BLOCK_CHARACTERS, EVERY, LEAST_BLOCKS, split_documents
from surgery.api import apply_plan
from surgery.planning.choice import SizeChoice
from surgery.planning.plan import Plan
from surgery.planning.planner import plan_cut
from surgery.planning.replacement import ReplacementWriter
from surgery.planning.request import CutRequest
from surgery.planning.shapes import axis_lengths
from surgery.planning.sizes import whole
from surgery.stats.channels import ChannelOptions
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.verify.files import verify_files
from surgery.vocabulary.order import open_vocabulary, rarity_of
from tests.support import tiny
from tests.support.plans import layout_of, random_plan
from tools.tasks.records import FOLDER

SETTINGS = PassSettings(torch.device("cpu"), torch.float32)
FAMILIES = ("llama", "gemma3_text", "gpt2", "phi3", "qwen2_moe", "gpt_oss", "llama4_text")


def study_text_of(path: Path) -> StudyText:
    layout = layout_of(path)
    tokenizer = open_vocabulary(layout)
    documents = [tiny.prose(4_000), tiny.prose(3_000)]
    return StudyText(layout, rarity_of(layout), tokenizer, documents, [tiny.prose(300)], 6, 64)


def bits_of(path: Path, study_text: StudyText) -> float:
    tokenizer = load_tokenizer(path)
    return score_windows(layout_of(path), study_text.heldout, tokenizer, SETTINGS).bits


def try_plan(
    plan: Plan, study_text: StudyText, output: Path, *, repair: bool, trains: bool = False
) -> tuple[float, Plan]:
    """Bits of a trial of ``plan``, and the plan with what the trial has refitted."""
    layout = study_text.layout
    parts = parts_by_source(plan, layout)
    variant = replace(plain_variant(plan, layout, parts), repair=repair, reconstruct=trains)
    size = plan.after.vocab_size
    calibration_pass = study_text.calibration_pass(size, refits=repair)
    entries = _entries(plan, layout, trains=trains)
    with ReplacementWriter(output, entries) as writer:
        write = refit_hook(layout, parts, entries, writer)
        trial = Trial(variant, study_text.encoded(size), calibration_pass, write)
        (bits,) = try_all(layout, [trial], SETTINGS)
    made = msgspec.structs.replace(plan, replaced=writer.replacement("test"))
    return sum(bits), made


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("key", FAMILIES)
def test_a_trial_is_what_apply_writes(tmp_path: Path, key: str, repair: bool) -> None:
    path = tiny.save(tmp_path / "model", key)
    study_text = study_text_of(path)
    plan = random_plan(path, 420, 0.5)
    bits, made = try_plan(plan, study_text, tmp_path / "new.safetensors", repair=repair)
    assert (made.replaced is not None) == repair
    apply_plan(made, source=path, output=tmp_path / "out")
    assert bits == pytest.approx(bits_of(tmp_path / "out", study_text), rel=1e-5)
    assert verify_files(tmp_path / "out", made, path).ok
    if repair:
        apply_plan(plan, source=path, output=tmp_path / "plain")
        assert bits != pytest.approx(bits_of(tmp_path / "plain", study_text), rel=1e-6)


@pytest.mark.parametrize(
    ("key", "trained"),
    [
        ("llama", True),
        ("gemma3_text", True),
        ("gemma4_text:shared", True),
        ("phi3", False),
        ("gpt2", False),
    ],
)
def test_a_trained_trial_is_what_apply_writes(tmp_path: Path, key: str, trained: bool) -> None:
    """FFNs whose linear maps are apart are trained, the same way every time."""
    path = tiny.save(tmp_path / "model", key)
    study_text = study_text_of(path)
    plan = random_plan(path, 420, 0.5)
    bits, made = try_plan(plan, study_text, tmp_path / "new.safetensors", repair=True, trains=True)
    assert made.replaced is not None
    names = [name for name in made.replaced.tensors if "gate_proj" in name]
    assert bool(names) == trained
    apply_plan(made, source=path, output=tmp_path / "out")
    assert bits == pytest.approx(bits_of(tmp_path / "out", study_text), rel=1e-5)
    assert verify_files(tmp_path / "out", made, path).ok
    assert compare_logits(made, path, tmp_path / "out", "cpu").ok
    _, again = try_plan(plan, study_text, tmp_path / "b.safetensors", repair=True, trains=True)
    assert again.replaced is not None
    assert again.replaced.digest == made.replaced.digest


@pytest.mark.parametrize("collapsed", [False, True])
def test_a_trial_answers_as_what_apply_writes(tmp_path: Path, collapsed: bool) -> None:
    """Of a smaller vocabulary, or of two layers that are collapsed into one."""
    path = tiny.save(tmp_path / "model")
    study_text, tasks = study_text_of(path), read_tasks([FOLDER / "words.jsonl"])
    layout = study_text.layout
    plan = random_plan(path, 420, 0.5)
    if collapsed:
        plan = random_plan(path, layout.vocab_size, layout.widths, layers=[[0, 1], [2]])
    variant = plain_variant(plan, layout, parts_by_source(plan, layout))
    study = Study(study_text, SETTINGS, tasks)
    asked = study.asked(plan.after.vocab_size)
    calibration_pass = None if collapsed else study_text.calibration_pass(plan.after.vocab_size)
    trial = Trial(variant, study_text.encoded(plan.after.vocab_size), calibration_pass, asked=asked)
    try_all(layout, [trial], SETTINGS)
    apply_plan(plan, source=path, output=tmp_path / "out")
    found = AskedTasks(layout_of(tmp_path / "out"), tasks, load_tokenizer(tmp_path / "out"))
    run_asked(layout_of(tmp_path / "out"), [found], SETTINGS)
    assert asked.bits() == pytest.approx(found.bits(), rel=1e-4)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_a_repaired_trial_without_experts_is_what_apply_writes(tmp_path: Path, key: str) -> None:
    path = tiny.save(tmp_path / "model", key, num_local_experts=8)
    study_text = study_text_of(path)
    plan = random_plan(path, 420, 0.5, experts=6)
    bits, made = try_plan(plan, study_text, tmp_path / "new.safetensors", repair=True)
    assert made.replaced is not None
    assert any(".experts." in name for name in made.replaced.tensors)
    apply_plan(made, source=path, output=tmp_path / "out")
    assert bits == pytest.approx(bits_of(tmp_path / "out", study_text), rel=1e-5)
    assert verify_files(tmp_path / "out", made, path).ok
    assert compare_logits(made, path, tmp_path / "out", "cpu").ok


@pytest.mark.parametrize(
    ("criterion", "part"), [("reap", 1), ("reap", 2), ("aimer", 1), ("random", 1)]
)
@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_a_trial_without_experts_is_what_apply_writes(
    tmp_path: Path, key: str, criterion: str, part: int
) -> None:
    path = tiny.save(tmp_path / "model", key, num_local_experts=8)
    study_text = study_text_of(path)
    layout = study_text.layout
    widths = {width: size // part for width, size in layout.widths.items()}
    sizes = replace(whole(layout), experts=5, widths=widths)
    candidate = Candidate("fewer", sizes, retokenize=False, expert_criterion=criterion)
    study = Study(study_text, SETTINGS)
    (row,) = study.rows([candidate])
    assert row.experts == 5
    stats = take_statistics(
        Calibration(
            layout,
            study_text.calibration_pass(640).streams[0].windows,
            *(64, np.zeros(640, dtype=np.int64), [640], SETTINGS),
        )
    )
    channels = ChannelOptions(expert_criterion=criterion, min_expert_tokens=0)
    request = CutRequest(channels=channels)
    plan = plan_cut(layout, SizeChoice(study_text.rarity, sizes, None, request), stats)
    apply_plan(plan, source=path, output=tmp_path / "out")
    nbytes = sum(len(text.encode("utf-8")) for text in study_text.heldout)
    expected = bits_of(tmp_path / "out", study_text) / nbytes
    assert row.bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert row.parameters == plan.after.parameters


def test_several_trials_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model", "llama")
    study_text = study_text_of(path)
    layout = study_text.layout
    full = axis_lengths(layout, layout.widths)
    half = {axis: length // 2 for axis, length in full.items()}

    def trials() -> list[Trial]:
        made = []
        for size, lengths in ((layout.vocab_size, half), (400, half), (400, full)):
            calibration_pass = study_text.calibration_pass(size, refits=True)
            variant = Variant(study_text.ids(size), lengths, repair=True)
            made.append(
                Trial(
                    variant, study_text.encoded(size), calibration_pass if lengths is half else None
                )
            )
        fewer = Variant(study_text.ids(layout.vocab_size), full, layers=[[0], [2]])
        made.append(Trial(fewer, study_text.encoded(layout.vocab_size), None))
        return made

    together = try_all(layout, trials(), SETTINGS)
    spilled = try_all(layout, trials(), replace(SETTINGS, spill=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    alone = [try_all(layout, [trial], SETTINGS)[0] for trial in trials()]
    assert together == alone == spilled


@given(st.lists(st.text(max_size=50), max_size=4), st.integers(0, 3 * BLOCK_CHARACTERS))
def test_splitting_loses_nothing(texts: list[str], length: int) -> None:
    documents = [*texts, "abcdefg " * (length // 8)]
    kept, held = map(list, split_documents(documents))
    assert sum(map(len, kept)) + sum(map(len, held)) == sum(map(len, documents))
    assert all(any(part in document for document in documents) for part in [*kept, *held])
    total = sum(map(len, documents))
    size = max(1, min(BLOCK_CHARACTERS, total // LEAST_BLOCKS))
    assert len(held) == sum(-(-len(document) // size) for document in documents) // EVERY
