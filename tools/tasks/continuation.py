"""Write continuation.jsonl: which of four passages of a held-out document comes next?

    python -m tools.tasks.continuation

The answer begins a sentence and follows the context; the other three begin sentences elsewhere in
the same document. Nothing is random, so the same text gives the same file.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from surgery.text.documents import read_documents
from tools.tasks.records import FOLDER

HELDOUT = Path(__file__).parent.parent / "text" / "heldout.txt"
OUTPUT = FOLDER / "continuation.jsonl"
ITEMS = 15
"""Of each document."""
OTHERS = (3, 7, 11)
"""Which items, counted from one's own, lend it their passages: each is right once, wrong thrice."""
CONTEXT_WORDS, CHOICE_WORDS = 30, 10
SENTENCE_START = re.compile(r'(?<=[a-z]{2}[.!?] )(?=["A-Z])')


def passages(document: str) -> list[tuple[str, str]]:
    """Return every ``(words before, words from)`` the start of a sentence, ASCII only."""
    found = []
    for match in SENTENCE_START.finditer(document):
        before = document[: match.start()].split()[-CONTEXT_WORDS:]
        after = document[match.start() :].split(maxsplit=CHOICE_WORDS)[:CHOICE_WORDS]
        pair = " ".join(before), " ".join(after)
        if len(before) == CONTEXT_WORDS and len(after) == CHOICE_WORDS and "".join(pair).isascii():
            found.append(pair)
    return found


def items(document: str) -> Iterator[dict[str, Any]]:
    """Return the items of one document, evenly spread over it; the answer's place goes round."""
    found = passages(document)
    spread = [found[n * len(found) // ITEMS] for n in range(ITEMS)]
    for n, (context, following) in enumerate(spread):
        answer = n % (len(OTHERS) + 1)
        choices = [spread[(n + other) % ITEMS][1] for other in OTHERS]
        choices.insert(answer, following)
        yield {"context": context, "choices": choices, "answer": answer}


def main() -> None:
    """Write the file anew."""
    documents = read_documents(str(HELDOUT), None)
    records = chain.from_iterable(map(items, documents))
    OUTPUT.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
