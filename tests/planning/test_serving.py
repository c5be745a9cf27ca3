"""What serving takes, predicted from headers: weights, bytes a token, cache, logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from surgery.families.encoder_decoder_table import ENCODER_DECODERS
from surgery.layout.layout import Layout
from surgery.layout.roles import CARRIED
from surgery.planning.serving import Serving, serving_of
from surgery.planning.sizes import Sizes, whole
from tests.support import tiny, tiny_encoders
from tests.support.command import Run
from tests.support.contents import weights
from tests.support.plans import layout_of, random_plan
from tests.support.sample import sampled


def dense(layout: Layout) -> Serving:
    return serving_of(layout, whole(layout))


def read(found: Serving) -> int:
    assert found.decoded is not None
    return found.decoded


def test_an_untied_embedding_is_looked_up_and_a_tied_one_is_the_head(tmp_path: Path) -> None:
    untied = layout_of(tiny.save(tmp_path / "untied"))
    found = dense(untied)
    assert found.weights == untied.checkpoint.nbytes
    assert found.decoded == found.weights - 639 * 32 * 4
    assert found.cache == 3 * 2 * 2 * 8 * 2  # layers, keys and values, heads, head_dim, bf16
    assert found.logits == 640 * 4
    tied = dense(layout_of(tiny.save(tmp_path / "tied", tied=True)))
    assert tied.decoded == tied.weights == found.weights - 640 * 32 * 4


def test_a_token_reads_its_own_experts(tmp_path: Path) -> None:
    layout = layout_of(tiny.save(tmp_path / "model", "qwen3_moe"))
    found, one = dense(layout), 3 * 64 * 32 * 4
    assert found.weights - read(found) == 639 * 32 * 4 + 2 * 2 * one  # two of four, two layers
    fewer = serving_of(layout, Sizes(640, layout.widths, experts=2))
    assert found.weights - fewer.weights == 2 * (2 * one + 2 * 32 * 4)  # and rows of the router
    assert read(found) - read(fewer) == 2 * 2 * 32 * 4


def test_latent_attention_keeps_latents(tmp_path: Path) -> None:
    found = dense(layout_of(tiny.save(tmp_path / "model", "deepseek_v2")))
    assert found.cache == 3 * (12 + 4) * 2


CACHED = {
    "olmo_hybrid": 1 * 2 * 4 * 8,  # one layer of four; the others carry on a state
    "kimi_linear": 1 * (12 + 4),
    "phi3": 3 * 2 * 2 * 8,
}
"""Model type → values of keys and values in its cache, of a tiny model."""


@pytest.mark.parametrize("key", CACHED)
def test_only_attention_that_looks_back_has_a_cache(tmp_path: Path, key: str) -> None:
    found = dense(layout_of(tiny.save(tmp_path / "model", key)))
    assert found.cache == CACHED[key] * 2


def test_of_every_table_a_token_reads_a_row(tmp_path: Path) -> None:
    layout = layout_of(tiny.save(tmp_path / "model", "gemma4_text", tied=True))
    table = layout.by_name["model.embed_tokens_per_layer.weight"]
    found = dense(layout)
    assert found.weights - read(found) == table.nbytes - table.nbytes // 640  # the other is tied


def test_encoders_of_images_are_weights_that_no_token_reads(tmp_path: Path) -> None:
    layout = layout_of(tiny.save(tmp_path / "model", "gemma3"))
    found, beside = (
        dense(layout),
        sum(
            layout.checkpoint.tensors[name].nbytes
            for name, role in layout.roles.items()
            if role.slot is CARRIED
        ),
    )
    assert found.weights == layout.checkpoint.nbytes
    assert read(found) == found.weights - beside - 639 * 32 * 4  # one row of the embedding
    assert found.cache == dense(layout_of(tiny.save(tmp_path / "text", "gemma3_text"))).cache


@pytest.mark.parametrize("key", ["bert", "eurobert"])
def test_only_what_is_true_of_encoders(tmp_path: Path, key: str, run: Run) -> None:
    layout = layout_of(tiny_encoders.save(tmp_path / "model", key))
    assert dense(layout) == Serving(layout.checkpoint.nbytes, None, None, None, None)
    table = run("inspect", tmp_path / "model", "--predict-serving").output.splitlines()
    assert len(table) == 2, table
    facts = json.loads(run("inspect", tmp_path / "model", "--predict-serving", "--json").output)
    assert {name for name, value in facts.items() if value is not None} == {"weights"}


NO_CACHE = "switch_transformers"
"""transformers refuses to run its decoder with a cache."""
READ_TEXT = [key for key in ENCODER_DECODERS if tiny_encoders.head_of(key) == "text"]
OTHERS = [NO_CACHE, "whisper", "udop", "pix2struct", "pp_formulanet", "florence2"]


@pytest.mark.parametrize("key", sampled([key for key in READ_TEXT if key != NO_CACHE]))
def test_a_decoder_beside_an_encoder_keeps_what_transformers_keeps(
    tmp_path: Path, key: str, run: Run
) -> None:
    path = tiny_encoders.save(tmp_path / "model", key, "text")
    model = tiny_encoders.load(path, "text")
    source, target = torch.arange(5, 16)[None], torch.arange(5, 12)[None]
    with torch.no_grad():
        kept = model(input_ids=source, decoder_input_ids=target, use_cache=True).past_key_values
    sizes = []
    for cache in (kept.self_attention_cache, kept.cross_attention_cache):
        layers = [layer for layer in cache.layers if layer.keys is not None]
        values = [each for layer in layers for each in (layer.keys, layer.values)]
        assert len({each.shape[2] for each in values}) == 1
        sizes.append(sum(each.numel() for each in values) // values[0].shape[2])
    found = dense(layout_of(path))
    assert (found.cache, found.source_cache) == (2 * sizes[0], 2 * sizes[1])
    assert found.decoded is None
    table = run("inspect", path, "--predict-serving").output
    assert f"cache of each source position{found.source_cache:>19,}" in table
    facts = json.loads(run("inspect", path, "--predict-serving", "--json").output)
    assert facts["source_cache"] == found.source_cache


@pytest.mark.parametrize("key", OTHERS)
def test_a_decoder_beside_another_encoder_has_a_cache_too(tmp_path: Path, key: str) -> None:
    head = tiny_encoders.head_of(key)
    found = dense(layout_of(tiny_encoders.save(tmp_path / "model", key, head)))
    assert found.cache == found.source_cache
    assert found.cache


def test_a_decoder_without_a_head_decodes_nothing(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    tensors = weights(source)
    assert dense(layout_of(source)).logits == 640 * 4
    del tensors["lm_head.weight"]
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(plain, source / "model.safetensors")
    found = dense(layout_of(source))
    assert (found.decoded, found.cache, found.logits) == (None, None, None)


def test_the_command(tmp_path: Path, llama: Path, run: Run) -> None:
    plan = random_plan(llama, 512, 64, layers=[[0], [2]])
    plan.save(tmp_path / "plan.json")
    shown = run("inspect", tmp_path / "plan.json", "--predict-serving", "--json")
    facts = json.loads(shown.output)
    assert facts["after"]["weights"] == plan.after.nbytes
    assert facts["before"]["weights"] == plan.before.nbytes
    assert facts["after"]["cache"] * 3 == facts["before"]["cache"] * 2
    table = run("inspect", tmp_path / "plan.json", "--predict-serving").output
    assert "read for each decoded token" in table
    assert "20.00%" in table  # of the logits
    alone = run("inspect", llama, "--predict-serving")
    assert alone.exit_code == 0, alone.output
    assert "before" not in alone.output
    assert run("inspect", llama, "--predict-serving", "--vocab").exit_code == 2
