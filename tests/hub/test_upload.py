"""--push-to: the whole result is on the hub, or one line gives the reason."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_commands import HURRY, SIZES, Result, assert_refused, child, command
from tests.support.hub_server import Fault, Hub, serve

TOKEN = {"HF_TOKEN": "hf_mine"}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve({}) as running:
        yield running


@pytest.fixture(autouse=True)
def quiet(hub: Hub) -> None:
    hub.forget()
    hub.pushed.clear()
    hub.objects.clear()


@pytest.fixture(scope="module")
def plan(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plan")
    made = command(
        "http://127.0.0.1:9", directory, "plan", llama, *SIZES, "-o", directory / "plan.json"
    )
    assert made.returncode == 0, made.stderr
    return directory / "plan.json"


def apply(hub: Hub, plan: Path, home: Path, *more: object, **settings: str) -> Result:
    options = ("-o", home / "out", "--push-to", "me/smaller", *more)
    return command(hub.url, home, "apply", plan, *options, **settings)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_apply_uploads_the_whole_output(hub: Hub, plan: Path, tmp_path: Path) -> None:
    hub.pushed["me/smaller"] = {"model.safetensors": b"stale", "notes.txt": b"mine"}
    result = apply(hub, plan, tmp_path, **TOKEN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2] == f"{hub.url}/me/smaller/commit/{'f' * 40}"
    assert result.stderr == ""
    assert hub.pushed["me/smaller"] == content(tmp_path / "out") | {"notes.txt": b"mine"}
    assert hub.objects.keys()


def test_prune_uploads_what_it_verified(hub: Hub, llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--data", text, "--samples", "2", "--seq-len", "32", *SIZES[:2]]
    more = ["--intermediate-size", "64", "-o", out, "--push-to", "me/new"]
    result = command(hub.url, tmp_path, "prune", llama, *options, *more, **TOKEN)
    assert result.returncode == 0, result.stderr
    assert hub.pushed["me/new"] == content(out)


def test_a_bad_day_of_the_hub_passes(hub: Hub, plan: Path, tmp_path: Path) -> None:
    hub.faults += [
        Fault("create", status=503),
        Fault("preupload", status=429, headers={"Retry-After": "0"}),
        Fault("commit", status=500, times=2),
    ]
    result = apply(hub, plan, tmp_path, **TOKEN)
    assert result.returncode == 0, result.stderr
    assert hub.pushed["me/smaller"] == content(tmp_path / "out")
    large = [request for request in hub.requests if request.startswith("PUT")]
    assert len(large) == len(set(large))  # not sent again with the second commit


def test_without_a_token_nothing_is_begun(hub: Hub, plan: Path, tmp_path: Path) -> None:
    assert_refused(apply(hub, plan, tmp_path), "me/smaller", "token", "HF_TOKEN")
    assert not (tmp_path / "out").exists()
    assert hub.requests == []


def test_a_bad_repository_name_is_refused_at_once(hub: Hub, plan: Path, tmp_path: Path) -> None:
    result = apply(hub, plan, tmp_path, "--push-to", "smaller", **TOKEN)
    assert_refused(result, "smaller", "org/name")
    offline = apply(hub, plan, tmp_path, **TOKEN, HF_HUB_OFFLINE="1")
    assert_refused(offline, "me/smaller", "HF_HUB_OFFLINE")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("create", status=403), ("403",)),
        (Fault("commit", status=412), ("412",)),
    ],
)
def test_what_the_hub_refuses_leaves_the_output_whole(
    hub: Hub, plan: Path, tmp_path: Path, fault: Fault, words: tuple[str, ...]
) -> None:
    hub.faults.append(Fault(**vars(fault)))
    result = apply(hub, plan, tmp_path, **TOKEN)
    assert_refused(result, "me/smaller", "was not uploaded", "hf upload me/smaller", *words)
    assert (tmp_path / "out" / "config.json").exists()
    assert hub.pushed.get("me/smaller", {}) == {}


@pytest.mark.parametrize("silent", ["create", "commit"])
def test_a_hub_that_never_answers_is_one_line(
    hub: Hub, plan: Path, tmp_path: Path, silent: str
) -> None:
    hub.faults.append(Fault(silent, stall=True, times=99))
    code = f"{HURRY}import surgery.hub.upload; surgery.hub.upload.SILENCE_SECONDS = 0.5; "
    code += "from surgery.cli.main import main; main()"
    options = ("-o", tmp_path / "out", "--push-to", "me/smaller")
    result = child(hub.url, tmp_path, code, "apply", plan, *options, **TOKEN)
    assert_refused(result, "me/smaller", "was not uploaded", "timed out", "hf upload me/smaller")
    assert (tmp_path / "out" / "config.json").exists()
