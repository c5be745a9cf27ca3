"""teach: the files are exact, resumable, and train as the resident teacher does."""

import errno
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calib
from calib.recovery.model import divergence
from calib.recovery.options import RecoverOptions, TeachOptions
from calib.recovery.taught import divergence_from_top
from calib.streaming.settings import ComputeOptions
from calib.streaming.weights import choose_settings
from surgery.api import open_layout
from surgery.errors import SurgeryError
from surgery.process import Progress
from surgery.text.documents import TextOptions, sources_of
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.recovery.conftest import Pair
from tests.support.command import Run, assert_refused
from tests.support.contents import digests
from tests.support.plans import random_plan

SEQ_LEN = 32


def taught(pair: Pair, output: Path, progress: Progress | None = None, **changes: Any) -> Path:
    from calib.recovery.teach import Teaching

    text = TextOptions(sources_of(pair.text), seq_len=SEQ_LEN, windows=2, seed=0)
    options = TeachOptions((output,), **{"tokens": 40 * SEQ_LEN, "top_k": 8, **changes})
    made = Teaching(open_layout(pair.dense), [pair.plan], text, ComputeOptions("cpu"), options)
    return made.run(progress).outputs[0]


@pytest.mark.parametrize(("precision", "allowed"), [("float32", 1e-5), ("float16", 2e-3)])
def test_all_tokens_give_the_resident_teacher_s_loss_and_gradients(
    pair: Pair, tmp_path: Path, precision: str, allowed: float
) -> None:
    from calib.recovery.model import Teacher
    from calib.recovery.taught import LOGPROBS, REST, TOP, TaughtWindows

    every = pair.plan.after.vocab_size
    files = taught(pair, tmp_path / "t", tokens=4 * SEQ_LEN, top_k=every, precision=precision)
    windows = TaughtWindows(files)
    assert len(windows) == 4
    resident = Teacher(open_layout(pair.dense), pair.plan.ids().kept, torch.float32)
    student: Any = AutoModelForCausalLM.from_pretrained(pair.pruned, dtype=torch.float32)
    for number in range(len(windows)):
        batch = {name: value[None] for name, value in windows[number].items()}
        logits = student(batch["input_ids"]).logits
        first = divergence(logits, resident.logits(batch["input_ids"]))
        second = divergence_from_top(logits, batch[TOP], batch[LOGPROBS], batch[REST])
        wanted, found = (
            torch.cat(
                [
                    each.flatten()
                    for each in torch.autograd.grad(loss, student.parameters(), retain_graph=True)
                ]
            )
            for loss in (first, second)
        )
        assert second.item() == pytest.approx(first.item(), rel=allowed, abs=allowed)
        assert (wanted - found).abs().max() <= allowed * wanted.abs().max()


def test_the_likeliest_tokens_and_what_is_left_over(pair: Pair, tmp_path: Path) -> None:
    from calib.recovery.model import Teacher
    from calib.recovery.taught import LOGPROBS, REST, TOP, TaughtWindows

    windows = TaughtWindows(taught(pair, tmp_path / "t", precision="float32"))
    resident = Teacher(open_layout(pair.dense), pair.plan.ids().kept, torch.float32)
    row = windows[3]
    wanted = resident.logits(row["input_ids"][None])[0].log_softmax(-1)
    assert torch.allclose(row[LOGPROBS], wanted.topk(8).values, atol=1e-4)
    assert torch.allclose(wanted.gather(-1, row[TOP]), row[LOGPROBS], atol=1e-4)
    assert torch.allclose(row[LOGPROBS].exp().sum(-1) + row[REST].exp(), torch.ones(SEQ_LEN))
    logits = torch.randn(1, SEQ_LEN, pair.plan.after.vocab_size)
    below = divergence_from_top(logits, row[TOP][None], row[LOGPROBS][None], row[REST][None])
    assert 0 < below <= divergence(logits, wanted[None]) + 1e-4  # merged tokens know less


def test_a_killed_pass_continues_and_ends_the_same(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calib.recovery.teach.PART_BYTES", 1 << 17)  # several parts
    whole = taught(pair, tmp_path / "whole")
    assert len(list(whole.glob("*.parquet"))) > 2

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taught(pair, tmp_path / "t", stop)
    assert not (tmp_path / "t").exists()
    with pytest.raises(SurgeryError, match="interrupted"):
        taught(pair, tmp_path / "t")
    with pytest.raises(SurgeryError, match="another model, plan, text or options"):
        taught(pair, tmp_path / "t", resume=True, top_k=4)
    changed = replace(pair, dense=shutil.copytree(pair.dense, tmp_path / "changed"))
    for shard in changed.dense.glob("*.safetensors"):
        save_file({n: t + 1 for n, t in load_file(shard).items()}, shard, {"format": "pt"})
    with pytest.raises(SurgeryError, match="another model, plan, text or options"):
        taught(changed, tmp_path / "t", resume=True)
    again = taught(pair, tmp_path / "t", resume=True)
    assert digests(again) == digests(whole)


def test_a_pass_continues_only_with_the_options_that_its_text_was_read_by(
    pair: Pair, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "other.txt").write_bytes(pair.text.read_bytes())
    usual = {
        "--data": pair.text,
        "--seq-len": SEQ_LEN,
        "--windows": 2,
        "--seed": 0,
        "--tokens": 4 * SEQ_LEN,
        "--field": "text",
    }

    def command(**changes: object) -> list[object]:
        given = usual | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        options = [word for option in given.items() for word in option]
        return ["teach", pair.dense, "--plan", pair.pruned, *options, "-o", tmp_path / "t"]

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib.recovery.teach.stage", stop)
        assert run(*command()).exit_code == 130
    before = digests(tmp_path)
    for name, value in {
        "data": tmp_path / "other.txt",
        "seq_len": 2 * SEQ_LEN,
        "windows": 3,
        "seed": 1,
        "tokens": 5 * SEQ_LEN,
        "field": "body",
    }.items():
        flag = f"--{name.replace('_', '-')}"
        refused = run(*command(**{name: value}), "--resume")
        assert_refused(refused, f"t.partial: {flag}: was another one", str(value), "begin anew")
        assert digests(tmp_path) == before
    (tmp_path / "t.partial" / "begun.json").write_text("{")
    assert_refused(run(*command(), "--resume"), "begun.json: is damaged", "begin anew")
    (tmp_path / "t.partial" / "begun.json").unlink()  # as when a run was killed at its very end
    assert run(*command(), "--resume").exit_code == 0
    assert not {"begun.json", "windows.npy"} & {each.name for each in (tmp_path / "t").iterdir()}


def test_two_runs_do_not_write_one_directory(pair: Pair, tmp_path: Path) -> None:
    tried: list[int] = []

    def meanwhile(stage: str, done: int, total: int) -> None:
        with pytest.raises(SurgeryError, match="t: is being written by another run; wait for it"):
            taught(pair, tmp_path / "t", resume=True)
        tried.append(done)

    taught(pair, tmp_path / "t", meanwhile)
    assert tried
    assert [each.name for each in tmp_path.iterdir()] == ["t"]


def test_an_output_that_another_run_has_just_written_is_not_replaced(
    pair: Pair, tmp_path: Path
) -> None:
    from calib.recovery.teach import Teaching

    text = TextOptions(sources_of(pair.text), seq_len=SEQ_LEN, windows=2, seed=0)
    options = TeachOptions((tmp_path / "t",), tokens=4 * SEQ_LEN, top_k=8)
    late = Teaching(open_layout(pair.dense), [pair.plan], text, ComputeOptions("cpu"), options)
    taught(pair, tmp_path / "t", tokens=4 * SEQ_LEN)
    before = digests(tmp_path)
    with pytest.raises(SurgeryError, match="exists already"):
        late.run()
    assert digests(tmp_path) == before


def test_a_text_without_words_leaves_nothing_behind(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    empty = replace(pair, text=tmp_path / "empty.txt")
    with pytest.raises(SurgeryError, match="holds no text"):
        taught(empty, tmp_path / "t")
    assert [each.name for each in tmp_path.iterdir()] == ["empty.txt"]


def test_recover_reads_the_files(pair: Pair, tmp_path: Path, run: Run) -> None:
    text = ("--data", pair.text, "--seq-len", SEQ_LEN, "--windows", 2, "--seed", 0)
    how = ("--tokens", 40 * SEQ_LEN, "--top-k", 64, "-o", tmp_path / "t")
    given = ("teach", pair.dense, "--plan", pair.pruned, *text, "--device", "cpu", *how)
    dry = run(*given, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not list(tmp_path.iterdir())
    made = run(*given, "--json")
    assert made.exit_code == 0, made.output
    facts = json.loads(made.stdout.splitlines()[-1])
    assert facts["tokens"] == 40 * SEQ_LEN
    more = ("--tokens", 1280, "--batch-size", 2, "--learning-rate", 3e-3, "--device", "cpu")
    trained = ("recover", pair.pruned, "--teacher", tmp_path / "t", "-o", tmp_path / "out", *more)
    assert_refused(run(*trained, "--data", pair.text), "--data", "leave it out")
    result = run(*trained)
    assert result.exit_code == 0, result.output
    assert run("verify", tmp_path / "out").exit_code == 0
    (tmp_path / "t" / "part-00000.parquet").rename(tmp_path / "away")
    assert_refused(run(*trained, "-o", tmp_path / "other"), "config.json")


def test_self_data_is_written_once_and_trains(pair: Pair, tmp_path: Path) -> None:
    from calib.recovery.run import Recovery

    def recover(
        output: Path, progress: Progress | None = None, *, resume: bool = False, seed: int = 0
    ) -> Any:
        text = TextOptions(sources_of(pair.text), seq_len=SEQ_LEN, windows=2, seed=seed)
        options = RecoverOptions(
            output,
            tokens=20 * SEQ_LEN * 2,
            batch_size=2,
            method="self-data",
            learning_rate=3e-3,
            resume=resume,
        )
        made = Recovery(open_layout(pair.pruned), text, ComputeOptions("cpu"), options)
        return made.run(progress)

    whole = recover(tmp_path / "whole")
    assert whole.after < whole.before
    kept = tmp_path / "whole.self-data.jsonl"
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert sum(row["tokens"] for row in rows) >= 20 * SEQ_LEN * 2

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "self-data" and done > SEQ_LEN * 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(tmp_path / "out", stop)
    with pytest.raises(SurgeryError, match="seed"):
        recover(tmp_path / "out", resume=True, seed=7)
    recover(tmp_path / "out", resume=True)
    assert (tmp_path / "out.self-data.jsonl").read_bytes() == kept.read_bytes()


def test_a_pass_killed_at_its_very_end_continues(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            taught(pair, tmp_path / "t", tokens=4 * SEQ_LEN)
    again = taught(pair, tmp_path / "t", tokens=4 * SEQ_LEN, resume=True)
    assert digests(again) == digests(taught(pair, tmp_path / "whole", tokens=4 * SEQ_LEN))


def test_damaged_files_are_refused_by_name(pair: Pair, tmp_path: Path, run: Run) -> None:
    files = taught(pair, tmp_path / "t", tokens=4 * SEQ_LEN)
    given = ("recover", pair.pruned, "--teacher", files, "-o", tmp_path / "out", "--tokens", 640)

    def refused(name: str, content: bytes, *words: str) -> None:
        path = files / name
        whole = path.read_bytes()
        path.write_bytes(content)
        assert_refused(run(*given), *words, "run teach again")
        path.write_bytes(whole)

    part = "part-00000.parquet"
    refused(part, (files / part).read_bytes()[:-9], part, "is damaged")
    refused("heldout.json", b"[]", "no text in heldout.json")
    settings = json.loads((files / "settings.json").read_bytes())
    for change in ({"windows": 5}, {"top_k": 9}):
        refused("settings.json", json.dumps(settings | change).encode(), part, "settings.json says")
    for wrong in ({"windows": 0}, {"precision": "int8"}):
        changed = json.dumps(settings | wrong).encode()
        refused("settings.json", changed, "is no directory that teach wrote")


def test_files_that_cannot_be_read_are_not_called_damaged(
    pair: Pair, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = taught(pair, tmp_path / "t", tokens=4 * SEQ_LEN)
    given = ("recover", pair.pruned, "--teacher", files, "-o", tmp_path / "out", "--tokens", 640)

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, f"Failed to open local file {path}", str(path))

    words = ("cannot be read: found Permission denied", "permissions")
    for name, opener in (
        ("part-00000.parquet", "pyarrow.parquet.ParquetFile"),
        ("settings.json", "calib.recovery.taught.read_file"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(opener, denied)
            assert_refused(run(*given), name, *words)
            assert "damaged" not in run(*given).stderr
    shutil.copy(files / "part-00000.parquet", tmp_path / "text.parquet")
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", denied)
    score = ("score", pair.dense, "--data", tmp_path / "text.parquet")
    assert_refused(run(*score), "text.parquet", *words)


def test_a_model_with_other_tokens_teaches_nobody(pair: Pair, tmp_path: Path, run: Run) -> None:
    other = shutil.copytree(pair.dense, tmp_path / "other")
    path = other / "tokenizer.json"
    words = json.loads(path.read_text(encoding="utf-8"))
    vocab, kept = words["model"]["vocab"], pair.plan.ids().kept.tolist()
    first, second = [token for token, row in vocab.items() if row in kept][-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(words), encoding="utf-8")
    with pytest.raises(SurgeryError, match="has another id in"):
        taught(replace(pair, dense=other), tmp_path / "t")
    unknown = msgspec.structs.replace(pair.plan, source="/gone")
    files = taught(replace(pair, dense=other, plan=unknown), tmp_path / "t")
    given = ("recover", pair.pruned, "--teacher", files, "-o", tmp_path / "out", "--tokens", 640)
    assert_refused(run(*given), "--teacher: was written by a model whose tokens have other ids")


def test_each_disk_must_have_room_for_what_is_written_to_it(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calib.recovery.teach import Teaching

    outputs = tuple(tmp_path / disk / name for disk, name in (("a", "0"), ("b", "1"), ("b", "2")))
    for output in outputs:
        output.parent.mkdir(exist_ok=True)
    text = TextOptions(sources_of(pair.text), seq_len=SEQ_LEN, windows=2, seed=0)
    options = TeachOptions(outputs, tokens=40 * SEQ_LEN, top_k=8)
    plans = [pair.plan] * len(outputs)
    made = Teaching(open_layout(pair.dense), plans, text, ComputeOptions("cpu"), options)
    one = made.nbytes // len(outputs)
    usage = shutil.disk_usage(tmp_path)
    free = {"a": made.nbytes, "b": 2 * one - 1}
    monkeypatch.setattr("calib.recovery.teach.file_system", lambda path: ord(path.parent.name))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[path.name]))
    with pytest.raises(SurgeryError, match=f"b/1: no space .* expected {2 * one:,} bytes"):
        made.run()
    assert not any(path.exists() for path in outputs)


def test_several_vocabularies_are_taught_in_one_pass(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    from calib.recovery.taught import IDS, LOGPROBS, REST, TOP, TaughtWindows

    monkeypatch.setattr("calib.recovery.teach.PART_BYTES", 1 << 17)  # several parts
    plans = {"first": pair.plan, "second": random_plan(pair.dense, 500, 64)}
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.json")
    text = ("--data", pair.text, "--seq-len", SEQ_LEN, "--windows", 2, "--seed", 0)
    given = ("teach", pair.dense, *text, "--device", "cpu", "--tokens", 640, "--top-k", 8)
    each = [("--plan", tmp_path / f"{n}.json", "-o", tmp_path / f"{n}-together") for n in plans]
    result = run(*given, *each[0], *each[1])
    assert result.exit_code == 0, result.output
    for name, plan in plans.items():
        alone = taught(replace(pair, plan=plan), tmp_path / f"{name}-alone", tokens=640)
        wanted, found = TaughtWindows(alone), TaughtWindows(tmp_path / f"{name}-together")
        assert found.info.vocab_size == plan.after.vocab_size
        assert found.info.parts > wanted.info.parts > 1
        assert found.heldout == wanted.heldout
        for number in range(len(wanted)):
            one, other = wanted[number], found[number]
            assert torch.equal(one[IDS], other[IDS])
            assert torch.equal(one[TOP], other[TOP])
            for column in (LOGPROBS, REST):
                assert torch.allclose(one[column], other[column], atol=2e-3)
    last = tmp_path / "second-together"
    last.rename(last.with_name("second-together.partial"))  # killed before it had its name
    result = run(*given, *each[0], *each[1], "--resume")
    assert result.exit_code == 0, result.output
    assert len(TaughtWindows(last)) == len(found)
    same = ("--plan", tmp_path / "first.json", *each[0])
    assert_refused(run(*given, *same), "--output", "2 different ones")
    inside = ("--plan", tmp_path / "first.json", "-o", tmp_path / "new", *each[1][:2])
    assert_refused(run(*given, *inside, "-o", tmp_path / "new/a"), "--output", "none inside")
    with pytest.raises(SurgeryError, match="`plan`: is none"):
        calib.teach(pair.dense, plan=[], data=pair.text, output=[], tokens=640)


VLLM = """
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None
    detokenize: bool = True

class LLM:
    def __init__(self, model, *, revision=None, dtype="auto", max_model_len=None):
        if REFUSES:
            raise ValueError("no such architecture")
        assert dtype == "float32"

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        found = []
        for prompt, how in zip(prompts, sampling_params, strict=True):
            assert len(prompt["prompt_token_ids"]) == 2
            assert how.temperature == 1 and not how.detokenize
            drawn = random.Random(how.seed).choices(range(20, 500), k=how.max_tokens)
            found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=drawn)]))
        return found
"""


@pytest.mark.parametrize("refuses", [False, True])
def test_vllm_writes_where_it_is_installed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    from calib.recovery.self_data import VLLM_BATCH, Writing, write_self_data

    (package := tmp_path / "vllm").mkdir()
    (package / "__init__.py").write_text(VLLM.replace("REFUSES", str(refuses)), encoding="utf-8")
    platform = (
        "from types import SimpleNamespace\ncurrent_platform = SimpleNamespace(device_type='cpu')\n"
    )
    (package / "platforms.py").write_text(platform, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    teacher = open_layout(pair.dense)
    settings = choose_settings(ComputeOptions("cpu", dtype="float32"), teacher.checkpoint)

    def write(name: str) -> list[str]:
        path = tmp_path / f"{name}.jsonl"
        writing = Writing(path, 320, None, tmp_path / f"{name}.json", SEQ_LEN, 0)
        write_self_data(teacher, ["a text", "the other"], writing, settings)
        return path.read_text(encoding="utf-8").splitlines()

    try:
        first, second = write("first"), write("second")
    finally:
        for module in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[module]
    assert first == second
    assert len(first) == (16 if refuses else VLLM_BATCH)


def test_self_data_is_what_the_model_predicts(pair: Pair, tmp_path: Path) -> None:
    """After the token that begins a text, without the penalties of generation_config.json."""
    from calib.recovery.self_data import BATCH, Writing, write_self_data
    from calib.scoring.score import first_token

    source = shutil.copytree(pair.dense, tmp_path / "source")
    settings = json.loads((source / "generation_config.json").read_text(encoding="utf-8"))
    settings |= {"eos_token_id": 2, "bos_token_id": 1, "repetition_penalty": 9.0, "min_p": 0.9}
    (source / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    teacher = open_layout(source)
    compute = choose_settings(ComputeOptions("cpu", dtype="float32"), teacher.checkpoint)
    writing = Writing(tmp_path / "t.jsonl", BATCH, None, tmp_path / "c.json", 12, 3)
    tokenizer, first = load_tokenizer(source), first_token(teacher)
    begins = str(tokenizer.id_to_token(first))
    write_self_data(teacher, [f"{begins}Some text", "Some", begins], writing, compute)
    rows = [json.loads(line) for line in writing.path.read_text(encoding="utf-8").splitlines()]

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    start = tokenizer.encode("Some", add_special_tokens=False).ids[0]
    ids = torch.tensor([[first, start]] * BATCH)
    torch.manual_seed(3)
    with torch.no_grad():
        while ids.shape[1] < 12:
            drawn = torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1)
            ids = torch.cat([ids, drawn], 1)
    assert len(rows) == BATCH
    for row, wanted in zip(rows, ids[:, 1:].tolist(), strict=True):
        said = wanted[: wanted.index(2) + 1] if 2 in wanted else wanted
        said = said[: said.index(first)] if first in said else said
        assert row == {"text": tokenizer.decode(said), "tokens": len(said)}
