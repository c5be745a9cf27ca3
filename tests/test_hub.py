"""Models and data sets of the hub: downloaded, recorded with their commit, refused in one line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from surgery.checkpoint import Checkpoint
from tests.hub_server import Hub, Repo, serve

Result = subprocess.CompletedProcess[str]
Command = Callable[..., Result]

COMMIT = Repo(Path()).commit
SIZES = ("--vocab-size", "512", "--intermediate-size", "96")
"""A cut of the vocabulary only, which needs no statistics."""

UNWANTED = (
    "pytorch_model.bin",
    "model.gguf",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
    "onnx/config.json",
)
"""Files of real repositories that are large or that pruning has no use for."""


@pytest.fixture(scope="module")
def hub(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with org/tiny, which has more files than needed, and with models it keeps back."""
    tiny = shutil.copytree(llama, tmp_path_factory.mktemp("hub") / "tiny")
    for name in UNWANTED:
        (tiny / name).parent.mkdir(exist_ok=True)
        (tiny / name).write_bytes(b"unwanted")
    repos = {
        "models/org/tiny": Repo(tiny),
        "models/org/secret": Repo(tiny, refusal=(401, "")),
        "models/org/locked": Repo(tiny, refusal=(403, "GatedRepo")),
        "models/org/broken": Repo(tiny, refusal=(500, "")),
    }
    data = tmp_path_factory.mktemp("data")
    (data / "data").mkdir()
    rows = [{"text": f"text {i}", "body": f"body {i}", "number": i} for i in range(3)]
    (data / "data" / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with serve({**repos, "datasets/org/text": Repo(data)}) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache of downloads, which the tests of this module share."""
    return tmp_path_factory.mktemp("home")


def command(url: str, home: Path, *arguments: object, **settings: str) -> Result:
    """Run the command line in a process of its own: the hub's settings are read at import."""
    return child(url, home, "from surgery.cli import main; main()", *arguments, **settings)


def child(url: str, home: Path, code: str, *arguments: object, **settings: str) -> Result:
    """Run Python code with ``url`` as the hub."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {name: "" for name in environment if name.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_refused(result: Result, *words: str) -> None:
    assert result.returncode == 2, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]!r}"


@pytest.fixture(scope="module")
def first(hub: Hub, home: Path) -> Result:
    """The command that downloads org/tiny."""
    return command(hub.url, home, "inspect", "org/tiny", "--json")


@pytest.fixture(scope="module")
def snapshot(first: Result, home: Path) -> Path:
    """The directory it was downloaded to."""
    return home / "hub" / "models--org--tiny" / "snapshots" / COMMIT


def test_inspect_counts_a_model_of_the_hub(first: Result) -> None:
    assert first.returncode == 0, first.stderr
    census = json.loads(first.stdout)
    assert (census["model"], census["parameters"]) == ("org/tiny", 78_048)


def test_stderr_is_quiet_where_it_is_no_terminal(first: Result) -> None:
    assert first.stderr == ""


def test_a_download_holds_every_file_of_the_checkpoint(snapshot: Path, llama: Path) -> None:
    for path in llama.iterdir():
        assert (snapshot / path.name).read_bytes() == path.read_bytes()


def test_a_download_leaves_out_what_pruning_does_not_read(snapshot: Path) -> None:
    assert [name for name in UNWANTED if (snapshot / name).exists()] == []


def test_a_second_command_downloads_nothing_again(hub: Hub, home: Path, snapshot: Path) -> None:
    hub.requests.clear()
    result = command(hub.url, home, "inspect", f"org/tiny@{COMMIT}")
    assert result.returncode == 0, result.stderr
    assert [request for request in hub.requests if "/resolve/" in request] == []


def test_a_downloaded_model_works_offline(hub: Hub, home: Path, snapshot: Path) -> None:
    result = command(hub.url, home, "inspect", "org/tiny", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr


def test_a_plan_names_the_commit_and_applies_from_it(hub: Hub, home: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    made = command(hub.url, home, "plan", "org/tiny@main", *SIZES, "-o", plan)
    assert made.returncode == 0, made.stderr
    assert json.loads(plan.read_bytes())["source"] == f"org/tiny@{COMMIT}"
    applied = command(hub.url, home, "apply", plan, "-o", tmp_path / "out")
    assert applied.returncode == 0, applied.stderr
    assert Checkpoint.open(tmp_path / "out").config["vocab_size"] == 512
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "org/tiny"' in card
    assert str(home) not in card
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    verified = command(hub.url, home, "verify", tmp_path / "out")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "ok       kept rows and channels are bit-identical" in verified.stdout  # from the cache


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/nothing", ("org/nothing", "hub", "404", "check the name")),
        ("org/secret", ("org/secret", "hub", "401", "token")),
        ("org/locked", ("org/locked", "hub", "403", "gated", "token")),
        ("org/broken", ("org/broken", "hub", "500", "connection")),
        ("org/tiny@nowhere", ("org/tiny@nowhere", "hub", "404", "Revision")),
        ("org/tiny--x", ("org/tiny--x", "hub", "check the name")),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, home: Path, model: str, words: tuple[str, ...]
) -> None:
    assert_refused(command(hub.url, home, "inspect", model), *words)


def test_no_hub_at_all_is_one_line(home: Path) -> None:
    with serve({}) as gone:
        url = gone.url
    words = ("org/new", "hub", "connection", "local directory")
    assert_refused(command(url, home, "inspect", "org/new"), *words)


def test_offline_without_the_model_is_one_line(hub: Hub, home: Path) -> None:
    words = ("org/new", "hub", "HF_HUB_OFFLINE")
    assert_refused(command(hub.url, home, "inspect", "org/new", HF_HUB_OFFLINE="1"), *words)


def test_a_plan_whose_source_left_the_hub_is_refused(hub: Hub, home: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    command(hub.url, home, "plan", "org/tiny", *SIZES, "-o", plan)
    plan.write_text(plan.read_text().replace("org/tiny@", "org/gone@"))
    assert_refused(command(hub.url, home, "apply", plan, "-o", tmp_path / "out"), "org/gone", "404")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


READ = "import sys, calib.documents as c; print('|'.join(c.read_documents(sys.argv[1])))"


@pytest.mark.parametrize(
    ("spec", "documents"),
    [
        ("hub:org/text", "text 0|text 1|text 2"),
        ("hub:org/text:default:train:body", "body 0|body 1|body 2"),
    ],
)
def test_a_data_set_of_the_hub_is_read(hub: Hub, home: Path, spec: str, documents: str) -> None:
    result = child(hub.url, home, READ, spec)
    assert result.stdout.splitlines() == [documents], result.stderr


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hub:org/nothing", ("org/nothing",)),
        ("hub:org/text:other", ("other", "default")),
        ("hub:org/text::test", ("test", "train")),
        ("hub:org/text:::title", ("title", "text", "body")),
        ("hub:org/text:::number", ("number", "not a string")),
    ],
)
def test_a_data_set_that_cannot_be_read_is_one_line(
    hub: Hub, home: Path, llama: Path, spec: str, words: tuple[str, ...]
) -> None:
    assert_refused(command(hub.url, home, "score", llama, "--data", spec), spec, *words)
