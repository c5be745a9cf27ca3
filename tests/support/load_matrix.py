"""What transformers makes of some checkpoints; runs in an interpreter of its own.

    python tests/support/load_matrix.py LOGITS.npz < JOBS.json

Imports nothing of this project, so that it also runs beside another major of transformers. A job
is ``{"directory": ..., "ids": [[...], ...], "auto_class": "AutoModelForCausalLM"}``; for each one
a JSON object of facts is printed, and its logits are stored under its place in the list. What
goes wrong in a job is one of its facts.
"""

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

SENTENCE = "The state of the union is not what it was."


class _Messages(logging.Handler):
    """Keeps the texts of what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """Collect what transformers logs and what it warns of, also what it says once per process."""
    messages = _Messages()
    logger: Any = logging.getLogger("transformers")
    level = logger.level  # a test of tools that want quiet may have run before
    type(logger).warning_once.cache_clear()
    logger.setLevel(logging.WARNING)
    logger.addHandler(messages)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)  # as Python does by default
            yield messages.texts
    finally:
        logger.removeHandler(messages)
        logger.setLevel(level)
    messages.texts += [str(warning.message) for warning in caught]


def load(directory: str, auto_class: str, ids: list[list[int]]) -> tuple[dict[str, Any], Any]:
    """Return what loading found amiss, what the tokenizer does, and float32 logits of ``ids``.

    Attention is eager: the default of 4.57 leaves out the cap on Gemma 2's attention.
    """
    loaded = getattr(transformers, auto_class).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(ids)).logits
    tokenizer = AutoTokenizer.from_pretrained(directory)
    facts = {
        "faults": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "tokens": len(tokenizer),
        "encoded": tokenizer(SENTENCE)["input_ids"],
        "decoded": tokenizer.decode(tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]),
    }
    return facts, logits.numpy()


def observe(job: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the facts of one job and its logits, None where ``error`` says why there are none."""
    facts: dict[str, Any] = {"version": transformers.__version__, "error": None}
    logits = None
    with warned() as said:
        try:
            found, logits = load(job["directory"], job["auto_class"], job["ids"])
            facts |= found
        except Exception as error:
            facts["error"] = f"{type(error).__name__}: {error}"
    facts["warnings"] = said
    return facts, logits


def main() -> None:
    """Do the jobs of standard input."""
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        observed = [observe(job) for job in json.load(sys.stdin)]
    arrays = {str(place): logits for place, (_, logits) in enumerate(observed)}
    np.savez(sys.argv[1], **{key: value for key, value in arrays.items() if value is not None})
    print(json.dumps([facts for facts, _ in observed]))


if __name__ == "__main__":
    main()
