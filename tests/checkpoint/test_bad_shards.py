"""Damaged shards and indices are refused in one line, and nothing is written."""

from pathlib import Path

import pytest

from surgery.files.model_files import INDEX_NAME
from tests.support.command import Run
from tests.support.damage import (
    EMBED,
    GATE,
    INSPECT,
    SHARD_1,
    SHARD_2,
    Case,
    append,
    assert_refused_and_nothing_written,
    change,
    cut,
    each,
    header,
    last_of,
    no_config_key,
    no_weights,
    remove,
    weight_map,
    write,
)

CASES = [
    Case("missing shard", remove(f"model/{SHARD_2}"), INSPECT,
         (INDEX_NAME, "tensor model.layers.0.", "missing", SHARD_2, "download")),
    Case("truncated shard", cut(f"model/{SHARD_1}", -100), INSPECT,
         (SHARD_1, EMBED, "truncated", "expected 82048 bytes", "found 81948", "download")),
    Case("shard truncated inside its header", cut(f"model/{SHARD_2}", 100), INSPECT,
         (SHARD_2, "truncated", "expected", "found", "in a file of 100", "download")),
    Case("empty shard", cut(f"model/{SHARD_2}", 0), INSPECT,
         (SHARD_2, "truncated", "expected at least 10 bytes", "found 0", "download")),
    Case("git-lfs pointer", write(f"model/{SHARD_1}", "version https://git-lfs\noid sha256:0\n"),
         INSPECT, (SHARD_1, "git-lfs pointer", "git lfs pull")),
    Case("no model_type", no_config_key("model_type"), INSPECT,
         ("config.json", "names no model_type", "such as llama", "add it")),
    Case("shard is no safetensors", write(f"model/{SHARD_1}", "<html>Not found</html>"), INSPECT,
         (SHARD_1, "not safetensors", "expected", "found", "download")),
    Case("shard with bytes after its last tensor", append(f"model/{SHARD_1}", b"1234"), INSPECT,
         (SHARD_1, "bytes after", "expected 82048", "found 82052", "download")),
    Case("offsets of a wrong length", header(SHARD_1, EMBED, shift=(0, 4)), INSPECT,
         (SHARD_1, EMBED, "expected 81920 bytes for F32 [640, 32]", "[0, 81924]", "download")),
    Case("shape too large", header(SHARD_1, EMBED, shape=[640, 33]), INSPECT,
         (SHARD_1, EMBED, "expected 84480 bytes", "found data_offsets [0, 81920]", "download")),
    Case("negative shape", header(SHARD_1, EMBED, shape=[-640, -32]), INSPECT,
         (SHARD_1, EMBED, "natural numbers", "download")),
    Case("tensors overlap", last_of(SHARD_2, shift=(-128, -128)), INSPECT,
         (SHARD_2, "tensor model.layers.", "overlaps", "expected data offset", "found")),
    Case("hole between tensors", last_of(SHARD_2, shift=(4, 4), tail=4), INSPECT,
         (SHARD_2, "tensor model.layers.", "hole", "expected data offset", "found", "download")),
    Case("header entry without shape", header(SHARD_1, EMBED, shape=None), INSPECT,
         (SHARD_1, EMBED, "incomplete", "expected dtype, shape, data_offsets", "download")),
    Case("index names a missing file", weight_map(embed="model-9.safetensors"), INSPECT,
         (INDEX_NAME, EMBED, "missing", "model-9.safetensors", "download")),
    Case("index reaches up", weight_map(embed="../x.safetensors"), INSPECT,
         (INDEX_NAME, EMBED, "outside", "expected a plain", "'../x.safetensors'", "do not use")),
    Case("index reaches anywhere", weight_map(embed="/etc/x.safetensors"), INSPECT,
         (INDEX_NAME, EMBED, "outside", "expected a plain", "'/etc/x.safetensors'", "do not use")),
    Case("index gives no name", weight_map(embed=7), INSPECT,
         (INDEX_NAME, EMBED, "expected a plain file name", "found 7", "do not use")),
    Case("index names another shard", weight_map(gate=SHARD_1), INSPECT,
         (SHARD_2, GATE, "disagree", f"expected index entry {SHARD_2}", f"found {SHARD_1}",
          "download")),
    Case("index names a tensor too many", weight_map(extra=SHARD_1), INSPECT,
         (SHARD_1, "model.layers.0.extra.weight", "not in the shard", "download")),
    Case("index lacks a tensor",
         change(f"model/{INDEX_NAME}", lambda data: data["weight_map"].pop(GATE)), INSPECT,
         (SHARD_2, GATE, "disagree", f"expected index entry {SHARD_2}", "no entry", "download")),
    Case("index without weight_map", write(f"model/{INDEX_NAME}", "{}"), INSPECT,
         (INDEX_NAME, "weight_map", "expected", "belongs to the shards")),
    Case("truncated index", cut(f"model/{INDEX_NAME}", 500), INSPECT,
         (INDEX_NAME, "not valid JSON", "found", "download")),
    Case("pickle only", each(no_weights, write("model/pytorch_model.bin", b"\x80\x02.")), INSPECT,
         ("pytorch_model.bin", "pickle", "expected safetensors", "save_pretrained")),
    Case("no weights", no_weights, INSPECT,
         ("model", "no weights", "expected model.safetensors or", "directory that has them")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    assert_refused_and_nothing_written(case, bench, run)
