"""The tables of what large models take, computed by the tool from headers alone.

python -m tools.predictions     # that of mixtures that lose a quarter of their experts
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from calib.estimate import WindowLengths, predict
from calib.streaming.settings import PassSettings
from surgery.apply.cost import apply_cost
from surgery.apply.run import JOBS
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.layout.build import read_layout
from surgery.planning.choice import SizeChoice
from surgery.planning.planner import plan_cut
from surgery.planning.request import CutRequest
from surgery.planning.shapes import shape_of
from surgery.planning.sizes import split, whole
from surgery.stats.channels import ChannelOptions
from surgery.vocabulary.order import identity_rarity
from tools.published import MIXTURES, PUBLISHED, QUANTIZED
from tools.shapes import write_headers_only

MODELS = {
    "Llama-3.2-1B": "Llama 3.2 1B",
    "Llama-3.1-8B": "Llama 3.1 8B",
    "Llama-3.1-70B": "Llama 3.1 70B",
    "Llama-3.1-405B": "Llama 3.1 405B",
    "DeepSeek-V3": "DeepSeek-V3 671B, as bf16",
}
SAMPLES, SEQ_LEN, BUCKETS = 256, 2048, 5
RATIO, SMALLEST = 0.2, 512
GB = 10**9


def prediction_table() -> str:
    """Return the table in Markdown."""
    rows = [
        "| model | on disk | calibrate, CPU, fp32: memory | spilled "
        "| GPU, bf16: memory | of the GPU "
        "| spilled: of the GPU | read | written | `apply` at 20 %: written |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row(name) for name in MODELS),
    ]
    return "\n".join(rows) + "\n"


def experts_table() -> str:
    """Return the table of mixtures, as published, that lose a quarter of their experts."""
    rows = [
        "| model | parameters | after | on disk | calibrate, CPU, fp32: memory | disk | read "
        "| `apply`: memory (MB) | read, or from the hub | written |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(experts_row, PRUNED),
    ]
    return "\n".join(rows)


PRUNED = MIXTURES | QUANTIZED
"""Name → config.json of the mixtures in the table of experts, as published."""


def experts_row(name: str) -> str:
    """The row of one mixture in the table of experts."""
    config = PRUNED[name]
    with tempfile.TemporaryDirectory() as directory:
        layout = read_layout(Checkpoint.open(write_headers_only(Path(directory), config, 30)))
        text = WindowLengths.full(SAMPLES, SEQ_LEN, layout.vocab_size)
        settings = PassSettings(torch.device("cpu"), torch.float32, hidden="file")
        passed = predict(layout, text, settings, buckets=BUCKETS, journal=True)
        sizes = replace(whole(layout), experts=layout.experts * 3 // 4)
        request = CutRequest(channels=ChannelOptions(expert_criterion="random"))
        rarity = identity_rarity(layout.vocab_size)
        plan = plan_cut(layout, SizeChoice(rarity, sizes, None, request))
        cost = apply_cost(plan, layout, JOBS)
        nbytes = layout.checkpoint.nbytes
    figures = [plan.before.parameters, plan.after.parameters, nbytes]
    figures += [passed.peak_memory, passed.disk, passed.read]
    cells = [f"{n / GB:,.1f}" for n in figures] + [f"{cost.memory_bytes / 1e6:,.0f}"]
    cells += [f"{n / GB:,.1f}" for n in (cost.read_bytes, cost.written_bytes)]
    method = config.get("quantization_config", {}).get("quant_method", "")
    shown = f"{name}, {method.upper()}" if method else name
    return f"| {shown} | " + " | ".join(cells) + " |"


def row(name: str) -> str:
    """The row of one model."""
    config = (PUBLISHED | MIXTURES)[name]
    with tempfile.TemporaryDirectory() as directory:
        layout = read_layout(Checkpoint.open(write_headers_only(Path(directory), config, 30)))
        text = WindowLengths.full(SAMPLES, SEQ_LEN, layout.vocab_size)
        cpu, filed, gpu, apart = (
            predict(layout, text, settings, buckets=BUCKETS, journal=True)
            for settings in (
                PassSettings(torch.device("cpu"), torch.float32),
                PassSettings(torch.device("cpu"), torch.float32, hidden="file"),
                PassSettings(torch.device("cuda"), torch.bfloat16, hidden="device"),
                PassSettings(torch.device("cuda"), torch.bfloat16, hidden="file"),
            )
        )
        after = shape_of(layout, split(layout, RATIO, SMALLEST))
        states = cpu.memory["hidden states"] * layout.num_hidden_layers
        figures = (
            layout.checkpoint.nbytes,
            *(cpu.peak_memory, filed.peak_memory, gpu.peak_memory, gpu.peak_device),
            *(apart.peak_device, cpu.read, states, after.nbytes),
        )
    return f"| {MODELS[name]} | " + " | ".join(f"{n / GB:,.1f}" for n in figures) + " |"


if __name__ == "__main__":
    print(experts_table())
