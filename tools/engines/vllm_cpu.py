"""Complete prompts greedily in vLLM, on the CPU and in float32.

python -m tools.engines.vllm_cpu JOBS.json ...
"""

from __future__ import annotations

import os
import sys

from tools.engines.jobs import TOP, Jobs, run

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else some small functions are compiled for minutes
    "KMP_BLOCKTIME": "0",
}
CONTEXT = 256


def complete(jobs: Jobs) -> Jobs:
    """Run one file of jobs."""
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    model = LLM(
        jobs["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=len(jobs["prompts"]),
        enable_prefix_caching=False,
        seed=0,
    )
    how = SamplingParams(
        temperature=0,
        max_tokens=jobs["new_tokens"],
        ignore_eos=True,
        logprobs=TOP,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in jobs["prompts"]]
    found = [out.outputs[0] for out in model.generate(prompts, how)]
    steps = [
        [
            sorted(
                ((int(id_), float(one.logprob)) for id_, one in step.items()),
                key=lambda pair: (pair[0] != chosen, -pair[1]),
            )
            for chosen, step in zip(of_prompt.token_ids, of_prompt.logprobs, strict=True)
        ]
        for of_prompt in found
    ]
    return {"completions": [list(one.token_ids) for one in found], "top": steps}


if __name__ == "__main__":
    run(sys.argv[1:], complete)
