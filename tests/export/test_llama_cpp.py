"""llama.cpp computes the model that was exported, pruned or not, as transformers does."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.support import ROOT, gguf_models, tiny
from tests.support.plans import random_plan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="xllamacpp, llama.cpp as a prebuilt wheel, is not installed",
)

TIE = 0.01
"""Of two tokens whose logits differ by less, either may be taken: rounding decides."""


def run_file(file: Path, **jobs: Any) -> dict[str, Any]:
    """What llama.cpp makes of jobs, in a process of its own."""
    path = file.with_suffix(".json")
    path.write_text(json.dumps({"model": str(file), **jobs}))
    command = [sys.executable, "-m", "tools.engines.llama_cpp", str(path)]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT, capture_output=True)
    found: dict[str, Any] = json.loads(path.read_text())
    assert "error" not in found, found["error"]
    return found


def assert_runs(source: Path, key: str, file: Path, tokens: int = 600) -> None:
    """Each greedy token is the best one in transformers, too, and about as likely."""
    surgery.export_gguf(source, file, pre="gpt-2", type="f32")
    prompts = torch.randint(4, tokens, (6, 20), generator=torch.Generator().manual_seed(1)).tolist()
    found = run_file(file, prompts=prompts, new_tokens=8, past_end=True)
    model = tiny.load(source, key)
    for prompt, own, tops in zip(prompts, found["completions"], found["top"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(own)[:, None])[:, 0]
        assert (logits.max(dim=1).values - chosen).max() < TIE, key
        seen = [place for place, top in enumerate(tops) if top]
        own_values = torch.tensor([tops[place][0][1] for place in seen])
        values = (chosen - logits.logsumexp(dim=1))[seen]
        torch.testing.assert_close(own_values, values, atol=TIE, rtol=0)


@pytest.mark.parametrize("key", gguf_models.CHANGES)
def test_the_same_texts(tmp_path: Path, key: str) -> None:
    assert_runs(gguf_models.save(tmp_path / "model", key), key, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("key", "layers"), [("llama", [[0], [2]]), ("gemma3_text", [[0], [2]]), ("gpt_oss", [[1], [2]])]
)
def test_the_same_texts_of_a_model_without_a_layer(
    tmp_path: Path, key: str, layers: list[list[int]]
) -> None:
    """Vocabulary, channels and layers: of gemma3 and gpt_oss, llama.cpp would count layers."""
    source, out = gguf_models.save(tmp_path / "model", key), tmp_path / "out"
    surgery.apply_plan(random_plan(source, 512, 0.75, layers=layers), source=source, output=out)
    assert_runs(out, key, tmp_path / "out.gguf", tokens=500)
