"""Hostile input made by hand, much of it found by test_fuzz: special files, numbers, bombs."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import MOST_CHARACTERS
from surgery.files.model_files import INDEX_NAME
from surgery.hub.fetch import HUB_ID
from tests.support import ROOT, fuzzing, tiny
from tests.support.command import Run, assert_refused
from tests.support.damage import (
    APPLY,
    CALIBRATE,
    EMBED,
    INSPECT,
    PLAN,
    PRUNE,
    RESUME,
    SCORE,
    SHARD_1,
    SIZES_ONLY,
    Case,
    Damage,
    config,
    each,
    header,
    model_key,
    no_weights,
    plan_key,
    replace,
    tokenizer,
    weight_map,
    write,
)

MEMORY = 1536 << 20
"""Bytes of address space for commands that run no model: a tenth of that is used."""

VOCAB = f"{INSPECT} --vocab"
CONFIG, TOKENIZER = "model/config.json", "model/tokenizer.json"
SINGLE = "model/model.safetensors"


def special(how: str, name: str) -> Damage:
    """Put one of ``fuzzing.SPECIAL`` in place of a file that may be there."""
    return lambda root: fuzzing.SPECIAL[how](root / name)


def fifo(name: str) -> Damage:
    return special("fifo", name)


def link(name: str, target: str) -> Damage:
    """Put a link there, in place of a file that may be there."""

    def damage(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)

    return damage


def single(text: str | bytes) -> Damage:
    """A single shard whose header is ``text`` and which has no bytes behind it."""
    raw = text.encode() if isinstance(text, str) else text
    return each(no_weights, write(SINGLE, struct.pack("<Q", len(raw)) + raw))


def sparse(name: str, size: int) -> Damage:
    """Let a file be ``size`` bytes long, of which the disk holds few."""

    def damage(root: Path) -> None:
        with open(root / name, "ab") as file:
            file.truncate(size)

    return damage


def template(data: Any) -> None:
    """A template that puts in a token which it does not list: the tokenizers library panics."""
    processor = data["post_processor"]
    processor["special_tokens"] = {"x": processor["special_tokens"].pop("<s>")}


ENTRY = '{"dtype": "F32", "shape": %s, "data_offsets": [0, 0]}'
NUMBERS = "[" + "4611686018427387904," * 1_000_000 + "1]"
BLOCK = {"quant_method": "fp8", "weight_block_size": [2**62, 2**62]}
READ = "not a regular file"

CASES = [
    *(
        Case(f"{name} is {how}", special(how, name), command, (name, words))
        for name, command in (
            (CONFIG, INSPECT), (TOKENIZER, PLAN), ("model/generation_config.json", PLAN),
            ("model/chat_template.jinja", PLAN), ("model/README.md", APPLY),
            (f"model/{INDEX_NAME}", INSPECT), ("plan.json", APPLY), ("stats.safetensors", PLAN),
            ("model/compact_surgery.json", "verify model"),
        )
        for how, words in (("fifo", READ), ("endless", READ), ("directory", "directory"))
    ),
    Case("single shard is a FIFO", each(no_weights, fifo(SINGLE)), INSPECT, (SINGLE, READ)),
    Case("shard is endless", link(f"model/{SHARD_1}", "/dev/zero"), INSPECT,
         (SHARD_1, "shard cannot be read", READ)),
    Case("text is a FIFO", fifo("text.txt"), f"{SCORE} text.txt", ("text.txt", "not a file")),
    Case("tokens to keep are a FIFO", fifo("keep"), f"{PLAN} --keep-tokens keep", ("keep", READ)),
    Case("dtype is a list", header(SHARD_1, EMBED, dtype=["F32"]), INSPECT,
         (EMBED, "dtype is not supported", "found ['F32']")),
    Case("a million dimensions", single('{"a": ' + ENTRY % NUMBERS + "}"), INSPECT,
         ("tensor a", "too many dimensions", "found 1000001")),
    Case("a layer's number of 5,000 digits",
         single(f'{{"model.layers.{"9" * 5_000}.mlp.up_proj.weight": {ENTRY % "[0]"}}}'), INSPECT,
         ("num_hidden_layers", "check config.json")),
    Case("a name of a megabyte", single(f'{{"{"x" * 1_000_000}": {ENTRY % "[1]"}}}'), INSPECT,
         ("tensor xxx", "xxx …", "data_offsets contradict the shape")),
    Case("infinity in figures", replace(CONFIG, "{", '{"a": 1e999,'), INSPECT,
         ("config.json", "not valid JSON", "found the number 1e999")),
    Case("blocks without an end", config(quantization_config=BLOCK), INSPECT,
         ("config.json", "weight_block_size", "expected two numbers from 1 to 65536")),
    Case("a terminal's commands", config(model_type="\x1b[2J\x1b]0;x\x07"), INSPECT,
         ("model type", "found \\u001b[2J\\u001b]0;x\\u0007")),
    Case("type of model is a list", model_key(type=["BPE"]), PLAN,
         ("tokenizer.json", "cannot be pruned", "found ['BPE'] model")),
    Case("pre-tokenizers are a number",
         tokenizer(lambda data: data.update(pre_tokenizer={"pretokenizers": 5}, decoder=None)),
         PLAN, ("tokenizer.json", "found BPE without a byte-level")),
    Case("added tokens are a number", tokenizer(lambda data: data.update(added_tokens=5)), PLAN,
         ("tokenizer.json", "added_tokens is not a list")),
    Case("unknown token is a list", model_key(unk_token=["<unk>"]), PLAN,
         ("tokenizer.json: model.unk_token", "is not a token", "found ['<unk>']")),
    Case("unknown token below 0", model_key(unk_id=-5), PLAN,
         ("tokenizer.json: model.unk_id", "is not a token", "found -5")),
    Case("merges of WordPiece",
         model_key(type="WordPiece", continuing_subword_prefix="##", merges=5), PLAN,
         ("tokenizer.json", "no model.merges")),
    Case("a token of a million characters",
         tokenizer(lambda data: data["model"]["vocab"].update({"a" * 1_000_000: 620})), VOCAB,
         ("tokenizer.json", "tokens that are too long", "found one of 1,000,000 characters")),
    Case("a template that the library gives up on", tokenizer(template), f"{CALIBRATE} text.txt",
         ("tokenizer.json", "cannot be loaded", "no entry found")),
    Case("a trillion tokens behind the rows", plan_key(None, rowless_tokens=10**12), APPLY,
         ("plan.json", "rowless_tokens", "found 1000000000000")),
    Case("source with a null character", plan_key(None, source="a\0b"), APPLY,
         ("a\\u0000b", "neither a directory")),
    Case("source is the plan", plan_key(None, source="plan.json"), APPLY,
         ("plan.json", "is a file", "expected the directory of a model")),
    Case("source of a revision that climbs", plan_key(None, source="a/b@../../x"), APPLY,
         ("a/b@../../x", "neither a directory")),
    Case("output with a null character", plan_key(None, output="a\0b"), "apply plan.json",
         ("a\\u0000b", "is no path", "choose")),
    *(
        Case(f"output {how}: {command.split()[0]}", damage, f"{command} {name}", words)
        for how, damage, name, words in (
            ("is a loop", link("loop", "loop"), "loop", ("loop", "is no path")),
            ("below a loop", link("loop", "loop"), "loop/x", ("loop/x", "is no path")),
            ("is a link to nothing", link("out", "nowhere"), "out", ("out", "exists already")),
        )
        for command in ("apply plan.json -o", PRUNE)
    ),
    Case("a run to resume that is elsewhere",
         each(lambda root: (root / "elsewhere").mkdir(), link("out.partial", "elsewhere")),
         RESUME, ("out.partial", "interrupted")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    case.damage(bench)
    before = fuzzing.listing(bench)
    with fuzzing.time_limit():
        assert_refused(run(*case.command.split()), *case.words)
    assert fuzzing.listing(bench) == before


@pytest.mark.parametrize(
    ("damage", "command", "words"),
    [
        pytest.param(write(CONFIG, b'{"a":[' + b"[]," * 9_000_000 + b"0]}"), INSPECT,
                     (CONFIG, "more than 8,388,608 values"), id="config"),
        pytest.param(single(b'{"a":[' + b"[]," * 9_000_000 + b"0]}"), INSPECT,
                     (SINGLE, "more than 8,388,608 values"), id="header"),
        pytest.param(write("plan.json", b'{"kept_channels":[' + b"{}," * 9_000_000 + b"{}]}"),
                     APPLY, ("plan.json", "more than 8,388,608 values"), id="plan"),
        pytest.param(sparse(TOKENIZER, 1 << 40), VOCAB, (TOKENIZER, "larger than"),
                     id="tokenizer of a terabyte"),
        pytest.param(sparse("model/LICENSE", 1 << 40), APPLY, ("LICENSE", "larger than"),
                     id="license of a terabyte"),
        pytest.param(sparse(f"model/{SHARD_1}", 1 << 40), INSPECT, (SHARD_1, "bytes after"),
                     id="shard of a terabyte"),
        pytest.param(sparse("stats.safetensors", 1 << 40), PLAN, ("stats.safetensors", "more than"),
                     id="statistics of a terabyte"),
        pytest.param(sparse("stats.safetensors", 1 << 32), PLAN, ("stats.safetensors", "memory"),
                     id="statistics beyond the memory"),
    ],
)  # fmt: skip
def test_memory_is_bounded(
    damage: Damage, command: str, words: tuple[str, ...], bench: Path
) -> None:
    """A process of its own, that may not have more than ``MEMORY``."""
    resource = pytest.importorskip("resource")
    damage(bench)
    result = subprocess.run(
        [sys.executable, "-c", "from surgery.cli.main import main; main()", *command.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        capture_output=True,
        text=True,
        timeout=fuzzing.SECONDS * 4,
    )
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_a_tokenizer_nested_too_deeply_for_a_forged_plan(bench: Path, run: Run) -> None:
    """Apply does not read it as planning does: the fingerprint says that it is the same."""

    def nest(data: Any) -> None:
        part: Any = {}
        for _ in range(300):
            part = [part]
        data["post_processor"] = part

    tokenizer(nest)(bench)
    fuzzing.fit_again(bench)
    assert_refused(run(*APPLY.split()), "tokenizer.json", "nested too deeply")


def test_a_tokenizer_that_is_no_text_for_a_forged_plan(bench: Path, run: Run) -> None:
    raw = (bench / TOKENIZER).read_bytes()
    (bench / TOKENIZER).write_bytes(raw.replace(b'"<unk>"', b'"<\xff>"', 1))
    fuzzing.fit_again(bench)
    assert_refused(run(*APPLY.split()), "tokenizer.json", "cannot be read", "download")


def test_an_id_that_the_library_would_count_up_to(tmp_path: Path, run: Run) -> None:
    fuzzing.save_legacy(tmp_path / "model")
    place = tmp_path / "model" / "vocab.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"<unk>": 2**32 - 2}))
    result = run("inspect", tmp_path / "model", "--vocab")
    assert_refused(result, "vocab.json", "an id that is not a number", "published")


def test_long_values_lose_their_middle(bench: Path, run: Run) -> None:
    config(model_type="x" * 1_000_000)(bench)
    assert len(run(*INSPECT.split()).stderr) < 2 * MOST_CHARACTERS


def test_file_names_of_any_bytes(bench: Path, run: Run) -> None:
    for name in (b"bad\xff.bin", b"\x1b[2J\n.bin", b"\xff.json"):
        Path(os.fsdecode(os.fsencode(bench / "model") + b"/" + name)).write_text("{}")
    planned = run(*PLAN.split())
    assert planned.exit_code == 0, planned.output
    assert "left out of the output: \\u001b[2J .bin, bad\\udcff.bin" in planned.output
    assert run(*["apply", "new.json", "-o", "out"]).exit_code == 0


def test_a_shard_by_the_name_of_a_license_is_cut(bench: Path, run: Run) -> None:
    shard = "LICENSE-1.safetensors"
    (bench / "model" / SHARD_1).rename(bench / "model" / shard)
    weight_map(embed=shard)(bench)
    fuzzing.fit_again(bench)
    for command in (APPLY, "verify out"):
        result = run(*command.split())
        assert result.exit_code == 0, result.output


# What transformers makes of a config.


def test_code_named_as_an_implementation_is_never_run(bench: Path, run: Run) -> None:
    """A kernel is code of the hub, which transformers would load where it can."""
    names = ("attn_implementation", "_attn_implementation", "experts_implementation")
    config(**dict.fromkeys(names, "evil/kernel"))(bench)
    result = run(*f"{CALIBRATE} text.txt".split())
    assert result.exit_code == 0, result.output


def damaged(tmp_path: Path, key: str, **changes: Any) -> Path:
    """A tiny model of ``key`` with another config."""
    path = tiny.save(tmp_path / "model", key)
    data = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(data))
    shutil.copy(tiny.TEXT, tmp_path / "text.txt")
    return path


@pytest.mark.parametrize(
    ("key", "changes", "words"),
    [
        ("qwen3", {"sliding_window": None}, ("cannot build or run", "ValueError", "check")),
        ("llama", {"num_attention_heads": 0}, ("cannot build or run", "ZeroDivisionError")),
        ("gpt_neo", {"max_position_embeddings": 30_000}, ("wpe", "expected [30000, 32]")),
        ("gptj", {"n_positions": 10**9}, ("tables that do not fit", "lower the number")),
        ("llama", {"head_dim": 10**9}, ("q_proj", "contradicts config.json")),
    ],
)
def test_a_config_that_makes_no_model(
    key: str, changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path, run: Run
) -> None:
    path = damaged(tmp_path, key, **changes)
    data = ("--data", tmp_path / "text.txt", "--samples", 1)
    with fuzzing.time_limit():
        assert_refused(run("score", path, *data), *words)


def test_revisions_of_the_hub_do_not_climb() -> None:
    assert HUB_ID.fullmatch("org/name@refs/pr/1")
    assert not HUB_ID.fullmatch("org/name@refs/../../x")


def test_sizes_alone_need_no_more(bench: Path, run: Run) -> None:
    """The bench itself is good: what is refused above is refused for what was done to it."""
    for command in (SIZES_ONLY, PLAN, VOCAB):
        assert run(*command.split()).exit_code == 0
        Path("new.json").unlink(missing_ok=True)
