"""Complete prompts greedily with the transformers of the Python that runs this.

python -m tools.engines.transformers_cpu JOBS.json ...
"""

from __future__ import annotations

import sys
from typing import Any

from tools.engines.jobs import Jobs, Step, best, results, run


def load(directory: str, **options: Any) -> Any:
    """Load a model in float32, on one thread."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {"torch_dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def complete(model: Any, jobs: Jobs) -> Jobs:
    """Complete the prompts, those of one length together, so that none needs padding."""
    import torch

    prompts = jobs["prompts"]
    found: list[list[Step]] = [[] for _ in prompts]
    with torch.no_grad():
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            ids, cache = torch.tensor([prompts[row] for row in rows]), None
            for _ in range(jobs["new_tokens"]):
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                steps = [best(logits) for logits in out.logits[:, -1].float().numpy()]
                for row, step in zip(rows, steps, strict=True):
                    found[row].append(step)
                ids, cache = torch.tensor([[step[0][0]] for step in steps]), out.past_key_values
    return results(found)


if __name__ == "__main__":
    run(sys.argv[1:], lambda jobs: complete(load(jobs["model"]), jobs))
