"""Children of the serving benchmark: tokenize its texts; run one task of a model in one engine.

    python tools/bench/serving.py tokenize DIR TASK.json
    PYTHON tools/bench/serving.py ENGINE MODEL TASK.json

The second imports its engine alone, so PYTHON may be of any environment. MODEL is a directory, or a
GGUF file for llama.cpp. The last line printed is what it measured, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WARM_TOKENS = 4
"""New tokens of the first, short request, which is not measured."""

Task = dict[str, Any]
"""``batch``, ``threads`` and ``new_tokens`` (0: the sequences are scored), ``sequences`` of ids and
``starts``: where in each sequence the scored ending begins."""


def tokenize(model: str, task: Task) -> None:
    """Add the ids of a task's ``texts`` to it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    found = [[tokenizer.encode(part).ids for part in text] for text in task["texts"]]
    most = task["prompt_tokens"]
    if task["new_tokens"]:
        task["sequences"] = [ids[:most] for (ids,) in found]
        task["starts"] = [0] * len(found)
        if any(len(ids) < most for ids in task["sequences"]):
            raise SystemExit(f"{model}: a text has fewer than {most} tokens")
    else:
        task["sequences"] = [context + ending for context, ending in found]
        task["starts"] = [len(context) for context, _ in found]


def batches(task: Task) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Yield the sequences of each batch, and where their endings begin."""
    for first in range(0, len(task["sequences"]), task["batch"]):
        part = slice(first, first + task["batch"])
        yield task["sequences"][part], task["starts"][part]


def in_transformers(model: str, task: Task) -> tuple[Callable[[], object], Callable[[], object]]:
    """Load a model and return what warms it up and what runs the task."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(task["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = "auto" if device == "cuda" else torch.float32
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(device)

    def generate(sequences: list[list[int]], count: int) -> object:
        ids = torch.tensor(sequences, device=device)
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        mask = torch.ones_like(ids)
        return loaded.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)

    def score(sequences: list[list[int]], starts: list[int]) -> list[float]:
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=device)
        lengths = torch.tensor([[len(s)] for s in sequences], device=device)
        mask = (torch.arange(longest, device=device) < lengths).long()
        bits = loaded(ids, attention_mask=mask).logits.float().log_softmax(-1)
        chosen = bits[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0]
        pairs = zip(chosen, sequences, starts, strict=True)
        return [float(row[start - 1 : len(s) - 1].sum()) for row, s, start in pairs]

    def run() -> list[object]:
        count = task["new_tokens"]
        return [generate(s, count) if count else score(s, starts) for s, starts in batches(task)]

    def warm() -> None:
        generate([task["sequences"][0][:8]], WARM_TOKENS)

    def quietly(work: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(work)

    return quietly(warm), quietly(run)


def in_vllm(model: str, task: Task) -> tuple[Callable[[], object], Callable[[], object]]:
    """Load a model and return what warms it up and what runs the task."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its CPU seconds are this process's
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    gpu = torch.cuda.is_available()
    torch.set_num_threads(task["threads"])
    longest = max(map(len, task["sequences"])) + max(1, task["new_tokens"])
    llm = LLM(
        model,
        dtype="auto" if gpu else "float32",
        enforce_eager=not gpu,
        max_model_len=longest,
        max_num_seqs=task["batch"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def ask(sequences: list[list[int]], count: int) -> None:
        asked = [TokensPrompt(prompt_token_ids=ids) for ids in sequences]
        logprobs = None if count else 0
        how = SamplingParams(
            temperature=0,
            max_tokens=max(1, count),
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=logprobs,
        )
        llm.generate(asked, how, use_tqdm=False)

    def run() -> None:
        for sequences, _ in batches(task):
            ask(sequences, task["new_tokens"])

    return lambda: ask([task["sequences"][0][:8]], WARM_TOKENS), run


def in_llama_cpp(model: str, task: Task) -> tuple[Callable[[], object], Callable[[], object]]:
    """Start a server of package xllamacpp, and return what warms it up and what runs the task.

    It gives no logits of a prompt, so sequences are only read, and one token is chosen.
    """
    import urllib.request

    import xllamacpp

    longest = max(map(len, task["sequences"])) + max(1, task["new_tokens"]) + 8
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel = model, task["batch"]
    params.n_ctx, params.cache_ram_mib = longest * task["batch"], 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["threads"]
    params.warmup, params.verbosity = False, -1
    server = xllamacpp.Server(params)

    def complete(prompt: list[int], count: int) -> Any:
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True}
        data = json.dumps({**body, "cache_prompt": False, "return_tokens": True}).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/completion", data, kind)
        with urllib.request.urlopen(request) as answer:
            found = json.load(answer)["tokens"]
        if len(found) < count:
            raise SystemExit(f"{model}: {len(found)} tokens, not {count}")

    def run() -> None:
        with ThreadPoolExecutor(task["batch"]) as pool:
            for sequences, _ in batches(task):
                counts = [max(1, task["new_tokens"])] * len(sequences)
                list(pool.map(complete, sequences, counts))

    return lambda: complete(task["sequences"][0][:8], WARM_TOKENS), run


ENGINES = {"transformers": in_transformers, "vLLM": in_vllm, "llama.cpp": in_llama_cpp}


def device_bytes() -> int:
    """Return the most memory that tensors took on a GPU, where the engine uses torch."""
    torch = sys.modules.get("torch")
    found: int = torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0
    return found


def main(engine: str, model: str, path: str) -> None:
    """Tokenize a task's texts into its file, or run it and print what it took."""
    task: Task = json.loads(Path(path).read_text("utf-8"))
    if engine == "tokenize":
        tokenize(model, task)
        Path(path).write_text(json.dumps(task), "utf-8")
        return
    start = time.perf_counter()
    warm, run = ENGINES[engine](model, task)
    loaded = time.perf_counter() - start
    warm()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    facts = {
        "load_seconds": loaded,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "device_bytes": device_bytes(),
    }
    print(json.dumps(facts), flush=True)
    os._exit(0)  # a server's threads do not end


if __name__ == "__main__":
    main(*sys.argv[1:])
