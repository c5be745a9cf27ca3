"""Outputs that are in the way or cannot be written are refused in one line."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.api import apply_plan
from tests.support import tiny
from tests.support.command import Run, assert_refused
from tests.support.contents import digests
from tests.support.damage import (
    APPLY,
    CALIBRATE,
    PLAN,
    PRUNE,
    RESUME,
    Case,
    Damage,
    assert_refused_and_nothing_written,
    directory,
    nothing,
    write,
)
from tests.support.plans import random_plan

BEGUN = '{"plan_digest": "0123456789abcdef"}'
"""The first line of the journal of another plan."""


def journal(content: str) -> Damage:
    def damage(root: Path) -> None:
        (root / "out.partial").mkdir()
        (root / "out.partial.journal").write_text(content + "\n")

    return damage


CASES = [
    *(
        Case(f"{place}: {command.split()[0]}", damage, command, words)
        for place, damage, name, words in (
            ("output inside the input", nothing, "model/out",
             ("model/out", "inside each other", "found input", "choose")),
            ("output is the input", nothing, "model",
             ("model", "inside each other", "found input", "choose")),
            ("input inside the output", nothing, ".",
             ("inside each other", "found input", "choose")),
            ("output inside the input by a link",
             lambda root: (root / "link").symlink_to("model"), "link/out",
             ("link/out", "inside each other", "found input", "choose")),
            ("output is a directory", directory("out"), "out",
             ("out", "exists already", "choose another")),
            ("output is a file", write("out", ""), "out",
             ("out", "exists already", "choose another")),
            ("output below a file", nothing, "text.txt/out",
             ("text.txt/out", "is below a file", "choose another")),
        )
        for command in (f"apply plan.json -o {name}", f"{PRUNE} {name}")
    ),
    Case("plan below a file", nothing, PLAN.replace("new.json", "text.txt/new.json"),
         ("text.txt/new.json", "directory does not exist", "create it")),
    Case("statistics below a file", nothing,
         f"{CALIBRATE} text.txt".replace("new.safe", "text.txt/new.safe"),
         ("text.txt/new.safetensors", "directory does not exist", "create it")),
    Case("statistics in a directory that is not there", nothing,
         f"{CALIBRATE} text.txt".replace("new.safe", "gone/new.safe"),
         ("gone/new.safetensors", "directory does not exist", "create it")),
    *(
        Case(f"{kind}: {command.split()[0]}", damage, f"{command} -o {place}", words)
        for command in (f"{CALIBRATE} text.txt", PLAN, "stats merge stats.safetensors")
        for kind, damage, place, words in (
            ("file in the model", nothing, "model/config.json",
             ("model/config.json", "inside a directory that is only read", "outside of it")),
            ("file in the model by a link", lambda root: (root / "link").symlink_to("model"),
             "link/x", ("link/x", "inside a directory that is only read", "outside of it")),
            ("file is a directory", directory("there"), "there",
             ("there", "is a directory", "name a file")),
        )
        if "merge" not in command or place == "there"
    ),
    Case("plan of the best pair in the model", nothing,
         "search model --data text.txt --ratio 0.2 -o model/config.json",
         ("model/config.json", "inside a directory that is only read", "outside of it")),
    Case("caps for tasks of ray", nothing,
         f"{CALIBRATE} text.txt --engine ray --max-memory 8GB",
         ("--engine ray", "no --max-memory")),
    Case("interrupted run in the way", journal(BEGUN), APPLY,
         ("out.partial", "interrupted", "--resume", "delete")),
    Case("resume with another plan", journal(BEGUN), RESUME,
         ("out.partial", "another plan", "expected plan", "found 0123456789ab", "resume")),
    Case("resume with a damaged journal", journal("{"), RESUME,
         ("out.partial.journal", "cannot be resumed", "found", "delete")),
    Case("verify nothing", nothing, "verify nowhere",
         ("nowhere", "not a directory", "name a model's directory")),
    Case("verify --forward without a plan", nothing, "verify model --forward",
         ("model", "--forward", "needs the plan")),
    Case("verify with damaged provenance", write("model/compact_surgery.json", "{}"),
         "verify model", ("compact_surgery.json", "is not a plan", "found", "plan again")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    assert_refused_and_nothing_written(case, bench, run)


@pytest.mark.parametrize("command", [APPLY, f"{PRUNE} out"])
def test_no_space(command: str, bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(bench)
    usage = shutil.disk_usage(bench)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = ("out", "no space", "bytes", "found 1,000 free", "free space, or name another output")
    assert_refused(run(*command.split()), *words)
    assert not list(bench.glob("out")) + list(bench.glob("out.partial"))
    assert {name: digests(bench)[name] for name in before} == before


@pytest.mark.parametrize("command", [f"{CALIBRATE} text.txt", PLAN, f"{PRUNE} new"])
def test_a_directory_that_takes_no_file_is_found_before_the_work(
    command: str, bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(bench)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert_refused(
        run(*command.split()), "new", "its directory is not writable", "another directory"
    )
    assert digests(bench) == before


@pytest.mark.parametrize("command", [f"{CALIBRATE} text.txt", PLAN])
def test_a_full_disk_names_the_file(
    command: str, bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(run(*command.split()), "new", "No space left on device", "free space")


def test_verify_says_what_differs_where_only_the_dtype_does(tmp_path: Path, run: Run) -> None:
    source, out = tiny.save(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "out"
    plan = tmp_path / "plan.json"
    random_plan(source, 512, 64).save(plan)
    apply_plan(plan, source=source, output=out)
    file = next(out.glob("*.safetensors"))
    found = load_file(file)
    for name, tensor in found.items():
        changed = found | {name: tensor.half()}
        save_file(changed, file, {"format": "pt"})
        result = run("verify", out, "--plan", plan)
        shape = list(tensor.shape)
        assert result.exit_code == 1
        fault = f"tensor {name}: expected BF16 {shape}, found F16 {shape}"
        assert fault in result.output
