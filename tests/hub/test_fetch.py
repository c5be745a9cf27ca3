"""Models and data sets on the hub: planned from headers, recorded with their commit."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.planning.plan import Plan
from tests.support.hub_commands import COMMIT, SIZES, Result, assert_refused, child, command
from tests.support.hub_server import Fault, Hub, Repo, serve
from tools.published import PUBLISHED
from tools.shapes import write_headers_only

UNWANTED = (
    "pytorch_model.bin",
    "model.gguf",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
    "onnx/config.json",
    "onnx/template.jinja",
    "onnx/config.json",
    "other/model.safetensors",
    "trainer_state.json",
    "corpus.txt",
)
"""Files of real repositories that are large or that pruning has no use for."""

TEMPLATE = "additional_chat_templates/tool_use.jinja"

MODULES = ("1_Pooling/config.json", "router/sub_0_Dense/model.safetensors")
"""What follows an embedding model, as modules.json lists it."""


@pytest.fixture(scope="module")
def hub(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with org/tiny, which has more files than needed, and with models it keeps back."""
    tiny = shutil.copytree(llama, tmp_path_factory.mktemp("hub") / "tiny")
    for name in UNWANTED:
        (tiny / name).parent.mkdir(exist_ok=True)
        (tiny / name).write_bytes(b"unwanted")
    (tiny / TEMPLATE).parent.mkdir()
    (tiny / TEMPLATE).write_text("tools")
    modules = [{"path": path, "type": "x.Module"} for path in ("", "1_Pooling", "router")]
    (tiny / "modules.json").write_text(json.dumps(modules))
    for name in MODULES:
        (tiny / name).parent.mkdir(parents=True)
    (tiny / MODULES[0]).write_text("{}")
    save_file({"weight": np.ones(3, np.float32)}, tiny / MODULES[1])
    repos = {
        "models/org/tiny": Repo(tiny),
        "models/gpt2": Repo(tiny),
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


@pytest.fixture(scope="module")
def first(hub: Hub, home: Path) -> Result:
    """The first command that names org/tiny."""
    return command(hub.url, home, "inspect", "org/tiny", "--json")


@pytest.fixture(scope="module")
def skeleton(first: Result, home: Path) -> Path:
    """The directory that it made."""
    return home / "assets" / "compact-surgery" / "org--tiny" / COMMIT


@pytest.fixture
def quiet(hub: Hub) -> Iterator[Hub]:
    """The hub, nothing of which was asked yet."""
    hub.forget()
    yield hub
    hub.forget()


def asked_for_files(hub: Hub) -> list[str]:
    return [request for request in hub.requests if "/resolve/" in request]


def test_inspect_counts_a_model_of_the_hub(first: Result) -> None:
    assert first.returncode == 0, first.stderr
    census = json.loads(first.stdout)
    assert (census["model"], census["parameters"]) == ("org/tiny", 78_048)


def test_stderr_is_quiet_where_it_is_no_terminal(first: Result) -> None:
    assert first.stderr == ""


def test_every_file_but_the_weights_is_downloaded(skeleton: Path, llama: Path) -> None:
    for path in llama.iterdir():
        if path.suffix != ".safetensors":
            assert (skeleton / path.name).read_bytes() == path.read_bytes()
    assert (skeleton / TEMPLATE).read_text() == "tools"
    for name, size in zip(MODULES, (2, 84), strict=True):
        assert (skeleton / name).stat().st_size == size
    assert list(skeleton.glob("*.safetensors")) == []


def test_what_pruning_does_not_read_is_left_out(skeleton: Path) -> None:
    assert [name for name in UNWANTED if (skeleton / name).exists()] == []


def test_a_skeleton_is_the_checkpoint_to_everything_that_reads_headers(
    skeleton: Path, home: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(home / "assets"))
    remote, local = Checkpoint.open(skeleton), Checkpoint.open(llama)
    assert remote.fingerprint == local.fingerprint
    assert remote.index == local.index
    assert [(t.name, t.shape, t.start) for t in remote.tensors.values()] == [
        (t.name, t.shape, t.start) for t in local.tensors.values()
    ]


def test_a_second_command_downloads_nothing_again(quiet: Hub, home: Path, skeleton: Path) -> None:
    result = command(quiet.url, home, "inspect", f"org/tiny@{COMMIT}")
    assert result.returncode == 0, result.stderr
    assert quiet.requests == []
    assert command(quiet.url, home, "inspect", "org/tiny").returncode == 0
    assert quiet.requests == ["GET /api/models/org/tiny"]


def test_an_earlier_copy_works_offline(hub: Hub, home: Path, skeleton: Path) -> None:
    for model in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        result = command(hub.url, home, "inspect", model, HF_HUB_OFFLINE="1")
        assert result.returncode == 0, result.stderr


def test_a_snapshot_in_the_cache_is_used_as_it_is(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys, huggingface_hub as h; h.snapshot_download('org/tiny', ignore_patterns=['*/*'])"
    )
    assert child(hub.url, tmp_path, code).returncode == 0
    hub.forget()
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    result = command(hub.url, tmp_path, "plan", "org/tiny", *SIZES, "-o", tmp_path / "plan.json")
    assert result.returncode == 0, result.stderr
    folders = (TEMPLATE, *MODULES)
    assert [path for path in asked_for_files(hub) if not path.endswith(folders)] == []
    assert (snapshot / TEMPLATE).read_text() == "tools"
    assert list((tmp_path / "assets").rglob("*.json")) == []
    offline = command(hub.url, tmp_path, "inspect", "org/tiny", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    min(snapshot.glob("model-*")).unlink()  # not whole any more
    assert_refused(
        command(hub.url, tmp_path, "inspect", "org/tiny", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE"
    )
    assert command(hub.url, tmp_path, "inspect", "org/tiny").returncode == 0
    assert any("/resolve/" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/nothing", ("org/nothing", "hub", "404", "check the name")),
        ("org/secret", ("org/secret", "hub", "401", "token")),
        ("org/locked", ("org/locked", "hub", "403", "gated", "token")),
        ("org/broken", ("org/broken", "hub", "500", "connection")),
        ("org/tiny@nowhere", ("org/tiny@nowhere", "hub", "404", "Revision")),
        ("org/tiny@/bin/sh", ("org/tiny@/bin/sh", "neither a directory nor", "spelling")),
        ("org/tiny--x", ("org/tiny--x", "hub", "check the name")),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, home: Path, model: str, words: tuple[str, ...]
) -> None:
    assert_refused(command(hub.url, home, "inspect", model), *words)


def test_no_hub_at_all_is_one_line(home: Path) -> None:
    with serve({}) as stopped:
        url = stopped.url
    words = ("org/new", "hub", "connection", "local directory")
    assert_refused(command(url, home, "inspect", "org/new"), *words)


def test_a_model_without_organization(hub: Hub, home: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    made = command(hub.url, home, "plan", "gpt2", *SIZES, "-o", plan, "--to", out)
    assert made.returncode == 0, made.stderr
    assert Plan.load(plan).source == Plan.load(plan).hub_id == f"gpt2@{COMMIT}"
    assert command(hub.url, home, "apply", plan).returncode == 0
    assert 'base_model: "gpt2"' in (out / "README.md").read_text()
    assert command(hub.url, home, "verify", out).returncode == 0


def test_offline_without_the_model_is_one_line(hub: Hub, home: Path) -> None:
    words = ("org/new", "hub", "HF_HUB_OFFLINE")
    assert_refused(command(hub.url, home, "inspect", "org/new", HF_HUB_OFFLINE="1"), *words)


def test_a_plan_whose_source_left_the_hub_is_refused(hub: Hub, home: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    command(hub.url, home, "plan", "org/tiny", *SIZES, "-o", plan)
    plan.write_text(plan.read_text().replace("org/tiny@", "org/gone@"))
    assert_refused(command(hub.url, home, "apply", plan, "-o", tmp_path / "out"), "org/gone", "404")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


def test_planning_a_large_model_downloads_kilobytes(tmp_path: Path) -> None:
    model = write_headers_only(tmp_path / "model", PUBLISHED["Llama-3.1-70B"], shards=30)
    shards = list(model.glob("*.safetensors"))
    headers = sum(shard.open("rb").read(8)[0] + 8 + 256 * 64 for shard in shards)
    small = sum(path.stat().st_size for path in model.glob("*.json"))
    with serve({"models/org/large": Repo(model, sparse=True)}) as hub:
        made = command(
            hub.url, tmp_path, "plan", "org/large", "--vocab-size", 128256,
            "--intermediate-size", "16256", "-o", tmp_path / "plan.json",
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        assert sum(hub.sent.values()) < headers + small + 20_000
        assert sum(hub.sent.values()) < 1_000_000
        assert len(hub.requests) < 2 * len(shards) + 5
    assert sum(shard.stat().st_size for shard in shards) > 141e9


BAD_DAYS = {
    "rate limit": [Fault("", status=429, headers={"Retry-After": "0"}, times=3)],
    "rate limit in the hub's own header": [
        Fault("", status=429, headers={"RateLimit": '"api";r=0;t=0'}, times=2)
    ],
    "server errors": [Fault("/api/", status=503, times=2), Fault("resolve", status=500, times=4)],
    "broken connections": [
        Fault(r"\.safetensors", cut=5, times=2),
        Fault("tokenizer.json", cut=1000, times=3),
        Fault("config.json", cut=0, times=1),
    ],
    "another range than asked for": [Fault(r"\.safetensors", shifted=True, times=2)],
    "no ranges": [Fault(r"\.safetensors", whole=True, times=100)],
    "a flipped bit": [Fault("/config.json", damage=True)],
    "all at once": [
        Fault("/api/", status=429, headers={"Retry-After": "0"}),
        Fault("tokenizer.json", cut=1000),
        Fault("tokenizer.json", status=502),
        Fault(r"\.safetensors", whole=True, cut=3),
        Fault(r"\.safetensors", shifted=True),
    ],
}


@pytest.mark.parametrize("day", BAD_DAYS)
def test_a_bad_day_of_the_hub_passes(quiet: Hub, tmp_path: Path, llama: Path, day: str) -> None:
    quiet.faults += [replace(fault) for fault in BAD_DAYS[day]]
    result = command(quiet.url, tmp_path, "plan", "org/tiny", *SIZES, "-o", tmp_path / "plan.json")
    assert result.returncode == 0, result.stderr
    assert Plan.load(tmp_path / "plan.json").fingerprint == Checkpoint.open(llama).fingerprint
    assert any(fault.times == 0 for fault in quiet.faults) or day == "no ranges"


def test_a_hub_that_never_answers_is_one_line(quiet: Hub, tmp_path: Path) -> None:
    quiet.faults.append(Fault("", stall=True, times=99))
    result = command(quiet.url, tmp_path, "inspect", "org/tiny", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert_refused(result, "org/tiny", "timed out", "connection")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("", status=429, times=99), ("429",)),
        (Fault("resolve", status=503, times=99), ("org/tiny@", "503", "connection")),
        (Fault(r"tokenizer\.json", cut=0, times=99), ("tokenizer.json", "connection")),
        (Fault(r"\.safetensors", shifted=True, times=99), (".safetensors", "bytes from 0")),
        (Fault(r"/config\.json", damage=True, times=99), ("config.json", "damaged", "digest")),
    ],
)
def test_a_permanent_fault_is_one_line(
    quiet: Hub, tmp_path: Path, fault: Fault, words: tuple[str, ...]
) -> None:
    quiet.faults.append(fault)
    assert_refused(command(quiet.url, tmp_path, "inspect", "org/tiny"), *words)


OUTSIDE = {"rfilename": "../../evil.json", "size": 2, "blobId": "0" * 40}
CONFIG = {"rfilename": "config.json", "size": 2, "blobId": "0" * 40}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1], ("org/odd", "does not describe")),
        ({"id": "org/odd"}, ("org/odd", "commit")),
        ({"id": "org/odd", "sha": "../.."}, ("org/odd", "commit")),
        ({"id": "org/odd", "sha": COMMIT, "siblings": [{}]}, ("org/odd", "does not describe")),
        (
            {"id": "org/odd", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]},
            ("no size",),
        ),
        ({"id": "org/odd", "sha": COMMIT, "siblings": [OUTSIDE]}, ("org/odd", "no weights")),
        (
            {
                "id": "org/odd",
                "sha": COMMIT,
                "siblings": [
                    CONFIG | {"size": 1 << 40},
                    CONFIG | {"rfilename": "model.safetensors", "size": 1 << 62},
                ],
            },
            ("config.json", "too large"),
        ),
    ],
)
def test_an_odd_answer_of_the_hub_is_one_line(
    llama: Path, tmp_path: Path, answer: object, words: tuple[str, ...]
) -> None:
    with serve({"models/org/odd": Repo(llama, answer=answer)}) as hub:
        assert_refused(command(hub.url, tmp_path / "home", "inspect", "org/odd"), *words)
    assert list(tmp_path.rglob("evil*")) == []


def test_a_token_is_sent_to_the_hub_but_not_on_to_where_it_points(
    llama: Path, tmp_path: Path
) -> None:
    repos = {"models/org/private": Repo(llama, token="hf_secret")}
    with serve(repos) as cdn, serve(repos) as hub:
        hub.cdn = cdn.url
        assert_refused(command(hub.url, tmp_path, "inspect", "org/private"), "401", "token")
        result = command(hub.url, tmp_path, "inspect", "org/private", HF_TOKEN="hf_secret")
        assert result.returncode == 0, result.stderr
        assert hub.authorized
        assert cdn.sent
        assert cdn.authorized == []


def test_an_interrupted_download_is_continued(quiet: Hub, tmp_path: Path, llama: Path) -> None:
    quiet.faults += [Fault(r"/tokenizer\.json", cut=20_000), Fault(r"/tokenizer\.json", status=404)]
    assert command(quiet.url, tmp_path, "inspect", "org/tiny").returncode == 2
    before = quiet.sent[f"/org/tiny/resolve/{COMMIT}/tokenizer.json"]
    assert command(quiet.url, tmp_path, "inspect", "org/tiny").returncode == 0
    sent = quiet.sent[f"/org/tiny/resolve/{COMMIT}/tokenizer.json"] - before
    assert sent == (llama / "tokenizer.json").stat().st_size - 20_000


READ = "import sys, surgery.text.documents as c; print('|'.join(c.read_documents(sys.argv[1])))"


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
