"""Embed texts with transformers: the mean of the last hidden states, of length 1.

    python -m tools.engines.embeddings_cpu JOBS.json ...

Besides what ``jobs.py`` says, a file of jobs has ``texts``; the results are ``embeddings``.
"""

from __future__ import annotations

import sys

from tools.engines.jobs import Jobs, run


def embed(jobs: Jobs) -> Jobs:
    """Run one file of jobs."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(jobs["model"])
    model = AutoModel.from_pretrained(jobs["model"], dtype=torch.float32).eval()
    found = []
    for text in jobs["texts"]:
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        found.append((mean / mean.norm()).tolist())
    return {"embeddings": found}


if __name__ == "__main__":
    run(sys.argv[1:], embed)
