"""Convert checkpoints for OpenVINO (optimum-intel), and complete prompts greedily, in float32.

python -m tools.engines.openvino_cpu JOBS.json ...
"""

from __future__ import annotations

import sys

from tools.engines.jobs import Jobs, Step, best, results, run

SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "INFERENCE_NUM_THREADS": "1",
}


def complete(jobs: Jobs) -> Jobs:
    """Run one file of jobs."""
    import torch
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(
        jobs["model"], export=True, load_in_8bit=False, ov_config=SETTINGS
    )
    new = jobs["new_tokens"]

    def steps(prompt: list[int]) -> list[Step]:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=-1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return [best(logits[0].float().numpy()) for logits in made.logits]

    return results([steps(prompt) for prompt in jobs["prompts"]])


if __name__ == "__main__":
    run(sys.argv[1:], complete)
