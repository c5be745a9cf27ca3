"""Verify's check of ids: one fault at a time in an output that is otherwise clean."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from tests.support import tiny
from tests.support.command import Run
from tests.support.json_files import Edit, change, put

SIZE = 400
SPECIAL_IDS = {"<unk>": 616, "<s>": 617, "</s>": 618, "<pad>": 619}
"""Behind the other tokens, so that an id that was not mapped is another token's or none's."""
NEW_IDS = {"<unk>": 396, "<s>": 397, "</s>": 398, "<pad>": 399}
PADDING = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
           "pad_id": 619, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip


def refer(model: Path) -> None:
    """Let every kind of file in ``model`` refer to tokens: special, rare and common ones."""
    vocab = json.loads((model / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    rare = sorted(vocab, key=vocab.__getitem__)[-4:]
    decoder = {str(i): {"content": t} for t, i in [*SPECIAL_IDS.items(), (rare[3], vocab[rare[3]])]}
    names = {"additional_special_tokens": ["<s>", rare[2]], "added_tokens_decoder": decoder}
    edits: dict[str, Edit] = {
        "tokenizer.json": lambda data: data.update(padding=PADDING),
        "config.json": lambda data: (
            data.pop("eos_token_id"),  # the class's default is 2
            data.update(text_config={"pad_token_id": 619}),
        ),
        "generation_config.json": lambda data: data.update(
            suppress_tokens=[5, vocab[rare[0]], 639, 619]
        ),
        "tokenizer_config.json": lambda data: data.update(pad_token_id=619, **names),
        "processor_config.json": lambda data: data.update(image_token_id=vocab[rare[1]]),
        "vocab.json": lambda data: data.update(vocab),
        "added_tokens.json": lambda data: data.update(SPECIAL_IDS),
    }
    for name, edit in edits.items():
        if not (model / name).exists():
            (model / name).write_text("{}")
        change(model / name, edit)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and what apply makes of it; tests must not change them."""
    root = tmp_path_factory.mktemp("verify")
    model = tiny.save(root / "model", special_first=False)
    refer(model)
    sizes = f"--vocab-size {SIZE} --intermediate-size {tiny.INTERMEDIATE_SIZE}"
    for command in (f"plan {model} {sizes} -o {root}/plan.json", f"apply {root}/plan.json"):
        arguments = [*command.split(), *(["-o", f"{root}/out"] if "apply" in command else [])]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    return model, root / "out"


@pytest.fixture
def out(pruned: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the output to spoil, beside its plan."""
    shutil.copy(pruned[1].with_name("plan.json"), tmp_path)
    return shutil.copytree(pruned[1], tmp_path / "out")


def without_source(out: Path) -> None:
    """Let verify find no source, though there is a plan."""
    change(out / "compact_surgery.json", lambda data: data["plan"].update(source="/nowhere"))


def faults(run: Run, out: Path) -> list[str]:
    """The faults that verify finds in ids; its exit status must say whether it finds any."""
    result = run("verify", out)
    found = [line for line in result.output.splitlines() if line.startswith("FAULT")]
    assert result.exit_code == (1 if found else 0), result.output
    return [line.partition("point at tokens: ")[2] for line in found if "point at tokens" in line]


def special_template(data: Any) -> None:
    data["post_processor"]["special_tokens"]["<s>"]["ids"] = [617]


def shifted(data: Any) -> None:
    """Each special token gets its neighbour's id."""
    entries = list(data["added_tokens_decoder"].values())
    data["added_tokens_decoder"] = dict(
        zip(data["added_tokens_decoder"], entries[1:], strict=False)
    )


def test_a_clean_output_passes(run: Run, pruned: tuple[Path, Path], out: Path) -> None:
    assert faults(run, pruned[1]) == []
    without_source(out)
    assert faults(run, out) == []


def test_apply_maps_every_place(pruned: tuple[Path, Path]) -> None:
    """By hand, for verify's expectations are made by the same functions."""
    data = {path.name: json.loads(path.read_text("utf-8")) for path in pruned[1].glob("*.json")}
    vocab, tokenizer = data["vocab.json"], data["tokenizer_config.json"]
    assert len(vocab) == SIZE - len(SPECIAL_IDS)
    assert data["added_tokens.json"] == NEW_IDS
    assert {e["content"]: int(i) for i, e in tokenizer["added_tokens_decoder"].items()} == NEW_IDS
    assert tokenizer["additional_special_tokens"] == ["<s>"]
    assert tokenizer["pad_token_id"] == 399
    assert data["config.json"]["text_config"] == {"pad_token_id": 399, "vocab_size": SIZE}
    assert data["config.json"]["bos_token_id"] == 397
    assert data["config.json"]["eos_token_id"] == 2
    assert data["generation_config.json"]["suppress_tokens"][::2] == [5, 399]
    source = json.loads((pruned[0] / "vocab.json").read_text("utf-8"))
    rare = sorted(source, key=source.__getitem__)[-4:]
    assert data["generation_config.json"]["suppress_tokens"][1] == vocab[rare[0]]
    assert data["processor_config.json"] == {"image_token_id": vocab[rare[1]]}
    assert not {rare[2], rare[3]} & vocab.keys()


SPOILED: list[tuple[str, Edit, str]] = [
    ("config.json", put(bos_token_id=617), "bos_token_id: expected id 397, found 617"),
    ("config.json", put(bos_token_id=10**9), "bos_token_id: expected id 397, found 1000000000"),
    ("config.json", put(bos_token_id=398), "bos_token_id: expected id 397, found 398"),
    ("config.json", put(bos_token_id=None), "bos_token_id: expected id 397, found none"),
    ("config.json", lambda data: data.pop("eos_token_id"),
     "eos_token_id: expected id 2, found none"),
    ("config.json", lambda data: data["text_config"].update(pad_token_id=619),
     "text_config: pad_token_id: expected id 399, found 619"),
    ("config.json", put(decoder={"unk_index": 400}),
     "decoder: unk_index: expected the id of a token, found 400"),
    ("generation_config.json", lambda data: data["suppress_tokens"].__setitem__(0, 7),
     "suppress_tokens[0]: expected id 5, found 7"),
    ("generation_config.json", lambda data: data["suppress_tokens"].pop(),
     "suppress_tokens[2]: expected id 399, found none"),
    ("generation_config.json", lambda data: data["suppress_tokens"].append(639),
     "suppress_tokens[3]: expected the id of a token, found 639"),
    ("tokenizer_config.json", put(pad_token_id=619), "pad_token_id: expected id 399, found 619"),
    ("tokenizer_config.json", shifted,
     "added_tokens_decoder: 396: expected '<unk>', found '<s>'"),
    ("tokenizer_config.json", shifted, "added_tokens_decoder: 399: expected id 399, found none"),
    ("tokenizer_config.json", lambda data: data["added_tokens_decoder"].update({"7x": "<s>"}),
     "added_tokens_decoder: 7x: is the id of no token"),
    ("tokenizer_config.json", lambda data: data["added_tokens_decoder"].update({"5": "<s>"}),
     "added_tokens_decoder: 5: expected '"),
    ("processor_config.json", put(image_token_id=4), "image_token_id: expected id "),
    ("tokenizer.json", special_template, "post_processor: expected ids [397], found [617]"),
    ("tokenizer.json", lambda data: data["padding"].update(pad_id=396),
     "padding.pad_id: expected ids [399], found [396]"),
    ("tokenizer.json", lambda data: data["added_tokens"][0].update(id=616),
     "'<unk>': expected an id below 400, found 616"),
    ("added_tokens.json", put(**{"<s>": 617}), "'<s>': expected id 397, found 617"),
    ("vocab.json", put(zzz=5), "'zzz': expected id of no token, found 5"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "fault"), SPOILED, ids=[row[2] for row in SPOILED])
def test_an_id_of_another_token_is_named(
    run: Run, out: Path, name: str, edit: Edit, fault: str
) -> None:
    change(out / name, edit)
    lines = faults(run, out)
    assert [line for line in lines if line.startswith(f"{name}: {fault}")], lines


def test_a_whole_vocabulary_may_have_its_sources_ids(
    run: Run, pruned: tuple[Path, Path], tmp_path: Path
) -> None:
    model, out = shutil.copytree(pruned[0], tmp_path / "model"), tmp_path / "out"
    change(model / "generation_config.json", put(eos_token_id=10**6))
    change(model / "added_tokens.json", put(**{"<old>": 7}))
    change(model / "tokenizer.json", lambda data: data["padding"].update(pad_id=10**6))
    sizes = ("--vocab-size", tiny.VOCAB_SIZE, "--intermediate-size", tiny.INTERMEDIATE_SIZE)
    assert run("plan", model, *sizes, "-o", tmp_path / "plan.json").exit_code == 0
    assert run("apply", tmp_path / "plan.json", "-o", out).exit_code == 0
    assert faults(run, out) == []
    change(out / "generation_config.json", put(eos_token_id=2))
    assert faults(run, out) == [
        "generation_config.json: eos_token_id: expected id 1000000, found 2"
    ]


def test_without_a_tokenizer_ids_must_have_rows(run: Run, out: Path) -> None:
    without_source(out)
    (out / "tokenizer.json").unlink()
    assert faults(run, out) == []
    change(out / "config.json", put(bos_token_id=SIZE))
    assert faults(run, out) == ["config.json: bos_token_id: expected the id of a token, found 400"]


@pytest.mark.parametrize("model", [None, {}, {"vocab": 3}, {"vocab": [[]]}])
def test_a_tokenizer_without_a_vocabulary_is_refused(run: Run, out: Path, model: object) -> None:
    change(out / "tokenizer.json", put(model=model))
    result = run("verify", out)
    assert result.exit_code == 2
    assert "tokenizer.json: has no readable vocabulary; apply the plan again" in result.stderr


@pytest.mark.parametrize("key", ["pad_token", "additional_special_tokens"])
def test_a_token_that_went_may_not_be_named(
    run: Run, out: Path, pruned: tuple[Path, Path], key: str
) -> None:
    names = json.loads((pruned[0] / "tokenizer_config.json").read_text("utf-8"))
    token = names["additional_special_tokens"][1]
    value = [token] if key.endswith("s") else token
    change(out / "tokenizer_config.json", put(**{key: value}))
    (line,) = faults(run, out)
    assert line.startswith("tokenizer_config.json: ")
    assert ("names a removed token" in line) == key.endswith("s")
    assert (f"token {token!r}: has a role but is removed" in line) != key.endswith("s")


@pytest.mark.parametrize(
    ("name", "edit", "fault"),
    [
        ("config.json", put(bos_token_id=617), "bos_token_id: expected the id of a token, found"),
        ("tokenizer.json", special_template, "post_processor: expected ids of tokens, found [617]"),
        ("tokenizer_config.json", shifted, "added_tokens_decoder: 396: expected '<unk>', found"),
        ("added_tokens.json", put(**{"<s>": 617}), "'<s>': expected id 397, found 617"),
    ],
)
def test_without_the_source_an_id_must_be_a_tokens(
    run: Run, out: Path, name: str, edit: Edit, fault: str
) -> None:
    without_source(out)
    change(out / name, edit)
    assert faults(run, out)[0].startswith(f"{name}: {fault}")
