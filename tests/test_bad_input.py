"""Bad input to whole commands: one line that says where, what and what to do; nothing written."""

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.numpy import load_file, save_file

from surgery.checkpoint import INDEX_NAME
from surgery.plan import Plan
from surgery.stats import ChannelStats
from tests import tiny
from tests.conftest import Run
from tests.plans import layout_of, random_plan, random_stats

Damage = Callable[[Path], object]
"""Spoils something in a bench directory."""

SIZES = "--vocab-size 512 --intermediate-size 64"
INSPECT = "inspect model"
SIZES_ONLY = f"plan model {SIZES} -o new.json"
PLAN = f"plan model {SIZES} --stats stats.safetensors -o new.json"
APPLY = "apply plan.json -o out"
RESUME = f"{APPLY} --resume"
CALIBRATE = "calibrate model --seq-len 32 --samples 2 -o new.safetensors --data"
SCORE = "score model --samples 2 --data"
PRUNE = f"prune model --data text.txt --seq-len 32 --samples 2 {SIZES} -o"

DEEP_ID = '"eos_token_id": ' + "[" * 900 + "2" + "]" * 900
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE, DOWN = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"
SHARD_1, SHARD_2 = "model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors"


class Case(NamedTuple):
    """A row of the tables below."""

    name: str
    damage: Damage
    command: str
    words: tuple[str, ...]
    """All of them stand in the one line on stderr."""


@pytest.fixture(scope="session")
def pattern(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that commands need: model, text, statistics, plan."""
    root = tmp_path_factory.mktemp("bench")
    shutil.copytree(llama, root / "model")
    shutil.copy(text, root / "text.txt")
    random_stats(layout_of(root / "model")).save(root / "stats.safetensors")
    plan = msgspec.structs.replace(random_plan(root / "model", 512, 64), source="model")
    plan.save(root / "plan.json")
    return root


@pytest.fixture
def bench(pattern: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``pattern`` to damage, which is also the working directory."""
    root = shutil.copytree(pattern, tmp_path / "bench")
    monkeypatch.chdir(root)
    return root


def snapshot(root: Path) -> dict[str, str]:
    """Return path → SHA-256 of everything below ``root``."""
    return {
        str(path.relative_to(root)): hashlib.sha256(
            path.read_bytes() if path.is_file() else b"directory"
        ).hexdigest()
        for path in root.rglob("*")
    }


def assert_refused(result: Result, *words: str) -> None:
    """One line, exit status 2, no traceback, and every one of ``words``."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.stderr.splitlines()
    assert (result.exit_code, len(lines)) == (2, 1), result.output
    assert lines[0].startswith("Error: ")
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]!r}"


# What spoils a bench.


def nothing(_: Path) -> None:
    """The command alone is wrong."""


def each(*damages: Damage) -> Damage:
    """Do all of ``damages``."""

    def damage(root: Path) -> None:
        for one in damages:
            one(root)

    return damage


def remove(name: str) -> Damage:
    return lambda root: (root / name).unlink()


def write(name: str, content: str | bytes) -> Damage:
    raw = content.encode() if isinstance(content, str) else content
    return lambda root: (root / name).write_bytes(raw)


def cut(name: str, size: int) -> Damage:
    """Keep the first ``size`` bytes, or all but the last ``-size``."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:size])


def append(name: str, tail: bytes) -> Damage:
    return lambda root: (root / name).write_bytes((root / name).read_bytes() + tail)


def replace(name: str, old: str, new: str) -> Damage:
    """Replace text that must be there."""

    def damage(root: Path) -> None:
        content = (root / name).read_text("utf-8")
        assert old in content
        (root / name).write_text(content.replace(old, new, 1), "utf-8")

    return damage


def change(name: str, edit: Callable[[Any], object]) -> Damage:
    """Let ``edit`` change the JSON in file ``name``."""

    def damage(root: Path) -> None:
        data = json.loads((root / name).read_text("utf-8"))
        edit(data)
        (root / name).write_text(json.dumps(data), "utf-8")

    return damage


def config(**changes: Any) -> Damage:
    return change("model/config.json", lambda data: data.update(changes))


def no_config_key(key: str) -> Damage:
    return change("model/config.json", lambda data: data.pop(key))


def weight_map(**changes: Any) -> Damage:
    names = {"embed": EMBED, "gate": GATE, "extra": "model.layers.0.extra.weight"}
    new = {names[key]: value for key, value in changes.items()}
    return change(f"model/{INDEX_NAME}", lambda data: data["weight_map"].update(new))


def tokenizer(edit: Callable[[Any], object]) -> Damage:
    return change("model/tokenizer.json", edit)


def plan_key(section: str | None, **changes: Any) -> Damage:
    def edit(data: Any) -> None:
        (data[section] if section else data).update(changes)

    return change("plan.json", edit)


def header(shard: str, tensor: str, tail: int = 0, **changes: Any) -> Damage:
    """Change entries of ``tensor`` in the header; add ``tail`` bytes to the file."""

    def damage(root: Path) -> None:
        path = root / "model" / shard
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        begin, end = entries[tensor]["data_offsets"]
        shift = changes.pop("shift", (0, 0))
        entries[tensor] |= {"data_offsets": [begin + shift[0], end + shift[1]], **changes}
        new = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :] + bytes(tail))

    return damage


def last_of(shard: str, **changes: Any) -> Damage:
    """Like ``header`` for the shard's last tensor."""

    def damage(root: Path) -> None:
        raw = (root / "model" / shard).read_bytes()
        entries = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        entries.pop("__metadata__", None)
        name = max(entries, key=lambda key: entries[key]["data_offsets"])
        header(shard, name, **changes)(root)

    return damage


def tensors(edit: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """Let ``edit`` change the tensors; they become one shard without an index."""

    def damage(root: Path) -> None:
        found: dict[str, np.ndarray] = {}
        for path in (root / "model").glob("*.safetensors"):
            found |= load_file(path)
            path.unlink()
        edit(found)
        (root / "model" / INDEX_NAME).unlink()
        save_file(found, root / "model" / "model.safetensors", {"format": "pt"})

    return damage


def no_weights(root: Path) -> None:
    for path in [*(root / "model").glob("*.safetensors"), root / "model" / INDEX_NAME]:
        path.unlink()


def stats(**changes: Any) -> Damage:
    """Change the fields of the statistics' metadata; None for an array drops it."""

    def damage(root: Path) -> None:
        path = root / "stats.safetensors"
        info = msgspec.to_builtins(ChannelStats.load(path).info)
        arrays = load_file(path)
        for key, value in changes.items():
            if value is None:
                del arrays[key.replace("__", ".")]
            elif isinstance(value, np.ndarray):
                arrays[key.replace("__", ".")] = value
            else:
                info[key] = value
        save_file(arrays, path, {"compact_surgery": json.dumps(info)})

    return damage


def sums_of(layer: int, *shape: int, axis: str = "ffn") -> dict[str, np.ndarray]:
    """Statistics of ``shape`` (experts, I), as ``stats`` takes them."""
    shapes = dict.fromkeys(("sum_sq", "sum_abs"), (1, *shape))
    shapes |= dict.fromkeys(("sum_l2", "weight_norm"), shape)
    arrays = {part: np.ones(of_part) for part, of_part in shapes.items()}
    arrays["tokens"] = np.ones((1, *shape[:1]), np.int64)
    return {f"layers__{layer}__{axis}__{part}": array for part, array in arrays.items()}


def kept_channels(layer: int, **axes: list[str]) -> Damage:
    """Let the plan keep other channels of ``layer``."""
    return change("plan.json", lambda data: data["kept_channels"][layer].update(axes))


def rename(data: dict[str, Any], old: str, new: str) -> None:
    data[new] = data.pop(old)


BEGUN = '{"plan_digest": "0123456789abcdef"}'
"""The first line of the journal of another plan."""


def journal(content: str) -> Damage:
    def damage(root: Path) -> None:
        (root / "out.partial").mkdir()
        (root / "out.partial.journal").write_text(content + "\n")

    return damage


def directory(name: str) -> Damage:
    return lambda root: (root / name).mkdir()


def swap_ids(data: Any) -> None:
    """Give the first two added tokens each other's id."""
    first, second = data["added_tokens"][:2]
    first["id"], second["id"] = second["id"], first["id"]


def model_key(**changes: Any) -> Damage:
    """Change keys of tokenizer.json's model."""
    return tokenizer(lambda data: data["model"].update(changes))


def prepend(path: Path, head: bytes) -> None:
    path.write_bytes(head + path.read_bytes())


def gap_under_added(data: Any) -> None:
    """One token fewer, so that the loader gives an added token the id of the last one."""
    del data["model"]["merges"][-1]
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].get)
    del data["model"]["vocab"][last]
    data["added_tokens"].append(dict(data["added_tokens"][0], id=620, content="<late>"))


def two_tokens_one_id(data: Any) -> None:
    vocab = data["model"]["vocab"]
    vocab["Ġthe"] = vocab["Ġa"]


SHARDS = [
    Case("missing shard", remove(f"model/{SHARD_2}"), INSPECT,
         (INDEX_NAME, "tensor model.layers.0.", "missing", SHARD_2, "download")),
    Case("truncated shard", cut(f"model/{SHARD_1}", -100), INSPECT,
         (SHARD_1, EMBED, "truncated", "expected 82048 bytes", "found 81948", "download")),
    Case("shard cut inside its header", cut(f"model/{SHARD_2}", 100), INSPECT,
         (SHARD_2, "truncated", "expected", "found", "in a file of 100", "download")),
    Case("empty shard", cut(f"model/{SHARD_2}", 0), INSPECT,
         (SHARD_2, "truncated", "expected at least 10 bytes", "found 0", "download")),
    Case("git-lfs pointer", write(f"model/{SHARD_1}", "version https://git-lfs\noid sha256:0\n"),
         INSPECT, (SHARD_1, "git-lfs pointer", "git lfs pull")),
    Case("no model_type", no_config_key("model_type"), INSPECT,
         ("config.json", "names no model_type", "expected one of llama", "add it")),
    Case("shard is no safetensors", write(f"model/{SHARD_1}", "<html>Not found</html>"), INSPECT,
         (SHARD_1, "not safetensors", "expected", "found", "download")),
    Case("shard with bytes behind", append(f"model/{SHARD_1}", b"1234"), INSPECT,
         (SHARD_1, "bytes behind", "expected 82048", "found 82052", "download")),
    Case("offsets of a wrong length", header(SHARD_1, EMBED, shift=(0, 4)), INSPECT,
         (SHARD_1, EMBED, "expected 81920 bytes for F32 [640, 32]", "[0, 81924]", "download")),
    Case("shape too large", header(SHARD_1, EMBED, shape=[640, 33]), INSPECT,
         (SHARD_1, EMBED, "expected 84480 bytes", "found data_offsets [0, 81920]", "download")),
    Case("negative shape", header(SHARD_1, EMBED, shape=[-640, -32]), INSPECT,
         (SHARD_1, EMBED, "natural numbers", "download")),
    Case("tensors overlap", last_of(SHARD_2, shift=(-128, -128)), INSPECT,
         (SHARD_2, "tensor model.layers.", "overlaps", "expected data offset", "found")),
    Case("hole between tensors", last_of(SHARD_2, shift=(4, 4), tail=4), INSPECT,
         (SHARD_2, "tensor model.layers.", "hole", "expected data offset", "found", "download")),
    Case("header entry without shape", header(SHARD_1, EMBED, shape=None), INSPECT,
         (SHARD_1, EMBED, "incomplete", "expected dtype, shape, data_offsets", "download")),
    Case("index names a missing file", weight_map(embed="model-9.safetensors"), INSPECT,
         (INDEX_NAME, EMBED, "missing", "model-9.safetensors", "download")),
    Case("index reaches up", weight_map(embed="../x.safetensors"), INSPECT,
         (INDEX_NAME, EMBED, "outside", "expected a plain", "'../x.safetensors'", "do not use")),
    Case("index reaches anywhere", weight_map(embed="/etc/x.safetensors"), INSPECT,
         (INDEX_NAME, EMBED, "outside", "expected a plain", "'/etc/x.safetensors'", "do not use")),
    Case("index gives no name", weight_map(embed=7), INSPECT,
         (INDEX_NAME, EMBED, "expected a plain file name", "found 7", "do not use")),
    Case("index names another shard", weight_map(gate=SHARD_1), INSPECT,
         (SHARD_2, GATE, "disagree", f"expected index entry {SHARD_2}", f"found {SHARD_1}",
          "download")),
    Case("index names a tensor too many", weight_map(extra=SHARD_1), INSPECT,
         (SHARD_1, "model.layers.0.extra.weight", "not in the shard", "download")),
    Case("index lacks a tensor",
         change(f"model/{INDEX_NAME}", lambda data: data["weight_map"].pop(GATE)), INSPECT,
         (SHARD_2, GATE, "disagree", f"expected index entry {SHARD_2}", "no entry", "download")),
    Case("index without weight_map", write(f"model/{INDEX_NAME}", "{}"), INSPECT,
         (INDEX_NAME, "weight_map", "expected", "download")),
    Case("index cut", cut(f"model/{INDEX_NAME}", 500), INSPECT,
         (INDEX_NAME, "not valid JSON", "found", "download")),
    Case("pickle only", each(no_weights, write("model/pytorch_model.bin", b"\x80\x02.")), INSPECT,
         ("pytorch_model.bin", "pickle", "expected safetensors", "save_pretrained")),
    Case("no weights", no_weights, INSPECT,
         ("model", "no weights", "expected model.safetensors or", "download")),
]  # fmt: skip

CONFIGS = [
    Case("unknown model type", config(model_type="mamba"), INSPECT,
         ("config.json", "model type", "not supported", "found mamba", "--family llama")),
    Case("quantized", config(quantization_config={"quant_method": "gptq"}), INSPECT,
         ("config.json", "quantized", "expected bf16, fp16 or fp32", "found quant_method gptq",
          "prune the unquantized")),
    Case("config missing", remove("model/config.json"), INSPECT,
         ("config.json", "cannot be read", "No such file", "check the model directory")),
    Case("config cut", cut("model/config.json", 90), INSPECT,
         ("config.json", "not valid JSON", "found", "line", "download")),
    Case("config with a key twice", replace("model/config.json", "{", '{"vocab_size": 1,'),
         INSPECT, ("config.json", "not valid JSON", "'vocab_size' twice", "download")),
    Case("config is a list", write("model/config.json", "[1]"), INSPECT,
         ("config.json", "not a JSON object", "expected an object", "found list", "download")),
    Case("config with NaN", config(rms_norm_eps=float("nan")), INSPECT,
         ("config.json", "not valid JSON", "found the number NaN", "download")),
    Case("config in UTF-16", write("model/config.json", "{}".encode("utf-16")), INSPECT,
         ("config.json", "not valid JSON", "found", "download")),
    Case("config 100,000 deep", write("model/config.json", '{"a":' + "[" * 100_000), INSPECT,
         ("config.json", "nested too deeply", "download")),
    Case("config with half a character", replace("model/config.json", "{", '{"a": "\\ud800",'),
         INSPECT, ("config.json", "not valid JSON", "found", "download")),
    Case("no number of layers", no_config_key("num_hidden_layers"), INSPECT,
         ("config.json", "num_hidden_layers", "expected a positive number", "check config.json")),
    Case("intermediate_size is 0", config(intermediate_size=0), INSPECT,
         ("config.json", "intermediate_size", "expected a positive number", "found 0", "check")),
    Case("intermediate_size differs by layer", config(intermediate_size=[96, 96, 64]), INSPECT,
         ("config.json", "intermediate_size", "expected a positive number", "check config.json")),
    Case("no intermediate_size and tensors that differ",
         each(no_config_key("intermediate_size"),
              tensors(lambda found: found.update({DOWN: np.zeros((32, 80), np.float32)}))),
         INSPECT, (GATE, "intermediate_size", "expected 80 on dimension 0", "found [96, 32]",
                   "check config.json")),
    Case("vocab_size is text", config(vocab_size="640"), INSPECT,
         ("config.json", "vocab_size", "expected a positive number", "found 640", "check")),
    Case("vocab_size contradicts the embedding", config(vocab_size=700), INSPECT,
         ("tensor", "contradicts config.json's vocab_size", "expected 700 on dimension 0",
          "found [640, 32]", "check config.json")),
    Case("intermediate_size contradicts", config(intermediate_size=128), INSPECT,
         (SHARD_2, "mlp", "contradicts config.json's intermediate_size", "expected 128",
          "check config.json")),
    Case("fewer layers than tensors", config(num_hidden_layers=2), INSPECT,
         ("tensor model.layers.2.", "num_hidden_layers", "expected less than 2", "found 2")),
    Case("more layers than tensors", config(num_hidden_layers=4), INSPECT,
         ("tensor model.layers.3.", "missing", "download")),
    Case("hidden_size contradicts", config(hidden_size=64), f"{CALIBRATE} text.txt",
         ("tensor", "contradicts config.json", "check config.json")),
    Case("heads contradict", config(num_attention_heads=2), f"{CALIBRATE} text.txt",
         ("tensor", "contradicts config.json", "check config.json")),
    Case("activation that nobody knows", config(hidden_act="nope"), f"{CALIBRATE} text.txt",
         ("config.json", "found", "nope", "check config.json")),
    Case("missing tensor", tensors(lambda found: found.pop(DOWN)), INSPECT,
         (f"tensor {DOWN}", "missing", "download")),
    Case("missing untied head", tensors(lambda found: found.pop(HEAD)), INSPECT,
         (f"tensor {HEAD}", "missing", "download")),
    Case("surplus tensor", tensors(lambda found: found.update(extra=np.zeros(2))), INSPECT,
         ("model.safetensors", "tensor extra", "not a tensor of this model", "families.py")),
    Case("U8 tensor", header(SHARD_1, EMBED, dtype="U8", shape=[640, 128]), INSPECT,
         (SHARD_1, EMBED, "expected BF16 or F16 or F32", "found U8", "unquantized")),
    Case("FP8 tensor", header(SHARD_1, EMBED, dtype="F8_E4M3", shape=[640, 128]), INSPECT,
         (SHARD_1, EMBED, "expected BF16 or F16 or F32", "found F8_E4M3", "unquantized")),
    Case("unknown dtype", header(SHARD_1, EMBED, dtype="F4"), INSPECT,
         (SHARD_1, EMBED, "dtype", "expected one of F64", "found F4", "unquantized")),
    Case("id of a padding row", config(eos_token_id=639), SIZES_ONLY,
         ("config.json", "eos_token_id", "no token", "found 639", "correct the id")),
    Case("list with a list in it", config(eos_token_id=[2, [3]]), SIZES_ONLY,
         ("config.json", "eos_token_id")),
    Case("id 900 lists deep", replace("model/config.json", '"eos_token_id": 2', DEEP_ID),
         SIZES_ONLY, ("config.json", "nested too deeply")),
]  # fmt: skip

SIZE_OPTIONS = [
    Case("vocabulary below what must stay", nothing,
         "plan model --vocab-size 200 --intermediate-size 64 -o new.json",
         ("--vocab-size", "out of reach", "expected 260", "to 640", "found 200", "choose")),
    Case("vocabulary above the rows", nothing,
         "plan model --vocab-size 641 --intermediate-size 64 -o new.json",
         ("--vocab-size", "out of reach", "expected 260", "to 640", "found 641", "choose")),
    Case("channels above the model's", nothing,
         "plan model --vocab-size 512 --intermediate-size 97 -o new.json",
         ("--intermediate-size", "out of reach", "expected 1 to 96", "found 97", "choose")),
    Case("no channels", nothing, "plan model --vocab-size 512 --intermediate-size 0 -o new.json",
         ("--intermediate-size", "out of reach", "expected 1 to 96", "found 0", "choose")),
    *(
        Case(f"width {given}", nothing, f"plan model --vocab-size 512 --width {given} -o new.json",
             ("--width", "no width of this model", "expected KEY=N with KEY one of inter",
              f"found {given}", "correct it"))
        for given in ("moe_intermediate_size=64", "intermediate_size", "intermediate_size=x", "=64",
                      "intermediate_size=-64", "intermediate_size=6.5")
    ),
    Case("rows that do not divide", nothing, f"plan model {SIZES} --multiple-of 96 -o new.json",
         ("vocab_size", "does not divide", "expected a multiple of 96, such as 480", "found 512")),
    Case("channels that do not divide", nothing,
         "plan model --vocab-size 512 --intermediate-size 60 --multiple-of 32 -o new.json",
         ("intermediate_size", "does not divide", "expected a multiple of 32, such as 64",
          "found 60")),
    Case("channels that do not divide for a target", nothing,
         "plan model --vocab-size 512 --intermediate-size 64 --target tp=2,group=64 -o new.json",
         ("intermediate_size", "does not divide", "expected a multiple of 128", "found 64")),
    *(
        Case(f"ratio {ratio}", nothing, f"plan model --ratio {ratio} -o new.json",
             ("ratio", "expected above 0, below 1", f"found {float(ratio)}", "choose"))
        for ratio in ("0", "1.5", "-0.1", "1", "nan")
    ),
    Case("ratio 0.99", nothing, "plan model --ratio 0.99 -o new.json",
         ("ratio", "expected at most 0.", "found 0.99", "--vocab-size")),
    *(
        Case(f"target {given or 'missing'}", nothing, f"plan model {given} -o new.json",
             ("sizes", "expected --ratio, or --vocab-size and --intermediate-size", "give"))
        for given in ("", f"--ratio 0.2 {SIZES}", "--vocab-size 512", "--intermediate-size 64",
                      "--ratio 0.2 --vocab-size 512")
    ),
    *(
        Case(f"bucket sizes {sizes}", nothing, f"{CALIBRATE} text.txt --vocab-sizes {sizes}",
             ("--vocab-sizes", "expected numbers from 1 to 640", f"found {sizes}", "correct"))
        for sizes in ("0,512", "641", "a", "512,")
    ),
    Case("model is a file", nothing, "inspect text.txt",
         ("text.txt", "neither", "expected DIR or org/name", "check the spelling")),
    Case("picture of no known kind", nothing, "inspect model --plot x.foo", ("x.foo", "foo")),
    Case("model is a path that is not there", nothing, "inspect ./nowhere",
         ("./nowhere", "neither", "expected DIR or org/name", "check the spelling")),
    Case("model is not there", nothing, "inspect nowhere",
         ("nowhere", "neither", "expected DIR or org/name", "check the spelling")),
]  # fmt: skip

STATS = [
    Case("statistics of another model", config(rms_norm_eps=1e-5), PLAN,
         ("stats.safetensors", "another model", "expected fingerprint", "found", "calibrate")),
    Case("statistics of another vocabulary",
         stats(token_counts=np.ones(3, np.int64), bucket_of=np.zeros(3, np.int64)), PLAN,
         ("stats.safetensors", "other sizes", "expected (3, {'ffn': (1, 96)}, 640)",
          "found (3, {'ffn': (1, 96)}, 3)", "calibrate again")),
    Case("statistics of other channels",
         stats(**sums_of(1, 1, 80)), PLAN,
         ("stats.safetensors", "other sizes", "of layer 1", "expected (3, {'ffn': (1, 96)}, 640)",
          "found (3, {'ffn': (1, 80)}, 640)", "calibrate again")),
    Case("statistics of experts",
         stats(**sums_of(2, 4, 96)), PLAN,
         ("stats.safetensors", "other sizes", "of layer 2", "found (3, {'ffn': (4, 96)}, 640)",
          "calibrate again")),
    Case("statistics with an axis too many",
         stats(**sums_of(0, 1, 96, axis="shared")), PLAN,
         ("stats.safetensors", "other sizes", "of layer 0", "'shared': (1, 96)", "calibrate")),
    Case("statistics of too few layers",
         stats(**dict.fromkeys(sums_of(2, 1, 96)), cosines=np.ones(2)), PLAN,
         ("stats.safetensors", "other sizes", "of layer 2",
          "expected (3, {'ffn': (1, 96)}, 640)", "found (2, 640)", "calibrate again")),
    Case("statistics of too many layers",
         stats(**sums_of(3, 1, 96), cosines=np.ones(4)), PLAN,
         ("stats.safetensors", "other sizes", "of layer 3", "expected (3, 640)",
          "found (4, {'ffn': (1, 96)}, 640)", "calibrate again")),
    Case("statistics without a layer",
         stats(**dict.fromkeys(sums_of(1, 1, 96))), PLAN,
         ("stats.safetensors", "other sizes", "of layer 1", "found (3, {}, 640)", "calibrate")),
    Case("text for statistics", nothing, PLAN.replace("stats.safetensors", "text.txt"),
         ("text.txt", "not a statistics file", "found", "calibrate again")),
    Case("weights for statistics", nothing, PLAN.replace("stats.safetensors", f"model/{SHARD_1}"),
         (SHARD_1, "not a statistics file", "found", "calibrate again")),
    Case("statistics not there", remove("stats.safetensors"), PLAN,
         ("stats.safetensors", "No such file", "name the file that calibrate wrote")),
    Case("statistics cut", cut("stats.safetensors", -8), PLAN,
         ("stats.safetensors", "not a statistics file", "found", "calibrate again")),
    Case("statistics of the next format", stats(format=4), PLAN,
         ("stats.safetensors", "another format", "expected 3", "found 4", "calibrate again")),
    Case("statistics without cosines", stats(cosines=None), PLAN,
         ("stats.safetensors", "lacks an array", "cosines", "calibrate again")),
    Case("statistics with a cosine too few", stats(cosines=np.ones(2)), PLAN,
         ("stats.safetensors: cosines", "each layer", "expected [3]", "found [2]", "calibrate")),
    Case("statistics with a cosine that is none", stats(cosines=np.full(3, np.nan)), PLAN,
         ("stats.safetensors: cosines", "not finite", "calibrate again")),
    Case("statistics whose cosines are whole numbers", stats(cosines=np.ones(3, np.int64)), PLAN,
         ("stats.safetensors: cosines", "dtype", "expected float64", "calibrate again")),
    Case("statistics without norms", stats(layers__1__ffn__weight_norm=None), PLAN,
         ("stats.safetensors", "lacks an array", "layers.1.ffn.weight_norm", "calibrate again")),
    Case("statistics with norms by bucket", stats(layers__1__ffn__sum_l2=np.ones((1, 1, 96))), PLAN,
         ("stats.safetensors: layers.1.ffn", "different shapes", "calibrate again")),
    Case("statistics with an endless norm",
         stats(layers__1__ffn__weight_norm=np.full((1, 96), np.inf)), PLAN,
         ("stats.safetensors: layers.1.ffn", "not finite", "calibrate again")),
    Case("statistics without counts", stats(token_counts=None), PLAN,
         ("stats.safetensors", "lacks an array", "token_counts", "calibrate again")),
    Case("statistics without sums", stats(layers__1__ffn__sum_abs=None), PLAN,
         ("stats.safetensors", "lacks an array", "layers.1.ffn.sum_abs", "calibrate again")),
    Case("statistics with an array too many", stats(layers__0__ffn__mean=np.ones(1)), PLAN,
         ("stats.safetensors: layers.0.ffn.mean", "no array of statistics", "calibrate again")),
    Case("statistics of an unknown axis", stats(layers__0__heads__sum_sq=np.ones(1)), PLAN,
         ("stats.safetensors: layers.0.heads.sum_sq", "no array of statistics", "calibrate")),
    Case("statistics with NaN", stats(layers__0__ffn__sum_sq=np.full((1, 1, 96), np.nan)), PLAN,
         ("stats.safetensors: layers.0.ffn", "not finite", "calibrate again")),
    Case("statistics of odd shape", stats(layers__0__ffn__sum_sq=np.ones((2, 1, 96))), PLAN,
         ("stats.safetensors: layers.0.ffn", "different shapes", "expected [1, experts, I]",
          "found", "calibrate again")),
    Case("statistics of the first format's shape", stats(layers__0__ffn__sum_sq=np.ones((1, 96))),
         PLAN, ("stats.safetensors: layers.0.ffn", "different shapes", "calibrate again")),
    Case("statistics of tokens by bucket alone",
         stats(layers__0__ffn__tokens=np.ones(1, np.int64)), PLAN,
         ("stats.safetensors: layers.0.ffn", "different shapes", "found", "calibrate again")),
    Case("statistics of tokens below 0",
         stats(layers__0__ffn__tokens=np.full((1, 1), -1)), PLAN,
         ("stats.safetensors: layers.0.ffn", "count below 0", "calibrate again")),
    Case("statistics whose buckets are no whole numbers", stats(bucket_of=np.zeros(640)), PLAN,
         ("stats.safetensors", "dtype", "expected int64", "found float64", "calibrate again")),
    Case("statistics whose counts are no whole numbers", stats(token_counts=np.ones(640)), PLAN,
         ("stats.safetensors", "dtype", "expected int64", "found float64", "calibrate again")),
    Case("statistics in single precision",
         stats(layers__0__ffn__sum_sq=np.ones((1, 1, 96), np.float32)), PLAN,
         ("stats.safetensors: layers.0.ffn", "dtype", "expected float64", "found float32",
          "calibrate again")),
    Case("statistics whose tokens are no whole numbers",
         stats(layers__0__ffn__tokens=np.ones((1, 1))), PLAN,
         ("stats.safetensors: layers.0.ffn", "dtype", "expected int64", "found float64",
          "calibrate again")),
    Case("statistics with a bucket too many", stats(bucket_of=np.full(640, 1)), PLAN,
         ("stats.safetensors", "do not fit", "calibrate again")),
    Case("statistics with a bucket below 0", stats(bucket_of=np.full(640, -1)), PLAN,
         ("stats.safetensors", "do not fit", "calibrate again")),
    Case("statistics of no tokens", stats(token_counts=np.ones(0, np.int64),
         bucket_of=np.ones(0, np.int64)), PLAN, ("stats.safetensors", "calibrate")),
]  # fmt: skip

PLANS = [
    Case("source changed after planning", config(rms_norm_eps=1e-5), APPLY,
         ("model", "not the checkpoint", "expected fingerprint", "found", "plan again")),
    Case("source gone", lambda root: (root / "model").rename(root / "moved"), APPLY,
         ("model", "neither a directory nor", "check")),
    Case("plan not there", remove("plan.json"), APPLY,
         ("plan.json", "No such file", "name the plan's file")),
    Case("plan cut", cut("plan.json", 300), APPLY, ("plan.json", "not a plan", "found", "again")),
    Case("plan is no JSON", write("plan.json", b"\xff\xfe"), APPLY,
         ("plan.json", "not a plan", "found", "plan again")),
    Case("plan with an unknown field", plan_key(None, extra=1), APPLY,
         ("plan.json", "not a plan", "extra", "plan again")),
    Case("plan of the next format", plan_key(None, format=4), APPLY,
         ("plan.json", "format", "expected 3", "found 4", "plan again")),
    Case("plan keeps fewer tokens than it says", plan_key("after", vocab_size=513), APPLY,
         ("plan.json", "kept_tokens", "expected 513", "found 512", "plan again")),
    Case("plan of the first format", plan_key("after", intermediate_size=64), APPLY,
         ("plan.json", "not a plan", "intermediate_size", "plan again")),
    Case("plan keeps fewer channels than it says", kept_channels(1, ffn=["0-62"]), APPLY,
         ("plan: kept_channels of layer 1: ffn", "expected 64", "found 63", "plan again")),
    Case("plan keeps channels that are not there", kept_channels(1, ffn=["33-96"]), APPLY,
         ("kept_channels of layer 1: ffn", "not a set of indices", "range 33-96 of 96 indices",
          "plan again")),
    Case("plan keeps no channels", kept_channels(2, ffn=["most"]), APPLY,
         ("kept_channels of layer 2: ffn", "not a set of indices", "most", "plan again")),
    Case("plan keeps channels of experts", kept_channels(0, ffn=["0-63", "0-63"]), APPLY,
         ("kept_channels of layer 0: ffn", "as many experts", "expected 1", "found 2", "again")),
    Case("plan keeps channels of no expert", kept_channels(0, ffn=[]), APPLY,
         ("kept_channels of layer 0: ffn", "as many experts", "expected 1", "found 0", "again")),
    Case("plan keeps channels of another axis",
         change("plan.json", lambda data: rename(data["kept_channels"][1], "ffn", "shared")),
         APPLY, ("plan: axes of kept_channels of layer 1", "expected ['ffn']", "found ['shared']",
                 "plan again")),
    Case("plan keeps channels of an axis too many", kept_channels(0, expert=["0-63"]), APPLY,
         ("plan: axes of kept_channels of layer 0", "expected ['ffn']", "found ['expert', 'ffn']",
          "plan again")),
    Case("plan for other channels than it keeps",
         plan_key("after", widths={"intermediate_size": 65}), APPLY,
         ("plan: after.", "plan again")),
    Case("plan for more channels than there are",
         plan_key("before", widths={"intermediate_size": 128}), APPLY,
         ("plan: before.widths", "'intermediate_size': 96", "'intermediate_size': 128", "again")),
    Case("plan for a width that the source lacks",
         plan_key("after", widths={"intermediate_size": 64, "moe_intermediate_size": 64}), APPLY,
         ("plan: after.widths", "expected", "found", "moe_intermediate_size", "plan again")),
    Case("plan without widths", plan_key("after", widths={}), APPLY,
         ("plan: after.widths", "expected", "found", "plan again")),
    Case("plan leaves tensors out", plan_key(None, dropped=[DOWN]), APPLY,
         ("plan: dropped", "expected []", DOWN, "plan again")),
    Case("plan keeps no tokens", plan_key(None, kept_tokens=""), APPLY,
         ("plan.json", "kept_tokens", "expected 512", "found 0", "plan again")),
    Case("plan keeps no indices", plan_key(None, kept_tokens="all"), APPLY,
         ("plan.json", "kept_tokens", "not a set of indices", "found", "plan again")),
    Case("plan lacks a layer", change("plan.json", lambda data: data["kept_channels"].pop()),
         APPLY, ("plan", "kept_channels", "expected 3", "found 2", "plan again")),
    Case("plan for more rows than there are",
         each(plan_key("before", vocab_size=1280), plan_key(None, kept_tokens="768-1279")), APPLY,
         ("plan", "1280", "640", "plan again")),
    Case("plan for absurdly many rows",
         each(plan_key("before", vocab_size=10**15), plan_key("after", vocab_size=10**15),
              plan_key(None, kept_tokens=f"0-{10**15 - 1}")), APPLY, ("plan.json", "plan again")),
    Case("plan with tokens below the embedding", plan_key(None, rowless_tokens=-1), APPLY,
         ("plan", "rowless_tokens", "plan again")),
    Case("plan predicts other bytes", plan_key("after", nbytes=1), APPLY,
         ("plan", "nbytes", "found 1", "plan again")),
    Case("plan without statistics", plan_key(None, kept_channels=[]), APPLY,
         ("plan", "channels are not chosen", "--stats")),
    Case("plan without a place", nothing, "apply plan.json", ("plan.json", "no output", "-o DIR")),
]  # fmt: skip

TEXTS = [
    Case("text not there", nothing, f"{CALIBRATE} gone.txt",
         ("gone.txt", "does not exist", "name a .txt")),
    Case("text of another kind", write("text.csv", "a,b"), f"{SCORE} text.csv",
         ("text.csv", "not text", "expected .txt, .jsonl, .parquet, or .txt", "rename or convert")),
    Case("text not UTF-8", write("latin.txt", "Süß".encode("latin-1")), f"{SCORE} latin.txt",
         ("latin.txt", "cannot be read", "found", "UTF-8")),
    Case("jsonl line is no JSON", write("a.jsonl", '{"text": "a"}\n\n{"text"'),
         f"{SCORE} a.jsonl --strict",
         ("a.jsonl", "line 3", "no record", 'expected {"text"', "found", "correct the line")),
    Case("jsonl line without text", write("a.jsonl", '{"body": "a"}'), f"{SCORE} a.jsonl",
         ("a.jsonl", "line 1", "no field 'text' or 'messages'", "fields body", "name the field")),
    Case("jsonl line without the field", write("a.jsonl", '{"text": "a"}'),
         f"{SCORE} a.jsonl --field body",
         ("a.jsonl", "line 1", "no field 'body'", "fields text", "name the field")),
    Case("jsonl line is a list", write("a.jsonl", "[1]"), f"{SCORE} a.jsonl",
         ("a.jsonl", "line 1", "no record", 'expected {"text"', "correct the line")),
    Case("jsonl text is a number", write("a.jsonl", '{"text": 1}'), f"{SCORE} a.jsonl",
         ("a.jsonl", "line 1", "not a string", "found int", "correct the row")),
    Case("jsonl text is half a character", write("a.jsonl", '{"text": "\\ud800"}'),
         f"{SCORE} a.jsonl", ("a.jsonl", "line 1", "half a char", "correct the row")),
    Case("jsonl text is half a character, for tokens", write("a.jsonl", '{"text": "\\ud800"}'),
         f"{CALIBRATE} a.jsonl", ("a.jsonl", "line 1", "half a char", "correct the row")),
    Case("chats without a template",
         write("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}'), f"{SCORE} a.jsonl",
         ("model", "no chat template", "expected chat_template.jinja", "add the model's")),
    Case("no .gz file", write("a.txt.gz", "text"), f"{CALIBRATE} a.txt.gz",
         ("a.txt.gz", "damaged, or no .gz file", "check its name")),
    Case("no .zst file", write("a.jsonl.zst", "text"), f"{SCORE} a.jsonl.zst",
         ("a.jsonl.zst", "damaged, or no .zst file", "check its name")),
    Case("no .parquet file", write("a.parquet", "text"), f"{SCORE} a.parquet",
         ("a.parquet", "damaged, or no .parquet file", "check its name")),
    Case("compressed file of another kind", write("a.csv.gz", "a,b"), f"{SCORE} a.csv.gz",
         ("a.csv.gz", "not text", "rename or convert")),
    Case("weight of nothing", nothing, f"{SCORE} text.txt=0",
         ("text.txt", "weight", "found 0", "correct it")),
    Case("empty text", write("empty.txt", ""), f"{SCORE} empty.txt",
         ("empty.txt", "no text", "expected documents", "give")),
    Case("blank text", write("blank.txt", "\n \n\n"), f"{CALIBRATE} blank.txt",
         ("blank.txt", "no text", "expected documents", "give")),
    Case("directory without text", directory("empty"), f"{SCORE} empty",
         ("empty", "no text", "expected documents", "give")),
]  # fmt: skip

OUTPUTS = [
    *(
        Case(f"{place}: {command.split()[0]}", damage, command, words)
        for place, damage, name, words in (
            ("output inside the input", nothing, "model/out",
             ("model/out", "inside each other", "found source", "choose")),
            ("output is the input", nothing, "model",
             ("model", "inside each other", "found source", "choose")),
            ("input inside the output", nothing, ".",
             ("inside each other", "found source", "choose")),
            ("output inside the input by a link",
             lambda root: (root / "link").symlink_to("model"), "link/out",
             ("link/out", "inside each other", "found source", "choose")),
            ("output is a directory", directory("out"), "out",
             ("out", "exists already", "choose another")),
            ("output is a file", write("out", ""), "out",
             ("out", "exists already", "choose another")),
            ("output below a file", nothing, "text.txt/out",
             ("text.txt/out", "lies below a file", "choose another")),
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
             ("model/config.json", "inside the model", "outside of it")),
            ("file in the model by a link", lambda root: (root / "link").symlink_to("model"),
             "link/x", ("link/x", "inside the model", "outside of it")),
            ("file is a directory", directory("there"), "there",
             ("there", "is a directory", "name a file")),
        )
        if "merge" not in command or place == "there"
    ),
    Case("plan of the best pair in the model", nothing,
         "search model --data text.txt --ratio 0.2 --plan model/config.json",
         ("model/config.json", "inside the model", "outside of it")),
    Case("caps for tasks of ray", nothing,
         f"{CALIBRATE} text.txt --engine ray --max-memory 8GB",
         ("--max-memory", "--engine local")),
    Case("interrupted run in the way", journal(BEGUN), APPLY,
         ("out.partial", "interrupted", "--resume", "delete")),
    Case("resume with another plan", journal(BEGUN), RESUME,
         ("out.partial", "another plan", "expected plan", "found 0123456789ab", "resume")),
    Case("resume with a damaged journal", journal("{"), RESUME,
         ("out.partial.journal", "cannot be resumed", "found", "delete")),
    Case("verify nothing", nothing, "verify nowhere",
         ("nowhere", "not a directory", "name a model directory")),
    Case("verify --forward without a plan", nothing, "verify model --forward",
         ("model", "--forward", "needs the plan")),
    Case("verify with damaged provenance", write("model/compact_surgery.json", "{}"),
         "verify model", ("compact_surgery.json", "no plan", "found", "plan again")),
]  # fmt: skip

KIND = ("tokenizer.json", "cannot be cut", "expected BPE on bytes", "keep the vocabulary whole")
"""What every refusal of a kind of tokenizer says."""

TOKENIZERS = [
    Case("tokenizer missing", remove("model/tokenizer.json"), PLAN,
         ("tokenizer.json", "missing", "keep the vocabulary whole")),
    Case("tokenizer missing for text", remove("model/tokenizer.json"), f"{SCORE} text.txt",
         ("tokenizer.json", "is missing", "AutoTokenizer")),
    Case("WordLevel tokenizer", model_key(type="WordLevel"), PLAN,
         (*KIND, "found WordLevel model")),
    Case("WordPiece with another prefix",
         model_key(type="WordPiece", continuing_subword_prefix="@@"), PLAN,
         (*KIND, "found WordPiece with continuing_subword_prefix '@@'")),
    Case("BPE with a suffix", model_key(end_of_word_suffix="</w>"), PLAN,
         (*KIND, "found BPE with end_of_word_suffix '</w>'")),
    Case("BPE with dropout", model_key(dropout=0.1), PLAN,
         (*KIND, "found BPE with dropout 0.1")),
    Case("BPE on words",
         tokenizer(lambda data: data.update(pre_tokenizer={"type": "Whitespace"}, decoder=None)),
         PLAN, (*KIND, "found BPE without a byte-level")),
    Case("Unigram with a table", model_key(type="Unigram"), PLAN,
         ("tokenizer.json", "model.vocab is not that of a Unigram model", "download")),
    Case("Unigram piece without a score",
         model_key(type="Unigram", vocab=[["<unk>", 0.0], ["a"]], unk_id=0), PLAN,
         ("tokenizer.json", "piece 1", "no piece with a score", "found ['a']", "download")),
    Case("Unigram piece twice",
         model_key(type="Unigram", vocab=[["a", 0.0], ["a", -1.0]], unk_id=0), PLAN,
         ("tokenizer.json", "piece 'a'", "twice", "found ids 0 and 1", "download")),
    Case("merges in two forms",
         tokenizer(lambda data: data["model"]["merges"].append("t h")), PLAN,
         ("tokenizer.json", "merge 't h'", "not of the form of the first", "download")),
    Case("token to keep that is none", write("keep.txt", "e\nzzzzqqq\n"),
         f"{PLAN} --keep-tokens keep.txt",
         ("keep.txt", "line 2", "no token of this vocabulary", "found 'zzzzqqq'", "correct")),
    Case("tokens to keep in no file", nothing, f"{PLAN} --keep-tokens none.txt",
         ("none.txt", "No such file")),
    Case("script that is none", nothing, f"{PLAN} --keep-script Cirillic",
         ("--keep-script", "found 'Cirillic'", "did you mean Cyrillic?")),
    Case("frequency without text", nothing, f"{PLAN} --vocab-by frequency",
         ("--vocab-by frequency", "needs a text", "--data TEXT")),
    Case("tokenizer with a key twice",
         replace("model/tokenizer.json", '"model": {', '"model": {"type": "BPE",'), PLAN,
         ("tokenizer.json", "not valid JSON", "'type' twice", "download")),
    Case("tokenizer with a BOM",
         lambda root: prepend(root / "model/tokenizer.json", b"\xef\xbb\xbf"), PLAN,
         ("tokenizer.json", "not valid JSON", "BOM", "download")),
    Case("tokenizer with NaN", model_key(extra=float("nan")), PLAN,
         ("tokenizer.json", "not valid JSON", "NaN", "download")),
    Case("tokenizer cut short", cut("model/tokenizer.json", -200), PLAN,
         ("tokenizer.json", "not valid JSON", "download")),
    Case("tokenizer 100,000 deep", write("model/tokenizer.json", '{"model":' + "[" * 100_000),
         PLAN, ("tokenizer.json", "nested too deeply", "download")),
    Case("tokenizer with a lone surrogate",
         tokenizer(lambda data: data["model"]["vocab"].update({"\ud800": 620})), PLAN,
         ("tokenizer.json", "not valid JSON", "surrogates", "download")),
    Case("two added tokens on one id", tokenizer(
         lambda data: data["added_tokens"].append(dict(data["added_tokens"][0], content="<x>"))),
         PLAN, ("tokenizer.json", "added token '<x>'", "expected 620", "found 0", "save")),
    Case("id gap that collides", tokenizer(gap_under_added), PLAN,
         ("tokenizer.json", "added token '<late>'", "expected 619", "found 620", "save")),
    Case("two tokens on one id", tokenizer(two_tokens_one_id), PLAN,
         ("tokenizer.json", "id ", "two tokens", "found 'Ġ", "download")),
    Case("token id is text", tokenizer(lambda data: data["model"]["vocab"].update(the="7")), PLAN,
         ("tokenizer.json", "no number", "download")),
    Case("added token with another id", tokenizer(swap_ids), PLAN,
         ("tokenizer.json", "added token '<unk>'", "expected 0", "found 1", "save the tokenizer")),
    Case("added token without content",
         tokenizer(lambda data: data["added_tokens"].append({"id": 620})), PLAN,
         ("tokenizer.json", "added token", "download")),
    Case("merge with a missing parent",
         tokenizer(lambda data: data["model"]["merges"].append(["q", "zzz"])), PLAN,
         ("tokenizer.json", "merge 'q' 'zzz'", "vocabulary lacks", "expected 'zzz'", "download")),
    Case("merge of three",
         tokenizer(lambda data: data["model"]["merges"].append(["a", "b", "c"])), PLAN,
         ("tokenizer.json", "merge ['a', 'b', 'c']", "not a pair", "download")),
    Case("merge of a token with a space",
         tokenizer(lambda data: data["model"].update(merges=["a b c"])), PLAN,
         ("tokenizer.json", "merge 'a b c'", "not a pair", "download")),
    Case("more tokens than rows",
         tokenizer(lambda data: data["model"]["vocab"].update(zzz=700)), PLAN,
         ("tokenizer.json", "without a row", "expected ids below 640", "found 700", "belongs")),
    Case("stale id in the post-processor",
         tokenizer(lambda data: data["post_processor"]["special_tokens"]["<s>"].update(ids=[639])),
         PLAN, ("tokenizer.json", "post_processor", "id 639", "correct the reference")),
    Case("padding without an id", tokenizer(lambda data: data.update(padding={"pad_id": None})),
         PLAN, ("tokenizer.json", "pad", "download")),
    Case("vocab.json disagrees", write("model/vocab.json", '{"Ġthe": 1}'), PLAN,
         ("vocab.json", "token 'Ġthe'", "another id", "expected", "found 1", "save the tokenizer")),
    Case("added_tokens_decoder names a padding row",
         change("model/tokenizer_config.json",
                lambda data: data.update(added_tokens_decoder={"639": {"content": "<x>"}})),
         PLAN, ("tokenizer_config.json", "added_tokens_decoder", "639", "correct")),
    Case("added_tokens_decoder without numbers",
         change("model/tokenizer_config.json",
                lambda data: data.update(added_tokens_decoder={"x": {"content": "<x>"}})),
         PLAN, ("tokenizer_config.json", "added_tokens_decoder", "x", "correct")),
    Case("generation config cut", cut("model/generation_config.json", 40), PLAN,
         ("generation_config.json", "not valid JSON", "found", "download")),
]  # fmt: skip

CASES = [*SHARDS, *CONFIGS, *SIZE_OPTIONS, *STATS, *PLANS, *TEXTS, *OUTPUTS, *TOKENIZERS]


def test_the_bench_itself_is_good(bench: Path, run: Run) -> None:
    commands = (INSPECT, PLAN, APPLY, "verify out --plan plan.json", f"{SCORE} text.txt")
    for command in (*commands, f"{CALIBRATE} text.txt"):
        result = run(*command.split())
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    case.damage(bench)
    before = snapshot(bench)
    assert_refused(run(*case.command.split()), *case.words)
    assert snapshot(bench) == before


@pytest.mark.parametrize(
    ("key", "old", "new"), [("intermediate_size", 96, 64), ("vocab_size", 640, 512)]
)
def test_a_size_that_config_json_does_not_say_is_the_tensors(
    key: str, old: int, new: int, bench: Path, run: Run
) -> None:
    """Config classes may have it as a default; what changes is written out."""
    no_config_key(key)(bench)
    facts = json.loads(run(*INSPECT.split(), "--json").stdout)
    assert (facts | facts["widths"])[key] == old
    random_stats(layout_of(bench / "model")).save(bench / "stats.safetensors")
    for command in (PLAN, "apply new.json -o out", "verify out --plan new.json"):
        result = run(*command.split())
        assert result.exit_code == 0, result.output
    assert json.loads((bench / "out/config.json").read_text())[key] == new
    assert tiny.load(bench / "out").config.intermediate_size == 64
    plan = Plan.load(bench / "new.json")
    assert (plan.before.vocab_size, plan.before.widths["intermediate_size"]) == (640, 96)


def test_code_of_a_checkpoint_is_never_run_and_left_behind(bench: Path, run: Run) -> None:
    """Where transformers knows the model type, a pointer to code is no obstacle."""
    code = "from pathlib import Path\nPath('run').touch()\nclass C: pass\n"
    (bench / "model" / "custom.py").write_text(code)
    names = {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.C"}
    config(auto_map=names)(bench)
    change("model/tokenizer_config.json", lambda data: data.update(auto_map=names))(bench)
    for command in (f"{PRUNE} out", "verify out --forward", f"{SCORE} text.txt"):
        result = run(*command.split())
        assert result.exit_code == 0, result.output
    assert not (bench / "run").exists()
    assert not list((bench / "out").glob("*.py"))
    assert "auto_map" not in json.loads((bench / "out/config.json").read_text())


@pytest.mark.parametrize("command", [APPLY, f"{PRUNE} out"])
def test_no_space(command: str, bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(bench)
    usage = shutil.disk_usage(bench)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = ("out", "no space", "bytes", "found 1,000 free", "free space, or name another output")
    assert_refused(run(*command.split()), *words)
    assert not list(bench.glob("out")) + list(bench.glob("out.partial"))
    assert {name: snapshot(bench)[name] for name in before} == before


@pytest.mark.parametrize("command", [f"{CALIBRATE} text.txt", f"{SCORE} text.txt", f"{PRUNE} out"])
def test_no_cuda(command: str, bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(bench)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("--device cuda", "not available", "--device cpu")
    assert_refused(run(*command.split(), "--device", "cuda"), *words)
    assert snapshot(bench) == before


@pytest.mark.parametrize("command", [f"{CALIBRATE} text.txt", PLAN, f"{PRUNE} new"])
def test_a_directory_that_takes_no_file_is_found_before_the_work(
    command: str, bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(bench)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert_refused(run(*command.split()), "new", "its directory takes no file", "another place")
    assert snapshot(bench) == before


@pytest.mark.parametrize("command", [f"{CALIBRATE} text.txt", PLAN])
def test_a_full_disk_names_the_file(
    command: str, bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(run(*command.split()), "new", "No space left on device", "free space")


def test_a_name_that_no_json_can_hold_is_one_line(bench: Path, run: Run) -> None:
    (bench / "model").rename(bench / "mod\udcff")
    command = SIZES_ONLY.replace("model", "mod\udcff")
    assert_refused(run(*command.split()), "mod\\udcff", "no UTF-8", "rename it")
