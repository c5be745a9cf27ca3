"""What AutoTokenizer makes of some directories, as JSON; runs in an interpreter of its own.

    python tests/support/auto_tokenizer.py TEXTS.json DIR...

Imports nothing of this project, so that it also runs beside another major of transformers.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

CHAT = [
    {"role": "user", "content": "Wie heißt „猫“ in Python?\n\n    cat = 'Katze'"},
    {"role": "assistant", "content": "It is a name: naïve, 猫 🐈‍⬛."},
    {"role": "user", "content": "Thanks!"},
]


def observe(directory: str, texts: list[str]) -> dict[str, Any]:
    """Return ids and decoded texts, before and after save and reload, and the rendered chat."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        again = AutoTokenizer.from_pretrained(saved)
    ids = tokenizer(texts)["input_ids"]
    seen = {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "size_again": len(again),
        "ids": ids,
        "ids_again": again(texts)["input_ids"],
        "decoded": [tokenizer.decode(part) for part in ids],
        "special": {
            text: tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in tokenizer.all_special_tokens
        },
        "chat": None,
    }
    if tokenizer.chat_template:
        seen["chat"], seen["chat_again"] = (
            part.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
            for part in (tokenizer, again)
        )
    try:
        tokenizer("a\ud800b")
        seen["surrogate"] = "accepted"
    except Exception as error:
        seen["surrogate"] = type(error).__name__
    return seen


def main() -> None:
    """Print what is seen of every directory."""
    texts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    seen = {directory: observe(directory, texts) for directory in sys.argv[2:]}
    print(json.dumps({"version": transformers.__version__, "seen": seen}))


if __name__ == "__main__":
    main()
