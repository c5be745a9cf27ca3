"""The script that a text is written in, by Unicode's Script property; the characters of bytes."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache

from surgery.errors import TokenizerError

COMMON = "Common"
"""For characters of no script: digits, punctuation, emoji, spaces, marks, private use."""
BYTES = "Bytes"
"""In place of a script, for a token that is not made of whole characters."""

# ISO 15924 code and Unicode name of every script of Unicode 18. Not here: Inherited and Unknown,
# which hold no letters, and Katakana_Or_Hiragana, which holds no characters at all.
_NAMES = """
Adlm:Adlam Aghb:Caucasian_Albanian Ahom:Ahom Arab:Arabic Armi:Imperial_Aramaic Armn:Armenian
Avst:Avestan Bali:Balinese Bamu:Bamum Bass:Bassa_Vah Batk:Batak Beng:Bengali Berf:Beria_Erfe
Bhks:Bhaiksuki Bopo:Bopomofo Brah:Brahmi Brai:Braille Bugi:Buginese Buhd:Buhid Cakm:Chakma
Cans:Canadian_Aboriginal Cari:Carian Cham:Cham Cher:Cherokee Chrs:Chorasmian Copt:Coptic
Cpmn:Cypro_Minoan Cprt:Cypriot Cyrl:Cyrillic Deva:Devanagari Diak:Dives_Akuru Dogr:Dogra
Dsrt:Deseret Dupl:Duployan Egyp:Egyptian_Hieroglyphs Elba:Elbasan Elym:Elymaic Ethi:Ethiopic
Gara:Garay Geor:Georgian Glag:Glagolitic Gong:Gunjala_Gondi Gonm:Masaram_Gondi Goth:Gothic
Gran:Grantha Grek:Greek Gujr:Gujarati Gukh:Gurung_Khema Guru:Gurmukhi Hang:Hangul Hani:Han
Hano:Hanunoo Hatr:Hatran Hebr:Hebrew Hira:Hiragana Hluw:Anatolian_Hieroglyphs Hmng:Pahawh_Hmong
Hmnp:Nyiakeng_Puachue_Hmong Hung:Old_Hungarian Ital:Old_Italic Java:Javanese Jurc:Jurchen
Kali:Kayah_Li Kana:Katakana Kawi:Kawi Khar:Kharoshthi Khmr:Khmer Khoj:Khojki
Kits:Khitan_Small_Script Knda:Kannada Krai:Kirat_Rai Kthi:Kaithi Lana:Tai_Tham Laoo:Lao
Latn:Latin Lepc:Lepcha Limb:Limbu Lina:Linear_A Linb:Linear_B Lisu:Lisu Lyci:Lycian Lydi:Lydian
Mahj:Mahajani Maka:Makasar Mand:Mandaic Mani:Manichaean Marc:Marchen Medf:Medefaidrin
Mend:Mende_Kikakui Merc:Meroitic_Cursive Mero:Meroitic_Hieroglyphs Mlym:Malayalam Modi:Modi
Mong:Mongolian Mroo:Mro Mtei:Meetei_Mayek Mult:Multani Mymr:Myanmar Nagm:Nag_Mundari
Nand:Nandinagari Narb:Old_North_Arabian Nbat:Nabataean Newa:Newa Nkoo:Nko Nshu:Nushu Ogam:Ogham
Olck:Ol_Chiki Onao:Ol_Onal Orkh:Old_Turkic Orya:Oriya Osge:Osage Osma:Osmanya Ougr:Old_Uyghur
Palm:Palmyrene Pauc:Pau_Cin_Hau Pcun:Proto_Cuneiform Perm:Old_Permic Phag:Phags_Pa
Phli:Inscriptional_Pahlavi Phlp:Psalter_Pahlavi Phnx:Phoenician Plrd:Miao
Prti:Inscriptional_Parthian Qaac:Coptic Rjng:Rejang Rohg:Hanifi_Rohingya Runr:Runic
Samr:Samaritan Sarb:Old_South_Arabian Saur:Saurashtra Seal:Seal Sgnw:SignWriting Shaw:Shavian
Shrd:Sharada Sidd:Siddham Sidt:Sidetic Sind:Khudawadi Sinh:Sinhala Sogd:Sogdian Sogo:Old_Sogdian
Sora:Sora_Sompeng Soyo:Soyombo Sund:Sundanese Sunu:Sunuwar Sylo:Syloti_Nagri Syrc:Syriac
Tagb:Tagbanwa Takr:Takri Tale:Tai_Le Talu:New_Tai_Lue Taml:Tamil Tang:Tangut Tavt:Tai_Viet
Tayo:Tai_Yo Telu:Telugu Tfng:Tifinagh Tglg:Tagalog Thaa:Thaana Thai:Thai Tibt:Tibetan
Tirh:Tirhuta Tnsa:Tangsa Todr:Todhri Tols:Tolong_Siki Toto:Toto Tutg:Tulu_Tigalari Ugar:Ugaritic
Vaii:Vai Vith:Vithkuqi Wara:Warang_Citi Wcho:Wancho Xpeo:Old_Persian Xsux:Cuneiform Yezi:Yezidi
Yiii:Yi Zanb:Zanabazar_Square Zyyy:Common
"""
_BY_CODE = dict(entry.split(":") for entry in _NAMES.split())
# The lookup tries these in order: the scripts with most tokens come first.
_FREQUENT = (COMMON, "Latin", "Han", "Hangul", "Cyrillic", "Arabic")
SCRIPTS = tuple(dict.fromkeys([*_FREQUENT, *_BY_CODE.values()]))
"""Every name that :func:`script_of` can return."""


class _ScriptOfCharacter(dict[str, str]):
    """Character → script, looked up once for each character; at most as large as Unicode."""

    def __missing__(self, char: str) -> str:
        script = next((name for name, matches in _matchers() if matches(char)), COMMON)
        self[char] = script
        return script


_SCRIPT_OF = _ScriptOfCharacter()


@cache
def _matchers() -> list[tuple[str, Callable[[str], object]]]:
    """One test per script; scripts that an older `regex` does not know yet are left out."""
    import regex

    matchers: list[tuple[str, Callable[[str], object]]] = []
    for name in SCRIPTS:
        with suppress(regex.error):
            matchers.append((name, regex.compile(rf"\p{{Script={name}}}").match))
    return matchers


def script_of(text: str) -> str:
    """Return the Unicode script of most of the letters of ``text``, such as ``"Han"``.

    A letter is any character with a script of its own, so Thai vowel signs and Devanagari digits
    count too. Of scripts with equally many letters the first wins; without letters it is "Common".
    """
    if text.isascii():
        return "Latin" if text.lower() != text.upper() else COMMON
    scripts = set(map(_SCRIPT_OF.__getitem__, text))
    scripts.discard(COMMON)
    if len(scripts) > 1:
        letters = Counter(map(_SCRIPT_OF.__getitem__, text))
        del letters[COMMON]
        return max(letters, key=letters.__getitem__)
    return scripts.pop() if scripts else COMMON


def scripts_of(texts: Iterable[str | None]) -> list[str]:
    """Return the script of each text; "Bytes" for None, which stands for part of a character."""
    return [BYTES if text is None else script_of(text) for text in texts]


def _loose(name: str) -> str:
    """Spell ``name`` so that case, spaces, hyphens and underscores do not matter."""
    return "".join(name.split()).replace("-", "").replace("_", "").lower()


def check_script(name: str, option: str = "keep_scripts") -> str:
    """Return Unicode's name of a script, given by its name or four-letter code in any case.

    Args:
        name: What a user calls the script.
        option: Where the user does so, for the error.

    Raises:
        TokenizerError: there is no such script.
    """
    names = {_loose(code): script for code, script in _BY_CODE.items()}
    names.update({_loose(script): script for script in SCRIPTS})
    script = names.get(_loose(name))
    if script is not None:
        return script
    from difflib import get_close_matches

    close = [names[key] for key in get_close_matches(_loose(name), names, n=1, cutoff=0.75)]
    raise TokenizerError(
        f"`{option}`",
        "is not a script of Unicode",
        found=repr(name[:40]),
        fix=(f"did you mean {close[0]}? " if close else "")
        + "name a script, not a language: Latin, Cyrillic, Arabic, Devanagari, Hangul, Han (or "
        "by code: Hani); Japanese is Han, Hiragana and Katakana",
    )


def lost_text(missing: Sequence[int]) -> list[str]:
    """Return a line on the characters that a byte-level vocabulary without these bytes loses.

    Bytes that are in no UTF-8 text lose none.
    """
    kinds: dict[str, list[str]] = {}
    for first, last in characters_with(missing):
        span = f"U+{first:04X}" if first == last else f"U+{first:04X}-U+{last:04X}"
        kinds.setdefault(_kind_of_characters(first, last), []).append(span)
    if not kinds:
        return []
    named = "; ".join(f"{kind} {', '.join(spans)}" for kind, spans in kinds.items())
    return [
        f"the source's tokenizer loses some characters, with or without this cut, for its "
        f"vocabulary lacks {len(missing)} of the 256 bytes: {named}"
    ]


def characters_with(missing: Sequence[int]) -> list[tuple[int, int]]:
    """First and last code point of each run of characters that need one of these bytes."""
    if any(0x80 <= byte <= 0xBF for byte in missing):  # within characters of every script
        return [(0x80, 0x10FFFF)]
    spans: list[tuple[int, int]] = []
    for byte in missing:
        if byte < 0x80:
            first, last = byte, byte
        elif 0xC2 <= byte <= 0xDF:
            first, last = (byte & 0x1F) << 6, (byte & 0x1F) << 6 | 0x3F
        elif 0xE0 <= byte <= 0xEF:
            first, last = max((byte & 0xF) << 12, 0x800), (byte & 0xF) << 12 | 0xFFF
        elif 0xF0 <= byte <= 0xF4:
            first = max((byte & 0x7) << 18, 0x10000)
            last = min((byte & 0x7) << 18 | 0x3FFFF, 0x10FFFF)
        else:  # in no UTF-8 text
            continue
        if spans and spans[-1][1] + 1 == first:
            first = spans.pop()[0]
        spans.append((first, last))
    return spans


def _kind_of_characters(first: int, last: int) -> str:
    """What the characters from ``first`` to ``last`` are, by some of them."""
    some = list(map(chr, range(first, last + 1, max(1, (last - first) // 256))))
    categories = set(map(unicodedata.category, some))
    if categories <= {"Cn", "Co", "Cs"}:
        return "unassigned or private characters"
    if categories == {"Cc"}:
        return "control characters"
    scripts = sorted(set(map(script_of, some)) - {COMMON}) if last < 0x10000 else []
    return f"characters ({', '.join(scripts)})" if 0 < len(scripts) < 5 else "characters"
