"""A long document's tokens, made from pieces of it, so that memory has a bound."""

from collections.abc import Iterator

from tokenizers import Tokenizer

PIECE_CHARACTERS = 1 << 18
"""Encoded at a time: their tokens take some 30 MB."""
OVERLAPS = (1 << 12, 1 << 15)
"""Characters of a piece that the next one begins with; the second where the first do not do."""
AGREEING = 16
"""Tokens on which two pieces must agree where one takes over from the other."""

Token = tuple[int, tuple[int, int]]
"""Id, and place in the document in characters."""


def token_ids(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """Yield the ids of ``text`` in order, in parts, without what the post-processor adds.

    A text of several pieces is encoded with overlaps. The next piece takes over in the middle of
    tokens on which both agree, so that no border of a piece shows. Only where they never agree,
    such as in one letter repeated for pages, the piece's border stays.
    """
    tokens = _encode(tokenizer, text, 0)
    stop = PIECE_CHARACTERS
    while stop < len(text):
        for overlap in OVERLAPS:
            start = stop - overlap
            following = _encode(tokenizer, text, start)
            meeting = _meeting(tokens, following, start)
            if meeting is not None:
                break
        else:
            start, meeting = stop, (len(tokens), 0)
            following = _encode(tokenizer, text, start)
        yield [token for token, _ in tokens[: meeting[0]]]
        tokens = following[meeting[1] :]
        stop = start + PIECE_CHARACTERS
    yield [token for token, _ in tokens]


def _encode(tokenizer: Tokenizer, text: str, start: int) -> list[Token]:
    encoding = tokenizer.encode(text[start : start + PIECE_CHARACTERS], add_special_tokens=False)
    return [
        (token, (start + begin, start + end))
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
    ]


def _meeting(tokens: list[Token], following: list[Token], start: int) -> tuple[int, int] | None:
    """How many of ``tokens`` come first, and how many of ``following`` they replace."""
    first = len(tokens)
    while first and tokens[first - 1][1][0] >= start:
        first -= 1
    places = {token: place for place, token in enumerate(tokens[first:], first)}
    run, before = 0, -2
    for place, token in enumerate(following):
        at = places.get(token)
        run = 0 if at is None else run + 1 if at == before + 1 else 1
        before = -2 if at is None else at
        if run == AGREEING:
            return before + 1 - run // 2, place + 1 - run // 2
    return None
