"""Weights on the hub: downloaded shard by shard in spite of faults, and deleted afterwards."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.stats.channel_stats import ChannelStats
from tests.support.command import Run
from tests.support.hub_commands import COMMIT, SIZES, assert_refused, command, started
from tests.support.hub_server import Fault, Hub, Repo, serve

Home = Path


@pytest.fixture(scope="module")
def hub(llama: Path) -> Iterator[Hub]:
    """A hub with org/tiny, and a server beside it that has the shards."""
    repos = {"models/org/tiny": Repo(llama)}
    with serve(repos) as cdn, serve(repos) as running:
        running.cdn = cdn.url
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def plan(hub: Hub, home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of org/tiny."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    made = command(hub.url, home, "plan", "org/tiny@main", *SIZES, "-o", path)
    assert made.returncode == 0, made.stderr
    return path


@pytest.fixture(scope="module")
def expected(llama: Path, tmp_path_factory: pytest.TempPathFactory, plan: Path) -> dict[str, bytes]:
    """The output of the same plan for the same model in a local directory."""
    directory = tmp_path_factory.mktemp("local")
    local = directory / "plan.json"
    local.write_text(plan.read_text().replace(f"org/tiny@{COMMIT}", str(llama)))
    made = command("http://127.0.0.1:9", directory, "apply", local, "-o", directory / "out")
    assert made.returncode == 0, made.stderr
    return weights(directory / "out")


@pytest.fixture(autouse=True)
def quiet(hub: Hub) -> Iterator[None]:
    hub.forget()
    yield
    hub.forget()


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def skeleton(home: Home) -> Path:
    return home / "assets" / "compact-surgery" / "org--tiny" / COMMIT


def assert_nothing_left(home: Home) -> None:
    left = [*home.rglob("*.incomplete"), *home.rglob("*.safetensors"), *home.rglob("tensor-*")]
    left += home.rglob("*.use")
    assert left == []


def test_a_plan_names_the_commit_and_applies_from_it(
    hub: Hub, home: Home, plan: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert json.loads(plan.read_bytes())["source"] == f"org/tiny@{COMMIT}"
    applied = command(hub.url, home, "apply", plan, "-o", tmp_path / "out")
    assert applied.returncode == 0, applied.stderr
    assert weights(tmp_path / "out") == expected
    assert_nothing_left(home)
    assert Checkpoint.open(tmp_path / "out").config["vocab_size"] == 512
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "org/tiny"' in card
    assert str(home) not in card
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_every_shard_is_asked_for_once(
    hub: Hub, home: Home, llama: Path, plan: Path, tmp_path: Path
) -> None:
    assert command(hub.url, home, "apply", plan, "-o", tmp_path / "out").returncode == 0
    shards = Checkpoint.open(llama).shards
    names = [request.rpartition("/")[2] for request in hub.requests]
    assert sorted(names) == sorted(shards)


def test_layers_become_one_across_shards(hub: Hub, home: Home, llama: Path, tmp_path: Path) -> None:
    """All three layers are wanted at once, more shards than else are on the disk."""
    made, options = tmp_path / "plan.json", ("--layers", "0+1+2", "-o", tmp_path / "plan.json")
    assert command(hub.url, home, "plan", "org/tiny@main", *options).returncode == 0
    applied = command(hub.url, home, "apply", made, "-o", tmp_path / "out")
    assert applied.returncode == 0, applied.stderr
    made.write_text(made.read_text().replace(f"org/tiny@{COMMIT}", str(llama)))
    assert command(hub.url, home, "apply", made, "-o", tmp_path / "local").returncode == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    assert_nothing_left(home)


def test_verify_compares_with_the_hub(hub: Hub, home: Home, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(hub.url, home, "apply", plan, "-o", out).returncode == 0
    verified = command(hub.url, home, "verify", out, "--plan", plan)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "ok       kept rows and channels are bit-identical" in verified.stdout
    assert_nothing_left(home)
    shard = max(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    found = command(hub.url, home, "verify", out, "--plan", plan)
    assert found.returncode == 1
    assert "differs from the source" in found.stdout
    hub.faults.append(Fault("", status=404, times=99))
    without_source = command(hub.url, tmp_path / "elsewhere", "verify", out, "--plan", plan)
    assert "skipped  kept rows and channels are bit-identical" in without_source.stdout


def test_a_hub_id_that_only_the_output_names_is_looked_up_when_asked(
    hub: Hub, home: Home, plan: Path, tmp_path: Path
) -> None:
    """Its plan may be anybody's."""
    out = tmp_path / "alone" / "out"
    assert command(hub.url, home, "apply", plan, "-o", out).returncode == 0
    hub.forget()
    verified = command(hub.url, home, "verify", out)
    assert verified.returncode == 0, verified.stderr
    assert "made from org/tiny@" in verified.stdout
    assert "name it with --source" in verified.stdout
    forward = command(hub.url, home, "verify", out, "--forward")
    assert (forward.returncode, hub.requests) == (2, [])
    asked = command(hub.url, home, "verify", out, "--source", "org/tiny")
    assert asked.returncode == 0, asked.stderr
    assert "skipped" not in asked.stdout


BAD_DAYS = {
    "rate limit": [Fault("safetensors", status=429, headers={"Retry-After": "0"}, times=3)],
    "server errors": [Fault("safetensors", status=503, times=4)],
    "broken connections": [
        Fault("/cdn/.*00002", cut=1000, times=3),
        Fault("/cdn/.*00003", cut=0, times=2),
    ],
    "broken, and then no ranges": [
        Fault("/cdn/.*00002", cut=1000),
        Fault("/cdn/.*00002", whole=True, times=9),
    ],
    "broken, and then another range": [
        Fault("/cdn/.*00002", cut=1000),
        Fault("/cdn/.*00002", shifted=True, times=2),
    ],
    "a flipped bit": [Fault("/cdn/.*00004", damage=True)],
}


@pytest.mark.parametrize("day", BAD_DAYS)
def test_apply_on_a_bad_day_of_the_hub(
    llama: Path, home: Home, plan: Path, expected: dict[str, bytes], tmp_path: Path, day: str
) -> None:
    repos = {"models/org/tiny": Repo(llama)}
    with serve(repos) as cdn, serve(repos) as hub:
        hub.cdn = cdn.url
        for fault in BAD_DAYS[day]:
            server = cdn if "cdn" in fault.path else hub
            server.faults.append(Fault(**vars(fault)))
        applied = command(hub.url, home, "apply", plan, "-o", tmp_path / "out")
        assert applied.returncode == 0, applied.stderr
        assert any(not fault.times for fault in (*cdn.faults, *hub.faults))
    assert weights(tmp_path / "out") == expected
    assert_nothing_left(home)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("00003", status=404), ("00003", "404")),
        (Fault("00003", status=503, times=99), ("00003", "503", "connection")),
        (Fault("00003", cut=0, times=99), ("00003", "connection")),
        (Fault("00003", damage=True, times=99), ("00003", "damaged", "digest")),
    ],
)
def test_what_does_not_pass_is_one_line_and_can_be_resumed(
    hub: Hub,
    home: Home,
    plan: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    fault: Fault,
    words: tuple[str, ...],
) -> None:
    out, cdn = tmp_path / "out", hub.cdn
    hub.cdn = None
    hub.faults.append(Fault(**vars(fault)))
    assert_refused(command(hub.url, home, "apply", plan, "-o", out), f"org/tiny@{COMMIT}", *words)
    assert not out.exists()
    hub.forget()
    resumed = command(hub.url, home, "apply", plan, "-o", out, "--resume")
    hub.cdn = cdn
    assert resumed.returncode == 0, resumed.stderr
    assert weights(out) == expected
    names = {request.rpartition("/")[2] for request in hub.requests}
    assert names < expected.keys()  # some were written before
    assert_nothing_left(home)


def test_a_plan_whose_source_left_the_hub_is_refused(hub: Hub, plan: Path, tmp_path: Path) -> None:
    no_source = tmp_path / "plan.json"
    no_source.write_text(plan.read_text().replace("org/tiny@", "org/gone@"))
    applied = command(hub.url, tmp_path / "home", "apply", no_source, "-o", tmp_path / "out")
    assert_refused(applied, "org/gone", "404")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "plan.json"]


def test_offline_without_the_weights_is_one_line(
    hub: Hub, home: Home, plan: Path, tmp_path: Path
) -> None:
    applied = command(hub.url, home, "apply", plan, "-o", tmp_path / "out", HF_HUB_OFFLINE="1")
    assert_refused(applied, f"org/tiny@{COMMIT}", ".safetensors", "HF_HUB_OFFLINE")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_apply_goes_on_with_what_is_there(
    llama: Path, home: Home, plan: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    repos, out = {"models/org/tiny": Repo(llama)}, tmp_path / "out"
    size = (llama / max(expected)).stat().st_size
    with serve(repos) as hub:
        hub.faults += [Fault(max(expected), cut=1000), Fault(max(expected), stall=True, times=9)]
        process = started(hub.url, home, "apply", plan, "-o", out)
        partial = skeleton(home) / ".hub" / f"{max(expected)}.incomplete"
        deadline = time.monotonic() + 30
        while not (partial.exists() and partial.stat().st_size == 1000):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        hub.forget()
        resumed = command(hub.url, home, "apply", plan, "-o", out, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert weights(out) == expected
        url = f"/org/tiny/resolve/{COMMIT}/{max(expected)}"
        assert hub.sent[url] == size - 1000
    assert_nothing_left(home)


def test_two_at_the_same_time_both_end_right(
    hub: Hub, home: Home, plan: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults += [Fault("safetensors", status=503, times=2)]  # so that they do not keep step
    outputs = [tmp_path / "one", tmp_path / "other"]
    running = [started(hub.url, home, "apply", plan, "-o", output) for output in outputs]
    assert [process.wait(60) for process in running] == [0, 0]
    assert [weights(output) for output in outputs] == [expected, expected]
    assert_nothing_left(home)


def test_statistics_are_those_of_a_local_directory(
    home: Home, plan: Path, llama: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    options = ["--data", text, "--samples", "4", "--seq-len", "64", "-o"]
    assert run("calibrate", llama, *options, tmp_path / "local").exit_code == 0
    with serve({"models/org/tiny": Repo(llama)}) as hub:
        result = command(hub.url, home, "calibrate", "org/tiny", *options, tmp_path / "hub")
    assert result.returncode == 0, result.stderr
    local, found = (ChannelStats.load(tmp_path / name) for name in ("local", "hub"))
    assert str(found.info.weights).startswith("hub:")
    info = msgspec.structs.replace(found.info, weights=local.info.weights)
    replace(found, info=info).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "local").read_bytes()
    assert_nothing_left(home)
    sent = {url.rpartition("/")[2]: n for url, n in hub.sent.items() if "resolve" in url}
    needed = {t.path for t in Checkpoint.open(llama).tensors.values() if "lm_head" not in t.name}
    assert sent.keys() == {path.name for path in needed}
    for path in needed:  # each once, but for norms that did not wait for their shard
        assert 0 <= sent[path.name] - path.stat().st_size < 512


def test_a_score_is_that_of_a_local_directory(
    hub: Hub, home: Home, llama: Path, text: Path, run: Run
) -> None:
    options = ["--data", text, "--samples", "4", "--json"]
    local = run("score", llama, *options)
    result = command(hub.url, home, "score", "org/tiny", *options)
    assert result.returncode == 0, result.stderr
    bits = [json.loads(output)["bits_per_byte"] for output in (result.stdout, local.stdout)]
    assert bits[0] == bits[1]
    assert_nothing_left(home)


def test_prune_does_it_all(hub: Hub, home: Home, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--data", text, "--samples", "4", "--seq-len", "64"]
    sizes = ["--vocab-size", "512", "--intermediate-size", "64"]
    result = command(hub.url, home, "prune", "org/tiny", *options, *sizes, "-o", out)
    assert result.returncode == 0, result.stderr
    assert "skipped  kept rows and channels are bit-identical" in result.stdout
    assert_nothing_left(home)
    verified = command(hub.url, home, "verify", out, "--forward")
    assert verified.returncode == 0, verified.stdout
    assert "skipped" not in verified.stdout
    assert "ok       logits equal the masked dense model's" in verified.stdout
