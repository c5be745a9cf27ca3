"""Tokenize texts and complete prompts in llama.cpp (package xllamacpp).

    python -m tools.engines.llama_cpp JOBS.json

``model`` of JOBS.json is a GGUF file. Its cache is in f32, and attention is computed without
llama.cpp's flash attention, which rounds to f16. Besides what ``jobs.py`` says, ``texts`` may be
there, of which ``ids`` are made. End-of-text tokens end a completion, unless ``past_end`` is true.
Where ``embed`` is true, ``embeddings`` of the texts are made as well, and their ids are those of
whole texts, with the tokens around them.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

from tools.engines.jobs import TOP, Jobs, Step, run

CONTEXT = 2048
"""Positions of the cache."""


def complete(jobs: Jobs) -> Jobs:
    """Run one file of jobs."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = jobs["model"], CONTEXT, 1
    params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, -1
    params.embedding = embed = bool(jobs.get("embed"))
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(name: str, body: dict[str, Any]) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/{name}", data, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokenize(text: str) -> list[int]:
        body = {"content": text, "add_special": embed, "parse_special": True}
        return list(post("tokenize", body)["tokens"])

    def steps(prompt: list[int]) -> tuple[list[int], list[Step]]:
        greedy = {"temperature": 0, "top_k": 1, "repeat_penalty": 1.0, "n_probs": TOP}
        body = {"prompt": prompt, "n_predict": jobs["new_tokens"], "return_tokens": True, **greedy}
        if jobs.get("past_end"):
            body["ignore_eos"] = True  # then no end-of-text token is ever chosen
        answer = post("completion", body)
        ids, places = list(answer["tokens"]), answer.get("completion_probabilities", [])
        if len(places) != len(ids):  # of a character that is not yet whole, none is sent
            return ids, [[] for _ in ids]
        tops = [[(one["id"], one["logprob"]) for one in place["top_logprobs"]] for place in places]
        return ids, tops

    found = [steps(prompt) for prompt in jobs["prompts"]]
    results: Jobs = {
        "ids": [tokenize(text) for text in jobs.get("texts", [])],
        "completions": [ids for ids, _ in found],
        "top": [tops for _, tops in found],
    }
    if embed:
        answers = [post("embedding", {"content": text})[0] for text in jobs["texts"]]
        results["embeddings"] = [vector for answer in answers for vector in answer["embedding"]]
    return results


if __name__ == "__main__":
    run(sys.argv[1:], complete)
    os._exit(0)  # the server's threads do not end
