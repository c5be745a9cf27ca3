"""The Python API: what a program that uses it may do, and what it is told."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import calib
import surgery
from tests.support import ROOT, tiny

DOCUMENTS = ["Some words in a document, told twice. " * 40] * 6
QUICK: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu"}


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, surgery, calib\n"
        "heavy = {'numpy', 'torch', 'transformers', 'click', 'tokenizers', 'msgspec'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for package in (surgery, calib):
        for name in package.__all__:
            assert getattr(package, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = surgery.no_such_name


def test_nothing_is_printed(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calib.calibrate(llama, data=DOCUMENTS, **QUICK)
    assert capfd.readouterr() == ("", "")


def test_a_short_text_is_logged(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        calib.calibrate(llama, data=["few words"], samples=4, seq_len=32)
    assert any("tokens" in message for message in caplog.messages)


def test_threads_calibrate_beside_each_other_and_a_host_that_builds_modules(llama: Path) -> None:
    expected = calib.calibrate(llama, data=DOCUMENTS, **QUICK)
    found: list[object] = []
    original = nn.Module.register_parameter

    def take() -> None:
        try:
            found.append(calib.calibrate(llama, data=DOCUMENTS, **QUICK))
        except BaseException as error:
            found.append(error)

    threads = [Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert nn.Linear(2, 2).weight.device == torch.device("cpu")
    assert nn.Module.register_parameter is original
    assert len(found) == 3
    for stats in found:
        assert isinstance(stats, surgery.ChannelStats), stats
        for one, other in zip(stats.layers, expected.layers, strict=True):
            assert np.array_equal(one["ffn"].sum_sq, other["ffn"].sum_sq)


def test_tokens_to_keep_are_a_file_by_its_name_or_a_list(llama: Path, tmp_path: Path) -> None:
    plain = surgery.make_plan(llama, vocab_size=400)
    vocabulary = surgery.open_model(llama).layout.checkpoint.path / "tokenizer.json"
    assert vocabulary.exists()
    rare = sorted(set(range(tiny.TOKENS)) - set(plain.ids().kept.tolist()))[0]
    token = tiny_token(llama, rare)
    (tmp_path / "keep.txt").write_text(token, encoding="utf-8")
    for keep in (str(tmp_path / "keep.txt"), tmp_path / "keep.txt", [token]):
        plan = surgery.make_plan(llama, vocab_size=400, keep_tokens=keep)
        assert rare in plan.ids().kept
    several = tiny.tokenizer().encode("no token at all", add_special_tokens=False).ids
    plan = surgery.make_plan(llama, vocab_size=400, keep_tokens=["no token at all"])
    assert set(several) <= set(plan.ids().kept.tolist())


def tiny_token(path: Path, token: int) -> str:
    from surgery.tokenizer.tokenizer_file import TokenizerFile

    tokens = TokenizerFile.open(path).token_ids
    return next(text for text, id_ in tokens.items() if id_ == token)


def test_names_of_files_are_no_documents(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(DOCUMENTS[0], encoding="utf-8")
    name = str(tmp_path / "a.txt")
    for data in ([name, name], ["hub:org/name"], [*DOCUMENTS, name]):
        with pytest.raises(surgery.SurgeryError, match="is the name of a text"):
            calib.calibrate(llama, data=data, samples=9_999, seq_len=32)
    wrong: list[Any] = [[surgery.Source(name), "text"], {"a": "text"}, None, 5]
    for each in wrong:
        with pytest.raises(surgery.SurgeryError, match="`data`"):
            calib.calibrate(llama, data=each, **QUICK)
    both: Any = [surgery.Source(name), Path(name)]
    mixed = calib.calibrate(llama, data=both, **QUICK)
    assert mixed.info.samples == 4


def test_a_source_that_failed_fails_again(llama: Path) -> None:
    def broken() -> Iterator[str]:
        yield DOCUMENTS[0]
        raise OSError("the line was cut")

    source = surgery.Source(broken())
    for _ in range(2):
        with pytest.raises(OSError, match="the line was cut"):
            calib.calibrate(llama, data=source, samples=64, seq_len=32)


def test_a_model_opened_by_a_relative_path_outlives_a_change_of_directory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)
    model = surgery.open_model(llama.name)
    monkeypatch.chdir(tmp_path)
    stats = calib.calibrate(model, data=DOCUMENTS, **QUICK)
    plan = surgery.make_plan(model, stats=stats, ratio=0.2, multiple_of=8)
    made = surgery.apply_plan(plan, output="out")
    assert made.output == Path("out")
    assert surgery.verify_checkpoint("out", plan=plan).ok
    assert calib.compare_logits("out", plan=plan).ok


def test_layers_of_largest_influence_are_kept_in_one_call(llama: Path, tmp_path: Path) -> None:
    made = calib.prune(llama, data=DOCUMENTS, output=tmp_path / "out", num_hidden_layers=2, **QUICK)
    assert made.ok, made.report.table()
    stats = surgery.ChannelStats.load(tmp_path / "out.stats.safetensors")
    kept = sorted(np.argsort(-stats.block_influence, kind="stable")[:2].tolist())
    assert made.plan.layers == [[layer] for layer in kept]
    assert made.plan.after.vocab_size == made.plan.before.vocab_size


def test_what_is_not_named_stays_whole(llama: Path) -> None:
    model = surgery.open_model(llama)
    by_vocabulary = surgery.make_plan(model, vocab_size=512)
    assert by_vocabulary.after.widths == by_vocabulary.before.widths
    by_width = surgery.make_plan(model, intermediate_size=48)
    assert by_width.after.vocab_size == by_width.before.vocab_size
