"""tools.mixture: a mixture that every engine finds the keys of."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from surgery.api import open_layout
from tools import mixture


def test_config_has_the_keys_of_published_mixtures(tmp_path: Path) -> None:
    result = CliRunner().invoke(mixture.main, ["--steps", "1", "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["num_experts"], config["rope_theta"]) == (16, 10_000.0)
    assert config["torch_dtype"] == "bfloat16"
    assert not {"num_local_experts", "rope_parameters", "dtype"} & config.keys()
    assert open_layout(tmp_path).experts == 16
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.num_experts == 16
    assert model.dtype == torch.bfloat16
