"""Unknown model types: families that fit are named, an entry is proposed, nothing is guessed."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.config.rewrite import token_references
from surgery.errors import SurgeryError, UnknownTypeError
from surgery.families.schema import EXPERT, EXPERTS, FFN, Dim, Family, Wrapper
from surgery.families.table import FAMILIES, family_of
from surgery.files.safetensors_header import Header, TensorRef
from surgery.layout.build import read_layout
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.probe.probe import Proposal, fitting, propose, unknown_type
from tests.support import tiny, tiny_encoders
from tests.support.command import Run, assert_refused
from tests.support.plans import assert_equals_masked_dense, layout_of

UNKNOWN = "unknown_x"
DENSE = ("llama", "qwen3", "gemma2", "phi3", "glm4", "olmo", "olmo2", "cohere", "stablelm:parallel",
         "starcoder2", "gpt2", "gpt_bigcode", "gptj", "gpt_neo", "gpt_neox", "opt", "opt:350m",
         "falcon:alibi", "bloom", "mpt", "persimmon", "apertus")  # fmt: skip
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_next", "deepseek_v3", "llama4_text", "granitemoeshared",
            "hunyuan_v1_moe", "gpt_oss")  # fmt: skip
LLAMA_LIKE = {"llama", "mistral", "qwen2", "gemma", "granite", "smollm3", "internlm3", "seed_oss"}


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Key → the tiny checkpoint of that family, and the same with a model type nobody knows."""

    @cache
    def build(key: str) -> tuple[Checkpoint, Checkpoint]:
        path = tiny.save(tmp_path_factory.mktemp("probe") / "model", key)
        known = Checkpoint.open(path)
        return known, replace(known, config={**known.config, "model_type": UNKNOWN})

    return build


def evaluated(proposal: Proposal) -> Any:
    """The proposed entry, as it would be in the table's module."""
    assert proposal.entry is not None, proposal.notes
    modules = (f"surgery.families.{name}" for name in ("schema", "blocks", "table"))
    known = {name: value for m in modules for name, value in vars(import_module(m)).items()}
    return eval(proposal.entry, known)


def axes(layout: Layout) -> dict[str, Any]:
    """Tensor → what its dimensions carry, whether its input is recorded; halves equal pairs.

    Proposals keep all experts: how a router chooses does not show in names and shapes.
    """

    def follows(dim: Dim | None) -> Any:
        key = layout.key_of(dim)
        return (key, layout.unit(dim)) if dim and key and key != EXPERTS else None

    found = {}
    for name, role in layout.roles.items():
        carried = {n: c for n, dim in enumerate(role.slot.dims) if (c := follows(dim))}
        found[name] = carried, role.slot.ffn_output
    return found


@pytest.mark.parametrize("key", [*DENSE, *MIXTURES])
def test_the_right_family_is_among_those_that_fit(unknown: Any, key: str) -> None:
    found = fitting(unknown(key)[1])
    assert key.partition(":")[0] in found
    if found[0] == "llama":
        assert set(found) >= LLAMA_LIKE


def test_a_family_that_only_copies_tensors_comes_last(tmp_path: Path) -> None:
    """As X-MOD's does with layers: of BERT, the one that knows each tensor is the likeliest."""
    found = fitting(Checkpoint.open(tiny_encoders.save(tmp_path, "bert", "base")))
    assert found[0] == "bert"
    assert found[-1] == "xmod"


@pytest.mark.parametrize("key", [*DENSE, *MIXTURES])
def test_the_proposed_entry_carries_the_axes_of_the_real_one(
    unknown: Any, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    known, checkpoint = unknown(key)
    real = read_layout(known)
    fit = fitting(checkpoint)
    others = {name: entry for name, entry in FAMILIES.items() if name not in fit}
    monkeypatch.setattr("surgery.probe.probe.FAMILIES", others)
    proposal = propose(checkpoint)
    assert proposal.families == ()
    found = read_layout(checkpoint, evaluated(proposal))
    assert axes(found) == axes(real)
    assert found.widths == real.widths
    assert found.num_hidden_layers == real.num_hidden_layers
    assert found.family.embedding == real.family.embedding
    assert found.family.head == real.family.head
    assert found.groups["vocabulary"] == real.groups["vocabulary"]
    buffers = [p for p in real.roles.values() if not p.is_parameter and p.slot.group == "ffn"]
    # Headers do not say which tensors are buffers.
    uncounted = sum(real.by_name[place.name].parameters for place in buffers)
    assert found.groups["ffn"] == real.groups["ffn"] + uncounted


def test_an_entry_reads_as_one_writes_it(unknown: Any) -> None:
    entry = propose(unknown("qwen2_moe")[1]).entry
    assert entry is not None
    for line in ("ends()", "gated(block='dense')", "widths={FFN: Width('intermediate_size'),",
                 "gated(path='mlp.experts.{expert}', axis=EXPERT, block='experts')"):  # fmt: skip
        assert line in entry


@pytest.mark.parametrize("key", ["llava", "gemma3", "internvl"])
def test_a_wrapper_of_a_known_language_model(unknown: Any, key: str) -> None:
    known, checkpoint = unknown(key)
    proposal = propose(checkpoint)
    assert key in proposal.families
    wrapper = evaluated(proposal)
    assert isinstance(wrapper, Wrapper)
    inner = known.config["text_config"]["model_type"]
    text = family_of({"model_type": inner}, "config.json")
    found = read_layout(checkpoint, wrapper.around(text, inner))
    assert axes(found) == axes(read_layout(known))


def test_names_that_nobody_uses() -> None:
    """Shapes decide where names do not help: twice the width is fused, biases show the way."""
    tensors = {"tok.weight": (50, 8), "out.weight": (50, 8), "final_norm.weight": (8,)}
    for number in range(2):
        at = f"stack.{number}."
        tensors |= {f"{at}a.weight": (24, 8), f"{at}b.weight": (8, 8), f"{at}n_norm.weight": (8,)}
        tensors |= {f"{at}ffn.x.weight": (40, 8), f"{at}ffn.x.bias": (40,)}
        tensors |= {f"{at}ffn.y.weight": (8, 20), f"{at}ffn.y.bias": (8,)}
    config = {"vocab_size": 50, "d_model": 8, "depth": 2, "ffn_size": 20, "heads": 2}
    family = evaluated(propose(checkpoint_of(tensors, config)))
    assert isinstance(family, Family)
    assert (family.embedding, family.head, family.depth) == ("tok.weight", "out.weight", "depth")
    assert family.widths[FFN].key == "ffn_size"
    slots = family.by_name
    assert slots["stack.{layer}.ffn.x.weight"].dims[0] == Dim(FFN, copies=2)
    assert slots["stack.{layer}.ffn.y.weight"].dims[1] == Dim(FFN)
    assert slots["stack.{layer}.ffn.y.weight"].ffn_output
    assert slots["stack.{layer}.a.weight"].group == "attention"


def test_layers_for_multi_token_prediction_are_recognized(unknown: Any) -> None:
    _, checkpoint = unknown("mixtral")
    config = {**checkpoint.config, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    family = evaluated(propose(replace(checkpoint, config=config)))
    assert family.draft_layers == "num_nextn_predict_layers"
    assert family.widths[EXPERT].key == "intermediate_size"


# What the user sees.


@pytest.fixture
def renamed(llama: Path, tmp_path: Path) -> Path:
    """A Llama by another name."""
    path = Path(shutil.copytree(llama, tmp_path / "renamed"))
    change(path, model_type=UNKNOWN)
    return path


def change(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


COMMANDS = ("inspect {}", "calibrate {} --data text", "score {} --data text",
            "plan {} --ratio 0.2 -o new.json",
            "prune {} --data text --ratio 0.2 -o out")  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_in_one_line(renamed: Path, run: Run, command: str) -> None:
    result = run(*command.format(renamed).split())
    assert_refused(result, "config.json", "not supported", f"found {UNKNOWN}", "llama, mistral",
                   "more: if it computes as", "--family llama")  # fmt: skip


def test_where_nothing_fits_the_line_names_the_probe(renamed: Path, run: Run) -> None:
    change(renamed, num_hidden_layers=7)
    assert_refused(run("inspect", renamed), UNKNOWN, "no family's tensors fit",
                   "compact-surgery inspect MODEL with --probe", "Add a model family")  # fmt: skip
    probed = run("inspect", renamed, "--probe")
    assert probed.exit_code == 0
    assert "families that fit: none" in probed.output
    assert "note: no entry: config.json: no key gives the number of layers: expected 3" in (
        probed.output
    )


def test_code_is_never_run(renamed: Path, run: Run) -> None:
    change(renamed, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (renamed / "evil.py").write_text("raise SystemExit('ran')")
    assert_refused(run("inspect", renamed), UNKNOWN, "own code is never run", "--family llama")
    assert run("inspect", renamed, "--family", "llama").exit_code == 0


def test_a_family_nobody_has(renamed: Path, run: Run) -> None:
    result = run("inspect", renamed, "--family", "lama")
    assert_refused(result, "--family", "names no family", "such as llama", "found 'lama'")


def test_a_family_that_does_not_fit(renamed: Path, run: Run) -> None:
    assert_refused(run("inspect", renamed, "--family", "gpt2"), "n_layer")
    assert_refused(run("inspect", renamed, "--family", "qwen3"), "k_norm", "missing")


def test_probe_prints_families_and_entry(renamed: Path, run: Run) -> None:
    shown = run("inspect", renamed, "--probe")
    assert shown.exit_code == 0
    assert "families that fit: llama, mistral" in shown.output
    assert "+ gated()" in shown.output
    as_json = json.loads(run("inspect", renamed, "--probe", "--json").output)
    assert as_json["model_type"] == UNKNOWN
    assert "llama" in as_json["families"]
    assert as_json["entry"] in shown.output


def test_a_named_family_works_from_plan_to_verify(
    renamed: Path, tmp_path: Path, text: Path, run: Run
) -> None:
    stats, plan, out = (tmp_path / name for name in ("stats.safetensors", "plan.json", "out"))
    sizes = ("--vocab-size", 512, "--intermediate-size", 48)
    named = ("--family", "llama")
    data = ("--data", text, "--seq-len", 64, "--samples", 8)
    steps = (
        ("inspect", renamed, *named),
        ("calibrate", renamed, *named, *data, "-o", stats),
        ("plan", renamed, *named, "--stats", stats, *sizes, "--to", out, "-o", plan),
        ("apply", plan),
        ("verify", out, "--forward"),
        ("score", out, *named, "--data", text, "--samples", 2, "--window-bytes", 200),
        ("prune", renamed, *named, *data, *sizes, "-o", tmp_path / "pruned"),
        ("verify", tmp_path / "pruned", "--forward"),
    )
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, (step, result.output, result.exception)
    made = Plan.load(plan)
    assert made.family == "llama"
    assert any("treated as llama" in note for note in made.provenance.notes)
    assert json.loads((out / "config.json").read_text("utf-8"))["model_type"] == UNKNOWN
    for path in (renamed, out):
        change(path, model_type="llama")
    assert_equals_masked_dense(renamed, out, made)


def test_ids_are_filled_in_as_the_named_family_does(renamed: Path) -> None:
    """Llama's class says 2 where config.json does not; pruning must not give 2 to another token."""
    config = json.loads((renamed / "config.json").read_text("utf-8"))
    del config["eos_token_id"]
    (renamed / "config.json").write_text(json.dumps(config), "utf-8")
    layout = read_layout(Checkpoint.open(renamed, "llama"))
    assert layout.family.model_type == "llama"
    tokens = {f"t{number}": number for number in range(9)}
    assert 2 in token_references(layout.checkpoint, tokens)


def test_a_known_type_needs_no_family(llama: Path) -> None:
    assert layout_of(llama).checkpoint.family is None
    assert family_of({"model_type": "llama"}, "config.json").model_type == "llama"
    assert family_of({"model_type": "x"}, "config.json", "phi3").model_type == "phi3"


# Garbage.

WORDS = ("model", "layers", "h", "0", "1", "00", "9" * 30, "mlp", "experts", "shared_experts",
         "self_attn", "gate_proj", "down_proj", "w1", "weight", "bias", "norm", "{layer}",
         "{expert}", "{0}", "", "language_model", "٣", "'", "\n")  # fmt: skip
KEYS = ("vocab_size", "num_hidden_layers", "n_layer", "hidden_size", "intermediate_size", "n_inner",
        "moe_intermediate_size", "n_shared_experts", "num_nextn_predict_layers", "num_mtp_modules",
        "tie_word_embeddings", "text_config", "auto_map")  # fmt: skip
SIZES = st.sampled_from((0, 1, 2, 4, 8, 16, 32, 64, 96, 640))
SHAPES = st.lists(SIZES, max_size=4).map(tuple)
NAMES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(".".join) | st.text(max_size=9)
LEAVES = (
    st.none() | st.booleans() | SIZES | st.integers() | st.floats() | st.text(max_size=4)
    | st.lists(st.integers(0, 3), max_size=3) | st.dictionaries(st.sampled_from(KEYS), SIZES)
)  # fmt: skip
CONFIGS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), LEAVES, max_size=10)
TYPES = st.none() | st.text(max_size=5) | st.integers() | st.sampled_from(("llava", "llama"))


def checkpoint_of(tensors: dict[str, tuple[int, ...]], config: dict[str, Any]) -> Checkpoint:
    refs = tuple(TensorRef(n, Path("x"), "F32", shape, 0) for n, shape in tensors.items())
    header = {"model.safetensors": Header(refs, {}, b"")}
    return Checkpoint(Path("x"), {"model_type": UNKNOWN, **config}, header, None)


def assert_no_traceback(checkpoint: Checkpoint) -> None:
    proposal = propose(checkpoint)
    assert proposal.table()
    if proposal.entry is not None:
        evaluated(proposal)
    with suppress(SurgeryError):
        read_layout(checkpoint)
    error = UnknownTypeError("config.json", checkpoint.config["model_type"], code=False)
    assert len(str(unknown_type(checkpoint, error)).splitlines()) == 1


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, SHAPES, max_size=12), CONFIGS, TYPES)
def test_garbage_never_gives_a_traceback(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], model_type: Any
) -> None:
    assert_no_traceback(checkpoint_of(tensors, {**config, "model_type": model_type}))


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from(("llama", "gpt2", "qwen2_moe", "gpt_oss", "llava")),
    changes=st.dictionaries(st.integers(0, 60), NAMES | SHAPES | st.none(), max_size=3),
    config=CONFIGS,
)
def test_damaged_checkpoints_never_give_a_traceback(
    unknown: Any, key: str, changes: dict[int, Any], config: dict[str, Any]
) -> None:
    _, checkpoint = unknown(key)
    tensors = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    for number, change in changes.items():
        name = list(tensors)[number % len(tensors)]
        shape = tensors.pop(name)
        if change is not None:
            new = isinstance(change, str)
            tensors |= {change if new else name: shape if new else change}
    assert_no_traceback(checkpoint_of(tensors, {**checkpoint.config, **config}))


def test_a_name_with_braces_is_no_name_of_a_slot(unknown: Any) -> None:
    known, _ = unknown("llama")
    tensors = {name: ref.shape for name, ref in known.tensors.items()}
    tensors["model.layers.{layer}.mlp.gate_proj.weight"] = (96, 32)
    with pytest.raises(SurgeryError, match="is not a tensor of this model's family"):
        read_layout(checkpoint_of(tensors, known.config))
