"""Compare llama.cpp's token ids with those of tokenizer.json, text by text.

    python -m tools.engines.ids build/smollm2 build/smaller --work build/engines

The texts are some 2,500: prose, Python, the Universal Declaration of Human Rights in sixteen
languages, each whole, in pieces and with its letters shuffled, emoji, control characters and odd
spaces. They are the same in every run. A model that differs ends the command with an error; where
the dense model differs, too, it is llama.cpp that differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
from tokenizers import Tokenizer

from tests.support.languages import ARTICLE_1
from tools.engines.__main__ import embeds, run_gguf, slug
from tools.engines.environments import ENGINES, ROOT, python_of
from tools.engines.jobs import Jobs

PROSE = ROOT / "tools" / "text" / "heldout.txt"
PIECE_LETTERS = 150
PROSE_PIECES = CODE_PIECES = 500
SHUFFLED, SPRINKLED = 60, 30
"""Texts that are made of each language: with letters shuffled, and with odd characters among
them."""

ODD = (
    *(
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "🇩🇪",
        "🇩",
        "1️⃣",
        "❤️‍🔥",
        "🐈‍⬛",
        "\u200d",
        "\ufe0f",
        "😀😀",
        "🤷🏿‍♀️",
    ),
    *("\t", "\n", "\n\n", "\r\n", "  ", "    ", " \n ", "\u00a0", "\u3000", "\u2028", "\u200b"),
    *("\x00", "\x01", "\x07", "\x1b", "\x7f", "\x85", "\ufeff", "\u202e", "\u0301"),
    *("1234567", "3.14159", "٣٤٥", "²", "½", "'s", "'LL", "—", "…", "ﬁ", "<0x41>", "Ġ", "▁", "\\n"),
)
"""Emoji, spaces, control characters, numbers, and what tokenizers write in their own way."""

SHOWN = 3
"""Texts that are shown of those that differ."""


def texts() -> list[str]:
    """Return the texts; none is empty, or there twice."""
    draws = np.random.default_rng(0)
    code = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "surgery").rglob("*.py")))
    found = [
        *_pieces(PROSE.read_text("utf-8"), PROSE_PIECES),
        *_pieces(code, CODE_PIECES),
        *ODD,
        *(f"{first}{second}" for first, second in pairwise(ODD)),
    ]
    for article in ARTICLE_1.values():
        found += [article, *article.split(". "), *article.split()]
        for _ in range(SHUFFLED):
            start = int(draws.integers(0, max(1, len(article) - 40)))
            found.append("".join(draws.permutation(list(article[start : start + 40]))))
        for _ in range(SPRINKLED):
            words = article.split()[:12]
            places = draws.integers(0, len(words), 3)
            for place in places.tolist():
                words[place] += str(draws.choice(np.array(ODD, dtype=object)))
            found.append(" ".join(words))
    return list(dict.fromkeys(text for text in found if text))


def _pieces(text: str, number: int) -> Iterator[str]:
    """Yield pieces that begin at equal distances, wherever that is in a word."""
    for start in np.linspace(0, len(text) - PIECE_LETTERS, number, dtype=int).tolist():
        yield text[start : start + PIECE_LETTERS]


def ids_of(model: Path, of: Sequence[str], work: Path, pre: str | None = None) -> Jobs:
    """Return ``ids`` by llama.cpp and ``wanted`` by tokenizer.json, a list for each text.

    Raises:
        click.ClickException: llama.cpp does not load the model.
    """
    engine = next(engine for engine in ENGINES if engine.gguf)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    whole = embeds(model)
    jobs: Jobs = {"prompts": [], "new_tokens": 0, "texts": list(of), "embed": whole}
    path = work / f"ids-{slug(model.name)}.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    run_gguf(engine, python_of(engine, work), model, path, pre)
    found: Jobs = json.loads(path.read_text("utf-8"))
    if "error" in found:
        raise click.ClickException(f"{model}: {found['error']}")
    encoded = tokenizer.encode_batch(list(of), add_special_tokens=whole)
    return {"ids": found["ids"], "wanted": [each.ids for each in encoded]}


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Environments.")
@click.option("--pre", help="The pre-tokenizer's name, where nobody knows it.")
def main(models: tuple[Path, ...], work: Path, pre: str | None) -> None:
    """Compare llama.cpp's token ids with those of tokenizer.json."""
    work.mkdir(parents=True, exist_ok=True)
    of, differ = texts(), 0
    click.echo("| model | texts with equal ids |\n|---|---|")
    for model in models:
        both = ids_of(model.absolute(), of, work.absolute(), pre)
        wrong = [
            (text, wanted, found)
            for text, wanted, found in zip(of, both["wanted"], both["ids"], strict=True)
            if wanted != found
        ]
        click.echo(f"| {model.name} | {len(of) - len(wrong):,} of {len(of):,} |")
        for text, wanted, found in wrong[:SHOWN]:
            click.echo(f"{text!r}\n  tokenizer.json {wanted}\n  llama.cpp      {found}", err=True)
        differ += len(wrong)
    if differ:
        raise click.ClickException(f"{differ:,} texts have other ids in llama.cpp")


if __name__ == "__main__":
    main()
