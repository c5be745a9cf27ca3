"""Complete prompts with a model that bitsandbytes quantizes to 8 bits when it is loaded.

python -m tools.engines.bitsandbytes_cpu JOBS.json ...
"""

from __future__ import annotations

import sys

from tools.engines.jobs import Jobs, run
from tools.engines.transformers_cpu import complete, load


def quantized(jobs: Jobs) -> Jobs:
    """Run one file of jobs."""
    from transformers import BitsAndBytesConfig

    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    model = load(jobs["model"], **options)
    if not any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        raise RuntimeError("no layer was quantized")
    return complete(model, jobs)


if __name__ == "__main__":
    run(sys.argv[1:], quantized)
