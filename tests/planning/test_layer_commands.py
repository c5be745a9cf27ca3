"""Layers that are removed, through the commands: options, config.json, costs, kills, refusals."""

import json
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from surgery.api import apply_plan
from surgery.apply.cost import COLLAPSING, apply_cost
from surgery.apply.edits import Edit
from surgery.apply.shard import WINDOW_BYTES, edit_windows
from surgery.errors import BudgetError, FamilyError
from surgery.families.layer_rules import LAYER_RULES, FirstStays
from surgery.families.table import family_of
from surgery.files.safetensors_header import read_header
from surgery.files.shard_file import ShardFile
from surgery.planning.layers import check_layers, layer_keys, nearest_layers
from surgery.planning.plan import Plan
from surgery.stats.channel_stats import ChannelStats
from tests.support import fp8, tiny, tiny_encoders
from tests.support.command import Run, assert_refused
from tests.support.contents import bits, snapshot
from tests.support.json_files import change, put
from tests.support.killing import run_apply
from tests.support.layers import merged_layers, plan_of
from tests.support.plans import layout_of

WHOLE = ("--vocab-size", tiny.VOCAB_SIZE, "--intermediate-size", tiny.INTERMEDIATE_SIZE)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers in many shards."""
    path = tmp_path_factory.mktemp("deep") / "model"
    return tiny.save(path, sharded=True, num_hidden_layers=6, dtype=torch.bfloat16)


def config_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text("utf-8")))


def test_layers_by_name_through_all_commands(deep: Path, tmp_path: Path, run: Run) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    shown = run("plan", deep, "--layers", "0-1,2+3,5", "-o", plan)
    assert shown.exit_code == 0, shown.output
    assert "layers kept: 0-1,2+3,5" in shown.output
    assert ["layers", "6", "4", "33.33%"] in [line.split() for line in shown.output.splitlines()]
    assert Plan.load(plan).layers == [[0], [1], [2, 3], [5]]
    assert run("apply", plan, "-o", out).exit_code == 0
    assert config_of(out) == config_of(deep) | {"num_hidden_layers": 4}
    verified = run("verify", out, "--forward")
    assert verified.exit_code == 0, verified.output
    assert "ok       logits equal the masked dense model's" in verified.output
    card = (out / "README.md").read_text("utf-8")
    assert "Removed layers: 4." in card
    assert "Layers merged into one: 2+3, as in LaCo" in card
    assert "| layers | 6 | 4 |" in card
    index = json.loads((out / "model.safetensors.index.json").read_text("utf-8"))
    files = {path.name for path in out.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert index["metadata"]["total_parameters"] == Plan.load(plan).after.parameters


def test_a_shard_with_nothing_left_is_not_written(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", sharded=True, num_hidden_layers=6)
    apply_plan(plan_of(source, [[0, 5]]), source=source, output=tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) < len(list(source.glob("*.safetensors")))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"].values()) == files
    assert tiny.load(tmp_path / "out").config.num_hidden_layers == 1


def test_verify_finds_other_layers(deep: Path, tmp_path: Path, run: Run) -> None:
    """The weights of layer 2 where the plan says 2+3, and layer 4 where it says 5."""
    out = tmp_path / "out"
    for text, named in (("0-1,2,5", "0-1,2+3,5"), ("0-1,2+3,4", "0-1,2+3,5")):
        run("plan", deep, "--layers", text, "-o", tmp_path / "made.json")
        run("plan", deep, "--layers", named, "-o", tmp_path / "named.json")
        place = out.with_name(text)
        assert run("apply", tmp_path / "made.json", "-o", place).exit_code == 0
        found = run("verify", place, "--plan", tmp_path / "named.json")
        assert found.exit_code == 1
        assert "differs from the source's kept values" in found.output


def test_the_layers_of_largest_influence_by_statistics(
    deep: Path, tmp_path: Path, text: Path, run: Run
) -> None:
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    take = ("calibrate", deep, "--data", text, "--seq-len", 64, "--samples", 4, "-o", stats)
    assert run(*take).exit_code == 0
    options = ("--num-hidden-layers", 4, *WHOLE)
    assert run("plan", deep, "--stats", stats, *options, "-o", plan).exit_code == 0
    influence = ChannelStats.load(stats).block_influence
    stays = sorted(influence.argsort()[::-1][:4].tolist())
    assert [group for (group,) in Plan.load(plan).layers] == stays
    assert "all layers in place" not in Plan.load(plan).provenance.notes
    refused = run("plan", deep, *options, "-o", plan, "--force")
    assert refused.exit_code == 2
    assert "--num-hidden-layers: needs statistics" in refused.output


def test_prune_measures_the_influence_itself(
    deep: Path, tmp_path: Path, text: Path, run: Run
) -> None:
    out = tmp_path / "out"
    take = ("--data", text, "--seq-len", 64, "--samples", 4, "--multiple-of", 4)
    result = run("prune", deep, *take, "--num-hidden-layers", 4, "--ratio", 0.4, "-o", out)
    assert result.exit_code == 0, result.output
    influence = ChannelStats.load(tmp_path / "out.stats.safetensors").block_influence
    kept = sorted(influence.argsort()[::-1][:4].tolist())
    plan = Plan.load(tmp_path / "out.plan.json")
    assert [group for (group,) in plan.layers] == kept
    assert 1 - plan.after.parameters / plan.before.parameters == pytest.approx(0.4, abs=0.01)
    assert run("verify", out, "--forward").exit_code == 0


def test_a_ratio_counts_all_parameters_of_the_source(deep: Path, tmp_path: Path, run: Run) -> None:
    plan = tmp_path / "plan.json"
    options = ("--multiple-of", 4, "-o", plan, "--force")
    assert run("plan", deep, "--layers", "0-3,5", "--ratio", 0.3, *options).exit_code == 0
    made = Plan.load(plan)
    assert 1 - made.after.parameters / made.before.parameters == pytest.approx(0.3, abs=0.005)
    assert made.after.num_hidden_layers == 5
    gone = 1 - plan_of(deep, [[0], [1], [5]], 640, 1.0).after.parameters / made.before.parameters
    exact = ("plan", deep, "--layers", "0-1,5", "--ratio", gone, *options)
    assert run(*exact).exit_code == 0
    assert Plan.load(plan).after.vocab_size == tiny.VOCAB_SIZE
    less = run("plan", deep, "--layers", "0-1,5", "--ratio", gone - 0.05, *options)
    assert less.exit_code == 2
    assert "--ratio: is less than the removed layers take alone" in less.output


def test_prune_takes_layers(deep: Path, tmp_path: Path, text: Path, run: Run) -> None:
    sizes = ("--layers", "0-3,4+5", "--vocab-size", 512, "--intermediate-size", 64)
    options = ("--data", text, "--samples", 2, "--seq-len", 32, "-o", tmp_path / "out")
    result = run("prune", deep, *sizes, *options)
    assert result.exit_code == 0, result.output
    assert "channels of 4+5 are chosen by the first layer's" in result.output
    assert run("verify", tmp_path / "out", "--forward").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "0-9"), "ascending numbers of the source's layers"),
        (("--layers", "3-1"), "does not name the layers to keep"),
        (("--layers", "x"), "does not name the layers to keep"),
        (("--layers", "0", "--num-hidden-layers", 1), "exclude each other"),
        (("--num-hidden-layers", 3), "needs statistics"),
        (("--num-hidden-layers", 3, "--ratio", 0.4, "--only", "layers"), "no number of layers"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    deep: Path, tmp_path: Path, run: Run, options: tuple[object, ...], message: str
) -> None:
    result = run("plan", deep, *options, "-o", tmp_path / "plan.json")
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("diffllama", {}, "layers of model type diffllama cannot be removed"),
        ("gpt_neo", {}, "layers of model type gpt_neo cannot be removed"),
        ("qwen3_vl", {}, "layers of model type qwen3 cannot be removed"),
        ("exaone4", {"layer_types": None}, "layer_types: is missing"),
        ("qwen3", {"layer_types": None}, "layer_types: is missing"),
        ("qwen3", {"layer_types": ["full_attention"]}, "does not have an entry for every layer"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: does not say which layers"),
        ("llama4_text", {"moe_layers": "all"}, "moe_layers: does not say which layers it means"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "makes layers differ by number"),
        ("llama", {"some_list": [1, 2, 3]}, "some_list: may have an entry for each layer"),
        ("qwen3_next", {}, "no full_attention would be left"),
    ],
)
def test_layers_that_differ_by_number_are_refused(
    tmp_path: Path, key: str, changes: dict[str, Any], message: str
) -> None:
    source = tiny.save(tmp_path / "source", key)
    layout = layout_of(source)
    config = {**layout.config, **changes}
    with pytest.raises(FamilyError, match=message):
        layer_keys(config, layout.family, [[0], [2]], 3, source / "config.json")
    if not changes:
        with pytest.raises(FamilyError, match=message):
            check_layers(layout, [[0], [2]])


def keys(model_type: str, groups: list[list[int]], **config: Any) -> dict[str, Any]:
    family = family_of({"model_type": model_type}, "config.json")
    return layer_keys(config, family, groups, 6, "config.json")


def test_keys_that_speak_of_layers_stay_in_step() -> None:
    """By hand, on numbers unlike those of the tiny checkpoints."""
    groups = [[0], [2, 3], [5]]
    depth = {"num_hidden_layers": 3}
    lists = {"layer_types": list("abcdef")}
    assert keys("gemma2", groups, **lists) == {**depth, "layer_types": ["a", "c", "f"]}
    assert keys("qwen2", groups) == depth
    assert keys("qwen2", groups, use_sliding_window=False, max_window_layers=2) == depth
    assert keys("qwen3_moe", groups, mlp_only_layers=[0, 3, 5]) == {
        **depth,
        "mlp_only_layers": [0, 2],
    }
    assert keys("qwen3_moe", groups, mlp_only_layers=[5], decoder_sparse_step=3) == {
        **depth,
        "mlp_only_layers": [0, 2],
        "decoder_sparse_step": 1,
    }
    assert keys("flint", groups, **lists)["mlp_only_layers"] == [0]  # the class's are 0 and 1
    assert keys("deepseek_v3", groups) == {**depth, "first_k_dense_replace": 2}
    assert keys("deepseek_v2", groups) == {**depth, "first_k_dense_replace": 0}
    assert keys("deepseek_v2", groups, first_k_dense_replace=1)["first_k_dense_replace"] == 1
    ends = {"moe_layer_start_index": 1, "moe_layer_end_index": 4}
    assert keys("ernie4_5_moe", groups, **ends) == {
        **depth,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    }
    assert "moe_layer_end_index" not in keys("ernie4_5_moe", groups, moe_layer_end_index=-1)
    with pytest.raises(FamilyError, match="no layer up to it would be left"):
        keys("ernie4_5_moe", [[2], [3]], moe_layer_end_index=1)
    assert keys("gpt2", groups, n_layer=6) == {"n_layer": 3}
    assert keys("llama", groups, intermediate_size=[96] * 6)["intermediate_size"] == [96] * 3
    assert keys("llama", groups, eos_token_id=[1, 2, 3, 4, 5, 6]) == depth


def test_a_plan_says_what_to_know_of_several_kinds(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "gemma3_text")
    notes = plan_of(source, [[0, 1], [2]]).provenance.notes
    assert "0+1 differ in layer_types; each becomes as its first" in notes
    assert "channels of 0+1 are chosen by the first layer's" in notes
    assert not any(note.startswith("layer_types: ") for note in notes)  # 0 and 2 keep the pattern
    counted = plan_of(source, [[0], [1]]).provenance.notes
    assert (
        "layer_types: llama.cpp's converter and mlx-lm would take each 6. layer for one of "
        "'full_attention', and run another model; compact-surgery export tells llama.cpp, or "
        "refuses; `layers` 0,2 keeps the pattern"
    ) in counted
    assert not any("layer" in note for note in plan_of(source, []).provenance.notes)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *((key, "layer_types") for key in ("gemma2", "gemma3_text", "vaultgemma", "olmo3")),
        *((key, "layer_types") for key in ("cohere2", "gpt_oss", "qwen3_next", "afmoe")),
        ("modernbert", "layer_types"),
        *((key, "no_rope_layers") for key in ("smollm3", "llama4_text")),
    ],
)
def test_a_missing_list_is_written_as_the_config_class_fills_it_in(key: str, name: str) -> None:
    config = AutoConfig.for_model(key, num_hidden_layers=13)
    given = {"num_hidden_layers": 13}
    kept = [[n] for n in (0, 1, 3, 5, 7, 11, 12)]
    changes = layer_keys(given, family_of({"model_type": key}, "config.json"), kept, 13, "config")
    assert changes[name] == [getattr(config, name)[group[0]] for group in kept]


@pytest.mark.parametrize(
    ("key", "pattern", "name"),
    [
        ("gemma3_text", {"sliding_window_pattern": 3}, "layer_types"),
        ("cohere2", {"sliding_window_pattern": 3}, "layer_types"),
        ("qwen3_next", {"full_attention_interval": 3}, "layer_types"),
        ("afmoe", {"global_attn_every_n_layers": 3}, "layer_types"),
        ("modernbert", {"global_attn_every_n_layers": 2}, "layer_types"),
        ("smollm3", {"no_rope_layer_interval": 3}, "no_rope_layers"),
        ("llama4_text", {"no_rope_layer_interval": 3, "no_rope_layers": []}, "no_rope_layers"),
    ],
)
def test_a_pattern_given_as_a_number_becomes_a_list(
    key: str, pattern: dict[str, Any], name: str
) -> None:
    config = AutoConfig.for_model(key, num_hidden_layers=13, **pattern)
    given, kept = {"num_hidden_layers": 13, **pattern}, [[n] for n in (0, 1, 3, 5, 7, 11, 12)]
    changes = layer_keys(given, family_of({"model_type": key}, "config.json"), kept, 13, "config")
    assert changes[name] == [getattr(config, name)[group[0]] for group in kept]


def test_layers_of_experts_that_a_number_tells_become_a_list() -> None:
    pattern = {"num_hidden_layers": 6, "interleave_moe_layer_step": 2}
    config = AutoConfig.for_model("llama4_text", **pattern)
    assert config.moe_layers == [1, 3, 5]
    family = family_of({"model_type": "llama4_text"}, "config.json")
    kept = [[0], [1], [3], [4], [5]]
    assert layer_keys(pattern, family, kept, 6, "config")["moe_layers"] == [1, 2, 4]
    given = {**pattern, "moe_layers": [0, 4]}
    assert layer_keys(given, family, kept, 6, "config")["moe_layers"] == [0, 3]


def test_the_note_names_every_engine_that_counts_and_what_to_do(tmp_path: Path) -> None:
    def said(key: str, kept: list[list[int]], **changes: Any) -> list[str]:
        save = tiny_encoders.save if key == "modernbert" else tiny.save
        source = save(tmp_path / key, key, **changes)
        return [note for note in plan_of(source, kept).provenance.notes if "would take" in note]

    assert said("gpt_oss", [[0], [2]], layer_types=None) == [
        "layer_types: llama.cpp's converter and vLLM would take each 2. layer for one of "
        "'full_attention', and run another model; compact-surgery export tells llama.cpp, or "
        "refuses; `layers` 0-1 keeps the pattern"
    ]
    layers = {"num_hidden_layers": 4, "moe_layers": [1, 3], "no_rope_layers": [1, 1, 1, 0]}
    found = said("llama4_text", [[0], [2], [3]], interleave_moe_layer_step=2, **layers)
    assert found == [
        "moe_layers: llama.cpp, mlx-lm and vLLM would take each 2. layer for one of 'mixture', and "
        "run another model; `layers` 0-2 keeps the pattern",
        "no_rope_layers: llama.cpp and mlx-lm would take each 4. layer for one of 0, and run "
        "another model; `layers` 0-2 keeps the pattern",
    ]
    source = tmp_path / "llama4_text"
    change(source / "config.json", lambda data: data["no_rope_layers"].append(1))
    assert [n for n in plan_of(source, [[0], [2], [3]]).provenance.notes if "would" in n] == found
    change(source / "config.json", lambda data: data.update(no_rope_layers=[1, 1, 1]))
    notes = plan_of(source, [[0], [1]]).provenance.notes  # the short list tells nothing
    assert not any("no_rope_layers" in note for note in notes)
    (note,) = said("modernbert", [[0], [2]], global_attn_every_n_layers=2)
    assert "llama.cpp and transformers 4 would take each 2. layer from the first on" in note


def test_the_nearest_layers_that_keep_a_pattern() -> None:
    kinds, last = "sssssfsssssfssssss", [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]
    wanted = [("f" if (n + 1) % 6 == 0 else "s") for n in range(12)]
    found = nearest_layers(kinds, wanted, [n in last for n in range(18)])
    assert found is not None
    assert [kinds[n] for n in found] == wanted
    assert len({*found} & {*last}) == 10
    assert nearest_layers("ssss", ["f", "s"], [1, 1, 0, 0]) is None
    assert nearest_layers("sfsf", "sf", [0.1, 0.2, 0.4, 0.3]) == [2, 3]


def test_what_is_taken_for_all_layers_alike_is_so_in_the_library(tmp_path: Path) -> None:
    """A missing list is allowed only where the library makes up one that has no number in it."""
    source = tiny.save(tmp_path / "source", "qwen2", use_sliding_window=False, layer_types=None)
    change(source / "config.json", lambda data: data.pop("layer_types"))
    kinds = set(tiny.load(source, "qwen2").config.layer_types)
    assert kinds == {"full_attention"}
    apply_plan(plan_of(source, [[0], [2]]), source=source, output=tmp_path / "out")


def test_fp8_layers_go_but_do_not_become_one(tmp_path: Path) -> None:
    source = fp8.save(tmp_path / "source", "llama")
    layout = layout_of(source)
    with pytest.raises(BudgetError, match=r"layers 0 and 1: cannot be merged .* is F8_E4M3"):
        check_layers(layout, [[0, 1], [2]])
    check_layers(layout, [[0], [2]])


@pytest.mark.parametrize("key", ["targets", "exclude_modules", "quantized_layers"])
def test_names_of_modules_follow_their_layers(tmp_path: Path, key: str) -> None:
    source = tiny.save(tmp_path / "source", num_hidden_layers=4)
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(4)]
    left = ["lm_head", names[0], names[1]]
    group: Any = ["lm_head", *names]
    expected: Any = left
    if key == "quantized_layers":
        group = {name: {"quant_algo": "FP8"} for name in group}
        expected = {name: {"quant_algo": "FP8"} for name in left}
    section = {"quant_method": "modelopt", "config_groups": {"group_0": {key: group}}}
    change(source / "config.json", put(quantization_config=section))
    apply_plan(plan_of(source, [[0], [2]]), source=source, output=tmp_path / "out")
    found = config_of(tmp_path / "out")["quantization_config"]["config_groups"]
    assert found == {"group_0": {key: expected}}


def test_modules_that_stay_unquantized_keep_their_layers(tmp_path: Path) -> None:
    source = fp8.save(tmp_path / "source", "llama")
    names = ["lm_head", "model.layers.1.mlp.gate_proj", "model.layers.2.self_attn.q_proj"]
    fp8.set_config(source, quantization_config={**fp8.section(), "modules_to_not_convert": names})
    size = layout_of(source).vocab_size
    apply_plan(plan_of(source, [[0], [2]], size, 1.0), source=source, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = config["quantization_config"]["modules_to_not_convert"]
    assert found == ["lm_head", "model.layers.1.self_attn.q_proj"]


def test_a_plan_of_other_layers_is_refused(deep: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "plan.json"
    for layers, message in (
        ([[0], [1]], "layers: does not match the rest of the plan"),
        ([[0], [9], [1], [2]], "ascending numbers of the source's layers"),
    ):
        plan_of(deep, [[0], [1], [2, 3], [5]]).save(path)
        change(path, put(layers=layers))
        refused = run("apply", path, "-o", tmp_path / "out")
        assert refused.exit_code == 2
        assert message in refused.output
        assert not (tmp_path / "out").exists()


def test_each_byte_is_read_once_and_the_cost_says_so(deep: Path, tmp_path: Path, run: Run) -> None:
    plan = plan_of(deep, [[0, 1, 2], [4]], 640, 1.0)
    plan.save(tmp_path / "plan.json")
    cost = apply_cost(plan, layout_of(deep), 1)
    one = plan.before.nbytes - plan_of(deep, [[0], [1], [2], [3], [4]], 640, 1.0).after.nbytes
    layers = layout_of(deep).of_layer
    norms = [r for n in (1, 2) for r in layers[n].values() if "norm" in r.name]  # the first's stay
    assert cost.read_bytes == plan.before.nbytes - 2 * one - sum(ref.nbytes for ref in norms)
    assert cost.written_bytes == plan.after.nbytes == plan.before.nbytes - 4 * one
    result = run("apply", tmp_path / "plan.json", "-o", tmp_path / "out", "--json")
    facts = json.loads(result.stdout)
    assert 0 <= facts.get("read_bytes", cost.read_bytes) - cost.read_bytes < 1_000_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [0, 1])
def test_memory_of_a_sum_is_some_windows(tmp_path: Path, dtype: torch.dtype, dim: int) -> None:
    parts = [torch.randn(4096, 4096).to(dtype) for _ in range(3)]
    for number, part in enumerate(parts):
        save_file({"w": part}, tmp_path / f"{number}.safetensors")
    first, *others = (read_header(tmp_path / f"{n}.safetensors").tensors[0] for n in range(3))
    kept = np.arange(0, 4096, 3)
    edit = Edit(first, dim, kept, terms=tuple(others))
    with ShardFile(first.path) as shard:
        tracemalloc.start()
        sizes = [len(window) for window in edit_windows(edit, shard)]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found = b"".join(bytes(window) for window in edit_windows(edit, shard))
    assert peak < COLLAPSING * WINDOW_BYTES < first.nbytes / 3
    assert max(sizes) <= WINDOW_BYTES
    assert found == bits(merged_layers(parts).index_select(dim, torch.from_numpy(kept)))


def test_killed_it_resumes_to_the_same_bytes(deep: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan_of(deep, [[0], [1, 2], [4, 5]]).save(plan)
    code, lines = run_apply(plan, "-o", tmp_path / "whole", "--jobs", 1)
    assert code == 0
    for number, share in enumerate((0.3, 0.6, 0.9)):
        out = tmp_path / f"{number}" / "out"
        killed, _ = run_apply(plan, "-o", out, "--jobs", 1, kill_at=round(share * lines))
        assert killed == -signal.SIGKILL
        assert run_apply(plan, "-o", out, "--jobs", 1, "--resume")[0] == 0
        assert snapshot(out) == snapshot(tmp_path / "whole")


def test_repair_goes_with_layers_that_go(tmp_path: Path, llama: Path, text: Path, run: Run) -> None:
    out, file, stats = tmp_path / "out", tmp_path / "plan.json", tmp_path / "stats.safetensors"
    options = ("--data", text, "--samples", 12, "--seq-len", 64)
    assert run("calibrate", llama, *options, "-o", stats).exit_code == 0
    cut = ("--vocab-size", 512, "--intermediate-size", 48, "--data", text, "-o", file)
    repair = ("--stats", stats, *cut, "--repair", "least-squares")
    result = run("plan", llama, *repair, "--layers", "0,2")
    assert result.exit_code == 0, result.output
    replaced = Plan.load(file).replaced
    if replaced is not None:  # held-out text agreed
        assert all(".0." in name or ".1." in name for name in replaced.tensors)
    assert run("apply", file, "-o", out).exit_code == 0
    result = run("verify", out, "--forward")
    assert result.exit_code == 0, result.output
    idle = ("--data", text, "-o", tmp_path / "idle.json", "--force", "--repair", "reconstruct")
    for removed in (("--vocab-size", 512, "--layers", "0,2"), ("--layers", "0,1-2")):
        result = run("plan", llama, "--stats", stats, *idle, *removed)
        assert result.exit_code == 0, result.output
        assert "--repair has nothing to do: the plan removes no channel" in result.output
    result = run("plan", llama, *repair, "--layers", "0,1+2", "--force")
    assert (result.exit_code, "does not work with collapsed layers" in result.output) == (2, True)


STRANGE: tuple[Any, ...] = (
    5,
    -1,
    "x",
    True,
    1.5,
    None,
    [],
    ["x"],
    [None],
    [[1]],
    {},
    {"1": 2},
    10**30,
)


@pytest.mark.parametrize("model_type", sorted(LAYER_RULES))
def test_a_strange_value_of_a_layer_key_is_refused_by_name(model_type: str) -> None:
    """Whatever config.json has for a key: new values, or a refusal by the key or the layer."""
    for rule in LAYER_RULES[model_type]:
        for value in STRANGE:
            for firsts in ([0], [1, 2], [0, 1, 2]):
                refusal = None
                try:
                    json.dumps(rule.renumbered({rule.key: value}, firsts, "config.json"))
                except FamilyError as error:
                    refusal = str(error)
                if isinstance(rule, FirstStays):  # of no key
                    assert (refusal is None) == (firsts[0] == 0)
                    assert refusal is None or refusal.startswith("layers: 0 cannot be removed: ")
                else:
                    assert refusal is None or refusal.startswith(f"config.json: {rule.key}: ")


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("qwen3_moe", "mlp_only_layers", 5),
        ("deepseek_v3", "first_k_dense_replace", "x"),
        ("ernie4_5_moe", "moe_layer_end_index", "x"),
    ],
)
def test_a_strange_layer_key_is_one_line(
    tmp_path: Path, run: Run, model_type: str, key: str, value: object
) -> None:
    source = tiny.save(tmp_path / "source", model_type)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {key: value}), "utf-8")
    result = run("plan", source, "--layers", "0,1", "-o", tmp_path / "plan.json")
    assert_refused(result, f"config.json: {key}", "which layers", f"found {value!r}")
