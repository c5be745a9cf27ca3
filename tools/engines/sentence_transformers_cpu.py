"""Embed texts with sentence-transformers.

    python -m tools.engines.sentence_transformers_cpu JOBS.json ...

The files of jobs are as for ``embeddings_cpu.py``.
"""

from __future__ import annotations

import sys

from tools.engines.jobs import Jobs, run


def embed(jobs: Jobs) -> Jobs:
    """Run one file of jobs."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(jobs["model"], device="cpu", local_files_only=True)
    return {"embeddings": model.encode(jobs["texts"]).astype(float).tolist()}


if __name__ == "__main__":
    run(sys.argv[1:], embed)
