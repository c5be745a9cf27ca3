"""The table of model types is what transformers builds: derived again, some come out the same."""

import json

import pytest

from surgery.families.default_ids import DERIVED, derived
from surgery.families.schema import Family
from surgery.families.table import (
    BY_HAND,
    FAMILIES,
    ONLY_VOCABULARY,
    REFUSED,
    WRAPPERS,
    read_entry,
)
from tests.support.sample import sampled
from tools.derive.__main__ import written
from tools.derive.configs import registered
from tools.derive.entry import derive


@pytest.mark.parametrize("model_type", sampled(derived(), ("llama", "mixtral"), 3))
def test_derived_again_an_entry_is_the_same(model_type: str) -> None:
    assert derive(model_type) == derived()[model_type]


def test_every_registered_type_is_in_the_table_or_refused_for_a_reason() -> None:
    assert registered().keys() == (FAMILIES.keys() | REFUSED.keys()) & registered().keys()
    assert all(REFUSED.values())


def test_the_file_is_as_the_tool_writes_it() -> None:
    text = DERIVED.read_text("utf-8")
    assert text == written(json.loads(text))
    assert max(map(len, text.splitlines())) < 200


def test_what_loses_vocabulary_alone_says_why() -> None:
    families = {n: each for n, each in FAMILIES.items() if isinstance(each, Family)}
    said = {n: each.only_vocabulary for n, each in families.items() if not each.widths}
    assert all(said.values())
    assert set(said) - BY_HAND.keys() == ONLY_VOCABULARY.keys()


def test_every_line_is_read() -> None:
    for name, entry in derived().items():
        family = read_entry(name, entry)
        assert family.tied == entry["tied"]
        assert FAMILIES[name] == family or name in WRAPPERS


def test_a_line_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="is no line of this table"):
        read_entry("x", {"tied": False, "widths": {}, "tensors": {"a.weight": "(ffn, -)"}})
