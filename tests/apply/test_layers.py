"""Layers that are removed or merged: equal to the dense model without them, or with the sum."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from calib.scoring.logits import compare_forward
from surgery.api import apply_plan
from surgery.apply.shard import collapse
from surgery.checkpoint.fp8 import from_bf16, to_bf16
from surgery.errors import BudgetError, FamilyError
from surgery.planning.layers import format_layers, layers_by_influence, parse_layers
from surgery.planning.plan import Plan
from surgery.verify.files import verify_files
from tests.support import tiny, tiny_encoders
from tests.support.command import Run, assert_refused
from tests.support.contents import bits, weights
from tests.support.layers import merged_layers, plan_of
from tests.support.plans import layout_of, masked_dense
from tests.support.sample import KEYS, sampled

CPU = torch.device("cpu")
BESIDE = re.compile("vision|visual|video|image|audio|qformer|sam_|connector|projector")
"""Parts of a name that no layer of a language model has."""


def bypass(module: torch.nn.Module) -> None:
    """Let a layer give back what goes into it."""

    def hook(_: Any, inputs: Any, named: Any, output: Any) -> Any:
        hidden = inputs[0] if inputs else named["hidden_states"]
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden

    module.register_forward_hook(hook, with_kwargs=True)


def layers_of(model: Any, count: int) -> Any:
    """The decoder layers of a loaded model: the list of so many that no vision tower has."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    }
    return next(module for name, module in lists.items() if not BESIDE.search(name))


def assert_equals_bypassed(source: Path, output: Path, key: str, stays: Sequence[int]) -> None:
    dense, pruned = tiny.load(source, key), tiny.load(output, key)
    for number, layer in enumerate(layers_of(dense, layout_of(source).num_hidden_layers)):
        if number not in stays:
            bypass(layer)
    ids = torch.randint(tiny.TOKENS, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = tiny.logits_of(dense, ids), tiny.logits_of(pruned, ids)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 0.05


def whole_plan(source: Path, layers: Sequence[Sequence[int]]) -> Plan:
    return plan_of(source, layers, tiny.VOCAB_SIZE, 1.0)


ONLY = {"qwen3_next": [0, 1], "granitemoehybrid": [0, 1, 3], "bamba": [0, 1]}
"""Layers to keep of a tiny model, one of which must stay; of others, all but one."""


def without_one(source: Path) -> list[int]:
    """All layers but one that is not the only one with its kind of channels."""
    outputs = layout_of(source).ffn_outputs
    every = range(len(outputs))
    gone = next(n for n in (1, *every) if all(
        any(axis in outputs[other] for other in every if other != n) for axis in outputs[n]
    ))  # fmt: skip
    return [n for n in every if n != gone]


@pytest.mark.parametrize("key", sampled(KEYS))
def test_dropped_equals_bypassed_or_is_refused(tmp_path: Path, key: str) -> None:
    source = tiny.save(tmp_path / "source", key, sharded=True)
    if layout_of(source).family.layer_rules is None:
        with pytest.raises(FamilyError, match="cannot be removed: what a layer is"):
            whole_plan(source, [[0], [2]])
        return
    stays = ONLY.get(key) or without_one(source)
    plan = whole_plan(source, [[layer] for layer in stays])
    apply_plan(plan, source=source, output=tmp_path / "out")
    assert verify_files(tmp_path / "out", plan, source).ok
    assert_equals_bypassed(source, tmp_path / "out", key, stays)


SPARSE_BY_NUMBER: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"layer_types": ["full_attention", "sliding_attention"] * 3},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 3},
}


@pytest.mark.parametrize("key", SPARSE_BY_NUMBER)
def test_layers_keep_their_experts_where_a_step_counts_them(tmp_path: Path, key: str) -> None:
    step: dict[str, Any] = {"decoder_sparse_step": 2, "mlp_only_layers": [5]}
    source = tiny.save(
        tmp_path / "source", key, num_hidden_layers=6, **step, **SPARSE_BY_NUMBER[key]
    )
    assert [sorted(axes) for axes in layout_of(source).ffn_outputs].count(["ffn"]) == 4
    stays = [0, 1, 4]
    plan = whole_plan(source, [[layer] for layer in stays])
    apply_plan(plan, source=source, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [0, 2])
    assert verify_files(tmp_path / "out", plan, source).ok
    assert_equals_bypassed(source, tmp_path / "out", key, stays)


@pytest.mark.parametrize("key", ["modernbert", "modernbert-decoder"])
def test_a_first_layer_unlike_all_others_stays(tmp_path: Path, key: str) -> None:
    """Without its norm, the layer after it would compute something else, and no shape shows it."""
    save: Any = tiny.save if key in KEYS else tiny_encoders.save
    source = save(tmp_path / "source", key)
    with pytest.raises(FamilyError, match="0 cannot be removed: the first layer has no norm"):
        plan_of(source, [[1], [2]], layout_of(source).vocab_size, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("key", ["llama", "gpt_oss", "mixtral", "apertus"])
def test_collapsed_equals_the_sum(
    tmp_path: Path, dtype: torch.dtype, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.apply.shard.WINDOW_BYTES", 1 << 10)
    monkeypatch.setattr("surgery.apply.shard.STRIP", 100)
    source = tiny.save(tmp_path / "source", key, dtype=dtype, sharded=True)
    plan = whole_plan(source, [[0, 1, 2]])
    apply_plan(plan, source=source, output=tmp_path / "out")
    old, new = weights(source), weights(tmp_path / "out")
    prefix = "model.layers.0."
    assert {name for name in new if ".layers." in name} == {n for n in old if prefix in n}
    for name, tensor in new.items():
        parts = [old[name.replace(prefix, f"model.layers.{layer}.")] for layer in range(3)]
        adds_up = prefix in name and "norm" not in name  # those stay the first layer's
        expected = merged_layers(parts) if adds_up else old[name]
        assert bits(tensor.reshape(-1)) == bits(expected.reshape(-1)), name
    assert verify_files(tmp_path / "out", plan, source).ok


@pytest.mark.parametrize("key", ["llama", "gemma3_text", "mixtral", "gpt_oss", "gpt2", "llama4"])
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_layers_channels_and_tokens_equal_the_dense_model(
    tmp_path: Path, key: str, data: st.DataObject
) -> None:
    """What verify --forward computes, on the source with and without layers that are its own."""
    source = tmp_path / "source"
    if not source.exists():
        tiny.save(source, key, dtype=torch.bfloat16, sharded=True, special_first=False)
    alike = [1, 2] if key == "llama4" else [0, 1, 2]  # its layer 0 is dense
    chosen = data.draw(st.lists(st.sampled_from(alike), min_size=1, unique=True).map(sorted))
    groups: list[list[int]] = [[chosen[0]]]
    for layer in chosen[1:]:
        if data.draw(st.booleans()):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    if key == "llama4":
        groups.insert(0, [0])
    plan = plan_of(source, groups, data.draw(st.integers(400, 640)), data.draw(st.floats(0.1, 1)))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    apply_plan(plan, source=source, output=tmp_path / "out", jobs=2)
    assert verify_files(tmp_path / "out", plan, source).ok
    dense, pruned = layout_of(source), layout_of(tmp_path / "out")
    found = compare_forward(plan, dense, pruned, CPU)
    assert found.ok, found
    after = plan.after
    assert pruned.num_hidden_layers == after.num_hidden_layers == len(groups)
    assert pruned.parameters(pruned.vocab_size, pruned.widths) == after.parameters
    assert pruned.checkpoint.nbytes == after.nbytes


def test_collapsed_and_cut_loads_and_equals_the_masked_sum(tmp_path: Path) -> None:
    """Without any of calib: the library's own models."""
    source = tiny.save(tmp_path / "source")
    plan = plan_of(source, [[0, 1], [2]])
    apply_plan(plan, source=source, output=tmp_path / "out")
    whole = whole_plan(source, [[0, 1], [2]])
    apply_plan(whole, source=source, output=tmp_path / "sum")
    masked = plan_of(tmp_path / "sum", [])
    masked = Plan.load(_saved(masked, tmp_path, kept_channels=plan.kept_channels))
    dense = tiny.load(masked_dense(tmp_path / "sum", masked, tmp_path / "masked"))
    pruned, kept = tiny.load(tmp_path / "out"), torch.from_numpy(plan.ids().kept)
    new = torch.randint(len(kept), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dense(input_ids=kept[new]).logits[..., kept]
        found = pruned(input_ids=new).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def _saved(plan: Plan, folder: Path, **changes: Any) -> Path:
    data = json.loads(plan.encode()) | changes
    (folder / "plan.json").write_text(json.dumps(data))
    return folder / "plan.json"


@given(
    values=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9), min_size=1),
)
def test_sums_round_once_to_nearest_even(values: list[list[float]]) -> None:
    size = min(map(len, values))
    parts = [to_bf16(np.array(v[:size], np.float32)) for v in values]
    first, *others = (from_bf16(part) for part in parts)
    expected = first.copy()
    for other in others:
        expected += other - first
    found = parts[0].copy()
    collapse(found, iter(parts[1:]), "BF16")
    assert np.array_equal(found, to_bf16(expected))


def test_sums_that_overflow_say_so() -> None:
    parts = [np.array([65504], np.float16) * sign for sign in (-1, 1, 1)]
    found = parts[0].view(np.uint16).copy()
    collapse(found, (p.view(np.uint16) for p in parts[1:]), "F16")
    assert np.isposinf(found.view(np.float16)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_only_numbers_that_are_computed_are_looked_at(
    tmp_path: Path, run: Run, dtype: torch.dtype, value: float
) -> None:
    source = tiny.save(tmp_path / "source", dtype=dtype, sharded=True)
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)]
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in {*names} & tensors.keys():
            tensors[name][3, 4] = value if name == names[1] else 0.0
        save_file(tensors, file, {"format": "pt"})
    (tmp_path / "new").mkdir()
    for groups, merges in ((([0], [1], [2]), False), (([0, 1], [2]), True)):
        plan_of(source, groups).save(tmp_path / "plan.json")
        made = run("apply", tmp_path / "plan.json", "-o", tmp_path / "new" / "out", "--jobs", 1)
        if merges and value:
            assert_refused(made, f"tensor {names[0]}: does not give finite numbers", "NaN or inf")
            assert not list((tmp_path / "new").iterdir())
        else:
            assert made.exit_code == 0, made.output
            shutil.rmtree(tmp_path / "new" / "out")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("0", [[0]]),
        ("0-2,4", [[0], [1], [2], [4]]),
        ("0,2+3+5,6-7", [[0], [2, 3, 5], [6], [7]]),
        ("1,3,5", [[1], [3], [5]]),
    ],
)
def test_layers_are_spelled_as_they_are_read(text: str, groups: list[list[int]]) -> None:
    assert parse_layers(text) == groups
    assert format_layers(groups) == text


@pytest.mark.parametrize("text", ["", "a", "1-", "1--2", "1+", "1-2+3", "1,,2", "1;2", "-1", "1 2"])
def test_what_names_no_layers_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="does not name the layers to keep"):
        parse_layers(text)


def test_the_layers_of_largest_influence_stay_in_order() -> None:
    assert layers_by_influence(np.array([0.9, 0.1, 0.5, 0.5, 0.2]), 3) == [[0], [2], [3]]
    assert layers_by_influence(np.array([0.5, 0.5]), 1) == [[0]]
    for count in (0, 3):
        with pytest.raises(BudgetError, match="expected 1 to 2"):
            layers_by_influence(np.array([0.5, 0.5]), count)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[1], [0]], "ascending"),
        ([[0], [0]], "ascending"),
        ([[0], [3]], "ascending"),
        ([[0], []], "ascending"),
    ],
)
def test_layers_out_of_order_are_refused(
    llama: Path, groups: list[list[int]], message: str
) -> None:
    with pytest.raises(BudgetError, match=message):
        whole_plan(llama, groups)


def test_layers_of_other_shapes_do_not_become_one(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "qwen3_moe")
    with pytest.raises(
        BudgetError, match=r"layers 0 and 1: cannot be merged into one: they differ in"
    ):
        whole_plan(source, [[0, 1], [2]])
    with pytest.raises(BudgetError, match="no kept layer has the ffn channels"):
        whole_plan(source, [[1], [2]])
