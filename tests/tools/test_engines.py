"""The table of engines: a row for each, with its reason where it cannot run a model."""

from pathlib import Path

import pytest

from tests.support import tiny
from tools.engines import __main__ as engines


def test_a_row_for_each_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save(tmp_path / "model")
    monkeypatch.setattr(engines, "VARIANTS", {})
    broken = engines.Engine("broken", "torch", "no_such_script.py")
    missing = engines.Engine("missing", "torch", "x.py", ("no such requirement",))
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(engines.venv, "create", lambda *_, **__: None)
    rows = engines.rows_of(model, tmp_path / "work", [engines.ENGINES[0], broken, missing])
    first, second, third = rows
    assert first.startswith("| transformers 5 | ")
    assert first.endswith("model, dense | yes | compared with |")
    assert "model, dense | no: " in second
    assert "no_such_script.py" in second
    assert third.startswith("| missing | | model | is not installed: ")


def test_the_prompts_are_twenty() -> None:
    assert len(engines.PROMPTS.read_text("utf-8").splitlines()) == 20
