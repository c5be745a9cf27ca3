"""The usual way, for comparison: load the whole model with transformers, slice it, save it.

python -m tools.bench.full_load PLAN OUTPUT
"""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from surgery.families.schema import FFN
from surgery.planning.plan import Plan


def full_load_apply(plan: Plan, output: Path) -> None:
    """Write the weights and config that ``plan`` makes of its source; no tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(plan.source, dtype=torch.bfloat16)
    rows = torch.from_numpy(plan.ids().kept)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            _keep(embedding, rows, 0)
        full = plan.before.widths["intermediate_size"]
        for number, layer in enumerate(model.model.layers):
            channels = torch.from_numpy(plan.channels(number, FFN, full)[0])
            _keep(layer.mlp.gate_proj, channels, 0)
            _keep(layer.mlp.up_proj, channels, 0)
            _keep(layer.mlp.down_proj, channels, 1)
    model.config.vocab_size = plan.after.vocab_size
    model.config.intermediate_size = plan.after.widths["intermediate_size"]
    for key in ("bos_token_id", "eos_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, key, plan.ids().new(getattr(config, key)))
    model.save_pretrained(output, max_shard_size="2.5GB")


def _keep(module: nn.Module, indices: torch.Tensor, dim: int) -> None:
    """Keep ``indices`` of the weight ``(rows, columns)`` on dimension ``dim``."""
    weight = module.get_parameter("weight").index_select(dim, indices)
    module.weight = nn.Parameter(weight, requires_grad=False)


if __name__ == "__main__":
    full_load_apply(Plan.load(Path(sys.argv[1])), Path(sys.argv[2]))
