"""The files beside the weights: what an output has of them, and what it leaves out."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from surgery.api import apply_plan
from surgery.apply.companions import files_left_out
from tests.support import tiny
from tests.support.plans import random_plan

FOLDER = "additional_chat_templates"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model")


@pytest.mark.parametrize("vocab_size", [512, tiny.VOCAB_SIZE])
def test_chat_templates_with_names_are_carried(
    source: Path, tmp_path: Path, vocab_size: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "default", "tool_use": "<s>tools", "rag": "documents"}
    tokenizer.save_pretrained(source)
    (source / FOLDER / "notes.txt").write_text("not a template")
    plan, out = random_plan(source, vocab_size, 64), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.apply.run._provenance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            apply_plan(plan, source=source, output=out)
    apply_plan(plan, source=source, output=out, resume=True)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert files_left_out(source, plan.ids()) == [f"{FOLDER}/notes.txt"]


def test_a_folder_of_templates_out_of_the_model_is_not_copied(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("nobody's business")
    (source / FOLDER).symlink_to(tmp_path / "elsewhere")
    plan = random_plan(source, 512, 64)
    apply_plan(plan, source=source, output=tmp_path / "out")
    assert not (tmp_path / "out" / FOLDER).exists()
    assert files_left_out(source, plan.ids()) == [f"{FOLDER}/x.jinja"]
