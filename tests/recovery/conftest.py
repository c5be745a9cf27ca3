"""A tiny dense model that says what it is asked for, its pruned model, and text of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from surgery.api import apply_plan
from surgery.planning.plan import Plan
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.support import tiny
from tests.support.plans import random_plan


@dataclass(frozen=True)
class Pair:
    """A dense model and the pruned one beside it."""

    dense: Path
    pruned: Path
    text: Path
    """Text that the dense model is likely to say, so that a better copy of it shows."""
    plan: Plan


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    for library in ("accelerate", "peft"):
        pytest.importorskip(library, reason="the extra recover is not installed")
    root = tmp_path_factory.mktemp("recovery")
    dense = tiny.save(root / "dense", sharded=True, dtype=torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model.get_input_embeddings().weight.data *= 8  # else all tokens are about as likely
    torch.manual_seed(0)
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([[1]] * 32), min_new_tokens=160, max_new_tokens=160, do_sample=True
        )
    model.to(torch.bfloat16).save_pretrained(dense, max_shard_size="60KB")
    tokenizer = load_tokenizer(dense)
    lines = (tokenizer.decode(row.tolist()).replace("\n", " ") for row in ids)
    text = root / "text.txt"
    text.write_text("\n\n".join(lines), encoding="utf-8")
    plan = random_plan(dense, 560, 64)
    plan.save(root / "pruned.plan.json")
    apply_plan(plan, output=root / "pruned")
    return Pair(dense, root / "pruned", text, plan)
