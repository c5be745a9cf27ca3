"""Progress over weights: bytes of layers that windows have passed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.layout import Layout
from surgery.steps import weights_bar
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
    shown: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.steps.progress_bar", lambda *_: Bar(shown))
        left = windows * layout.num_hidden_layers
        with weights_bar("x", layout, windows) as count:
            while left:
                more = data.draw(st.integers(1, left))
                count(more)
                left -= more
    assert sum(shown) == total
    assert min(shown) >= 0


class Bar:
    """A bar that remembers."""

    def __init__(self, shown: list[int]) -> None:
        self._shown = shown

    def __enter__(self) -> object:
        return self._shown.append

    def __exit__(self, *_: object) -> None:
        pass


def test_a_terminal_sees_bytes_per_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    layout = layout_of(tiny.save(tmp_path / "model"))
    with weights_bar("score", layout, 2) as count:
        for _ in range(2 * layout.num_hidden_layers):
            count(1)
    assert "B/s" in capsys.readouterr().err
