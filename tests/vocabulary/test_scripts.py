"""The script of a character, a token and a stretch of text."""

import random
import subprocess
import sys
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import TokenizerError
from surgery.vocabulary.scripts import (
    _BY_CODE,
    _SCRIPT_OF,
    BYTES,
    COMMON,
    SCRIPTS,
    _matchers,
    _ScriptOfCharacter,
    check_script,
    script_of,
    scripts_of,
)

SAMPLES = {
    "Latin": "aZéßŁªⅧａ",
    "Greek": "αΩἀ",
    "Cyrillic": "жЯѣ",
    "Han": "中々〇𠀀",
    "Hiragana": "あを",
    "Katakana": "アｱ",
    "Hangul": "한ㄱ",
    "Arabic": "عپ",
    "Hebrew": "אְ",
    "Thai": "กัๆ",
    "Devanagari": "अि१",
    "Georgian": "აᲐ",
    "Adlam": "𞤀",
}
NO_LETTERS = "0 \n\t.,!?-_()«»、。।ー~€½²😀\u200d\u0301\ue000\ufffd\uffff"
# Scripts newer than Unicode 15.1, which the oldest `regex` that pyproject.toml allows has.
NEWER = {"Garay", "Gurung_Khema", "Kirat_Rai", "Ol_Onal", "Sunuwar", "Todhri", "Tulu_Tigalari"}
NEWER |= {"Beria_Erfe", "Sidetic", "Tai_Yo", "Tolong_Siki"}
NEWER |= {"Jurchen", "Proto_Cuneiform", "Seal"}

letters = st.sampled_from("".join(SAMPLES.values()))
mixed = st.text(letters | st.sampled_from(NO_LETTERS) | st.characters(), max_size=40)


def knows(name: str) -> bool:
    try:
        regex.compile(rf"\p{{Script={name}}}")
    except regex.error:
        return False
    return True


@pytest.mark.parametrize(("name", "chars"), SAMPLES.items())
def test_letters_have_their_script(name: str, chars: str) -> None:
    assert [script_of(char) for char in chars] == [name] * len(chars)


@pytest.mark.parametrize("char", NO_LETTERS)
def test_characters_of_no_script_are_common(char: str) -> None:
    assert script_of(char) == COMMON


def test_each_name_and_code_is_one_that_regex_knows() -> None:
    unknown = {name for name in SCRIPTS if not knows(name)}
    assert unknown <= NEWER
    for code, name in _BY_CODE.items():
        assert knows(code) or name in unknown, code
    assert len(SCRIPTS) == len(set(SCRIPTS)) == 176


def test_each_code_and_name_mean_the_same_characters() -> None:
    every = "".join(map(chr, range(0x110000)))
    for code, name in _BY_CODE.items():
        if not knows(name):
            continue
        by_name = regex.search(rf"\p{{Script={name}}}", every)
        by_code = regex.search(rf"\p{{Script={code}}}", every)
        assert by_name is not None, name
        assert by_code is not None, code
        assert by_code.start() == by_name.start(), (code, name)
        assert script_of(by_name[0]) == name


def test_every_assigned_character_belongs_to_exactly_one_script() -> None:
    matchers = {
        name: regex.compile(rf"\p{{Script={name}}}")
        for name in (*SCRIPTS, "Inherited", "Unknown")
        if knows(name)
    }
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    for char in random.Random(0).sample(assigned, 3000):
        names = [name for name, matcher in matchers.items() if matcher.match(char)]
        assert len(names) == 1, hex(ord(char))
        (name,) = names
        assert script_of(char) == (COMMON if name in ("Inherited", "Unknown") else name)


def test_the_lookup_agrees_with_another_copy_of_unicode() -> None:
    other = pytest.importorskip("fontTools.unicodedata", reason="comes with matplotlib")
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    sample = random.Random(1).sample(assigned, 3000)
    named = [other.script_name(other.script(char)).replace(" ", "_") for char in sample]
    expected = [COMMON if name in ("Inherited", "Unknown") else name for name in named]
    differing = {c: name for c, name in zip(sample, expected, strict=True) if script_of(c) != name}
    # The two copies may be of different Unicode versions, which move a character now and then.
    assert len(differing) <= 3, differing


def test_an_older_regex_may_lack_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.vocabulary.scripts.SCRIPTS", ("Klingon", "Latin", "Han"))
    monkeypatch.setattr("surgery.vocabulary.scripts._SCRIPT_OF", _ScriptOfCharacter())
    _matchers.cache_clear()
    try:
        assert [script_of(text) for text in "é中ж"] == ["Latin", "Han", COMMON]
    finally:
        _matchers.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", COMMON),
        (" the", "Latin"),
        ("123", COMMON),
        ("1st", "Latin"),
        (" 中文x", "Han"),
        ("a中", "Latin"),
        ("中a", "Han"),
        ("1234中", "Han"),
        ("μm²s", "Latin"),
        ("😀👍🏽", COMMON),
        ("\ud800", COMMON),
    ],
)
def test_most_letters_decide_and_the_first_of_equals(text: str, expected: str) -> None:
    assert script_of(text) == expected


@given(mixed)
def test_the_script_of_a_text_is_that_of_most_of_its_letters(text: str) -> None:
    counts = dict.fromkeys(SCRIPTS, 0)
    for char in text:
        counts[script_of(char)] += 1
    del counts[COMMON]
    most = max(counts.values())
    script = script_of(text)
    assert counts[script] == most if most else script == COMMON


@given(st.text(st.characters(max_codepoint=0x7F)))
def test_ascii_takes_a_short_cut_to_the_same_answer(text: str) -> None:
    letters = any(_SCRIPT_OF[char] == "Latin" for char in text)
    assert script_of(text) == ("Latin" if letters else COMMON)


@given(st.lists(st.none() | mixed))
def test_scripts_of_goes_text_by_text(texts: list[str | None]) -> None:
    assert scripts_of(iter(texts)) == [BYTES if text is None else script_of(text) for text in texts]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Latin", "Latin"),
        ("hani", "Han"),
        ("CYRILLIC", "Cyrillic"),
        ("old italic", "Old_Italic"),
        (" Phags-Pa ", "Phags_Pa"),
        ("nko", "Nko"),
        ("Qaac", "Coptic"),
        ("zyyy", COMMON),
    ],
)
def test_scripts_go_by_name_or_code(name: str, expected: str) -> None:
    assert check_script(name) == expected


@given(st.sampled_from(sorted(_BY_CODE.items())), st.data())
def test_case_and_separators_do_not_matter(entry: tuple[str, str], data: st.DataObject) -> None:
    code, name = entry
    spelled = data.draw(st.sampled_from([code, name, name.replace("_", " ")]))
    flips = data.draw(st.lists(st.booleans(), min_size=len(spelled), max_size=len(spelled)))
    spelled = "".join(
        char.swapcase() if flip else char for char, flip in zip(spelled, flips, strict=True)
    )
    assert check_script(spelled) == name


@pytest.mark.parametrize(
    "name", ["Klingon", "", "Inherited", "Unknown", "Bytes", "Hrkt", "L", ".*"]
)
def test_no_script_is_refused(name: str) -> None:
    with pytest.raises(
        TokenizerError, match="`keep_scripts`: is not a script of Unicode"
    ) as caught:
        check_script(name)
    assert f"found {name!r}" in str(caught.value)
    assert "by code: Hani" in str(caught.value)


def test_a_misspelt_script_is_corrected() -> None:
    with pytest.raises(TokenizerError, match=r"did you mean Cyrillic\? name a script"):
        check_script("Cirillic")


def test_the_error_for_a_language_explains_how_to_name_scripts() -> None:
    with pytest.raises(TokenizerError) as caught:
        check_script("Japanese\nand " + "more " * 1000)
    message = str(caught.value)
    assert "name a script, not a language" in message
    assert "Japanese is Han, Hiragana and Katakana" in message
    assert "\n" not in message
    assert len(message) < 300


def test_start_up_stays_fast() -> None:
    code = (
        "import sys, surgery.vocabulary.scripts, surgery.tokenizer.kinds\n"
        "import surgery.vocabulary.census\n"
        "print({'regex', 'matplotlib', 'tokenizers', 'difflib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
