import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

from calib.streaming.empty_model import empty_model
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.opaque import opaque_matrices
from surgery.hub.shards import Shards
from surgery.layout.build import read_layout
from surgery.vocabulary.order import rarity_of
from tests.support import ROOT, tiny
from tests.support.tiny import MODEL_TYPES
from tools.bench import __main__ as bench_module
from tools.bench import forward
from tools.bench.child import ChildError, measure
from tools.bench.hub import PeakDisk
from tools.predictions import PRUNED, experts_row
from tools.published import MIXTURES, MXFP4, PUBLISHED, QUANTIZED, llama_config
from tools.shapes import write_headers_only, write_random, write_tokenizer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen2.5-0.5B", 494_032_768),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.1-70B", 70_553_706_496),
        ("Llama-3.1-405B", 405_853_388_800),
        ("Gemma-3-1B", 999_885_952),
        ("Mixtral-8x7B", 46_702_792_704),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("DeepSeek-V3", 671_026_419_200 - 58 * 256),  # the routers' biases are buffers
    ],
)
def test_headers_have_the_published_number_of_parameters(
    tmp_path: Path, name: str, parameters: int
) -> None:
    config = (PUBLISHED | MIXTURES)[name]
    layout = read_layout(Checkpoint.open(write_headers_only(tmp_path, config, shards=2)))
    assert layout.parameters(layout.vocab_size, layout.widths) == parameters
    empty_model(layout, torch.bfloat16)  # transformers expects the same tensors, by their headers


def test_quantized_mixtures_have_the_published_bytes(tmp_path: Path) -> None:
    """The index of openai/gpt-oss-120b says this total size."""
    config = QUANTIZED["GPT-OSS-120B"]
    layout = read_layout(Checkpoint.open(write_headers_only(tmp_path, config, shards=2)))
    assert layout.checkpoint.nbytes == 65_248_815_744
    assert layout.parameters(layout.vocab_size, layout.widths) == 116_829_156_672
    empty_model(layout, torch.bfloat16)


def test_rows_of_mixtures_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "experts.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith(tuple(f"| {n}" for n in PRUNED))]
    assert len(rows) == len(PRUNED)
    for name in ("Mixtral-8x7B", "GPT-OSS-120B"):
        assert experts_row(name) in rows


SPARSE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_shared_experts": 2, "moe_intermediate_size": 64},
        **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        **{"q_lora_rank": None, "kv_lora_rank": 12, "qk_rope_head_dim": 4},
        **{"qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    },
}
"""Model type → what its config has beside a dense one's."""


def test_random_weights_in_mxfp4_are_small_and_finite(tmp_path: Path) -> None:
    config = llama_config(64, 96, 2, 4, 2, 640, head_dim=8, model_type="gpt_oss")
    config |= {"num_local_experts": 4, "attention_bias": True, "quantization_config": MXFP4}
    layout = read_layout(Checkpoint.open(write_random(tmp_path, config)))
    ref = layout.checkpoint.tensors["model.layers.1.mlp.experts.down_proj_blocks"]
    assert layout.shape_of(ref) == (4, 96, 64)
    with Shards.of(tmp_path) as shards:
        (first, *_) = opaque_matrices(layout.checkpoint, ref)
        values = first.decode(shards)
    assert 0 < np.abs(values).max() < 2**-4
    assert len(np.unique(values)) > 10


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *SPARSE])
@pytest.mark.parametrize("tied", [True, False])
def test_random_checkpoints_of_every_family_are_accepted(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    changes = {"model_type": model_type, "tie_word_embeddings": tied, **SPARSE.get(model_type, {})}
    config = llama_config(32, 96, 2, 4, 2, 640, head_dim=8) | changes
    layout = read_layout(Checkpoint.open(write_random(tmp_path, config, max_shard_bytes=60_000)))
    empty_model(layout, torch.bfloat16)
    assert layout.tied == tied
    assert len(layout.checkpoint.shards) > 1
    embedding = layout.checkpoint.tensors[layout.family.embedding]
    bits = np.fromfile(embedding.path, np.uint16, embedding.parameters, offset=embedding.start)
    assert len(np.unique(bits.reshape(embedding.shape), axis=0)) == 640
    assert np.abs((bits.astype(np.uint32) << 16).view(np.float32)).max() < 2**-4


def test_the_synthetic_tokenizer_can_be_cut_and_loads(tmp_path: Path) -> None:
    config = llama_config(32, 96, 1, 4, 2, 1024)
    directory = write_tokenizer(write_headers_only(tmp_path, config), config)
    assert rarity_of(read_layout(Checkpoint.open(directory))).tokens == 1024
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    encoded = tokenizer.encode("A natural born citizen")
    assert encoded.ids[0] == config["bos_token_id"]
    assert tokenizer.decode(encoded.ids) == "A natural born citizen"


def test_the_peak_of_a_disk_is_seen(tmp_path: Path) -> None:
    with PeakDisk([tmp_path, tmp_path / "absent"]) as disk:
        (tmp_path / "file").write_bytes(bytes(1 << 20))
        while not disk.peak_bytes:
            time.sleep(0.005)
        (tmp_path / "file").unlink()
    assert disk.peak_bytes == 1 << 20


def test_a_child_is_measured() -> None:
    usage = measure(["sh", "-c", "echo done; sleep 0.02"])
    assert usage.output == "done\n"
    assert usage.peak_rss_bytes > 0
    with pytest.raises(ChildError, match="ended with status 3"):
        measure(["sh", "-c", "exit 3"])


def test_the_proof_for_a_card_runs_to_its_end_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    command = ("gpu", "--device", "cpu", "--toy", "--work", tmp_path, "--output", output)
    result = CliRunner().invoke(bench_module.main, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text(encoding="utf-8"))
    passed = {check["name"]: check["passed"] for check in found["checks"]}
    assert [name for name, ok in passed.items() if ok] == [
        *("tests on cpu", "verify", "logits", "score", "time")
    ]
    assert False not in passed.values()
    assert passed["calibrate: card idle"] is None
    stages = found["stages"]
    assert "passed" in stages["tests on cpu"]["result"]
    calibrated = stages["whole model: calibrate"]
    assert 0 < calibrated["compute_seconds"] < calibrated["total_seconds"]
    assert calibrated["mfu_of_matmul"] > 0
    assert stages["large shape: 4 layers"]["estimated_70b_seconds"] > 0
    lines = result.stdout.splitlines()
    assert re.search(r"^logits +pass +\S+ +at most 1e-04$", result.stdout, re.MULTILINE)
    assert "large: fits the card" in lines[-2]
    if not torch.cuda.is_available():
        refused = CliRunner().invoke(bench_module.main, ["gpu", "--work", str(tmp_path)])
        assert refused.exit_code == 1
        assert "`device` cuda: is not available" in refused.output


def test_the_bare_forward_and_what_commands_take_over_it(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model", intermediate_size=512)
    text = tmp_path / "text.txt"
    text.write_text(tiny.prose(12_000), encoding="utf-8")
    facts = forward.measured(forward.stages_of(str(path), str(text), 2, 32, 2, 2), 1)
    assert {"forward", "calibrate", "score", "search"} < facts.keys()
    assert facts["calibrate_over_forward"] > 0
    assert facts["search_over_score"] > 0
    assert all(facts[f"{name}, of a forward"] > 0 for name in forward.PLACES)


def test_what_is_missing_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = bench_module.version

    def without_tqdm(name: str) -> str:
        if name == "tqdm":
            raise bench_module.PackageNotFoundError
        return known(name)

    monkeypatch.setattr(bench_module, "version", without_tqdm)
    refused = CliRunner().invoke(bench_module.main, ["gpu", "--work", str(tmp_path / "work")])
    assert refused.output.strip() == "Error: missing: tqdm; bring them as wheels"
    assert not (tmp_path / "work").exists()
