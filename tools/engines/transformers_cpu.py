"""Complete prompts greedily with the transformers of the Python that runs this.

    python tools/engines/transformers_cpu.py DIR JOBS.json

JOBS.json is as for ``llama_cpp.py``. End-of-text tokens do not end a completion.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(model: str, jobs_path: str) -> None:
    """Run the jobs of a file."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    path = Path(jobs_path)
    jobs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()

    @torch.no_grad()
    def complete(prompt: list[int]) -> list[int]:
        ids, cache, found = torch.tensor([prompt]), None, list[int]()
        for _ in range(jobs["new_tokens"]):
            out = loaded(ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1].argmax(dim=1, keepdim=True), out.past_key_values
            found.append(int(ids))
        return found

    jobs["completions"] = [complete(prompt) for prompt in jobs["prompts"]]
    path.write_text(json.dumps(jobs), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
