import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.errors import BudgetError
from surgery.planning.sizes import VOCAB_PADDING, Steps, parse_target, steps
from surgery.verify.engines import (
    CONSTRAINTS,
    TP,
    Constraint,
    Effect,
    EngineNote,
    ModelFacts,
    by_engine,
    engine_notes,
    engine_table,
    facts_of,
    planned_notes,
    shared,
)
from tests.support import tiny
from tests.support.plans import layout_of

SERVED = ModelFacts(
    misread_vocab_sizes=(32016, 49152),
    vocab_size=32000,
    widths={"intermediate_size": 2048 * 4},
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    tokens=32000,
    source_vocab_size=128256,
)
"""A checkpoint that breaks nothing."""


def width(size: int) -> dict[str, Any]:
    return {"widths": {"intermediate_size": size}}


def experts(size: int) -> dict[str, Any]:
    key = "moe_intermediate_size"
    return {"widths": {key: size}, "expert_keys": (key,)}


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("vLLM", "whole number of heads", {"num_attention_heads": 14}, {"num_attention_heads": 16}),
    ("vLLM", "neither split over", {"num_key_value_heads": 3}, {"num_key_value_heads": 2}),
    ("vLLM", "whole number of channels", width(1026), width(8192)),
    ("vLLM", "no whole groups", width(11008), width(11264)),
    ("llama.cpp", "more than the embedding", {"tokens": 32001}, {"tokens": 31999}),
    ("llama.cpp", "a pruned byte-level BPE", {"byte_level": True}, {"byte_level": False}),
    ("llama.cpp", "sets special tokens", {"vocab_size": 49152}, {"vocab_size": 49280}),
    ("llama.cpp", "no multiple of 32,", width(1040), width(1056)),
    ("llama.cpp", "no multiple of 256, so down_proj", width(1408), width(1536)),
    (
        "llama.cpp",
        "no K-quant; nor has hidden_size any",
        {"hidden_size": 576, **width(1408)},
        {"hidden_size": 768, **width(1408)},
    ),
    ("llama.cpp", "no multiple of 256, so emb", {"hidden_size": 576}, {"hidden_size": 768}),
    ("transformers 5", "no whole 16 bytes", experts(1028), experts(1032)),
    ("MLX", "no multiple of 64", width(1056), width(1088)),
    ("torchao", "no multiple of 16", width(1032), width(1040)),
    ("torchao", "no multiple of 128", width(1088), width(1152)),
    ("PyTorch", "no multiple of 8", {"vocab_size": 32001}, {"vocab_size": 32008}),
    ("PyTorch", "no multiple of 8", width(1028), width(1032)),
]
"""Engine, part of the line, what breaks it, what satisfies it: in the order of the table."""


# --- steps -----------------------------------------------------------------------------------

sizes = st.integers(1, 400)


@given(multiple_of=sizes, tp=sizes, group=sizes, times=st.integers(1, 50))
def test_any_multiple_of_the_steps_can_be_served(
    multiple_of: int, tp: int, group: int, times: int
) -> None:
    found = steps(multiple_of, tp=tp, group=group)
    wide, vocab = times * found.width, times * found.vocab
    assert wide % multiple_of == vocab % multiple_of == 0
    assert wide % tp == 0
    assert wide // tp % group == 0
    assert vocab % tp == 0
    padded = -(-vocab // VOCAB_PADDING) * VOCAB_PADDING
    assert padded % tp == 0


@given(multiple_of=st.integers(1, 24), tp=st.integers(1, 24), group=st.integers(1, 24))
def test_no_smaller_width_step_would_do(multiple_of: int, tp: int, group: int) -> None:
    step = steps(multiple_of, tp=tp, group=group).width
    assert not any(size % multiple_of == size % (tp * group) == 0 for size in range(1, step))


@pytest.mark.parametrize(
    ("text", "multiple_of", "expected"),
    [
        ("tp=4,group=128", 128, Steps(vocab=128, width=512)),
        ("group=128,tp=4", 128, Steps(vocab=128, width=512)),
        (" tp = 4 , group = 128 ", 128, Steps(vocab=128, width=512)),
        ("tp=8", 128, Steps(vocab=128, width=128)),
        ("group=64", 48, Steps(vocab=48, width=192)),
        ("tp=3", 16, Steps(vocab=192, width=48)),
        ("tp=256", 128, Steps(vocab=256, width=256)),
        ("tp=1,group=1", 1, Steps(vocab=1, width=1)),
    ],
)
def test_target(text: str, multiple_of: int, expected: Steps) -> None:
    assert parse_target(text, multiple_of) == expected


@given(tp=sizes, group=sizes, multiple_of=sizes)
def test_order_of_the_keys_does_not_matter(tp: int, group: int, multiple_of: int) -> None:
    found = parse_target(f"tp={tp},group={group}", multiple_of)
    assert found == parse_target(f"group={group},tp={tp}", multiple_of)
    assert found == steps(multiple_of, tp=tp, group=group)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`target`: has no such key: expected tp or group, found ''; write it as"),
        ("tp=4,", "`target`: has no such key: expected tp or group, found ''; write it as"),
        ("pp=2", "`target`: has no such key: expected tp or group, found 'pp'; write it as"),
        ("TP=2", "`target`: has no such key: expected tp or group, found 'TP'; write it as"),
        ("tp=2,tp=2", "`target`: names a key twice: expected tp once, found 'tp=2,tp=2'; write"),
        ("tp", "`target`: has no size for tp: expected a whole number from 1 to 999999, found ''"),
        ("group=0", "`target`: has no size for group: expected a whole number from 1 to 999999,"),
        ("tp=-4", "`target`: has no size for tp: expected a whole number from 1 to 999999, found"),
        ("tp=4.0", "`target`: has no size for tp: expected a whole number from 1 to 999999, found"),
        ("tp=４", "`target`: has no size for tp: expected a whole number from 1 to 999999, found"),
        ("tp=4=4", "`target`: has no size for tp: expected a whole number from 1 to 999999, found"),
        ("tp=" + "9" * 5000, "`target`: has no size for tp: expected a whole number from 1 to"),
        ("tp=4\ngroup=2", "`target`: has no size for tp: expected a whole number from 1 to 999999"),
    ],
)
def test_bad_target(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match="^" + re.escape(message)) as caught:
        parse_target(text, 128)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
def test_any_text_is_a_target_or_one_line(text: str) -> None:
    try:
        message = f"`target`: {parse_target(text, 128)}"
    except BudgetError as error:
        message = str(error)
    assert message.startswith("`target`: ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("multiple_of", [0, -128])
def test_bad_multiple_of(multiple_of: int) -> None:
    message = f"`multiple_of`: is no valid step: expected 1 or more, found {multiple_of}; give a"
    with pytest.raises(BudgetError, match=re.escape(message)):
        parse_target("tp=2", multiple_of)


# --- constraints -----------------------------------------------------------------------------


def test_a_size_for_every_engine_breaks_nothing() -> None:
    assert engine_notes(SERVED) == []
    assert engine_notes(SERVED) == []


@given(st.integers(1, 64))
def test_widths_in_steps_of_the_target_break_nothing(times: int) -> None:
    width_step = parse_target("tp=8,group=128", 256).width
    facts = replace(SERVED, widths={"moe_intermediate_size": times * width_step})
    assert engine_notes(facts) == []


@pytest.mark.parametrize(
    ("case", "constraint"),
    list(zip(CASES, CONSTRAINTS, strict=True)),
    ids=[f"{engine}: {problem}" for engine, problem, *_ in CASES],
)
def test_every_entry_broken_and_satisfied(
    case: tuple[str, str, dict[str, Any], dict[str, Any]], constraint: Constraint
) -> None:
    engine, problem, broken, satisfied = case
    notes = engine_notes(replace(SERVED, **broken))
    (found,) = (note for note in notes if constraint.problem in note.text)
    assert found.engine.startswith(engine)
    assert found.effect == constraint.effect
    assert problem in found.text
    subject = found.size if constraint.of in ("widths", "experts") else constraint.of
    assert found.text.startswith(f"{subject} ")
    assert found.text.endswith(f" ({constraint.fix})")
    assert "\n" not in found.text
    satisfying = engine_notes(replace(SERVED, **satisfied))
    assert not any(constraint.problem in note.text for note in satisfying)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda entry: entry.problem)
def test_every_entry_names_a_repository_and_a_file(constraint: Constraint) -> None:
    assert re.match(r"[\w.-]+/[\w.-]+ [\w./{},-]*/?[\w./{},-]+\.(py|cpp|h)", constraint.source)
    assert "http" not in constraint.source


def test_each_effect_of_an_engine_has_one_line() -> None:
    facts = replace(SERVED, widths={"moe_intermediate_size": 768, "intermediate_size": 1408})
    assert by_engine(engine_notes(facts)) == [
        "vLLM, SGLang: cannot: moe_intermediate_size 768 at tp=4, 8 gives a rank no whole groups "
        "of 128, so AWQ, GPTQ and FP8 in such groups do not load (`target` tp=N,group=128, or "
        "smaller groups); intermediate_size 1408 at tp=2, 4, 8 gives a rank no whole "
        "groups of 128, so AWQ, GPTQ and FP8 in such groups do not load (`target` tp=N,group=128, "
        "or smaller groups)",
        "llama.cpp: falls back: intermediate_size 1408 is no multiple of 256, so down_proj gets no "
        "K-quant (`multiple_of` 256; a ratio then changes V', too)",
    ]


def test_only_notes_that_another_plan_can_change_are_shown(llama: Path) -> None:
    facts = replace(SERVED, num_attention_heads=9, byte_level=True, **width(1408))
    cut = surgery.make_plan(llama, vocab_size=512)
    notes = engine_notes(facts, cut)
    assert [note.size for note in notes if note.chosen] == ["vocab_size"]
    assert len(engine_table(notes).splitlines()) == 2  # the heading, and llama.cpp
    everything = engine_table(notes, every=True).splitlines()
    assert everything[0] == "engines:"
    assert len(everything) == 1 + len({(note.engine, note.effect) for note in notes}) > 2
    assert engine_table(engine_notes(facts)) == ""


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(list(Effect)), st.booleans())))
def test_the_table_has_a_line_for_each_effect_of_an_engine(
    found: list[tuple[str, Effect, bool]],
) -> None:
    notes = [EngineNote(e, effect, "size", f"n{n}", c) for n, (e, effect, c) in enumerate(found)]
    for every in (False, True):
        shown = [note for note in notes if every or note.chosen]
        lines = engine_table(notes, every=every).splitlines()
        heads = [f"  {note.engine}: {note.effect.value}: " for note in shown]
        assert len(lines) == (1 + len(set(heads)) if shown else 0)
        for note, head in zip(shown, heads, strict=True):
            (line,) = (line for line in lines[1:] if line.startswith(head))
            assert note.text in line


def test_a_plan_has_the_notes_of_its_output(llama: Path, tmp_path: Path) -> None:
    plan = surgery.make_plan(llama, vocab_size=500)
    surgery.apply_plan(plan, output=tmp_path / "out")
    report = surgery.verify_checkpoint(tmp_path / "out", plan=plan)
    assert planned_notes(plan, layout_of(llama)) == report.engines
    assert any(note.size == "vocab_size" and note.chosen for note in report.engines)
    assert all(note.chosen == (note.size == "vocab_size") for note in report.engines)


def test_a_degree_that_heads_rule_out_is_not_told_again_of_widths() -> None:
    facts = replace(SERVED, num_attention_heads=9, num_key_value_heads=3, **width(1408))
    (on_gpus,) = (note for note in engine_notes(facts) if note.engine.startswith("vLLM"))
    assert "num_attention_heads 9 at tp=2, 4, 8" in on_gpus.text


def test_the_worst_speaks_for_an_engine() -> None:
    notes = engine_notes(replace(SERVED, **width(1001)))
    assert sum(note.engine == "llama.cpp" for note in notes) == 1
    assert sum(note.engine == "torchao" for note in notes) == 1
    assert any("stays F16" in note.text for note in notes)


def test_what_the_facts_decide_is_told_beside_a_size() -> None:
    facts = replace(SERVED, vocab_size=32016, byte_level=True)
    notes = engine_notes(facts)
    assert {note.engine for note in notes} == {"llama.cpp"}
    assert [note.effect for note in notes] == [Effect.CANNOT, Effect.MISREADS]


@pytest.mark.parametrize("vocab_size", [32016, 49152])
def test_a_vocabulary_that_stays_or_is_read_elsewhere_is_not_misread(vocab_size: int) -> None:
    facts = replace(SERVED, vocab_size=vocab_size)
    assert len(engine_notes(facts)) == 1
    assert engine_notes(replace(facts, source_vocab_size=vocab_size)) == []
    assert engine_notes(replace(facts, source_vocab_size=None)) == []
    assert engine_notes(replace(facts, misread_vocab_sizes=())) == []


def test_a_whole_byte_level_vocabulary_is_known_to_llama_cpp() -> None:
    facts = replace(SERVED, vocab_size=128256, byte_level=True)
    assert engine_notes(facts) == []


@pytest.mark.parametrize(
    ("heads", "served"), [(1, TP), (2, TP), (4, TP), (8, TP), (3, ()), (6, (2,)), (12, (2, 4))]
)
def test_key_value_heads_are_split_or_repeated(heads: int, served: tuple[int, ...]) -> None:
    assert tuple(tp for tp in TP if shared(heads, tp)) == served


def test_tokens_without_a_row_are_left_out_where_there_is_a_tokenizer_model(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    assert facts_of(layout_of(source), None).tokens == tiny.TOKENS
    (source / "tokenizer.model").write_bytes(b"")
    assert facts_of(layout_of(source), None).tokens is None


@pytest.mark.parametrize("unknown", [None, 0])
def test_what_is_not_known_is_not_judged(unknown: int | None) -> None:
    facts = ModelFacts(
        32000,
        {},
        hidden_size=unknown,
        num_attention_heads=unknown,
        num_key_value_heads=unknown,
        tokens=unknown,
    )
    assert engine_notes(facts) == []


@given(size=st.integers(1, 40000), vocab_size=st.integers(1, 300000))
def test_every_line_names_a_size_and_what_to_do(size: int, vocab_size: int) -> None:
    facts = replace(SERVED, vocab_size=vocab_size, tokens=None, widths={"ffn_dim": size})
    for note in engine_notes(facts):
        assert re.fullmatch(r"\w+ \d+ .+ \(.+\)", note.text)
        assert note.text.startswith((f"ffn_dim {size} ", f"vocab_size {vocab_size} "))


def test_effects_are_told_apart() -> None:
    assert {constraint.effect for constraint in CONSTRAINTS} == set(Effect)
