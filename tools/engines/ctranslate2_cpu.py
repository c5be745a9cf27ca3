"""Convert checkpoints for CTranslate2, and complete prompts greedily.

python -m tools.engines.ctranslate2_cpu JOBS.json ...
"""

from __future__ import annotations

import sys
import tempfile

from tools.engines.jobs import Jobs, Step, best, results, run


def converted(jobs: Jobs) -> Jobs:
    """Run one file of jobs."""
    import ctranslate2
    import numpy as np
    from tokenizers import Tokenizer

    model, new = jobs["model"], jobs["new_tokens"]
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    with tempfile.TemporaryDirectory() as directory:
        ctranslate2.converters.TransformersConverter(model).convert(directory, force=True)
        generator = ctranslate2.Generator(
            directory, compute_type="float32", intra_threads=1, inter_threads=1
        )

        def complete(prompt: list[int]) -> list[Step]:
            (found,) = generator.generate_batch(
                [[tokenizer.id_to_token(id_) for id_ in prompt]],
                max_length=new,
                min_length=new,
                include_prompt_in_result=False,
                end_token=[],
                sampling_topk=1,
            )
            ids = [*prompt, *found.sequences_ids[0]]
            logits = np.asarray(generator.forward_batch([ids[:-1]]))[0, -new:]
            steps = [best(of_place) for of_place in logits]
            # What was generated comes first, even where another id's logit is the same.
            return [
                sorted(step, key=lambda pair: pair[0] != id_)
                for step, id_ in zip(steps, ids[-new:], strict=True)
            ]

        return results([complete(prompt) for prompt in jobs["prompts"]])


if __name__ == "__main__":
    run(sys.argv[1:], converted)
