"""Models that lose vocabulary alone: all that is computed of kept tokens is the source's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.api import apply_plan
from tests.support import tiny_encoders
from tests.support.command import Run
from tests.support.json_files import change
from tests.support.plans import layout_of, random_plan
from tests.support.tiny_encoders import ENCODER_DECODERS, VOCABULARY_ALONE, head_of

SMALLER = 400


SEEN: dict[str, dict[str, tuple[int, ...]]] = {
    "whisper": {"input_features": (2, 8, 40)},
    "udop": {"bbox": (2, 12, 4)},
    "pix2struct": {"flattened_patches": (2, 6, 18)},
    "pp_formulanet": {"pixel_values": (2, 3, 64, 64)},
    "vision-encoder-decoder": {"pixel_values": (2, 3, 16, 16)},
    "blip": {"pixel_values": (2, 3, 16, 16)},
    "kosmos-2": {"pixel_values": (2, 3, 16, 16)},
}
"""What models read or hear beside text; numbers from 0 to 1."""

NO_TEXT = ("whisper", "pix2struct", "pp_formulanet", "vision-encoder-decoder")
"""Models whose encoder is given no text."""


def logits(path: Path, key: str, ids: torch.Tensor) -> torch.Tensor:
    """Of a decoder that is given ``ids``, as is the encoder; or noise, where that sees or hears."""
    given: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, shape in SEEN.get(key.partition(":")[0], {}).items():
            given[name] = torch.rand(shape)
    if key == "kosmos-2":  # four of the tokens are the image
        given["image_embeds_position_mask"] = torch.arange(ids.shape[1]).expand(ids.shape) < 4
    if key.partition(":")[0] not in NO_TEXT:
        given["input_ids"] = ids
    if key in ENCODER_DECODERS:
        given["decoder_input_ids"] = ids.flip(0)
    with torch.no_grad():
        made = tiny_encoders.load(path, head_of(key))(**given)
    result: torch.Tensor = made.logits
    return result


@pytest.mark.parametrize("key", VOCABULARY_ALONE)
def test_a_smaller_vocabulary_changes_no_bit(tmp_path: Path, run: Run, key: str) -> None:
    source = tiny_encoders.save(tmp_path / "source", key, head_of(key))
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    planned = run("plan", source, "--vocab-size", SMALLER, "-o", plan)
    assert planned.exit_code == 0, planned.output
    for step in (("apply", plan, "-o", out), ("verify", out)):
        result = run(*step)
        assert result.exit_code == 0, result.output
    kept = torch.from_numpy(random_plan(source, SMALLER, dict(layout_of(source).widths)).ids().kept)
    new = torch.randint(5, SMALLER, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = logits(source, key, kept[new])[..., kept]
    assert expected.std() > 0.05
    assert torch.equal(logits(out, key, new), expected)
    old, made = (layout_of(path).config for path in (source, out))
    ids = [(made[name], old[name]) for name in old if name.endswith("_token_id") and old[name]]
    assert len(ids) > 2
    assert all(int(kept[new_id]) == old_id for new_id, old_id in ids)


def test_a_bias_of_logits_and_a_table_under_each_name(tmp_path: Path) -> None:
    """As published files of BART and mBART have them."""
    source = tiny_encoders.save(tmp_path / "source", "mbart", "text")
    tensors = load_file(source / "model.safetensors")
    table = tensors["model.shared.weight"]
    tensors |= {
        "final_logits_bias": torch.randn(1, len(table)),
        "model.encoder.embed_tokens.weight": table.clone(),
        "model.decoder.embed_tokens.weight": table.clone(),
        "lm_head.weight": table.clone(),
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan, out = random_plan(source, SMALLER, dict(layout_of(source).widths)), tmp_path / "out"
    apply_plan(plan, source=source, output=out)
    kept, found = plan.ids().kept, load_file(out / "model.safetensors")
    assert torch.equal(found["final_logits_bias"], tensors["final_logits_bias"][:, kept])
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        assert torch.equal(found[f"model.{name}.weight"], table[kept])
    assert layout_of(out).tied


def test_languages_and_tasks_keep_their_tokens(tmp_path: Path) -> None:
    """As Whisper's generation_config.json names them."""
    source = tiny_encoders.save(tmp_path / "source", "whisper", "speech")
    ids = tiny_encoders.tokenizer("whisper").get_vocab()
    rare = max(token for token in ids if len(token) > 4)
    named = {
        "lang_to_id": {"<|en|>": ids[rare], "<|de|>": ids["<mask>"]},
        "task_to_id": {"transcribe": ids["<unk>"]},
        "forced_decoder_ids": [[1, None], [2, ids["<unk>"]]],
        "suppress_tokens": [ids["<s>"], 635],
        "alignment_heads": [[1, 0]],
        "prev_sot_token_id": ids["</s>"],
    }
    change(source / "generation_config.json", lambda config: config.update(named))
    plan, out = random_plan(source, SMALLER, dict(layout_of(source).widths)), tmp_path / "out"
    apply_plan(plan, source=source, output=out)
    made = json.loads((out / "generation_config.json").read_text("utf-8"))
    new = plan.ids().new
    assert made["lang_to_id"] == {"<|en|>": new(ids[rare]), "<|de|>": new(ids["<mask>"])}
    assert made["task_to_id"] == {"transcribe": new(ids["<unk>"])}
    assert made["forced_decoder_ids"] == [[1, None], [2, new(ids["<unk>"])]]
    assert made["suppress_tokens"] == [new(ids["<s>"])]
    assert made["alignment_heads"] == [[1, 0]]
    assert made["prev_sot_token_id"] == new(ids["</s>"])


def test_sentencepiece_models_alone_are_refused_by_name(tmp_path: Path, run: Run) -> None:
    """Those of a class that no tokenizer.json can be made for."""
    source = tiny_encoders.save(tmp_path / "source", "m2m_100", "text")
    (source / "tokenizer.json").unlink()
    (source / "spm.model").write_text("{}", "utf-8")
    refused = run("plan", source, "--vocab-size", SMALLER, "-o", tmp_path / "plan.json")
    assert refused.exit_code == 2
    assert "the tokens are made by spm.model" in refused.output
    rows = ("--vocab-size", tiny_encoders.VOCAB_SIZE)
    assert run("plan", source, *rows, "-o", tmp_path / "plan.json").exit_code == 0
    assert run("apply", tmp_path / "plan.json", "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "spm.model").read_bytes() == b"{}"
