"""Convert a checkpoint for CTranslate2, and complete prompts greedily.

    python tools/engines/ctranslate2_cpu.py DIR JOBS.json

JOBS.json is as for ``llama_cpp.py``. End-of-text tokens do not end a completion.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(model: str, jobs_path: str) -> None:
    """Run the jobs of a file."""
    import ctranslate2
    from tokenizers import Tokenizer

    path = Path(jobs_path)
    jobs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    with tempfile.TemporaryDirectory() as directory:
        converter = ctranslate2.converters.TransformersConverter(model)
        converter.convert(directory, force=True)
        generator = ctranslate2.Generator(directory, intra_threads=1, inter_threads=1)

        def complete(prompt: list[int]) -> list[int]:
            (found,) = generator.generate_batch(
                [[tokenizer.id_to_token(id_) for id_ in prompt]],
                max_length=jobs["new_tokens"],
                min_length=jobs["new_tokens"],
                include_prompt_in_result=False,
                end_token=[],
                sampling_topk=1,
            )
            return list(found.sequences_ids[0])

        jobs["completions"] = [complete(prompt) for prompt in jobs["prompts"]]
    path.write_text(json.dumps(jobs), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
