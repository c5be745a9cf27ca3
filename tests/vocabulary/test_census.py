"""Tokens of a vocabulary by kind and by script, as a table and as a picture."""

import builtins
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import OutputError
from surgery.vocabulary.census import KINDS, TOP_SCRIPTS, VocabCensus, plot_vocab_census
from surgery.vocabulary.scripts import SCRIPTS, scripts_of

TEXTS: list[str | None] = [
    *("<s>", "<unused0>", "\n", "dead"),
    *(" the", "a", "ing", "中", "中文", "12", None, "ж", None),
]
KINDS_OF = ["special", "reserved", "alphabet", "unreachable", *["ordinary"] * 9]
# One letter of each of 15 scripts, more of the first ones.
MANY = [char for index, char in enumerate("aжα中あア한عאกअবதაա") for _ in range(15 - index)]


def census(rows: int = 16) -> VocabCensus:
    return VocabCensus.of(rows, TEXTS, KINDS_OF)


def test_the_counts_of_a_small_vocabulary() -> None:
    assert census() == VocabCensus(
        rows=16,
        tokens=13,
        padding_rows=3,
        rowless_tokens=0,
        kinds={"ordinary": 9, "unreachable": 1, "alphabet": 1, "special": 1, "reserved": 1},
        scripts={"Latin": 3, "Bytes": 2, "Han": 2, "Common": 1, "Cyrillic": 1},
        mean_chars={"Latin": 8 / 3, "Han": 1.5, "Common": 2.0, "Cyrillic": 1.0},
        max_chars={"Latin": 4, "Han": 2, "Common": 2, "Cyrillic": 1},
    )
    assert list(census().scripts) == ["Latin", "Bytes", "Han", "Common", "Cyrillic"]


@pytest.mark.parametrize(("rows", "padding", "rowless"), [(16, 3, 0), (13, 0, 0), (12, 0, 1)])
def test_rows_and_tokens_need_not_agree(rows: int, padding: int, rowless: int) -> None:
    assert (census(rows).padding_rows, census(rows).rowless_tokens) == (padding, rowless)


@given(
    st.integers(0, 40),
    st.lists(st.tuples(st.none() | st.text(max_size=6), st.sampled_from(KINDS)), max_size=30),
)
def test_every_token_is_counted_once(rows: int, tokens: list[tuple[str | None, str]]) -> None:
    texts = [text for text, _ in tokens]
    kinds = [kind for _, kind in tokens]
    found = VocabCensus.of(rows, texts, kinds)
    assert found.rows - found.padding_rows == found.tokens - found.rowless_tokens
    assert sum(found.kinds.values()) == found.tokens == len(tokens)
    assert sum(found.scripts.values()) == found.kinds["ordinary"]
    assert list(found.scripts.values()) == sorted(found.scripts.values(), reverse=True)
    ordinary = [text for text, kind in tokens if kind == "ordinary"]
    for text, script in zip(ordinary, scripts_of(ordinary), strict=True):
        assert text is None or len(text) <= found.max_chars[script]
    chars = sum(mean * found.scripts[script] for script, mean in found.mean_chars.items())
    assert chars == pytest.approx(sum(len(text) for text in ordinary if text is not None))
    assert VocabCensus.of(rows, texts[::-1], kinds[::-1]) == found, "any order"
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        VocabCensus.of(3, ["a", "b"], ["ordinary"])
    with pytest.raises(ValueError, match=r"unknown kinds of tokens: \['normal'\]"):
        VocabCensus.of(3, ["a", "b"], ["ordinary", "normal"])


def test_the_table() -> None:
    assert census().table().splitlines() == [
        "rows                              16",
        "tokens                            13",
        "  ordinary                         9   69.2%",
        "  unreachable                      1    7.7%",
        "  alphabet                         1    7.7%",
        "  special                          1    7.7%",
        "  reserved                         1    7.7%",
        "padding rows                       3",
        "",
        "ordinary, by script           tokens   share   chars  longest",
        "  Latin                            3   33.3%     2.7        4",
        "  Bytes (partial)                  2   22.2%",
        "  Han                              2   22.2%     1.5        2",
        "  Common (no letters)              1   11.1%     2.0        2",
        "  Cyrillic                         1   11.1%     1.0        1",
    ]


def test_the_table_names_tokens_without_a_row() -> None:
    assert "tokens without a row               1" in census(12).table().splitlines()
    assert "without a row" not in census(13).table()


def test_the_table_sums_up_small_scripts() -> None:
    texts = [*MANY, "բա"]
    found = VocabCensus.of(len(texts), texts, ["ordinary"] * len(texts))
    lines = found.table().splitlines()
    scripts = lines[lines.index("") + 2 :]
    assert len(scripts) == TOP_SCRIPTS + 1
    # Tamil has 3 letters, Georgian 2, Armenian 1 and a token of two: 8 characters in 7 tokens.
    assert scripts[-1] == "  3 others                         7    5.8%     1.1        2"


def test_no_script_is_too_long_for_the_table() -> None:
    assert max(map(len, SCRIPTS)) <= 22


@pytest.mark.parametrize(
    ("texts", "kinds"),
    [([], []), (["<s>"], ["special"]), ([None], ["ordinary"])],
    ids=["empty", "special only", "bytes only"],
)
def test_odd_vocabularies_have_a_table_and_a_plot(
    texts: list[str | None], kinds: list[str], tmp_path: Path
) -> None:
    found = VocabCensus.of(1, texts, kinds)
    assert f"tokens{len(texts):>30}" in found.table()
    plot_vocab_census(found, tmp_path / "census.svg")
    assert f"{len(texts)} tokens, 1 embedding rows" in drawn_text(tmp_path / "census.svg")


def drawn_text(path: Path) -> str:
    """The texts of an SVG file."""
    return "\n".join(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text("utf-8")))


def test_the_plot_shows_every_number(tmp_path: Path) -> None:
    texts = [*MANY, "<s>", "<pad>"]
    kinds = [*["ordinary"] * len(MANY), "special", "special"]
    found = VocabCensus.of(150, texts, kinds)
    plot_vocab_census(found, tmp_path / "census.svg")
    drawn = drawn_text(tmp_path / "census.svg")
    for text in ("Latin", "15  (10.0%)", "3 others", "6  (4.0%)", "special", "2  (1.3%)"):
        assert text in drawn
    for text in ("padding rows", "28  (18.7%)", "122 tokens, 150 embedding rows", "other rows"):
        assert text in drawn
    assert "reserved" not in drawn, "kinds that do not occur are not drawn"


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    plot_vocab_census(census(), tmp_path / "census.png")
    assert (tmp_path / "census.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_kind_of_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=r"census\.tokens: cannot be drawn.*name a .png or .svg file"
    ):
        plot_vocab_census(census(), tmp_path / "census.tokens")


def test_the_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_import = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(
        OutputError, match=r"needs matplotlib; pip install 'compact-surgery\[plot\]"
    ):
        plot_vocab_census(census(), tmp_path / "census.png")
