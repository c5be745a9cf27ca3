"""A config.json that is damaged or contradicts the tensors is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery.planning.plan import Plan
from tests.support import tiny
from tests.support.command import Run, assert_refused
from tests.support.damage import (
    CALIBRATE,
    DOWN,
    EMBED,
    GATE,
    HEAD,
    INSPECT,
    PLAN,
    SHARD_1,
    SHARD_2,
    SIZES_ONLY,
    Case,
    assert_refused_and_nothing_written,
    config,
    cut,
    each,
    header,
    no_config_key,
    remove,
    replace,
    tensors,
    write,
)
from tests.support.plans import layout_of, random_stats

DEEP_ID = '"eos_token_id": ' + "[" * 900 + "2" + "]" * 900


CASES = [
    Case("unknown model type", config(model_type="snake9"), INSPECT,
         ("config.json", "model type", "not supported", "found snake9", "--family llama")),
    Case("model type in a list", config(model_type=["llama"]), INSPECT,
         ("config.json", "model type", "not supported", "found ['llama']")),
    Case("quantized", config(quantization_config={"quant_method": "bitsandbytes"}), INSPECT,
         ("config.json", "quantized", "expected bf16, fp16 or fp32", "quant_method bitsandbytes",
          "prune the unquantized")),
    Case("config missing", remove("model/config.json"), INSPECT,
         ("config.json", "no Hugging Face checkpoint", "no config.json", "name the directory")),
    Case("truncated config", cut("model/config.json", 90), INSPECT,
         ("config.json", "not valid JSON", "found", "line", "download")),
    Case("config with a key twice", replace("model/config.json", "{", '{"vocab_size": 1,'),
         INSPECT, ("config.json", "not valid JSON", "'vocab_size' twice", "published")),
    Case("config is a list", write("model/config.json", "[1]"), INSPECT,
         ("config.json", "not a JSON object", "expected an object", "found list", "published")),
    Case("config with NaN", config(rms_norm_eps=float("nan")), INSPECT,
         ("config.json", "not valid JSON", "found the number NaN", "published")),
    Case("config in UTF-16", write("model/config.json", "{}".encode("utf-16")), INSPECT,
         ("config.json", "not valid JSON", "found", "download")),
    Case("config 100,000 deep", write("model/config.json", '{"a":' + "[" * 100_000), INSPECT,
         ("config.json", "nested too deeply", "published")),
    Case("config with half a character", replace("model/config.json", "{", '{"a": "\\ud800",'),
         INSPECT, ("config.json", "not valid JSON", "found", "published")),
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
         ("tensor model.layers.3.", "missing", "whole checkpoint")),
    Case("hidden_size contradicts", config(hidden_size=64), f"{CALIBRATE} text.txt",
         ("tensor", "contradicts config.json", "check config.json")),
    Case("heads contradict", config(num_attention_heads=2), f"{CALIBRATE} text.txt",
         ("tensor", "contradicts config.json", "check config.json")),
    Case("activation that nobody knows", config(hidden_act="nope"), f"{CALIBRATE} text.txt",
         ("config.json", "found", "nope", "check config.json")),
    Case("missing tensor", tensors(lambda found: found.pop(DOWN)), INSPECT,
         (f"tensor {DOWN}", "missing", "whole checkpoint")),
    Case("missing untied head", tensors(lambda found: found.pop(HEAD)), INSPECT,
         (f"tensor {HEAD}", "missing", "whole checkpoint")),
    Case("surplus tensor", tensors(lambda found: found.update(extra=np.zeros(2))), INSPECT,
         ("model.safetensors", "tensor extra", "not a tensor of this model", "CONTRIBUTING.md")),
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


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    assert_refused_and_nothing_written(case, bench, run)


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


@pytest.mark.parametrize("size", [tiny.VOCAB_SIZE, tiny.INTERMEDIATE_SIZE, 32])
def test_tensors_without_values_are_refused(tmp_path: Path, size: int, run: Run) -> None:
    """No rows, no channels or no width, whether config.json says so or names no size."""
    source = tiny.save(tmp_path / "source")
    file, path = source / "model.safetensors", source / "config.json"
    config = json.loads(path.read_text("utf-8"))
    found = load_file(file)
    for name, tensor in found.items():
        shape = [0 if length == size else length for length in tensor.shape]
        found[name] = np.zeros(shape, tensor.dtype)
    save_file(found, file, {"format": "pt"})
    sizes = ("vocab_size", "intermediate_size", "hidden_size")
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in sizes}), "utf-8")
    (tmp_path / "text.txt").write_text(tiny.prose(500), encoding="utf-8")
    text = ("--data", tmp_path / "text.txt")
    for command in (
        ("inspect", source),
        ("inspect", source, "--vocab"),
        ("plan", source, "--ratio", 0.2, "-o", tmp_path / "plan.json"),
        ("score", source, *text),
        ("calibrate", source, *text, "-o", tmp_path / "stats"),
    ):
        assert_refused(run(*command), "holds no values", "expected at least 1")
