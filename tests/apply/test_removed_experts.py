"""Removed experts: exact for every mixture, in every layout, together with all other axes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from calib.api.measuring import compare_logits
from surgery.api import apply_plan
from surgery.apply.companions import pruned_config
from surgery.apply.edits import kept_parts
from surgery.families.schema import EXPERTS as EXPERTS_AXIS
from surgery.families.schema import Family
from surgery.families.table import BEST_OF_GROUP, EXPERTS_STAY, FAMILIES
from surgery.planning.plan import Plan
from surgery.stats.channels import choose_experts
from surgery.verify.files import verify_files
from tests.support import fp8, tiny
from tests.support.command import Run
from tests.support.contents import bits, weights
from tests.support.plans import assert_equals_masked_dense, layout_of, random_plan
from tests.support.sample import MIXTURES, sampled, text_family

EXPERTS, LEFT = 8, 6
"""In two groups of four in families with groups; then three of each group are left."""

MOE = "qwen3_moe"


def eight(path: Path, key: str, **changes: Any) -> Path:
    """Save a tiny mixture of eight experts, with correction biases that decide some choices."""
    groups = MIXTURES[key].groups
    two = {groups.key: 2, "topk_group": 1} if groups else {}
    limited = {"topk_method": "group_limited_greedy"} if key in BEST_OF_GROUP else {}
    tiny.save(path, key, **{tiny.expert_key(key): EXPERTS, **two, **limited, **changes})
    generator = torch.Generator().manual_seed(2)
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(("correction_bias", "expert_bias")):
                tensors[name] = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        save_file(tensors, file, {"format": "pt"})
    return path


@pytest.mark.parametrize("key", sampled(MIXTURES))
@pytest.mark.parametrize("share", [1.0, 0.5], ids=["experts", "all"])
def test_pruned_equals_a_dense_model_that_cannot_choose_them(
    tmp_path: Path, run: Run, key: str, share: float
) -> None:
    source, out, file = (tmp_path / name for name in ("source", "out", "plan.json"))
    eight(source, key, sharded=True)
    plan = random_plan(source, 640 if share == 1 else 512, share, experts=LEFT)
    plan.save(file)
    apply_plan(plan, source=source, output=out)
    assert layout_of(out).experts == LEFT
    assert_equals_masked_dense(source, out, plan, key)
    verified = run("verify", out, "--plan", file, "--forward")
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("key", ["deepseek_v3", "gpt_oss", "granitemoe", "ernie4_5_moe"])
def test_kept_experts_are_bit_identical_and_numbered_anew(tmp_path: Path, key: str) -> None:
    source, out = eight(tmp_path / "source", key, dtype=torch.bfloat16), tmp_path / "out"
    plan = random_plan(source, 640, 1.0, experts=LEFT)
    apply_plan(plan, source=source, output=out)
    layout, old, new = layout_of(source), weights(source), weights(out)
    kept, expected = kept_parts(plan, layout), {}
    for name, tensor in old.items():
        role = layout.roles[name]
        experts = kept[role.layer].experts.tolist() if role.layer is not None else []
        if role.slot.of_expert:
            if role.expert in experts:
                number = experts.index(role.expert)
                expected[name.replace(f"experts.{role.expert}.", f"experts.{number}.")] = tensor
            continue
        for dim, axis in enumerate(role.slot.dims):
            if axis is not None and axis.axis == EXPERTS_AXIS:
                tensor = tensor.index_select(dim, torch.tensor(experts))
        expected[name] = tensor
    assert new.keys() == expected.keys()
    assert all(bits(new[name]) == bits(tensor) for name, tensor in expected.items())
    assert any(part.experts.tolist() != list(range(LEFT)) for part in kept if len(part.experts))
    counted = layout_of(out)
    assert counted.parameters(640, counted.widths) == plan.after.parameters
    assert sum(tensor.nbytes for tensor in new.values()) == plan.after.nbytes


def test_codes_and_scales_of_fp8_experts_stay_as_they_are(tmp_path: Path) -> None:
    source = fp8.save(tmp_path / "source", "deepseek_v3", apart=True, n_routed_experts=EXPERTS)
    plan, out = random_plan(source, 640, 1.0, experts=LEFT), tmp_path / "out"
    apply_plan(plan, source=source, output=out)
    kept = kept_parts(plan, layout_of(source))
    old, new = weights(source), weights(out)
    for layer in (1, 2):
        for number, expert in enumerate(kept[layer].experts):
            for part in ("gate_proj.weight", "down_proj.weight_scale_inv"):
                at = f"model.layers.{layer}.mlp.experts"
                assert bits(new[f"{at}.{number}.{part}"]) == bits(old[f"{at}.{expert}.{part}"])
    assert not any(f".experts.{LEFT}." in name for name in new)
    assert verify_files(out, plan, source).ok
    before, after = fp8.plain(source, tmp_path / "a"), fp8.plain(out, tmp_path / "b")
    assert_equals_masked_dense(before, after, plan, "deepseek_v3")


@given(
    vocab_size=st.integers(300, 640),
    channels=st.integers(1, 64),
    experts=st.integers(2, EXPERTS),
    dense=st.integers(1, 96),
)
@settings(max_examples=20, deadline=None)
def test_parameters_are_exact_when_experts_and_channels_change(
    tmp_path_factory: pytest.TempPathFactory,
    vocab_size: int,
    channels: int,
    experts: int,
    dense: int,
) -> None:
    root = tmp_path_factory.mktemp("sizes")
    source = eight(root / "source", MOE)
    widths = {"moe_intermediate_size": channels, "intermediate_size": dense}
    plan = random_plan(source, vocab_size, widths, experts=experts)
    apply_plan(plan, source=source, output=root / "out")
    found = weights(root / "out").values()
    assert sum(tensor.numel() for tensor in found) == plan.after.parameters
    assert sum(tensor.nbytes for tensor in found) == plan.after.nbytes
    layout = layout_of(source).with_experts(experts)
    assert layout.parameters(vocab_size, widths) == plan.after.parameters
    one = layout_of(source).with_experts(experts - 1).parameters(640, layout.widths)
    assert layout.parameters(640, layout.widths) - one == layout.axis_cost("experts")


@given(
    groups=st.integers(1, 4),
    size=st.integers(1, 6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_each_group_keeps_its_best(groups: int, size: int, seed: int, data: st.DataObject) -> None:
    each = data.draw(st.integers(1, size))
    importance = np.random.default_rng(seed).integers(0, 4, groups * size).astype(float)
    chosen = choose_experts(importance, groups * each, groups)
    assert (np.diff(chosen) > 0).all()
    for group in range(groups):
        inside = chosen[(chosen >= group * size) & (chosen < (group + 1) * size)]
        assert len(inside) == each
        rest = np.setdiff1d(np.arange(group * size, (group + 1) * size), inside)
        assert all(importance[inside].min() >= importance[rest])


def test_removed_and_merged_layers_go_with_removed_experts(tmp_path: Path, run: Run) -> None:
    for key, layers in (("mixtral", [[0], [1, 2]]), ("gpt_oss", [[0, 2]]), (MOE, [[0], [2]])):
        source, out = eight(tmp_path / key, key), tmp_path / f"{key}.out"
        plan = random_plan(source, 512, 0.5, experts=LEFT, layers=layers)
        plan.save(tmp_path / "plan.json")
        assert plan.kept_experts
        apply_plan(plan, source=source, output=out)
        verified = run("verify", out, "--plan", tmp_path / "plan.json", "--forward")
        assert verified.exit_code == 0, verified.output


def test_the_whole_command_keeps_every_other_axis_whole(
    tmp_path: Path, text: Path, run: Run
) -> None:
    source, out = eight(tmp_path / "source", MOE), tmp_path / "out"
    take = ("--data", text, "--seq-len", 64, "--samples", 8)
    made = run("prune", source, *take, "--num-experts", 5, "-o", out)
    assert made.exit_code == 0, made.output
    plan = Plan.load(tmp_path / "out.plan.json")
    assert (plan.before.experts, plan.after.experts) == (8, 5)
    assert plan.after.widths == plan.before.widths
    assert plan.after.vocab_size == 640
    assert "experts of a layer" in made.output
    assert (
        "Experts: 3 of 8 were removed from each layer; kept by reap over"
        in (out / "README.md").read_text()
    )
    assert run("verify", out, "--forward").exit_code == 0
    assert '"num_local_experts": 5' in (out / "config.json").read_text()
    every = run("plan", source, "--num-experts", 8, "-o", tmp_path / "every.json")
    assert every.exit_code == 0, every.output
    assert Plan.load(tmp_path / "every.json").complete


def test_a_plan_without_statistics_only_predicts(tmp_path: Path, run: Run) -> None:
    source, plan = eight(tmp_path / "source", MOE), tmp_path / "plan.json"
    made = run("plan", source, "--num-experts", 6, "-o", plan, "--force")
    assert made.exit_code == 0, made.output
    assert "sizes only" in made.output
    assert not Plan.load(plan).complete
    assert run("apply", plan, "-o", tmp_path / "out").exit_code == 2
    made = run(
        "plan", source, "--num-experts", 6, "--expert-criterion", "random", "-o", plan, "--force"
    )
    assert made.exit_code == 0, made.output
    assert run("apply", plan, "-o", tmp_path / "out").exit_code == 0


def change_config(source: Path, **changes: Any) -> None:
    path = source / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "none"}))


def test_every_name_of_the_number_of_experts_is_rewritten(tmp_path: Path) -> None:
    source = eight(tmp_path / "qwen3", MOE)
    change_config(source, num_experts=8)
    found = config_with_six(source)
    assert (found["num_experts"], found["num_local_experts"]) == (6, 6)
    change_config(source, num_experts="none", num_local_experts="none")
    assert config_with_six(source)["num_experts"] == 6
    lists = eight(tmp_path / "hunyuan", "hunyuan_v1_moe")
    change_config(lists, num_experts=[8, 8, 8], moe_topk=[2, 1, 2])
    found = config_with_six(lists)
    assert (found["num_experts"], found["moe_topk"]) == ([6, 6, 6], [2, 1, 2])
    found = config_with_six(eight(tmp_path / "llama4", "llama4"))
    assert found["text_config"]["num_local_experts"] == 6


def config_with_six(source: Path) -> dict[str, Any]:
    """Return config.json of an output with six experts."""
    plan = random_plan(source, 640, 1.0, experts=6)
    found: dict[str, Any] = json.loads(pruned_config(plan, layout_of(source).checkpoint))
    return found


def test_modules_that_stay_unquantized_are_named_by_new_numbers(tmp_path: Path) -> None:
    source = fp8.save(tmp_path / "source", "deepseek_v3", n_routed_experts=EXPERTS)
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in range(EXPERTS)]
    section = {**fp8.section(), "modules_to_not_convert": [*names, "lm_head"]}
    change_config(source, quantization_config=section)
    plan = random_plan(source, 640, 1.0, experts=LEFT)
    found = json.loads(pruned_config(plan, layout_of(source).checkpoint))
    kept = found["quantization_config"]["modules_to_not_convert"]
    assert kept == [*names[:LEFT], "lm_head"]


@pytest.mark.parametrize(
    ("key", "changes", "experts", "words"),
    [
        (MOE, {}, 1, ("--num-experts", "a token goes to 2", "2 to 8", "found 1")),
        (MOE, {}, 9, ("--num-experts", "2 to 8", "found 9")),
        (MOE, {}, 0, ("--num-experts", "below 1")),
        (MOE, {"num_experts_per_tok": "none"}, 7, ("a token goes to 8",)),
        ("phimoe", {"num_experts_per_tok": 1}, 1, ("2 to 8",)),
        ("hunyuan_v1_moe", {"moe_topk": [2, 3, 2]}, 2, ("a token goes to 3",)),
        ("deepseek_v3", {}, 5, ("in steps of 2, for as many in each group", "4 to 8")),
        ("deepseek_v3", {}, 2, ("4 to 8",)),
        ("deepseek_v3", {"num_experts_per_tok": 3}, 4, ("6 to 8",)),
        ("deepseek_v3", {"n_group": "none", "topk_group": "none"}, 4, ("8 to 8",)),
        ("deepseek_v2", {"num_experts_per_tok": "none"}, 6, ("num_experts_per_tok", "is missing")),
        ("deepseek_v3", {"n_group": 3}, 6, ("n_group", "does not divide the experts")),
        ("bailing_hybrid", {"num_expert_group": 3}, 6, ("num_expert_group", "does not divide")),
        ("bailing_hybrid", {"num_experts_per_token": 3}, 4, ("a token goes to 3", "6 to 8")),
        ("axk2", {"n_group": "none"}, 1, ("a token goes to 2", "2 to 8")),
        (MOE, {"n_group": 2}, 6, ("n_group", "names groups of experts", "keep all experts")),
        (MOE, {"expert_capacity": [1, 2]}, 6, ("expert_capacity", "an entry for each expert")),
        (MOE, {"table": list(range(8))}, 6, ("table", "an entry for each expert")),
        ("llama", {}, 6, ("--num-experts", "no routed experts")),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    tmp_path: Path, run: Run, key: str, changes: dict[str, Any], experts: int, words: Any
) -> None:
    make = tiny.save if key == "llama" else eight
    source = make(tmp_path / "source", key)
    change_config(source, **changes)
    refused = run("plan", source, "--num-experts", experts, "-o", tmp_path / "plan.json")
    assert refused.exit_code == 2, refused.output
    assert all(word in refused.output for word in words), refused.output
    assert len(refused.output.strip().splitlines()) == 1


def test_a_ratio_is_taken_from_experts(tmp_path: Path, run: Run) -> None:
    source, file = eight(tmp_path / "source", MOE), tmp_path / "plan.json"
    layout = layout_of(source)
    full, cost = layout.parameters(640, layout.widths), layout.axis_cost("experts")
    for only, ratio, left in (("experts", 2 * cost / full, 6), ("experts", 3.4 * cost / full, 5)):
        made = run("plan", source, "--ratio", ratio, "--only", only, "-o", file, "--force")
        assert made.exit_code == 0, made.output
        plan = Plan.load(file)
        assert (plan.after.experts, plan.after.vocab_size) == (left, 640)
        assert plan.after.widths == plan.before.widths
    step = ("--multiple-of", 8)
    made = run(
        "plan", source, "--ratio", 0.4, "--only", "experts,vocabulary", *step, "-o", file, "--force"
    )
    assert made.exit_code == 0, made.output
    plan = Plan.load(file)
    assert plan.after.experts < 8
    assert plan.after.vocab_size < 640
    assert plan.after.widths == plan.before.widths
    assert 1 - plan.after.parameters / plan.before.parameters == pytest.approx(0.4, abs=0.005)
    for options, words in (
        (("--ratio", 0.9, "--only", "experts"), ("--ratio", "cannot be met by whole experts")),
        (
            ("--ratio", 0.2, "--only", "experts,channels"),
            ("--only", "names experts and channels", "search for the best split"),
        ),
        (
            ("--ratio", 0.2, "--only", "experts", "--num-experts", 6),
            ("--only", "number of experts"),
        ),
    ):
        refused = run("plan", source, *options, "-o", file, "--force")
        assert refused.exit_code == 2, refused.output
        assert all(word in refused.output for word in words), refused.output


def test_a_ratio_beside_a_number_of_experts_chooses_the_rest(tmp_path: Path, run: Run) -> None:
    source, file = eight(tmp_path / "source", MOE), tmp_path / "plan.json"
    options = ("--ratio", 0.5, "--num-experts", 6, "--multiple-of", 2)
    made = run("plan", source, *options, "-o", file, "--force")
    assert made.exit_code == 0, made.output
    plan = Plan.load(file)
    assert plan.after.experts == 6
    assert 1 - plan.after.parameters / plan.before.parameters == pytest.approx(0.5, abs=0.005)
    assert plan.after.widths["moe_intermediate_size"] < 64
    few = run("plan", source, "--ratio", 0.05, "--num-experts", 6, "-o", file, "--force")
    assert few.exit_code == 2
    assert "less than the removed experts take alone" in few.output


def test_config_json_must_have_as_many_experts_as_the_tensors(tmp_path: Path, run: Run) -> None:
    source = eight(tmp_path / "source", MOE)
    change_config(source, num_experts=4)
    refused = run("inspect", source)
    assert refused.exit_code == 2
    assert "num_experts is not the number of experts that the tensors have" in refused.output


def test_experts_and_channels_are_removed_and_repaired(
    tmp_path: Path, text: Path, run: Run
) -> None:
    source = eight(tmp_path / "source", MOE)
    sizes = ("--num-experts", 6, "--width", "moe_intermediate_size=32", "--min-expert-tokens", 0)
    made = run(
        *("prune", source, "--data", text, *sizes, "--repair", "least-squares"),
        *("-o", tmp_path / "out"),
    )
    assert made.exit_code == 0, made.output
    assert "repaired" in made.output
    assert run("verify", tmp_path / "out", "--forward").exit_code == 0


def test_a_plan_that_keeps_other_experts_is_refused(tmp_path: Path, run: Run) -> None:
    source, file = eight(tmp_path / "source", "deepseek_v3"), tmp_path / "plan.json"
    random_plan(source, 640, 1.0, experts=LEFT).save(file)
    data = json.loads(file.read_text())
    for kept, words in (
        (["", "0-4", "0-5"], ("kept_experts of layer 1", "expected 6 experts", "found 5")),
        (["", "0-5", "0-5"], ("layer 1, by group", "expected [3, 3]", "found [4, 2]")),
        (["", "0-2,4-6"], ("layers of kept_experts", "expected 3", "found 2")),
        (["", "0-2,4-8", "0-2,4-6"], ("kept_experts of layer 1", "not a set of indices")),
        ([], ("are not chosen",)),
    ):
        file.write_text(json.dumps({**data, "kept_experts": kept}))
        refused = run("apply", file, "-o", tmp_path / "out")
        assert refused.exit_code == 2, refused.output
        assert all(word in refused.output for word in words), refused.output


def test_the_table_has_the_defaults_of_the_config_classes() -> None:
    for key, experts in MIXTURES.items():
        config = AutoConfig.for_model(key.split(":")[0])
        made = getattr(config, text_family(key).section or "text_config", config)
        names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
        found = next(getattr(made, name) for name in names if hasattr(made, name))
        assert experts.per_token == found, key
        assert isinstance(getattr(made, experts.key), int | None)
        groups = [getattr(made, name, None) for name in ("n_group", "topk_group")]
        table = [experts.groups.count, experts.groups.chosen] if experts.groups else [None, None]
        assert groups == table, key


def test_parameters_are_counted_exactly_whatever_the_sizes(tmp_path: Path) -> None:
    """Five of seven experts of an odd width: no tensor's share is a whole number."""
    source, out = tmp_path / "source", tmp_path / "out"
    tiny.save(source, MOE, num_experts=7, moe_intermediate_size=9)
    plan = random_plan(source, 640, 1.0, experts=5)
    apply_plan(plan, source=source, output=out)
    made = layout_of(out)
    assert plan.after.parameters == made.parameters(made.vocab_size, made.widths)


def test_every_mixture_loses_experts_or_says_why() -> None:
    for name, entry in FAMILIES.items():
        if isinstance(entry, Family) and any(slot.counts_experts for slot in entry.slots):
            assert (entry.experts is None) == (name in EXPERTS_STAY), name


def test_mixtures_without_an_entry_keep_their_experts(tmp_path: Path, run: Run) -> None:
    source = tiny.save(tmp_path / "source", "zaya")
    refused = run("plan", source, "--num-experts", 2, "-o", tmp_path / "plan.json")
    assert refused.exit_code == 2
    assert "cannot change: its router has a row that belongs to no expert" in refused.output


def test_verify_sees_a_router_that_chooses_other_experts(tmp_path: Path) -> None:
    source, out = eight(tmp_path / "source", "deepseek_v3"), tmp_path / "out"
    plan = random_plan(source, 640, 1.0, experts=LEFT)
    apply_plan(plan, source=source, output=out)
    assert compare_logits(out, plan=plan, source=source, device="cpu").ok
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        other = tmp_path / name
        shutil.copytree(out, other)
        tensors = load_file(other / "model.safetensors")
        tensors[f"model.layers.1.mlp.{name}"] = tensors[f"model.layers.1.mlp.{name}"].flip(0)
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        assert not compare_logits(other, plan=plan, source=source, device="cpu").ok
