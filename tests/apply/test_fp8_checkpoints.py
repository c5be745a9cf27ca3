"""FP8 checkpoints, cut in whole blocks or written as bf16, against torch's own dequantization."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from calib.statistics.calibrate import Calibration, take_statistics
from calib.streaming.settings import PassSettings
from calib.streaming.weights import WeightReader
from surgery.api import apply_plan
from surgery.apply.companions import pruned_config
from surgery.apply.edits import Edit, Scaling, edits, kept_parts
from surgery.apply.shard import WINDOW_BYTES, edit_windows, stream_edit
from surgery.config.rewrite import dequantized_config
from surgery.errors import PlanError
from surgery.families.schema import WIDTHS, Dim
from surgery.families.table import family_of
from surgery.files.model_files import INDEX_NAME
from surgery.files.safetensors_header import read_header
from surgery.files.shard_file import ShardFile
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.planning.shapes import shape_of
from surgery.planning.sizes import Sizes, whole
from surgery.verify.files import verify_files
from tests.support import fp8, tiny
from tests.support.command import Run, refusal
from tests.support.contents import bits, weights
from tests.support.fp8 import GATE
from tests.support.plans import assert_equals_masked_dense, layout_of, plan_to, random_stats

CPU = torch.device("cpu")
PASS = PassSettings(CPU, torch.float32)
FP32 = torch.float32
DEEPSEEK: dict[str, Any] = {"kv_lora_rank": 20}
"""kv_a_proj_with_mqa then has a block and a half of rows, as published ones have 4.5."""
LATENT = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
SETTINGS = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, scales beside their weights; tests must not change it."""
    return fp8.save(tmp_path_factory.mktemp("qwen3") / "model")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards, all scales in another one; tests must not change it."""
    return fp8.save(tmp_path_factory.mktemp("v3") / "model", "deepseek_v3", apart=True, **DEEPSEEK)


def plan_of(path: Path, vocab_size: int, share: float, *, dequantize: bool, step: int = 1) -> Plan:
    """Plan to keep about ``share`` of each width, rounded to a multiple of ``step``."""
    layout = layout_of(path)
    sizes = {key: max(step, round(share * n / step) * step) for key, n in layout.widths.items()}
    return plan_to(layout, Sizes(vocab_size, sizes, dequantize), random_stats(layout))


def taken(layout: Layout, plan: Plan, tensors: fp8.Tensors) -> fp8.Tensors:
    """What the plan leaves of ``tensors``: the rows and columns of the weights that it keeps."""
    kept = [part.channels for part in kept_parts(plan, layout)]
    found = {}
    for name, tensor in tensors.items():
        role = layout.roles[name]
        for number, dim in enumerate(role.slot.dims):
            if dim == Dim("vocab"):
                tensor = tensor[torch.from_numpy(plan.ids().kept)]
            elif dim is not None and dim.axis in WIDTHS and role.layer is not None:
                chosen = torch.from_numpy(kept[role.layer][dim.axis][role.expert or 0])
                if role.scales:
                    chosen = chosen[:: fp8.BLOCK] // fp8.BLOCK
                tensor = tensor.view(_plain_dtype(tensor)).index_select(number, chosen)
        found[name] = tensor
    return found


def _plain_dtype(tensor: torch.Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[tensor.itemsize]


def assert_same(found: fp8.Tensors, expected: fp8.Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def assert_sizes_are_as_predicted(out: Path, plan: Plan) -> None:
    found = weights(out)
    assert sum(tensor.nbytes for tensor in found.values()) == plan.after.nbytes
    assert parameters_of(found) == plan.after.parameters
    if (out / INDEX_NAME).exists():
        index = json.loads((out / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == plan.after.nbytes
        assert index["weight_map"].keys() == found.keys()
        assert {p.name for p in out.glob("*.safetensors")} == set(index["weight_map"].values())


def parameters_of(tensors: dict[str, torch.Tensor]) -> int:
    """Count them as transformers does, to which the bias of DeepSeek's router is a buffer."""
    others = (fp8.SUFFIX, "e_score_correction_bias")
    return sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(others))


@pytest.mark.parametrize("model", ["qwen3", "deepseek"])
def test_scales_are_no_parameters(model: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(model)
    layout = layout_of(path)
    found = weights(path)
    assert layout.parameters(layout.vocab_size, layout.widths) == parameters_of(found)
    assert layout.groups.total() == parameters_of(found)
    assert not any(name.endswith(fp8.SUFFIX) for name in layout.by_name)
    assert shape_of(layout, whole(layout)).nbytes == sum(t.nbytes for t in found.values())


@pytest.mark.parametrize("model", ["qwen3", "deepseek"])
def test_whole_blocks_go_and_codes_and_scales_stay_as_they_are(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path, out = request.getfixturevalue(model), tmp_path / "out"
    plan = plan_of(path, 400, 0.5, dequantize=False, step=fp8.BLOCK)
    apply_plan(plan, source=path, output=out)
    found, layout = weights(out), layout_of(path)
    assert_same(found, taken(layout, plan, weights(path)))
    assert_sizes_are_as_predicted(out, plan)
    for axes in (part.channels for part in kept_parts(plan, layout)):
        for chosen in (chosen for of_axis in axes.values() for chosen in of_axis):
            starts = chosen[:: fp8.BLOCK]
            assert not (starts % fp8.BLOCK).any()
            assert (np.diff(chosen.reshape(-1, fp8.BLOCK)) == 1).all()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == fp8.section()
    old, new = fp8.plain(path, tmp_path / "a", FP32), fp8.plain(out, tmp_path / "b", FP32)
    assert_equals_masked_dense(old, new, plan, "deepseek_v3" if model == "deepseek" else model)
    assert verify_files(out, plan, path).ok


def test_partial_blocks_that_are_not_cut_are_copied(deepseek: Path, tmp_path: Path) -> None:
    rows = weights(deepseek)[LATENT].shape[0]
    assert rows % fp8.BLOCK
    assert weights(deepseek)[LATENT + fp8.SUFFIX].shape[0] == rows // fp8.BLOCK + 1
    apply_plan(
        plan_of(deepseek, 400, 0.5, dequantize=False, step=fp8.BLOCK),
        source=deepseek,
        output=tmp_path / "out",
    )
    for name in (LATENT, LATENT + fp8.SUFFIX):
        assert bits(weights(tmp_path / "out")[name]) == bits(weights(deepseek)[name])


@pytest.mark.parametrize("model", ["qwen3", "deepseek"])
@SETTINGS
@given(
    vocab_size=st.integers(280, tiny.VOCAB_SIZE),
    share=st.floats(0.02, 1),
    window_bytes=st.sampled_from([2, 40, 900, 1 << 20]),
)
def test_bf16_is_torchs_and_can_be_cut_anywhere(
    model: str,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    vocab_size: int,
    share: float,
    window_bytes: int,
) -> None:
    path, directory = request.getfixturevalue(model), tmp_path_factory.mktemp("cut")
    plan = plan_of(path, vocab_size, share, dequantize=True)
    out, dense = directory / "out", fp8.plain(path, directory / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.apply.shard.WINDOW_BYTES", window_bytes)
        apply_plan(plan, source=path, output=out)
    assert_same(weights(out), taken(layout_of(path), plan, weights(dense)))
    assert_sizes_are_as_predicted(out, plan)
    report = verify_files(out, plan, path)
    assert report.ok, report.table()


@pytest.mark.parametrize(
    "scale_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu]
)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("block", [16, 24])
def test_conversion_alone_gives_a_plain_bf16_model(
    tmp_path: Path, scale_dtype: torch.dtype, apart: bool, block: int
) -> None:
    path = fp8.save(tmp_path / "model", block=block, scale_dtype=scale_dtype, apart=apart)
    dense = fp8.plain(path, tmp_path / "dense")
    layout = layout_of(path)
    sizes = Sizes(layout.vocab_size, layout.widths, dequantize=True)
    plan = plan_to(layout, sizes, None)
    assert plan.complete
    apply_plan(plan, source=path, output=tmp_path / "out")
    assert_same(weights(tmp_path / "out"), weights(dense))
    assert_sizes_are_as_predicted(tmp_path / "out", plan)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    ids = torch.arange(40)[None]
    models = [AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "out", dense)]
    assert {parameter.dtype for parameter in models[0].parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found, expected = (model(ids).logits for model in models)
    assert torch.equal(found, expected)
    for file in path.iterdir():
        if file.suffix not in (".safetensors", ".md") and file.name not in (
            "config.json",
            INDEX_NAME,
        ):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_config_loses_the_quantization_on_both_levels() -> None:
    config = {
        "model_type": "mistral3",
        "torch_dtype": "float16",
        "quantization_config": fp8.section(),
        "text_config": {
            "model_type": "mistral",
            "dtype": "float8_e4m3fn",
            "quantization_config": fp8.section(),
        },
    }
    assert dequantized_config(config, family_of(config, "config.json")) == {
        "model_type": "mistral3",
        "torch_dtype": "bfloat16",
        "text_config": {"model_type": "mistral", "dtype": "bfloat16"},
    }


def test_config_of_a_cut_has_the_dtype_of_its_weights(deepseek: Path) -> None:
    made = pruned_config(
        plan_of(deepseek, 400, 0.3, dequantize=True), layout_of(deepseek).checkpoint
    )
    config = json.loads(made)
    assert "quantization_config" not in config
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_a_vocabulary_in_fp8_is_dequantized_only(tmp_path: Path, run: Run) -> None:
    path = fp8.save(tmp_path / "model", also="lm_head.weight")
    sizes = ("--vocab-size", 400, "--intermediate-size", 96, "-o", tmp_path / "plan.json")
    message = refusal(run, "plan", path, *sizes)
    for word in ("--vocab-size", "640", "400", "share scales", "--dequantize"):
        assert word in message
    plan = plan_of(path, 400, 0.4, dequantize=True)
    apply_plan(plan, source=path, output=tmp_path / "out")
    dense = fp8.plain(path, tmp_path / "dense")
    assert_same(weights(tmp_path / "out"), taken(layout_of(path), plan, weights(dense)))
    rows = np.array([0, 1, 15, 16, 17, 400, 639])
    with WeightReader(layout_of(path).checkpoint, CPU, torch.bfloat16) as reader:
        found = reader.rows("lm_head.weight", rows)
    assert bits(found) == bits(weights(dense)["lm_head.weight"][torch.from_numpy(rows)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_calibration_reads_the_numbers_that_codes_stand_for(
    deepseek: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    checkpoint = layout_of(deepseek).checkpoint
    expected = weights(fp8.plain(deepseek, tmp_path / "dense", dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib.streaming.weights.BLOCK_BYTES", 100)
        for name, tensor in expected.items():
            with WeightReader(checkpoint, CPU, dtype) as reader:
                found = reader.to_device(reader.read(name))
                scales = checkpoint.scales_of(checkpoint.tensors[name])
                read = checkpoint.tensors[name].nbytes + (scales.nbytes if scales else 0)
                assert reader.bytes_read == read
            assert bits(found) == bits(tensor.to(dtype)), name


def test_verify_reads_what_a_dequantized_output_holds(qwen3: Path, tmp_path: Path) -> None:
    expected = weights(fp8.plain(qwen3, tmp_path / "dense"))[GATE].float()
    with WeightReader(
        layout_of(qwen3).checkpoint, CPU, torch.float32, dequantize=torch.bfloat16
    ) as reader:
        assert torch.equal(reader.to_device(reader.read(GATE)), expected)


@pytest.mark.parametrize("model", ["qwen3", "deepseek"])
def test_statistics_are_those_of_the_dequantized_model(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(model)
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, tiny.TOKENS, 24) for _ in range(4)]
    both = []
    for place in (path, fp8.plain(path, tmp_path / "dense", torch.float32)):
        layout = layout_of(place)
        buckets, edges = np.zeros(layout.vocab_size, np.int64), [layout.vocab_size]
        both.append(take_statistics(Calibration(layout, windows, 24, buckets, edges, PASS)).layers)
    for found, expected in zip(*both, strict=True):
        assert found.keys() == expected.keys()
        for axis, sums in found.items():
            np.testing.assert_array_equal(sums.sum_sq, expected[axis].sum_sq)
            np.testing.assert_array_equal(sums.weight_norm, expected[axis].weight_norm)


@pytest.mark.parametrize("way", [(), ("--dequantize",)], ids=["blocks", "bf16"])
def test_calibrate_plan_apply_verify(
    deepseek: Path, text: Path, tmp_path: Path, run: Run, way: tuple[str, ...]
) -> None:
    stats, plan, out = (tmp_path / name for name in ("stats.safetensors", "plan.json", "out"))
    widths = ("--width", "moe_intermediate_size=48", "--width", "intermediate_size=32")
    steps = (
        ("inspect", deepseek),
        ("calibrate", deepseek, "--data", text, "--seq-len", 64, "-o", stats),
        ("plan", deepseek, "--stats", stats, "--vocab-size", 512, *widths, *way, "-o", plan),
        ("apply", plan, "-o", out),
        ("verify", out, "--forward"),
        ("score", out, "--data", text, "--samples", 2, "--window-bytes", 200),
    )
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, (step, result.output, result.exception)
    assert json.loads(plan.read_text())["dequantize"] is bool(way)
    assert Plan.load(plan).dequantize is bool(way)


def test_prune_dequantizes(qwen3: Path, text: Path, tmp_path: Path, run: Run) -> None:
    sizes = ("--vocab-size", 512, "--intermediate-size", 41, "--dequantize")
    result = run("prune", qwen3, "--data", text, "--seq-len", 64, *sizes, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "FP8 weights become bf16" in result.output
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_dequantize_alone_cuts_nothing(qwen3: Path, tmp_path: Path, run: Run) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    for step in (
        ("plan", qwen3, "--dequantize", "-o", plan),
        ("apply", plan, "-o", out),
        ("verify", out, "--forward"),
    ):
        result = run(*step)
        assert result.exit_code == 0, (step, result.output)
    assert_same(weights(out), weights(fp8.plain(qwen3, tmp_path / "dense")))


def test_ratio_keeps_whole_blocks(tmp_path: Path, run: Run) -> None:
    path = fp8.save(tmp_path / "model", block=48, intermediate_size=768, hidden_size=64)
    ratio = ("--ratio", 0.3, "--multiple-of", 16, "-o", tmp_path / "plan.json", "--force")
    assert run("plan", path, *ratio).exit_code == 0
    after = Plan.load(tmp_path / "plan.json").after
    assert after.widths["intermediate_size"] % 48 == 0
    assert after.vocab_size % 48
    assert run("plan", path, *ratio, "--dequantize", "--force").exit_code == 0


@pytest.mark.parametrize("way", [False, True], ids=["blocks", "bf16"])
def test_layers_that_guess_ahead_go_with_their_scales(tmp_path: Path, way: bool) -> None:
    path = fp8.save(tmp_path / "model", "deepseek_v3")
    drafts = {
        name.replace(".2.", ".3.", 1): tensor
        for name, tensor in weights(path).items()
        if name.startswith("model.layers.2.")
    }
    fp8.change(path, dict(drafts))
    fp8.set_config(path, num_nextn_predict_layers=1)
    plan = plan_of(path, 400, 0.5, dequantize=way, step=fp8.BLOCK)
    assert "model.layers.3.mlp.experts.{expert}.up_proj.weight_scale_inv" in plan.dropped
    apply_plan(plan, source=path, output=tmp_path / "out")
    assert not any(".3." in name for name in weights(tmp_path / "out") if "experts" not in name)
    assert verify_files(tmp_path / "out", plan, path).ok


def test_code_of_a_known_model_type_is_neither_run_nor_pointed_at(tmp_path: Path, run: Run) -> None:
    path = fp8.save(tmp_path / "model", "deepseek_v3")
    (path / "modeling_deepseek.py").write_text("raise SystemExit(9)")
    fp8.set_config(path, auto_map={"AutoModelForCausalLM": "modeling_deepseek.Model"})
    assert run("plan", path, "--dequantize", "-o", tmp_path / "plan.json").exit_code == 0
    assert run("apply", tmp_path / "plan.json", "-o", tmp_path / "out").exit_code == 0
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "modeling_deepseek.py").exists()
    fp8.set_config(path, model_type="unheard_of")
    message = refusal(run, "inspect", path)
    assert "unheard_of" in message
    assert "its own code is never run" in message


def test_verify_finds_a_changed_scale(qwen3: Path, tmp_path: Path) -> None:
    for way in (False, True):
        out = tmp_path / str(way)
        plan = plan_of(qwen3, 400, 0.5, dequantize=way, step=fp8.BLOCK)
        apply_plan(plan, source=qwen3, output=out)
        name = DOWN if way else DOWN + fp8.SUFFIX
        tensor = weights(out)[name].clone()
        tensor[0, 0] *= 2
        fp8.change(out, {name: tensor})
        faults = verify_files(out, plan, qwen3).checks["kept rows and channels are bit-identical"]
        assert len(faults) == 1
        assert name in faults[0]


def test_a_plan_that_splits_blocks_is_refused(qwen3: Path) -> None:
    layout = layout_of(qwen3)
    split = plan_of(qwen3, 400, 0.5, dequantize=True, step=fp8.BLOCK)
    after = shape_of(layout, Sizes(split.after.vocab_size, split.after.widths))
    split = msgspec.structs.replace(split, dequantize=False, after=after)
    with pytest.raises(PlanError, match=r"not whole blocks.*blocks of 16.*plan again"):
        edits(split, layout)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_an_edit_that_dequantizes_holds_a_few_windows(tmp_path: Path, dim: int | None) -> None:
    rows, columns, block = 4096, 4096, 128
    codes = torch.randint(0, 127, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.rand(rows // block, columns // block)
    save_file({"w": codes}, tmp_path / "a.safetensors")
    save_file({"s": scales}, tmp_path / "b.safetensors")
    source, grid = (read_header(tmp_path / f"{n}.safetensors").tensors[0] for n in "ab")
    kept = None if dim is None else np.arange(0, (rows, columns)[dim], 3)
    edit = Edit(source, dim or 0, kept, scaling=Scaling(grid, (block, block)))
    with ShardFile(source.path) as shard, open(os.devnull, "wb") as output:
        tracemalloc.start()
        stream_edit(edit, shard, output.fileno())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        windows = [bytes(window) for window in edit_windows(edit, shard)]
    assert peak < 5 * WINDOW_BYTES < source.nbytes / 3
    assert max(map(len, windows)) <= WINDOW_BYTES
    assert sum(map(len, windows)) == edit.nbytes
    wide = (codes.float() * fp8.spread(scales, block, codes.shape)).to(torch.bfloat16)
    if kept is not None:
        wide = wide.view(torch.uint16).index_select(edit.dim, torch.from_numpy(kept))
    assert b"".join(windows) == bits(wide)


def test_nan_and_infinity_that_apply_computes_are_refused_and_leave_nothing(
    tmp_path: Path, deepseek: Path, run: Run
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "new" / "out"
    codes, scales = weights(deepseek)[DOWN], weights(deepseek)[DOWN + fp8.SUFFIX]
    codes.view(torch.uint8)[3, 5] = 0x7F  # NaN
    for number, wrong in enumerate(
        ({DOWN: codes}, *({DOWN + fp8.SUFFIX: scales * x} for x in (float("nan"), float("inf"))))
    ):
        source = shutil.copytree(deepseek, tmp_path / str(number))
        fp8.change(source, dict(wrong))
        plan_of(source, 640, 1, dequantize=True).save(plan)
        (tmp_path / "new").mkdir()
        for more in ((), ("--jobs", 1)):  # other shards are finished before
            line = refusal(run, "apply", plan, "-o", out, *more)
            assert f"tensor {DOWN}: does not give finite numbers: found NaN or infinity" in line
            assert "download the file again" in line
            assert not list((tmp_path / "new").iterdir())
        (tmp_path / "new").rmdir()


def test_codes_of_nan_are_copied_where_nothing_is_computed(
    tmp_path: Path, qwen3: Path, run: Run
) -> None:
    source = shutil.copytree(qwen3, tmp_path / "source")
    codes = weights(source)[DOWN]
    codes.view(torch.uint8)[3, 5] = 0x7F
    fp8.change(source, {DOWN: codes})
    plan_of(source, 512, 1, dequantize=False).save(tmp_path / "plan.json")
    made = run("apply", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert bits(weights(tmp_path / "out")[DOWN]) == bits(codes)
