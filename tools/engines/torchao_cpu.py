"""Complete prompts with a model whose weights torchao quantizes to 8 bits.

python -m tools.engines.torchao_cpu JOBS.json ...
"""

from __future__ import annotations

import sys

from tools.engines.jobs import Jobs, run
from tools.engines.transformers_cpu import complete, load


def quantized(jobs: Jobs) -> Jobs:
    """Run one file of jobs."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(jobs["model"])
    before = type(model.model.layers[0].self_attn.q_proj.weight)
    quantize_(model, Int8WeightOnlyConfig())
    if type(model.model.layers[0].self_attn.q_proj.weight) is before:
        raise RuntimeError("no weight was quantized")
    return complete(model, jobs)


if __name__ == "__main__":
    run(sys.argv[1:], quantized)
