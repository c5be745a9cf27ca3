"""Dense models in quantized formats: read decoded, cut bit for bit where an axis allows it."""

import json
import re
from pathlib import Path

import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file

from surgery.api import apply_plan
from surgery.checkpoint import opaque
from surgery.checkpoint.opaque import opaque_matrices
from surgery.checkpoint.quantization import opaque_of
from surgery.hub.shards import Shards
from surgery.planning.plan import Plan
from surgery.planning.sizes import Sizes
from surgery.stats.channel_stats import ChannelStats
from tests.support import quantized
from tests.support.command import Run, assert_refused
from tests.support.contents import weights
from tests.support.plans import layout_of, plan_to, random_stats

KINDS = tuple(quantized.SECTIONS)
BY_BLOCKS = {"mxfp4 packed": 32, "tensor": 1, "channel": 1, "int8": 1}
"""Kind → channels that are kept or removed together, where these are not ``GROUP``."""
CUT = tuple(kind for kind in KINDS if kind not in ("gptq", "awq"))
"""Kinds whose rows and columns can be removed."""
FILE = "model.safetensors"
TAKE = ("--seq-len", 32, "--samples", 4)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_decoded_model(
    tmp_path: Path, text: Path, run: Run, kind: str
) -> None:
    source = quantized.save(tmp_path / "source", kind, "llama")
    found = []
    for path in (source, quantized.plain(source, tmp_path / "plain")):
        stats = path.with_suffix(".safetensors")
        made = run("calibrate", path, "--data", text, *TAKE, "-o", stats)
        assert made.exit_code == 0, made.output
        found.append(ChannelStats.load(stats).layers)
    for one, other in zip(*found, strict=True):
        for name, array in one["ffn"].arrays().items():
            torch.testing.assert_close(
                torch.tensor(array), torch.tensor(other["ffn"].arrays()[name]), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("key", ["llama", "phi3"])
@pytest.mark.parametrize("kind", CUT)
def test_a_cut_is_that_of_the_decoded_model(tmp_path: Path, run: Run, kind: str, key: str) -> None:
    source, out = quantized.save(tmp_path / "source", kind, key), tmp_path / "out"
    plain = quantized.plain(source, tmp_path / "plain")
    sizes, stats = Sizes(512, {"intermediate_size": 64}), tmp_path / "stats.safetensors"
    random_stats(layout_of(source)).save(stats)
    chosen = ("--stats", stats, "--vocab-size", 512, "--width", "intermediate_size=64")
    plan = tmp_path / "plan.json"
    made = run("plan", source, *chosen, "-o", plan)
    assert made.exit_code == 0, made.output
    assert run("apply", plan, "-o", out).exit_code == 0
    verified = run("verify", out, "--source", source, "--forward")
    assert verified.exit_code == 0, verified.output
    assert "bit-identical" in verified.output
    same = plan_to(layout_of(plain), sizes, random_stats(layout_of(plain)))
    same = structs.replace(same, kept_channels=Plan.load(plan).kept_channels)
    apply_plan(same, source=plain, output=tmp_path / "same")
    expected, found = weights(tmp_path / "same"), weights(quantized.plain(out, tmp_path / "cut"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section == quantized.SECTIONS[kind]


@pytest.mark.parametrize("kind", CUT)
def test_channels_that_share_a_scale_go_together(tmp_path: Path, run: Run, kind: str) -> None:
    source = quantized.save(tmp_path / "source", kind, "llama")
    block = BY_BLOCKS.get(kind, quantized.GROUP)
    made = run("plan", source, "--width", "intermediate_size=90", "-o", tmp_path / "plan.json")
    assert (made.exit_code == 0) == (block == 1), made.output
    if block > 1:
        assert f"is not in whole blocks of {block} channels, which share a scale" in made.output


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_what_is_not_stored_by_rows_loses_vocabulary_and_layers(
    tmp_path: Path, run: Run, kind: str
) -> None:
    source = quantized.save(tmp_path / "source", kind, "llama")
    plan = ("-o", tmp_path / "plan.json", "--force")
    refused = run("plan", source, "--width", "intermediate_size=64", *plan)
    assert "intermediate_size: cannot change: its weights are" in refused.output
    made = run("plan", source, "--vocab-size", 512, "--layers", "0,2", *plan)
    assert made.exit_code == 0, made.output
    assert run("apply", tmp_path / "plan.json", "-o", tmp_path / "out").exit_code == 0
    verified = run("verify", tmp_path / "out", "--source", source, "--forward")
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("kind", KINDS)
def test_prune_decodes_and_cuts_anywhere(tmp_path: Path, text: Path, run: Run, kind: str) -> None:
    source, out = quantized.save(tmp_path / "source", kind, "llama"), tmp_path / "out"
    sizes = ("--vocab-size", 500, "--width", "intermediate_size=90", "--dequantize")
    made = run("prune", source, "--data", text, *TAKE, *sizes, "-o", out)
    assert made.exit_code == 0, made.output
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    verified = run("verify", out, "--source", source, "--forward")
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_rows_are_the_whole(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = layout_of(quantized.save(tmp_path / "source", kind, "llama")).checkpoint
    monkeypatch.setattr(opaque, "ALIGNED_ROWS", 8)
    monkeypatch.setattr(opaque, "WINDOW_VALUES", 1)
    codes = [
        t for n, t in checkpoint.tensors.items() if re.search(r"_proj\.(weight(_packed)?|qw)", n)
    ]
    seen = 0
    for tensor in codes:
        if tensor.dtype == "I64" or not re.search("weight$|packed$|qweight$", tensor.name):
            continue
        (matrix,) = opaque_matrices(checkpoint, tensor)
        whole, windows = matrix.decode(Shards()), list(matrix.windows())
        seen = max(seen, len(windows))
        for first, window in windows:
            assert (window.decode(Shards()) == whole[first : first + window.shape[0]]).all()
    assert seen > 1 or kind in ("gptq", "awq")


UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("kind", "name", "wrong", "expected"),
    [
        ("channel", f"{UP}.weight_scale", torch.ones(7, 1), "[96, 1]"),
        ("int4", f"{UP}.weight_scale", torch.ones(48, 2), "[96, 2], as strategy group says"),
        ("int4", f"{DOWN}.weight_scale", torch.ones(32, 3), "[32, 6], as strategy group says"),
        ("int4", f"{UP}.weight_scale", torch.ones(96, 2, dtype=torch.int32), "or F8_E8M0"),
        ("int4", f"{UP}.weight_shape", torch.tensor([128]), "I64 or I32 [2]"),
        ("int4 with zeros", f"{UP}.weight_zero_point", torch.ones(12, 1).int(), "I32 [12, 2]"),
        ("int4 with zeros", f"{UP}.weight_zero_point", torch.ones(96, 2).char(), "I32 [12, 2]"),
        ("nvfp4", f"{UP}.weight_global_scale", torch.ones(2), "F32 or BF16 or F16 [1, 1]"),
        ("block", f"{UP}.weight_scale", torch.ones(3, 2), "[6, 2], as strategy block says"),
        ("gptq", f"{UP}.scales", torch.ones(2, 95).half(), "F32 or BF16 or F16 [2, 96]"),
        ("gptq", f"{DOWN}.scales", torch.ones(3, 32).half(), "[6, 32]"),
        ("gptq", f"{UP}.qzeros", torch.ones(2, 96).int(), "I32 [2, 12]"),
        ("gptq", f"{UP}.g_idx", torch.zeros(31).int(), "I32 or I64 [32]"),
        ("awq", f"{UP}.scales", torch.ones(2, 96).int(), "F32 or BF16 or F16 [2, 96]"),
        ("awq", f"{DOWN}.qzeros", torch.ones(5, 4).int(), "I32 [6, 4]"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, run: Run, kind: str, name: str, wrong: torch.Tensor, expected: str
) -> None:
    source = quantized.save(tmp_path / "source", kind, "llama")
    file = source / "model.safetensors"
    tensors = load_file(file)
    assert name in tensors
    save_file(tensors | {name: wrong}, file, {"format": "pt"})
    assert_refused(run("inspect", source), f"tensor {name}: does not fit the weight", expected)


@pytest.mark.parametrize(
    ("kind", "part"),
    [(kind, part) for kind, parts in {
        "int4": ("weight_packed", "weight_scale", "weight_shape"),
        "int4 with zeros": ("weight_zero_point",), "nvfp4": ("weight_global_scale",),
        "modelopt": ("weight_scale_2",), "channel": ("weight_scale",), "gptq": ("qzeros",),
    }.items() for part in parts],
)  # fmt: skip
def test_a_missing_part_is_named(tmp_path: Path, run: Run, kind: str, part: str) -> None:
    source = quantized.save(tmp_path / "source", kind, "llama")
    file = source / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{UP}.{part}"]
    save_file(tensors, file, {"format": "pt"})
    missing = "has no codes" if part == "weight_packed" else f"expected {UP}.{part}"
    assert_refused(run("inspect", source), f"tensor {UP}.", missing)


def test_widths_that_fill_no_int32_are_refused(tmp_path: Path, run: Run) -> None:
    source = quantized.save(tmp_path / "source", "int4", "llama")
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("weight_shape")]:
        tensors[name] -= torch.tensor([0, 4])
    save_file(tensors, file, {"format": "pt"})
    assert_refused(run("inspect", source), "weight_shape: has other rows and columns than whole")


def test_each_group_of_config_json_has_its_own_scales(tmp_path: Path, run: Run) -> None:
    source, out = quantized.save(tmp_path / "source", "int4", "llama"), tmp_path / "out"
    other = quantized.save(tmp_path / "other", "channel", "llama")
    found = {n: t for n, t in load_file(source / FILE).items() if ".mlp." not in n}
    found |= {n: t for n, t in load_file(other / FILE).items() if ".mlp." in n}
    save_file(found, source / FILE, {"format": "pt"})
    section = dict(quantized.SECTIONS["int4"])
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": quantized.GROUP, "strategy": "group"},
        },
        "group_1": {
            "targets": [r"re:.*mlp\..*"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        },
    }
    quantized.set_section(source, section | {"config_groups": groups})
    plan = tmp_path / "plan.json"
    stats = tmp_path / "stats.safetensors"
    random_stats(layout_of(source)).save(stats)
    made = run("plan", source, "--stats", stats, "--width", "intermediate_size=90", "-o", plan)
    assert made.exit_code == 0, made.output
    applied = run("apply", plan, "-o", out)
    assert applied.exit_code == 0, applied.output
    verified = run("verify", out, "--source", source, "--forward")
    assert verified.exit_code == 0, verified.output
    groups["group_0"]["targets"] = ["Embedding"]
    quantized.set_section(source, section | {"config_groups": groups})
    assert_refused(run("inspect", source), "but config.json does not say how", "self_attn")


def test_the_exact_name_comes_before_patterns_and_the_class() -> None:
    targets = {"tensor": ["Linear"], "channel": ["re:.*up"], "group": ["mlp.up"]}
    groups = {n: {"targets": t, "weights": {"strategy": n}} for n, t in targets.items()}
    section = {"quant_method": "compressed-tensors", "config_groups": groups}
    found = opaque_of({"quantization_config": section})
    assert found is not None
    for module, strategy in {"mlp.up": "group", "x.up": "channel", "x": "tensor"}.items():
        held = found.of(module)
        assert held is not None
        assert held.strategy == strategy


def test_groups_of_several_widths_of_integers_are_refused_by_name(tmp_path: Path, run: Run) -> None:
    source = quantized.save(tmp_path / "source", "int4", "llama")
    section = dict(quantized.SECTIONS["int4"])
    groups = {f"group_{n}": {"weights": {"num_bits": n}} for n in (4, 8)}
    quantized.set_section(source, section | {"config_groups": groups})
    refused = run("inspect", source)
    assert refused.exit_code == 2
    assert "checkpoint is quantized" in refused.output
    assert "found quant_method compressed-tensors" in refused.output


def test_a_scale_of_nan_is_refused_where_the_weight_is_decoded(tmp_path: Path, run: Run) -> None:
    source, plan = quantized.save(tmp_path / "source", "int8", "llama"), tmp_path / "plan.json"
    tensors = load_file(source / FILE)
    name = next(each for each in tensors if "layers.1.mlp.up_proj" in each and "scale" in each)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, source / FILE, {"format": "pt"})
    assert run("plan", source, "--dequantize", "-o", plan).exit_code == 0
    before = sorted(tmp_path.iterdir())
    refused = run("apply", plan, "-o", tmp_path / "out")
    assert_refused(refused, "layers.1.mlp.up_proj", "does not give finite numbers", "found NaN")
    assert sorted(tmp_path.iterdir()) == before
