"""Attach an adapter, train it one step, merge it; the prompts are completed with a fresh one.

    python -m tools.engines.peft_cpu JOBS.json ...

A fresh adapter adds nothing, so its texts are the model's. After the step, the merged model has to
compute what the model with its adapter does.
"""

from __future__ import annotations

import sys

from tools.engines.jobs import Jobs, run
from tools.engines.transformers_cpu import complete, load

BOUND = 1e-3
"""By which logits of the merged model may differ."""


def adapt(jobs: Jobs) -> Jobs:
    """Run one file of jobs."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj"]
    model = get_peft_model(load(jobs["model"]), LoraConfig(r=4, target_modules=targets))
    found = complete(model.eval(), jobs)
    ids = torch.tensor([jobs["prompts"][0] + found["completions"][0]])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    before = model(input_ids=ids, labels=ids)
    before.loss.backward()
    optimizer.step()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    if torch.equal(adapted, before.logits):
        raise RuntimeError("the step changed nothing")
    difference = float((merged - adapted).abs().max())
    if not difference < BOUND:
        raise RuntimeError(f"logits of the merged model differ by {difference:g}")
    return found


if __name__ == "__main__":
    run(sys.argv[1:], adapt)
