"""Quantized mixtures lose whole experts, and every kept byte stays as it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from surgery.api import apply_plan
from surgery.apply.edits import kept_parts
from surgery.planning.plan import Plan
from surgery.planning.sizes import Sizes
from surgery.stats.channel_stats import ChannelStats
from tests.support import quantized, tiny
from tests.support.command import Run
from tests.support.contents import bits, weights
from tests.support.plans import layout_of, plan_to, random_plan, random_stats

KINDS = (*quantized.SECTIONS, "mxfp4")


def save(path: Path, kind: str) -> Path:
    if kind == "mxfp4":
        return quantized.save_mxfp4(path, num_local_experts=8)
    return quantized.save(path, kind, num_experts=8)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_bytes_stay_as_they_were(tmp_path: Path, run: Run, kind: str) -> None:
    source, out = save(tmp_path / "source", kind), tmp_path / "out"
    plan = random_plan(source, 640, 1.0, experts=6)
    apply_plan(plan, source=source, output=out)
    old, new, kept = weights(source), weights(out), kept_parts(plan, layout_of(source))
    expected = {}
    for name, tensor in old.items():
        layer = int(name.split(".")[2]) if "layers" in name else 0
        experts = kept[layer].experts.tolist() if "layers" in name else []
        if ".experts." in name and kind != "mxfp4":
            expert = int(name.split(".")[5])
            if expert in experts:
                at = name.replace(f".experts.{expert}.", f".experts.{experts.index(expert)}.")
                expected[at] = tensor
        elif ".experts." in name or name.endswith(("gate.weight", "router.weight", "router.bias")):
            expected[name] = tensor[torch.tensor(experts)]
        else:
            expected[name] = tensor
    assert new.keys() == expected.keys()
    for name, tensor in expected.items():
        assert new[name].dtype == tensor.dtype
        assert bits(new[name]) == bits(tensor), name
    assert sum(tensor.nbytes for tensor in new.values()) == plan.after.nbytes
    verified = run("verify", out, "--source", source)
    assert verified.exit_code == 0, verified.output
    assert "bit-identical" in verified.output


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_unquantized_model(tmp_path: Path, kind: str) -> None:
    layout = layout_of(save(tmp_path / "source", kind))
    channels = next(iter(layout.widths.values())) if kind == "mxfp4" else 64
    biases = 3 * 8 * (2 * channels + 32) if kind == "mxfp4" else 0
    layers = 3 if kind == "mxfp4" else 2
    assert layout.weights["experts"] == layers * 8 * (3 * 32 * channels + 32) + biases + (
        3 * 8 if kind == "mxfp4" else 0
    )


@pytest.mark.parametrize("kind", ["gptq", "awq", "mxfp4"])
def test_only_whole_experts_go(tmp_path: Path, run: Run, kind: str) -> None:
    source, file = save(tmp_path / "source", kind), tmp_path / "plan.json"
    key = "intermediate_size" if kind == "mxfp4" else "moe_intermediate_size"
    refused = run("plan", source, "--width", f"{key}=32", "-o", file, "--force")
    assert refused.exit_code == 2, refused.output
    assert f"{key}: cannot change: its weights are " in refused.output
    assert "only moved whole" in refused.output
    layers = run("plan", source, "--layers", "0,1+2", "-o", file, "--force")
    assert layers.exit_code == 2
    assert "cannot be merged into one" in layers.output
    assert (
        run("plan", source, "--layers", "0,2", "--vocab-size", 512, "-o", file, "--force").exit_code
        == 0
    )
    assert run("apply", file, "-o", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("rule", "refused"),
    [
        (r"re:.*layers\.1\.mlp\.experts\.3\..*", True),
        (r"re:.*experts\.(0|1)\.down_proj", True),
        (r"re:model\.layers\.(?:[0-9]|1[0-9])\..*", True),
        (r"re:.*experts\.\d+\.down_proj", False),
        (r"re:.*layers\.[0-9]+\.self_attn.*", False),
        ("model.layers.1.mlp.gate", False),
    ],
)
def test_patterns_that_name_experts_by_number_are_refused(
    tmp_path: Path, run: Run, rule: str, refused: bool
) -> None:
    kind = next(iter(quantized.SECTIONS))
    source, plan = save(tmp_path / "source", kind), tmp_path / "plan.json"
    section = json.loads((source / "config.json").read_text())["quantization_config"]
    quantized.set_section(source, section | {"ignore": [*section.get("ignore", []), rule]})
    options = ("--num-experts", 6, "--expert-criterion", "random", "-o", plan)
    made = run("plan", source, *options)
    assert (made.exit_code == 2) == refused, made.output
    assert ("has a pattern that names a layer or an expert" in made.stderr) == refused
    assert run("plan", source, "--vocab-size", 600, "-o", plan, "--force").exit_code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_reads_them_decoded(tmp_path: Path, text: Path, run: Run, kind: str) -> None:
    source = save(tmp_path / "source", kind)
    plain = quantized.plain(source, tmp_path / "plain")
    found = {}
    for path in (source, plain):
        stats = path.with_suffix(".safetensors")
        take = ("--data", text, "--seq-len", 32, "--samples", 4, "-o", stats)
        made = run("calibrate", path, *take)
        assert made.exit_code == 0, made.output
        found[path.name] = ChannelStats.load(stats)
    for one, other in zip(found["source"].layers, found["plain"].layers, strict=True):
        for axis, sums in one.items():
            for name, array in sums.arrays().items():
                assert np.allclose(array, other[axis].arrays()[name], rtol=1e-4), (axis, name)
    sums = found["source"].layers[2]["expert"]
    assert sums.routed is not None
    assert sums.routed.sum_norm.max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_command_and_its_check(tmp_path: Path, text: Path, run: Run, kind: str) -> None:
    source, out = save(tmp_path / "source", kind), tmp_path / "out"
    take = ("--data", text, "--seq-len", 32, "--samples", 4)
    made = run("prune", source, *take, "--num-experts", 5, "--vocab-size", 512, "-o", out)
    assert made.exit_code == 0, made.output
    verified = run("verify", out, "--forward")
    assert verified.exit_code == 0, verified.output
    assert "logits" in verified.output


@pytest.mark.parametrize(
    ("kind", "part", "change"),
    [("int4", "weight_g_idx", {}), ("int4", "", {"transform_config": {"rotate": 1}}),
     ("awq", "", {"version": "gemv"}), ("gptq", "", {"bits": 3})],
)  # fmt: skip
def test_kinds_that_are_not_decoded_are_refused_by_name(
    tmp_path: Path, text: Path, run: Run, kind: str, part: str, change: dict[str, Any]
) -> None:
    source, file = save(tmp_path / "source", kind), tmp_path / "source" / "model.safetensors"
    quantized.set_section(source, {**quantized.SECTIONS[kind], **change})
    if part:
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name.replace("weight_scale", part)] = torch.zeros(8, 2, dtype=torch.int32)
        save_file(tensors, file, {"format": "pt"})
    refused = run("calibrate", source, "--data", text, "-o", tmp_path / "s.safetensors")
    assert refused.exit_code == 2, refused.output
    assert len(refused.output.strip().splitlines()) == 1 or "note" in refused.output
    if kind != "gptq":
        assert "of a kind that is not decoded" in refused.output
    random = ("--num-experts", 6, "--expert-criterion", "random", "-o", tmp_path / "p.json")
    assert run("plan", source, *random).exit_code == 0
    assert run("apply", tmp_path / "p.json", "-o", tmp_path / "out").exit_code == 0


def test_a_pruned_gpt_oss_loads_in_transformers(tmp_path: Path) -> None:
    source, out = save(tmp_path / "source", "mxfp4"), tmp_path / "out"
    apply_plan(random_plan(source, 640, 1.0, experts=6), source=source, output=out)
    loads = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(out, **loads).eval()
    plain = tiny.load(quantized.plain(out, tmp_path / "plain"), "gpt_oss")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert model.config.num_local_experts == 6
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_they_can_be_pruned_anywhere(tmp_path: Path, run: Run, kind: str) -> None:
    source, out = save(tmp_path / "source", kind), tmp_path / "out"
    plain = quantized.plain(source, tmp_path / "plain")
    layout, other = layout_of(source), layout_of(plain)
    widths = {key: size // 2 for key, size in layout.widths.items()}
    assert layout.widths == other.widths
    sizes = Sizes(512, widths, dequantize=True, experts=6)
    plan = plan_to(layout, sizes, random_stats(layout))
    same = plan_to(other, replace(sizes, dequantize=False), random_stats(other))
    assert plan.kept_channels == same.kept_channels
    plan.save(tmp_path / "plan.json")
    apply_plan(plan, source=source, output=out)
    apply_plan(same, source=plain, output=tmp_path / "same")
    found, expected = weights(out), weights(tmp_path / "same")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    assert sum(tensor.numel() for tensor in found.values()) == plan.after.parameters
    assert sum(tensor.nbytes for tensor in found.values()) == plan.after.nbytes
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    verified = run("verify", out, "--plan", tmp_path / "plan.json", "--forward")
    assert verified.exit_code == 0, verified.output
    repaired = run("plan", source, "--dequantize", "--width", *width_of(widths), *REPAIR)
    assert "--repair: does not work with" in repaired.output


REPAIR = ("--repair", "least-squares")


def width_of(widths: dict[str, int]) -> list[str]:
    key = "moe_intermediate_size" if "moe_intermediate_size" in widths else "intermediate_size"
    return [f"{key}={widths[key]}"]


@pytest.mark.parametrize("kind", KINDS)
def test_aimer_reads_them_decoded(tmp_path: Path, run: Run, kind: str) -> None:
    source = save(tmp_path / "source", kind)
    found = []
    for path in (source, quantized.plain(source, tmp_path / "plain")):
        file = path.with_suffix(".json")
        made = run("plan", path, "--num-experts", 5, "--expert-criterion", "aimer", "-o", file)
        assert made.exit_code == 0, made.output
        found.append(Plan.load(file).kept_experts)
    assert found[0] == found[1]
    assert set(found[0]) - {"", "0-4"}
