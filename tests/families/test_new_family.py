"""A model type that transformers has gained is derived, and works from inspect to verify."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from surgery.families.default_ids import DEFAULT_IDS
from surgery.families.table import FAMILIES, read_entry
from surgery.planning.plan import Plan
from tests.support import ROOT, tiny
from tests.support.command import Run
from tests.support.plans import assert_equals_masked_dense, layout_of
from tools.derive import configs
from tools.derive.entry import derive

NAME = "newmodel"
NORM = "model.layers.{layer}.post_feedforward_layernorm.weight"
BRANCH = re.compile(r"(?<!trainer_spec\.)model_type\b\W*(==|!=|\bin\b)|\bmatch\b.*model_type")
"""SentencePiece calls its kind of vocabulary so, too."""


class NewLayer(LlamaDecoderLayer):
    """Llama's, with one more norm after it."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.post_feedforward_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.post_feedforward_layernorm(super().forward(*arguments, **named))


class NewConfig(LlamaConfig):
    """Llama's by another name."""

    model_type = NAME


class NewForCausalLM(LlamaForCausalLM):
    """Llama's with new layers."""

    config_class = NewConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers = (NewLayer(config, number) for number in range(config.num_hidden_layers))
        self.model.layers = nn.ModuleList(layers)
        self.post_init()


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers knows the model, and so do the tables, by what was derived of it."""
    AutoConfig.register(NAME, NewConfig)
    AutoModelForCausalLM.register(NewConfig, NewForCausalLM)
    monkeypatch.setitem(configs.CAUSAL, NAME, "NewForCausalLM")
    entry = derive(NAME)
    assert entry["tensors"][NORM] == "norms"
    monkeypatch.setitem(FAMILIES, NAME, read_entry(NAME, entry))
    monkeypatch.setitem(DEFAULT_IDS, NAME, entry["ids"])
    yield
    CONFIG_MAPPING._extra_content.pop(NAME)
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(NewConfig)


def test_contributing_names_the_command() -> None:
    assert "python -m tools.derive" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


@pytest.mark.usefixtures("added")
def test_an_invented_family_works_from_inspect_to_verify(
    tmp_path: Path, text: Path, run: Run
) -> None:
    assert DEFAULT_IDS[NAME] == {"bos_token_id": NewConfig().bos_token_id,
                                 "eos_token_id": NewConfig().eos_token_id}  # fmt: skip
    source = tiny.save(tmp_path / "source", NAME, sharded=True)
    stats, plan, out = (tmp_path / name for name in ("stats.safetensors", "plan.json", "out"))
    sizes = ("--vocab-size", 512, "--intermediate-size", 48)
    steps = (
        ("inspect", source),
        ("calibrate", source, "--data", text, "--seq-len", 64, "--samples", 8, "-o", stats),
        ("plan", source, "--stats", stats, *sizes, "--to", out, "-o", plan),
        ("apply", plan),
        ("verify", out, "--forward"),
    )
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, (step, result.output, result.exception)
    assert "logits equal" in result.output
    assert_equals_masked_dense(source, out, Plan.load(plan), NAME)
    norm = tiny.load(out, NAME).model.layers[1].post_feedforward_layernorm.weight
    assert torch.equal(
        norm, tiny.load(source, NAME).model.layers[1].post_feedforward_layernorm.weight
    )
    assert layout_of(out).family == layout_of(source).family


def test_it_is_removed_again() -> None:
    assert NAME not in FAMILIES
    assert NAME not in CONFIG_MAPPING


def test_no_other_module_asks_for_the_model_type() -> None:
    tables = {ROOT / "surgery" / "families" / f"{n}.py" for n in ("table", "schema", "default_ids")}
    paths = {*(ROOT / "surgery").rglob("*.py"), *(ROOT / "calib").rglob("*.py")}
    assert paths > tables
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted(paths - tables)
        for line in path.read_text("utf-8").splitlines()
        if BRANCH.search(line.partition("#")[0])
    ]
    assert found == []
