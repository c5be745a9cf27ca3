"""The table of what large models take, computed by the tool from headers alone."""

import tempfile
from pathlib import Path

import torch

from calib.estimate import WindowLengths, predict
from calib.streaming.settings import PassSettings
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.layout.build import read_layout
from surgery.planning.shapes import shape_of
from surgery.planning.sizes import split
from tools.published import MIXTURES, PUBLISHED
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
