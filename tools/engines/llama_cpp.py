"""Tokenize texts and complete prompts in llama.cpp (package xllamacpp); imports nothing else.

    python tools/engines/llama_cpp.py MODEL.gguf JOBS.json

JOBS.json has ``prompts`` (lists of token ids), ``new_tokens`` and, if wanted, ``texts``. The
results are written into it: ``completions``, the ids that follow each prompt by greedy choice, and
``ids``, those of each text. End-of-text tokens end a completion, unless ``past_end`` is true.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

CONTEXT = 2048


def main(model: str, jobs_path: str) -> None:
    """Run the jobs of a file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = model, CONTEXT, 1
    params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, -1
    server = xllamacpp.Server(params)
    path = Path(jobs_path)
    jobs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

    def post(name: str, body: dict[str, Any]) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/{name}", data, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokenize(text: str) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": True}
        return list(post("tokenize", body)["tokens"])

    def complete(prompt: list[int]) -> list[int]:
        greedy = {"temperature": 0, "top_k": 1, "repeat_penalty": 1.0}
        body = {"prompt": prompt, "n_predict": jobs["new_tokens"], "return_tokens": True, **greedy}
        if jobs.get("past_end"):
            body["ignore_eos"] = True  # then no end-of-text token is ever chosen
        return list(post("completion", body)["tokens"])

    jobs["ids"] = [tokenize(text) for text in jobs.get("texts", [])]
    jobs["completions"] = [complete(prompt) for prompt in jobs["prompts"]]
    path.write_text(json.dumps(jobs), encoding="utf-8")
    os._exit(0)  # the server's threads do not end


if __name__ == "__main__":
    main(*sys.argv[1:])
