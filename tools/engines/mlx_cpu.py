"""Complete prompts greedily in mlx-lm, in float32.

python -m tools.engines.mlx_cpu JOBS.json ...
"""

from __future__ import annotations

import sys

from tools.engines.jobs import Jobs, Step, best, results, run


def complete(jobs: Jobs) -> Jobs:
    """Run one file of jobs."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, _ = load(jobs["model"])
    model.set_dtype(mx.float32)

    def steps(prompt: list[int]) -> list[Step]:
        new = jobs["new_tokens"]
        made = generate_step(mx.array(prompt), model, max_tokens=new)
        return [best(np.asarray(logprobs)) for _, logprobs in made]

    return results([steps(prompt) for prompt in jobs["prompts"]])


if __name__ == "__main__":
    run(sys.argv[1:], complete)
