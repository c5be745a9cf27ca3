"""Choices that share their context in one window: exactly those of a window for each."""

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
from calib.streaming.settings import PassSettings
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.support import ROOT, tiny
from tests.support.plans import layout_of

FILES = [ROOT / "tools" / "tasks" / f"{name}.jsonl" for name in ("science", "physical")]
SETTINGS = PassSettings(torch.device("cpu"), torch.float32)

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
    sees, positions = both.branches.sees.numpy(), both.branches.positions.numpy()
    for text, count, places in zip(texts, last, both.places, strict=True):
        assert both.window[places].tolist() == text[-count:].tolist()
        assert positions[places].tolist() == list(range(len(text)))[-count:]
        seen = np.flatnonzero(sees[places[-1]])
        assert both.window[seen].tolist() == text.tolist()
        assert positions[seen].tolist() == list(range(len(text)))


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


@pytest.mark.parametrize("key", ["qwen3_next", "mamba2", "bloom"])
def test_layers_that_take_no_such_mask_share_nothing(tmp_path: Path, key: str) -> None:
    assert most_shared(layout_of(tiny.save(tmp_path / "model", key)), SETTINGS) == 0
