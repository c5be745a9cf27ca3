"""Tokens that only the files beside tokenizer.json name: kept with their rows, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.api import apply_plan, make_plan, verify_checkpoint
from surgery.errors import TokenizerError
from surgery.tokenizer.legacy import named_tokens
from surgery.tokenizer.tokenizer_file import TokenizerFile
from tests.support import tiny
from tests.support.json_files import change, put

SIZE = 400
PAD: dict[str, Any] = {"pad_token": "[PAD]"}
LIST: dict[str, Any] = {"additional_special_tokens": ["<a>", "<b>", "<s>"]}
EXTRA: dict[str, Any] = {"extra_special_tokens": ["<c>", "[PAD]"]}
DESCRIBED: dict[str, Any] = {"pad_token": {"content": "[PAD]", "lstrip": True, "special": True}}
DECODER: dict[str, Any] = {
    "added_tokens_decoder": {
        str(tiny.TOKENS + 1): {"content": "<e>", "special": False},
        str(tiny.TOKENS): {"content": "<d>", "special": True},
    }
}
CONFIG, SHARED, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMED: dict[str, dict[str, dict[str, Any]]] = {
    "none": {},
    "role": {CONFIG: PAD},
    "described": {SHARED: DESCRIBED},
    "list": {CONFIG: LIST},
    "extra": {CONFIG: PAD | EXTRA},
    "shared": {SHARED: PAD},
    "shared list": {CONFIG: {"sep_token": "[SEP]"}, SHARED: EXTRA},
    "decoder": {CONFIG: DECODER | PAD},
    "decoder hides the map": {CONFIG: DECODER, SHARED: PAD},
    "added": {ADDED: {"<d>": tiny.TOKENS}, CONFIG: PAD},
    "model's own": {CONFIG: {"image_token": "<image>"} | PAD},
    "roles": {CONFIG: {"mask_token": "[MASK]", "cls_token": "[CLS]", **PAD, **LIST}},
    "named twice": {CONFIG: PAD | {"sep_token": "[PAD]"}},
}


def named(path: Path, files: dict[str, dict[str, Any]]) -> Path:
    """A tiny checkpoint whose ``files`` name tokens; its tokenizer.json has TOKENS of 640."""
    source = tiny.save(path)
    for name, entries in files.items():
        if not (source / name).exists():
            (source / name).write_text("{}")
        change(source / name, put(**entries))
    return source


def ids(directory: Path) -> dict[str, int]:
    return dict(AutoTokenizer.from_pretrained(directory).get_vocab())


@pytest.mark.parametrize("key", NAMED)
def test_every_id_that_a_loader_gives_has_its_row(tmp_path: Path, key: str) -> None:
    source, out = named(tmp_path / "source", NAMED[key]), tmp_path / "out"
    before = ids(source)
    assert TokenizerFile.open(source).token_ids == before
    assert (len(before) > tiny.TOKENS) == (key != "none")
    plan = make_plan(source, vocab_size=SIZE)
    apply_plan(plan, output=out)
    report = verify_checkpoint(out)
    assert report.ok, report.table()
    after = ids(out)
    assert sorted(after.values()) == list(range(SIZE))
    rows = [load_file(d / "model.safetensors")["model.embed_tokens.weight"] for d in (source, out)]
    for token, new in after.items():
        assert torch.equal(rows[1][new], rows[0][before[token]]), token
    assert before.keys() - after.keys() <= set(named_in_file(source))
    seen = AutoTokenizer.from_pretrained(out)
    assert len(seen) == SIZE
    AutoModelForCausalLM.from_pretrained(out)(torch.tensor([list(range(SIZE))]))
    known = AutoTokenizer.from_pretrained(source)
    assert seen.special_tokens_map == known.special_tokens_map
    for token in after.keys() - named_in_file(source):
        text = f"one {token} two"
        assert seen.decode(seen(text)["input_ids"]) == known.decode(known(text)["input_ids"])
        assert after[token] in seen(text)["input_ids"]


def named_in_file(source: Path) -> set[str]:
    data = json.loads((source / "tokenizer.json").read_text("utf-8"))
    return {*data["model"]["vocab"], *(token["content"] for token in data["added_tokens"])}


@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: {"added_tokens_decoder": {"630": {"content": "<e>"}}}},
        {ADDED: {"<e>": 3}},
        {CONFIG: {"image_token": "<image>", "extra_special_tokens": ["<c>"]}},
    ],
    ids=["gap", "taken", "4 and 5"],
)
def test_a_token_of_unknown_id_is_refused_by_name(
    tmp_path: Path, files: dict[str, dict[str, Any]]
) -> None:
    source = named(tmp_path / "source", files)
    with pytest.raises(TokenizerError, match=r"'<(e|image)>': is not in tokenizer.json, and") as e:
        make_plan(source, vocab_size=SIZE)
    assert "save_pretrained" in str(e.value)
    make_plan(source, vocab_size=tiny.VOCAB_SIZE)  # whose files are copied as they are


@pytest.mark.parametrize("key", [key for key in NAMED if key != "none"])
@pytest.mark.parametrize("known", [True, False], ids=["source", "alone"])
def test_verify_finds_what_a_loader_adds_behind_the_rows(
    tmp_path: Path, key: str, known: bool
) -> None:
    source, out = named(tmp_path / "source", {}), tmp_path / "out"
    apply_plan(make_plan(source, vocab_size=SIZE), output=out)
    for name, entries in NAMED[key].items():
        moved = json.dumps(entries).replace("620", "400").replace("621", "401")
        if not (out / name).exists():
            (out / name).write_text("{}")
        change(out / name, put(**json.loads(moved)))
    if not known:
        (out / "compact_surgery.json").unlink()
    added = named_tokens(json.loads((out / "tokenizer.json").read_text("utf-8")), out)
    found = ids(out)
    assert {token["content"]: token["id"] for token in added} == {
        token: id_ for token, id_ in found.items() if id_ >= SIZE
    }
    faults = "\n".join(verify_checkpoint(out).checks["ids in JSON files point at tokens"])
    for token in added:
        assert f"lacks {token['content']!r}: expected an id below 400" in faults
