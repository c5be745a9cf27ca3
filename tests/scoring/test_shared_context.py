"""Choices that share their context in one window: exactly those of a window for each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.scoring.score import run_asked
from calib.scoring.shared_context import joined, most_shared
from calib.scoring.tasks import AskedTasks, Task, read_tasks
from calib.streaming.batches import Stream, seen
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.settings import PassSettings
from calib.streaming.weights import WeightReader
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.support import ROOT, tiny
from tests.support.json_files import change
from tests.support.plans import layout_of

FILES = [ROOT / "tools" / "tasks" / f"{name}.jsonl" for name in ("science", "physical")]
SETTINGS = PassSettings(torch.device("cpu"), torch.float32)

FULL = {"layer_types": ["full_attention"] * tiny.LAYERS}
IDS = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(st.lists(IDS, min_size=1, max_size=4), st.data())
def test_each_text_finds_its_own_tokens_and_positions(
    lists: list[list[int]], data: st.DataObject
) -> None:
    texts = [np.array(each) for each in lists]
    last = [data.draw(st.integers(1, len(text))) for text in texts]
    both = joined(texts, last)
    assert both.longest == max(map(len, texts))
    assert len(both.window) <= sum(map(len, texts))
    sees, positions = seen(both.branches.numbers).numpy(), both.branches.positions.numpy()
    for text, count, places in zip(texts, last, both.places, strict=True):
        assert both.window[places].tolist() == text[-count:].tolist()
        assert positions[places].tolist() == list(range(len(text)))[-count:]
        own = np.flatnonzero(sees[places[-1]])
        assert both.window[own].tolist() == text.tolist()
        assert positions[own].tolist() == list(range(len(text)))


def asked_bits(path: Path, shared: int) -> tuple[list[float], int]:
    layout = layout_of(path)
    tasks = [Task(task.name, task.items[:4]) for task in read_tasks(FILES)]
    asked = AskedTasks(layout, tasks, load_tokenizer(path), most_shared=shared)
    run_asked(layout, [asked], SETTINGS)
    return asked.bits(), asked.stream.tokens


@pytest.mark.parametrize("key", ["llama", "gemma3_text", "gpt2", "qwen3_moe"])
def test_sharing_changes_no_answer(tmp_path: Path, key: str) -> None:
    changes: dict[str, Any] = {"sliding_window": 512} if key == "gemma3_text" else {}
    path = tiny.save(tmp_path / "model", key, **changes)
    shared = most_shared(layout_of(path), SETTINGS)
    assert shared >= 512
    (together, few), (alone, many) = asked_bits(path, shared), asked_bits(path, 0)
    assert together == pytest.approx(alone, rel=1e-4)
    assert few < 0.6 * many


def test_what_a_layer_sees_no_further_than_is_alone(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model", "gemma3_text")  # with a window of 16
    assert most_shared(layout_of(path), SETTINGS) == 16
    assert asked_bits(path, 16) == asked_bits(path, 0)


@pytest.mark.parametrize(
    ("key", "given", "shared"),
    [
        ("mistral", {}, 4096),
        ("modernbert-decoder", {"local_attention": 64}, 32),
        ("qwen2", {**FULL, "use_sliding_window": False, "sliding_window": 16}, 1 << 30),
    ],
)
def test_a_limit_that_only_the_config_class_has_counts(
    tmp_path: Path, key: str, given: dict[str, Any], shared: int
) -> None:
    path = tiny.save(tmp_path / "model", key)

    def amend(config: dict[str, Any]) -> None:
        config.pop("sliding_window", None)
        config.update(given)

    change(path / "config.json", amend)
    assert most_shared(layout_of(path), SETTINGS) == shared


def test_no_mask_is_held_for_windows_that_do_not_run(tmp_path: Path) -> None:
    """Of all windows they would be tokens² numbers each."""
    layout = layout_of(tiny.save(tmp_path / "model"))
    trunk = np.arange(400) % tiny.TOKENS
    texts = [np.append(trunk, [n, n + 1]) for n in range(4)]
    windows = [joined(texts, [2] * 4) for _ in range(16)]
    branches = [each.branches for each in windows]
    stream = Stream([each.window for each in windows], branches=branches)
    settings = PassSettings(torch.device("cpu"), torch.float32, micro_batch_values=1)
    with WeightReader(layout.checkpoint, settings.device, settings.dtype) as reader:
        decoder = StreamedDecoder(layout, reader, settings)
        decoder.embed([stream])
        held = {each.data_ptr(): each.numel() for each in tensors_in(stream.batches[0].arguments)}
        assert sum(held.values()) < len(windows[0].window) ** 2
        decoder.run_layers([stream])
    found = [states for _, _, states in stream.hidden()]
    assert all(torch.equal(each, found[0]) for each in found)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


@pytest.mark.parametrize("key", ["qwen3_next", "mamba2", "bloom"])
def test_layers_that_take_no_such_mask_share_nothing(tmp_path: Path, key: str) -> None:
    assert most_shared(layout_of(tiny.save(tmp_path / "model", key)), SETTINGS) == 0
