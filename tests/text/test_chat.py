"""Chats become text by the model's own template, from the command line on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from calib.text.chat import ChatTemplate
from calib.text.windows import token_windows
from surgery.errors import DataError, TokenizerError
from surgery.stats.channel_stats import ChannelStats
from surgery.text.documents import read_documents
from surgery.text.rows import Chat
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.support.command import Run

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no ' ~ m.role ~ ' here') }}"
    "{% endif %}{{ '[' + m.role + '] ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": "What is the sea?"},
    {"role": "assistant", "content": "Water, and much of it."},
]
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def talker(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template, which writes bos itself."""
    path = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(llama, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def test_a_window_of_a_chat_is_what_transformers_makes_of_it(talker: Path) -> None:
    rows: Any = [MESSAGES]
    documents = read_documents(rows, render=ChatTemplate(talker))
    (window,) = token_windows(documents, load_tokenizer(talker), samples=1, seq_len=256)
    tokenizer = AutoTokenizer.from_pretrained(talker)
    expected = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert window.tolist() == expected
    assert (window[0], window[1:].tolist().count(BOS), window[-1]) == (BOS, 0, EOS)


def test_a_template_in_tokenizer_config_is_used(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(llama, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "other", "template": "no"},
    ]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate(path)(Chat(MESSAGES, "here")) == "What is the sea?"


def test_messages_that_the_template_refuses(talker: Path, caplog: pytest.LogCaptureFixture) -> None:
    render = ChatTemplate(talker)
    with pytest.raises(DataError, match=r"^a: line 3: the chat .* refuses .* found no tool here;"):
        render(Chat([{"role": "tool", "content": "x"}], "a: line 3"))
    with pytest.raises(DataError, match=r"^a: line 3: the chat template does not fit"):
        render(Chat([{"role": "user", "content": ["x"]}], "a: line 3"))
    rows: Any = [[{"role": "tool", "content": "x"}], MESSAGES]
    with caplog.at_level("INFO"):
        assert len(list(read_documents(rows, render=render))) == 1
    assert "skipped 1 bad rows of 2" in caplog.messages[0]


def test_a_template_cannot_leave_its_sandbox(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(llama, path)
    (path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(DataError, match="the chat template refuses"):
        ChatTemplate(path)(Chat(MESSAGES, "here"))


def test_a_model_without_a_template_is_one_error(llama: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no chat template.*add the model's template"):
        ChatTemplate(llama)(Chat(MESSAGES, "here"))


def test_chats_and_text_by_weight_on_the_command_line(
    talker: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    chats, digests = tmp_path / "chats=2", set()
    chats.mkdir()
    rows = [json.dumps({"talk": MESSAGES}) for _ in range(20)]
    (chats / "a.jsonl").write_text("\n".join([*rows, "{"]))
    for weight, windows in ((1, 4), (3, 6)):
        stats = tmp_path / f"{weight}.safetensors"
        result = run(
            *("calibrate", talker, "--data", text, "--data", f"{chats}={weight}"),
            *("--field", "talk", "--samples", 8, "--seq-len", 256, "-o", stats),
        )
        assert result.exit_code == 0, result.output
        assert f"tokens in 8 windows, of {8 * 256:,} asked for" in result.stderr
        info = ChannelStats.load(stats).info
        digests.add(info.text_digest)
        assert info.samples == 8
        assert info.tokens - windows * chat_tokens(talker) == (8 - windows) * 256
    assert len(digests) == 2
    refused = run(
        *("calibrate", talker, "--data", chats, "--field", "talk", "--strict"),
        *("--samples", 256, "-o", tmp_path / "no"),
    )
    assert refused.exit_code == 2
    assert "a.jsonl: line 21: is not a record" in refused.stderr


def chat_tokens(path: Path) -> int:
    """Of MESSAGES, as transformers counts them."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    return int(np.size(tokenizer.apply_chat_template(MESSAGES, return_dict=False)))


def test_skipped_rows_are_reported_once_in_a_command(
    talker: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("{\n" + json.dumps({"text": text.read_text()}))
    result = run(
        *("prune", talker, "--data", data, "--samples", 4, "--seq-len", 64),
        *("--vocab-by", "frequency", "--vocab-size", 512, "--intermediate-size", 64),
        *("-o", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.count("skipped 1 bad rows of 2") == 1
