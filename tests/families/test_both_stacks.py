"""Encoders with a decoder lose channels: statistics equal hooks on the whole model, in both."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.scoring.logits import compare_logits
from calib.statistics.calibrate import Calibration, take_statistics
from calib.statistics.resume import ResumeDirectory
from calib.statistics.sums import ChannelSums
from calib.streaming.batches import Stream, Tokens
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.ends import shifted
from calib.streaming.settings import PassSettings
from calib.streaming.weights import WeightReader
from calib.text.windows import token_windows
from surgery.api import apply_plan
from surgery.errors import CheckpointError
from surgery.families.schema import Family
from surgery.families.table import FAMILIES
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.vocabulary.order import rarity_of
from tests.support import tiny, tiny_encoders
from tests.support.command import Run
from tests.support.plans import layout_of, masked_dense, random_plan
from tests.support.sample import sampled
from tests.support.tiny_encoders import ENCODER_DECODERS, VOCAB_SIZE, head_of

CPU = torch.device("cpu")
EDGES = [400, VOCAB_SIZE]
SMALLER = 400


def has_layers(key: str) -> bool:
    """Whether the layers of both stacks are in the table."""
    family = FAMILIES[key.partition(":")[0]]
    return isinstance(family, Family) and bool(family.stacks)


BOTH = [key for key in ENCODER_DECODERS if has_layers(key)]
ALWAYS = ("t5", "umt5", "mbart", "bigbird_pegasus", "m2m_100", "marian", "florence2")
"""One of each kind of layer, of positions and of names."""


def shift(ids: torch.Tensor, model: Any) -> torch.Tensor:
    """What the decoder reads beside an encoder that reads ``ids``."""
    return shifted(ids, getattr(model.config, "decoder_start_token_id", None))


def text_model(path: Path, key: str) -> Any:
    """The library's model without its head; of Florence 2, the part that reads text."""
    model = tiny_encoders.load(path, "base")
    return model.language_model if key == "florence2" else model


def down_proj(layout: Layout, layer: int) -> str:
    """Name of the module whose input are the channels of a layer."""
    slots = ((name, layout.roles[ref.name].slot) for name, ref in layout.of_layer[layer].items())
    (name,) = (name for name, slot in slots if slot.ffn_output and name.endswith("weight"))
    return name.removesuffix(".weight")


def windows_of(path: Path) -> list[np.ndarray]:
    """Windows of several lengths."""
    documents = [tiny.prose(600), tiny.prose(640)[600:]]
    return list(token_windows(documents, load_tokenizer(path), 30, 24))


def calibration_of(path: Path, windows: list[np.ndarray], **more: Any) -> Calibration:
    layout = layout_of(path)
    buckets = rarity_of(layout).buckets(EDGES)
    settings = PassSettings(CPU, torch.float32)
    return Calibration(layout, windows, 24, buckets, EDGES, settings, **more)


@pytest.mark.parametrize("key", sampled(BOTH, ALWAYS, 2))
def test_streamed_statistics_equal_hooks(tmp_path: Path, key: str) -> None:
    path = tiny_encoders.save(tmp_path / "model", key, head_of(key))
    calibration = calibration_of(path, windows_of(path))
    stats, layout = take_statistics(calibration), calibration.layout
    model, buckets = text_model(path, key), torch.from_numpy(calibration.bucket_of)
    assert (layout.num_hidden_layers, layout.decoder_layers) == (3, 1)
    expected: list[tuple[str, ChannelSums]] = []
    running = [torch.empty(0), torch.empty(0)]
    for layer, axes in enumerate(layout.ffn_outputs):
        (axis,) = axes
        sums = ChannelSums(len(EDGES), 1, layout.channels_of(axis), CPU)
        expected.append((axis, sums))

        def hook(_: Any, inputs: Any, layer: int = layer, sums: ChannelSums = sums) -> None:
            tokens = Tokens.of(running[layer == 2])
            sums.add(0, tokens, buckets[tokens.ids], inputs[0].flatten(0, -2))

        model.get_submodule(down_proj(layout, layer)).register_forward_pre_hook(hook)
    for length in dict.fromkeys(map(len, calibration.windows)):
        ids = np.stack([w for w in calibration.windows if len(w) == length])
        running[:] = torch.from_numpy(ids), shift(torch.from_numpy(ids), model)
        with torch.no_grad():
            model(input_ids=running[0], decoder_input_ids=running[1])
    for found, (axis, sums) in zip(stats.layers, expected, strict=True):
        assert np.array_equal(found[axis].tokens, sums.tokens.numpy())
        assert np.allclose(found[axis].sum_sq, sums.sum_sq.total.numpy(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("key", sampled(BOTH, ALWAYS, 2))
def test_what_the_decoder_makes_is_the_whole_models(tmp_path: Path, key: str) -> None:
    """This is what ``verify --forward`` compares."""
    path = tiny_encoders.save(tmp_path / "model", key, head_of(key))
    ids = np.random.default_rng(0).integers(5, 600, (3, 24))
    with WeightReader(layout_of(path).checkpoint, CPU, torch.float32) as reader:
        decoder, stream = StreamedDecoder(layout_of(path), reader), Stream(list(ids))
        decoder.embed([stream])
        decoder.run_layers([stream])
        found = decoder.outputs(stream.batches[0].hidden)
    model, tokens = text_model(path, key), torch.from_numpy(ids)
    with torch.no_grad():
        expected = model(input_ids=tokens, decoder_input_ids=shift(tokens, model))
    assert torch.allclose(found, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert expected.last_hidden_state.std() > 0.05


def logits(path: Path, key: str, ids: torch.Tensor) -> torch.Tensor:
    """Of a decoder that reads another text than the encoder."""
    model = tiny_encoders.load(path, head_of(key))
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, decoder_input_ids=ids.flip(0)).logits
    return result


@pytest.mark.parametrize("key", sampled(BOTH, ALWAYS, 2))
def test_pruned_equals_masked_dense(tmp_path: Path, key: str) -> None:
    source, out = tiny_encoders.save(tmp_path / "source", key, head_of(key)), tmp_path / "out"
    plan = random_plan(source, SMALLER, 0.6)
    apply_plan(plan, source=source, output=out)
    kept = torch.from_numpy(plan.ids().kept)
    new = torch.randint(5, SMALLER, (2, 24), generator=torch.Generator().manual_seed(1))
    dense = logits(masked_dense(source, plan, tmp_path / "masked"), key, kept[new])[..., kept]
    found = logits(out, key, new)
    assert (found - dense).abs().max() <= 1e-4 * dense.abs().max()
    assert not torch.allclose(logits(source, key, kept[new])[..., kept], dense, rtol=1e-3)


@pytest.mark.parametrize("key", sampled(BOTH, ("t5", "bart"), 1))
def test_the_whole_command_line(tmp_path: Path, text: Path, run: Run, key: str) -> None:
    source = tiny_encoders.save(tmp_path / "source", key, head_of(key))
    stats, plan, out = (tmp_path / name for name in ("stats.safetensors", "plan.json", "out"))
    sizes: list[object] = ["--vocab-size", SMALLER]
    for width in layout_of(source).widths:
        sizes += ["--width", f"{width}=48"]
    for step in (
        ("inspect", source),
        ("calibrate", source, "--data", text, "--seq-len", 32, "--samples", 8, "-o", stats),
        ("plan", source, "--stats", stats, *sizes, "-o", plan),
        ("report", plan, "--stats", stats, "-o", tmp_path / "report.html"),
        ("apply", plan, "-o", out),
        ("verify", out, "--forward"),
    ):
        result = run(*step)
        assert result.exit_code == 0, (step, result.output, result.exception)
    assert "ok       hidden states equal the masked dense model's" in result.output
    for stack in ("encoder.", "decoder."):
        _change_a_weight(out / "model.safetensors", stack)
        assert compare_logits(Plan.load(plan), source, out, "cpu").largest > 1e-3


def _change_a_weight(shard: Path, stack: str) -> None:
    """Change a map of the attention in a stack's first layer."""
    tensors = load_file(shard)
    changed = [
        n for n in tensors if stack in n and re.search(r"\.0\..*\.(q|q_proj|query)\.weight", n)
    ]
    tensors[changed[0]] *= -1
    save_file(tensors, shard, {"format": "pt"})


@pytest.mark.parametrize("key", ["t5", "mbart"])
def test_a_killed_run_is_resumed(tmp_path: Path, key: str) -> None:
    """After each layer; those of T5 pass on a bias that the first layer of each stack makes."""
    path = tiny_encoders.save(tmp_path / "model", key, head_of(key), **DEEPER[key])
    windows, whole = windows_of(path), tmp_path / "whole.safetensors"
    take_statistics(calibration_of(path, windows, output=whole))
    for killed_in in range(1, 4):
        out = tmp_path / f"{killed_in}.safetensors"
        killed = calibration_of(path, windows, output=out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ResumeDirectory, "add", _killed_after(killed_in))
            with pytest.raises(KeyboardInterrupt):
                take_statistics(killed)
        take_statistics(calibration_of(path, windows, output=out, resume=True))
        assert out.read_bytes() == whole.read_bytes()


DEEPER: dict[str, dict[str, int]] = {"t5": {"num_decoder_layers": 2}, "mbart": {}}


def _killed_after(layers: int) -> Any:
    """``ResumeDirectory.add`` that ends the run once so many layers are finished."""
    add, count = ResumeDirectory.add, [0]

    def adds(self: ResumeDirectory, *arguments: Any) -> None:
        count[0] += 1
        add(self, *arguments)
        self.wait_for_commit()
        if count[0] == layers:
            raise KeyboardInterrupt

    return adds


def test_a_table_of_its_own_for_each_stack(tmp_path: Path) -> None:
    """Files may have the embedding under all its names; each stack reads its own."""
    path = tiny_encoders.save(tmp_path / "model", "bart", "text")
    windows = windows_of(path)
    before = take_statistics(calibration_of(path, windows))
    tensors = load_file(path / "model.safetensors")
    table = tensors["model.shared.weight"]
    for stack in ("encoder", "decoder"):
        tensors[f"model.{stack}.embed_tokens.weight"] = table.clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    after = take_statistics(calibration_of(path, windows))
    for one, two in zip(before.layers, after.layers, strict=True):
        assert all(np.array_equal(one[axis].sum_sq, two[axis].sum_sq) for axis in one)


def test_an_encoder_saved_without_its_decoder(tmp_path: Path, text: Path, run: Run) -> None:
    """As embedding models of T5 are published: it is an encoder like others."""
    path = tiny_encoders.save(tmp_path / "source", "t5", "text")
    tensors = load_file(path / "model.safetensors")
    encoder = {n: t for n, t in tensors.items() if n.startswith(("encoder.", "shared."))}
    save_file(encoder, path / "model.safetensors", {"format": "pt"})
    assert layout_of(path).num_hidden_layers == 2
    sizes = ("--vocab-size", SMALLER, "--intermediate-size", 48)
    few = ("--samples", 8, "--seq-len", 32)
    done = run("prune", path, "--data", text, *sizes, *few, "-o", tmp_path / "out")
    assert done.exit_code == 0, (done.output, done.exception)
    result = run("verify", tmp_path / "out", "--forward")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "hidden states equal" in result.output


@pytest.mark.parametrize(("tokens", "fits"), [(192, True), (190, False)])
def test_long_windows_in_whole_blocks(tmp_path: Path, tokens: int, fits: bool) -> None:
    """BigBird attends to blocks of a long window; it pads others, which no pass here does."""
    blocks = {"attention_type": "block_sparse", "block_size": 16, "num_random_blocks": 2}
    blocks |= {"max_position_embeddings": 256}
    path = tiny_encoders.save(tmp_path / "model", "bigbird_pegasus", "text", **blocks)
    windows = list(np.random.default_rng(0).integers(5, 600, (2, tokens)))
    with nullcontext() if fits else pytest.raises(CheckpointError, match="window of 190 tokens"):
        take_statistics(calibration_of(path, windows))


def test_what_begins_the_decoders_text() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert shifted(ids, 2).tolist() == [[2, 5, 6], [2, 8, 9]]
    assert shifted(ids, None).tolist() == [[7, 5, 6], [10, 8, 9]]


REFUSED = {
    "whisper": "its encoder hears sound",
    "pix2struct": "its encoder reads images",
    "vision-encoder-decoder": "its encoder reads images",
    "udop": "its encoder reads where each word lies on a page",
    "prophetnet": "its decoder has several states for each token",
    "xlnet": "its layers compute two streams of states, and are not run one by one",
}
"""Model type → why its channels cannot be ranked."""


@pytest.mark.parametrize("key", REFUSED)
def test_what_runs_on_no_text_is_refused(tmp_path: Path, text: Path, run: Run, key: str) -> None:
    source = tiny_encoders.save(tmp_path / "source", key, head_of(key))
    out, kind = tmp_path / "out", layout_of(source).family.kind
    apply_plan(random_plan(source, SMALLER, {}), source=source, output=out)
    for command in (
        ("calibrate", source, "--data", text, "-o", tmp_path / "stats.safetensors"),
        ("verify", out, "--forward", "--source", source),
    ):
        refused = run(*command)
        assert refused.exit_code == 2, (command, refused.output)
        assert f"{key} is an {kind}, of which only the vocabulary is pruned" in refused.output
        assert REFUSED[key] in refused.output


def test_nothing_counts_the_bits_of_its_text(tmp_path: Path, text: Path, run: Run) -> None:
    source = tiny_encoders.save(tmp_path / "source", "bart", "text")
    sizes = ("--multiple-of", 16, "--ratio", 0.2, "--samples", 4, "--seq-len", 32)
    repaired = ("--repair", "least-squares", "-o", tmp_path / "out")
    for command in (
        ("score", source, "--data", text),
        ("search", source, "--data", text, "--ratio", 0.2),
        ("compare", source, "--data", text, "--ratio", 0.2),
        ("prune", source, "--data", text, *sizes, *repaired),
    ):
        refused = run(*command)
        assert refused.exit_code == 2, (command, refused.output)
        assert "bart is an encoder with a decoder, which is not scored" in refused.output
    refused = run("plan", source, "--layers", "0", "-o", tmp_path / "plan.json")
    assert refused.exit_code == 2
    assert "no rule chooses among those of an encoder and of a decoder" in refused.output


def test_two_widths_are_named_one_by_one(tmp_path: Path, run: Run) -> None:
    source = tiny_encoders.save(tmp_path / "source", "bart", "text")
    refused = run("plan", source, "--intermediate-size", 48, "-o", tmp_path / "plan.json")
    assert refused.exit_code == 2
    assert "--width with one of encoder_ffn_dim, decoder_ffn_dim" in refused.output
