"""Whole commands on hostile input made by chance: no traceback, no hang, nothing written beside."""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import fuzzing
from tests.support.command import Run

EXAMPLES = int(os.environ.get("COMPACT_SURGERY_FUZZ", "60"))
"""Of each test; more find more."""

COMMANDS = {
    "inspect": "inspect model",
    "json": "inspect model --json",
    "vocab": "inspect model --vocab",
    "probe": "inspect model --probe",
    "plan": "plan model --stats stats.safetensors {sizes} -o new.json",
    "text": "plan model --stats stats.safetensors {sizes} --data text.txt -o new.json",
    "ratio": "plan model --ratio 0.2 --multiple-of 8 -o new.json",
    "dequantize": "plan model --dequantize -o new.json",
    "apply": "apply plan.json -o out",
    "verify": "verify cut",
    "verify plan": "verify cut --plan plan.json",
    "verify alone": "verify model",
    "calibrate": "calibrate model --data text.txt --seq-len 16 --samples 2 -o new.safetensors",
    "score": "score model --data text.txt --samples 1 --window-bytes 64",
}
MODELS = ("calibrate", "score")
PARTIAL = {"out.partial", "out.partial.journal", "new.safetensors.partial"}
"""What a command may leave that failed: finished shards or layers, to go on from."""

FILES = {
    "config": ("model/config.json",),
    "tokenizer": ("model/tokenizer.*", "model/vocab.json", "model/merges.txt"),
    "plan": ("plan.json",),
    "stats": ("stats.safetensors",),
    "shard": ("model/*.safetensors", "model/model.safetensors.index.json"),
    "beside": ("model/*.json", "model/*.jinja", "model/LICENSE", "model/README.md"),
    "cut": ("cut/*",),
}
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
WATCH = fuzzing.Watch()


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind → a bench of it and the options for its sizes."""

    @cache
    def build(kind: str) -> tuple[Path, str]:
        root = tmp_path_factory.mktemp(kind)
        return root, fuzzing.build_bench(root, kind)

    return build


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sandbox")


@pytest.fixture(autouse=True)
def stay(monkeypatch: pytest.MonkeyPatch, sandbox: Path) -> None:
    """Come back from wherever the examples go."""
    monkeypatch.chdir(sandbox)


def check(run: Run, root: Path, command: str) -> int:
    """Run ``command`` in ``root/bench`` and check what every command holds to."""
    before = fuzzing.listing(root)
    with WATCH.over((root / "bench").resolve()), fuzzing.time_limit():
        result = run(*command.split())
    assert isinstance(result.exception, SystemExit | None), result.exc_info
    assert result.exit_code in (0, 1, 2), result.output
    after = fuzzing.listing(root)
    new = {name.split("/")[1] for name in after if name not in before}
    assert {name: after.get(name) for name in before} == before
    if result.exit_code == 2:
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("Error: ")
        assert len(lines[0]) < 5_000
        assert lines[0].isprintable()
        assert new <= PARTIAL
    else:
        assert new <= {"out", "new.json", "new.safetensors"}
    return result.exit_code


@pytest.mark.parametrize("kind", fuzzing.BUILDERS)
def test_the_benches_are_good(kind: str, benches: Any, sandbox: Path, run: Run) -> None:
    pattern, sizes = benches(kind)
    for name, command in COMMANDS.items():
        bench = fuzzing.copy_bench(pattern, sandbox)
        fuzzing.fit_again(bench)
        os.chdir(bench)
        expected = 2 if name == "dequantize" and kind != "fp8" else 0
        assert check(run, sandbox, command.format(sizes=sizes)) == expected, name


@st.composite
def attacks(
    draw: st.DrawFn, benches: Any, sandbox: Path, files: tuple[str, ...], commands: list[str]
) -> str:
    """Spoil one of ``files`` of a fresh bench and go there; return the command to run."""
    pattern, sizes = benches(draw(st.sampled_from(sorted(fuzzing.BUILDERS))))
    command = COMMANDS[draw(st.sampled_from(commands))]
    bench = fuzzing.copy_bench(pattern, sandbox)
    os.chdir(bench)
    draw(fuzzing.file_spoilt(draw(st.sampled_from([p for f in files for p in bench.glob(f)]))))
    if draw(st.booleans()):
        with suppress(Exception):
            fuzzing.fit_again(bench)
    return command.format(sizes=sizes)


@pytest.mark.parametrize("files", FILES)
@SETTINGS
@given(data=st.data())
def test_commands_that_edit_files(
    data: Any, files: str, benches: Any, sandbox: Path, run: Run
) -> None:
    commands = sorted(COMMANDS.keys() - set(MODELS))
    check(run, sandbox, data.draw(attacks(benches, sandbox, FILES[files], commands)))


@pytest.mark.parametrize("files", ["config", "tokenizer", "shard"])
@SETTINGS
@given(data=st.data())
def test_commands_that_run_models(
    data: Any, files: str, benches: Any, sandbox: Path, run: Run
) -> None:
    check(run, sandbox, data.draw(attacks(benches, sandbox, FILES[files], list(MODELS))))
