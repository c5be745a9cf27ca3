"""Progress over weights: bytes of layers that windows have passed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.streaming.layers import weights_stage
from surgery.cli.terminal import bars
from surgery.layout.layout import Layout
from surgery.process import stage
from tests.support import tiny
from tests.support.plans import layout_of


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    path = tmp_path_factory.mktemp("progress") / "model"
    return layout_of(tiny.save(path, "qwen3_moe"))


@given(windows=st.integers(1, 40), data=st.data())
def test_all_weights_have_passed_when_all_windows_have(
    layout: Layout, windows: int, data: st.DataObject
) -> None:
    total = sum(ref.nbytes for layer in layout.of_layer for ref in layer.values())
    shown: list[tuple[str, int, int]] = []
    left = windows * layout.num_hidden_layers
    count = weights_stage(lambda *facts: shown.append(facts), "x", layout, windows)
    while left:
        more = data.draw(st.integers(1, left))
        count(more)
        left -= more
    assert shown[0] == ("x", 0, total)
    assert shown[-1] == ("x", total, total)
    assert [done for _, done, _ in shown] == sorted(done for _, done, _ in shown)


def test_nobody_need_look(layout: Layout) -> None:
    weights_stage(None, "x", layout, 2)(1)
    stage(None, "y", 3)(3)


def test_a_terminal_sees_bytes_per_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    layout = layout_of(tiny.save(tmp_path / "model"))
    with bars() as progress:
        count = weights_stage(progress, "score", layout, 2)
        for _ in range(2 * layout.num_hidden_layers):
            count(1)
    assert "B/s" in capsys.readouterr().err


def test_each_pass_has_a_bar_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with bars() as progress:
        for total in (3, 5):
            stage(progress, "search", total)(total)
    shown = capsys.readouterr().err
    assert "3.00/3.00" in shown
    assert "5.00/5.00" in shown
    assert "100%" in shown
