"""Mixtures of experts: both layouts, experts nobody saw, layers that guess ahead, odd tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.api import apply_plan
from surgery.apply.edits import kept_parts
from surgery.planning.plan import Plan
from surgery.stats.channel_stats import PARTS, ChannelStats
from tests.support import tiny
from tests.support.command import Run
from tests.support.contents import weights
from tests.support.full_load import hooked
from tests.support.plans import assert_equals_masked_dense, layout_of, random_plan
from tools.published import MIXTURES
from tools.shapes import write_headers_only, write_tokenizer

MOE = "qwen3_moe"
SIZES = ("--vocab-size", 512, "--width", "moe_intermediate_size=32")


def rewrite(path: Path, change: Any) -> Path:
    """Change the tensors of a single-file checkpoint."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return path


def pack(path: Path) -> Path:
    """Store the experts of each layer in one tensor, as transformers 5 holds them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (1, 2):
            at = f"model.layers.{layer}.mlp.experts"
            parts = {
                p: torch.stack([tensors.pop(f"{at}.{e}.{p}_proj.weight") for e in range(4)])
                for p in ("gate", "up", "down")
            }
            tensors[f"{at}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
            tensors[f"{at}.down_proj"] = parts["down"]

    return rewrite(path, change)


def calibrated(run: Run, source: Path, text: Path, stats: Path, samples: int = 16) -> None:
    result = run(
        *("calibrate", source, "--data", text, "--seq-len", 64, "--samples", samples),
        *("-o", stats),
    )
    assert result.exit_code == 0, result.output


def test_packed_experts_are_cut_like_single_ones(tmp_path: Path, text: Path, run: Run) -> None:
    single = tiny.save(tmp_path / "single", MOE)
    packed = pack(tiny.save(tmp_path / "packed", MOE))
    found = {}
    for source in (single, packed):
        stats = tmp_path / f"{source.name}.safetensors"
        calibrated(run, source, text, stats)
        plan, out = source.with_suffix(".json"), source.with_suffix(".out")
        assert run("plan", source, "--stats", stats, *SIZES, "-o", plan).exit_code == 0
        assert run("apply", plan, "-o", out).exit_code == 0
        assert run("verify", out, "--plan", plan, "--forward").exit_code == 0
        assert_equals_masked_dense(source, out, Plan.load(plan), MOE)
        found[source.name] = (ChannelStats.load(stats).layers, weights(out))
    for one, other in zip(found["single"][0], found["packed"][0], strict=True):
        for axis in one:
            for part in PARTS:
                assert np.array_equal(getattr(one[axis], part), getattr(other[axis], part)), part
    old, new = found["single"][1], found["packed"][1]
    at = "model.layers.1.mlp.experts"
    for expert in range(4):
        gate, up = new[f"{at}.gate_up_proj"][expert].chunk(2)
        assert torch.equal(gate, old[f"{at}.{expert}.gate_proj.weight"])
        assert torch.equal(up, old[f"{at}.{expert}.up_proj.weight"])
        assert torch.equal(new[f"{at}.down_proj"][expert], old[f"{at}.{expert}.down_proj.weight"])


def test_each_expert_keeps_the_channels_that_its_own_tokens_use(
    tmp_path: Path, text: Path, run: Run
) -> None:
    source, stats = tiny.save(tmp_path / "source", MOE), tmp_path / "stats.safetensors"
    calibrated(run, source, text, stats)
    run("plan", source, "--stats", stats, *SIZES, "--criterion", "act2", "-o", tmp_path / "p.json")
    kept = [part.channels for part in kept_parts(Plan.load(tmp_path / "p.json"), layout_of(source))]
    from calib.text.windows import token_windows
    from surgery.text.documents import read_documents
    from surgery.tokenizer.tokenizer_file import load_tokenizer

    windows = token_windows(read_documents(str(text)), load_tokenizer(source), 16, 64)
    seen = hooked(source, MOE, windows).activations
    for layer in (1, 2):
        chosen = [kept[layer]["expert"][expert] for expert in range(4)]
        for expert in range(4):
            importance = sum(
                act.double().square().sum(0) for e, _, act in seen[layer]["expert"] if e == expert
            )
            assert isinstance(importance, torch.Tensor)
            assert set(chosen[expert]) == set(torch.argsort(-importance)[:32].tolist())
        assert len({tuple(channels) for channels in chosen}) == 4


def shut_out(path: Path, expert: int) -> Path:
    """Let the router of layer 1 never choose ``expert``: it copies another's row and loses."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        gate = tensors["model.layers.1.mlp.gate.weight"]
        gate[expert] = 0
        gate[(expert + 1) % 4], gate[(expert + 2) % 4] = 1, -1
        gate[(expert + 3) % 4] = torch.tensor([2.0, -2.0] * 16)

    return rewrite(path, change)


def test_an_expert_that_saw_too_little_is_reported_not_guessed(
    tmp_path: Path, text: Path, run: Run
) -> None:
    source, stats = shut_out(tiny.save(tmp_path / "source", MOE), 2), tmp_path / "s.safetensors"
    calibrated(run, source, text, stats, samples=2)
    layers = ChannelStats.load(stats).layers[1:]
    seen = np.stack([axes["expert"].tokens.sum(axis=0) for axes in layers])
    least = int(seen.min()) + 1
    options = ("plan", source, "--stats", stats, *SIZES, "-o", tmp_path / "plan.json")
    refused = run(*options, "--min-expert-tokens", least)
    assert refused.exit_code == 2
    layer, few = divmod(int(seen.argmin()), 4)
    assert f"{(seen < least).sum()} experts saw too few tokens" in refused.output
    assert f"such as expert {few} of layer {layer + 1}: expected at least {least}" in refused.output
    assert "--min-expert-tokens" in refused.output
    assert not (tmp_path / "plan.json").exists()
    accepted = run(*options, "--min-expert-tokens", int(seen.min()))
    assert accepted.exit_code == 0, accepted.output
    # nothing is cut from the experts: their channels need no ranking
    whole = ("--vocab-size", 512, "--width", "intermediate_size=48")
    assert run("plan", source, "--stats", stats, *whole, "-o", tmp_path / "w.json").exit_code == 0


@pytest.mark.parametrize("key", ["deepseek_v3", "glm4_moe"])
def test_layers_that_guess_ahead_are_left_out_and_said_to_be(
    tmp_path: Path, run: Run, key: str
) -> None:
    source = tiny.save(tmp_path / "source", key, num_nextn_predict_layers=1)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            tensors[name.replace("layers.2.", "layers.3.")] = tensors[name].clone()
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(32, 64)
        tensors["model.layers.3.embed_tokens.weight"] = torch.ones(640, 32)
        tensors["model.layers.3.shared_head.head.weight"] = torch.ones(640, 32)

    rewrite(source, add)
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    made = random_plan(source, 512, 0.5)
    made.save(plan)
    assert "model.layers.3.mlp.experts.{expert}.down_proj.weight" in made.dropped
    assert made.before.parameters == layout_of(source).parameters(640, made.before.widths)
    counted = [tensor.name for tensor in layout_of(source).counted]
    assert not any(name.startswith("model.layers.3.") for name in counted)
    assert run("apply", plan, "-o", out).exit_code == 0
    assert not any(name.startswith("model.layers.3.") for name in weights(out))
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert run("verify", out, "--forward").exit_code == 0
    assert_equals_masked_dense(source, out, made, key)
    sizes = [o for k, n in made.after.widths.items() for o in ("--width", f"{k}={n}")]
    said = run("plan", source, "--vocab-size", 512, *sizes, "-o", plan, "--force")
    assert "left out, for they only guess ahead: " in said.output
    assert "model.layers.3.eh_proj.weight" in said.output


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("llama", "model.embed_tokens_per_layer.weight"),
        ("llama", "model.layers.1.mlp.extra.weight"),
        ("llama", "model.mtp.0.weight"),
        ("llama", "draft.fc.weight"),
        ("llama", "model.layers.01.mlp.up_proj.weight"),
        (MOE, "model.layers.1.mlp.shared_expert.up_proj.weight"),
        ("deepseek_v3", "model.layers.2.eh_proj.weight"),
        ("gemma3", "audio_tower.proj.weight"),
    ],
)
def test_an_unexpected_tensor_is_named(tmp_path: Path, run: Run, key: str, name: str) -> None:
    source = tiny.save(tmp_path / "source", key)
    rewrite(source, lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    result = run("plan", source, "--ratio", 0.2, "-o", tmp_path / "plan.json")
    assert result.exit_code == 2
    assert f"model.safetensors: tensor {name}: is not a tensor of" in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.experts.3.down_proj.weight",
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.mlp.up_proj.weight",
    ],
)
def test_a_missing_tensor_of_the_experts_is_named(tmp_path: Path, run: Run, name: str) -> None:
    source = rewrite(tiny.save(tmp_path / "source", MOE), lambda tensors: tensors.pop(name))
    result = run("inspect", source)
    assert result.exit_code == 2
    assert f"tensor {name}: is missing" in result.output


def test_every_tensor_is_used_exactly_once(tmp_path: Path) -> None:
    from surgery.apply.edits import edits

    for key in ("llama", MOE, "gpt_oss", "gemma3"):
        source = tiny.save(tmp_path / key, key, sharded=True)
        made = [t for shard in edits(random_plan(source, 512, 0.5), layout_of(source)).values()
                for t in shard]  # fmt: skip
        names = [tensor.name for tensor in made]
        assert sorted(names) == sorted(layout_of(source).checkpoint.tensors)
        assert {edit.source.name for t in made for edit in t.edits} == set(names)


def test_widths_are_named_by_their_keys(tmp_path: Path, run: Run) -> None:
    source = tiny.save(tmp_path / "source", "qwen2_moe")
    file = tmp_path / "plan.json"
    plan = ("plan", source, "--vocab-size", 512, "--force", "-o", file)
    for options, words in (
        (("--width", "nothing=3"), ("--width", "moe_intermediate_size", "found nothing=3")),
        (("--width", "moe_intermediate_size"), ("is no width of this model",)),
        (("--width", "moe_intermediate_size=65"), ("out of reach", "1 to 64", "found 65")),
        (
            ("--width", "moe_intermediate_size=40", "--multiple-of", 16),
            ("moe_intermediate_size", "a multiple of 16", "found 40"),
        ),
        (
            ("--intermediate-size", 48, "--target", "tp=4,group=4", "--multiple-of", 1),
            (),
        ),
    ):
        result = run(*plan, *options)
        assert result.exit_code == (2 if words else 0), result.output
        assert all(word in result.output for word in words), result.output
    made = Plan.load(tmp_path / "plan.json")
    assert made.after.widths == {**made.before.widths, "intermediate_size": 48}
    several = tiny.save(tmp_path / "several", "llama4_text")
    result = run(
        *("plan", several, "--vocab-size", 512, "--intermediate-size", 32),
        *("--force", "-o", plan[-1]),
    )
    assert result.exit_code == 0
    assert Plan.load(plan[-1]).after.widths["intermediate_size_mlp"] == 96


def test_a_width_that_no_key_holds_cannot_change(tmp_path: Path, run: Run) -> None:
    source = tiny.save(tmp_path / "source", "bloom")
    plan = ("plan", source, "-o", tmp_path / "plan.json")
    refused = run(*plan, "--vocab-size", 512, "--intermediate-size", 64)
    assert refused.exit_code == 2
    assert "config.json has no key for the width of this model's FFN" in refused.output
    assert run(*plan, "--vocab-size", 512).exit_code == 0
    assert run("apply", plan[-1], "-o", tmp_path / "out").exit_code == 0


def test_a_width_that_is_a_list_stays_one(tmp_path: Path, run: Run) -> None:
    source = tiny.save(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["intermediate_size"] = [96, 96, 96]
    (source / "config.json").write_text(json.dumps(config))
    apply_plan(random_plan(source, 512, 0.5), source=source, output=tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == [48] * 3
    )
    config["intermediate_size"] = [96, 64, 96]
    (source / "config.json").write_text(json.dumps(config))
    result = run("inspect", source)
    assert result.exit_code == 2
    assert "intermediate_size is missing or not a size" in result.output


@pytest.mark.parametrize(
    ("key", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")]
)
def test_names_without_the_first_word_are_known(
    tmp_path: Path, text: Path, run: Run, key: str, prefix: str
) -> None:
    source = tiny.save(tmp_path / "source", key, tied=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    rewrite(source, change)
    layout = layout_of(source)
    widths = [o for k, n in layout.widths.items() for o in ("--width", f"{k}={n // 2}")]
    out = tmp_path / "out"
    sizes = ("--vocab-size", 512, *widths, *(("--seq-len", 64) if widths else ()))
    result = run("prune", source, "--data", text, *sizes, "-o", out)
    assert result.exit_code == 0, result.output
    assert run("verify", out, "--forward").exit_code == 0
    assert set(weights(out)) == set(layout.checkpoint.tensors)
    assert_equals_masked_dense(source, out, Plan.load(tmp_path / "out.plan.json"), key)


def test_a_pointer_to_code_is_dropped_where_transformers_knows_the_type(
    tmp_path: Path, run: Run
) -> None:
    source = tiny.save(tmp_path / "source", "phi3")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_phi3.py").write_text("raise SystemExit('run')\n")
    path = source / "tokenizer_config.json"
    named = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    for vocab_size in (512, tiny.VOCAB_SIZE):
        out = tmp_path / f"out-{vocab_size}"
        random_plan(source, vocab_size, 0.5).save(tmp_path / f"plan-{vocab_size}")
        apply_plan(tmp_path / f"plan-{vocab_size}", output=out)
        for name in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in json.loads((out / name).read_text())
        assert not (out / "modeling_phi3.py").exists()
        assert run("verify", out, "--forward").exit_code == 0


def test_a_ratio_between_two_steps_of_the_experts_takes_the_nearer(
    tmp_path: Path, run: Run
) -> None:
    config = MIXTURES["Qwen3-30B-A3B"]
    source = write_tokenizer(write_headers_only(tmp_path / "source", config), config)
    for ratio, width, note in ((0.3, 512, "reach 31.7%, not 30.0%"), (0.47, 384, "")):
        result = run("plan", source, "--ratio", ratio, "-o", tmp_path / "plan.json", "--force")
        assert result.exit_code == 0, result.output
        made = Plan.load(tmp_path / "plan.json")
        assert made.after.widths["moe_intermediate_size"] == width
        assert note in result.output
        assert ("note: the steps" in result.output) == bool(note)
    beyond = run("plan", source, "--ratio", 0.99, "-o", tmp_path / "plan.json", "--force")
    assert beyond.exit_code == 2
    assert "cannot be met by sizes in steps of 128 and 128" in beyond.output
