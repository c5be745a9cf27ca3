"""Try pruned checkpoints in engines, each in an environment of its own, and write docs/engines.md.

    python -m tools.engines --model build/smollm2 --work build/engines

A model is tried dense, without a part of its vocabulary, of that and its channels, and of its
layers, too. What is kept is chosen by chance: it is not the texts' quality that counts, but whether
an engine's greedy texts are those of transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import click
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "engines.md"
MARKS = ("<!-- engines: made by python -m tools.engines -->", "<!-- end of engines -->")
PROMPTS = SCRIPTS / "prompts.txt"
NEW_TOKENS = 12
TIMEOUT_SECONDS = 1800

PRUNE = "from surgery.cli.main import main; main()"

TRANSFORMERS_4 = ("transformers==4.57.6", "tokenizers==0.22.2", "sentencepiece", "protobuf")


@dataclass(frozen=True)
class Engine:
    """An engine, and how it is installed and run."""

    name: str
    package: str
    """Whose version the page shows."""
    script: str
    """In this folder; it takes a model and a file of jobs."""
    requirements: tuple[str, ...] = ()
    """What its environment holds; without any, it is this one."""
    shares_torch: bool = False
    """Whether the environment sees this one's packages behind its own."""
    gguf: bool = False
    """Whether it takes a GGUF file."""


ENGINES = (
    Engine("transformers 5", "transformers", "transformers_cpu.py"),
    Engine("transformers 4", "transformers", "transformers_cpu.py", TRANSFORMERS_4, True),
    Engine("llama.cpp", "xllamacpp", "llama_cpp.py", ("xllamacpp",), gguf=True),
    Engine(
        "CTranslate2",
        "ctranslate2",
        "ctranslate2_cpu.py",
        ("ctranslate2", *TRANSFORMERS_4),
        True,
    ),
)
"""The first is what the others are compared with."""

VARIANTS = {
    "vocabulary": ("--ratio", "0.2", "--only", "vocabulary"),
    "both": ("--ratio", "0.2"),
    "both and layers": ("--ratio", "0.3", "--layers"),
}
"""Variant → options of prune."""


class Failure(Exception):
    """An engine cannot be installed, or cannot run a model; the text is the reason."""


def call(*command: object) -> None:
    """Run a command; its last line on stderr is the reason of a failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*map(str, command)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(str(error)) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Failure(lines[-1] if lines else f"exit status {done.returncode}")


def python_of(engine: Engine, work: Path) -> Path:
    """Install an engine, unless it is there, and return its Python."""
    if not engine.requirements:
        return Path(sys.executable)
    home = work / engine.name.replace(" ", "-")
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (home / "done").exists():
        venv.create(home, clear=True, with_pip=True)
        call(python, "-m", "pip", "install", "--only-binary", ":all:", *engine.requirements)
        if engine.shares_torch:
            script = "import sysconfig; print(sysconfig.get_path('purelib'))"
            found = subprocess.run([python, "-c", script], capture_output=True, text=True)
            shared = Path(found.stdout.strip()) / "torch.pth"
            shared.write_text(sysconfig.get_path("purelib"))
        (home / "done").touch()
    return python


def version_of(python: Path, package: str) -> str:
    """Return the version of a package in an environment."""
    script = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def variants_of(model: Path, work: Path) -> dict[str, Path]:
    """Return name → checkpoint, made unless it is there."""
    layers = json.loads((model / "config.json").read_text("utf-8"))["num_hidden_layers"]
    made = {"dense": model}
    for name, options in VARIANTS.items():
        out = work / f"{model.name}-{name.replace(' ', '-')}"
        kept = [f"0-{layers // 2 - 1},{layers // 2 + 2}-{layers - 1}"] if "layers" in name else []
        if not out.exists():
            how = (*options, *kept, "--criterion", "random", "-o", out)
            call(sys.executable, "-c", PRUNE, "prune", model, *how)
        made[name] = out
    return made


def ends_of(model: Path) -> set[int]:
    """Return the ids of a checkpoint's end-of-text tokens."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = model / name
        ids = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.exists() else None
        found |= set(ids if isinstance(ids, list) else () if ids is None else (ids,))
    return found


def completions(engine: Engine, python: Path, model: Path, work: Path) -> list[list[int]]:
    """Return the greedy completions of the prompts, up to a token that ends the text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = PROMPTS.read_text("utf-8").splitlines()
    jobs = {"prompts": [tokenizer.encode(text).ids for text in prompts], "new_tokens": NEW_TOKENS}
    path, target = work / "jobs.json", model
    path.write_text(json.dumps(jobs), encoding="utf-8")
    if engine.gguf:
        import surgery

        target = work / f"{model.name}.gguf"
        surgery.export_gguf(model, target, type="f32", force=True)
    call(python, SCRIPTS / engine.script, target, path)
    if engine.gguf:
        target.unlink()
    found: list[list[int]] = json.loads(path.read_text("utf-8"))["completions"]
    ends = ends_of(model)
    return [list(takewhile(lambda id_: id_ not in ends, ids)) for ids in found]


def rows_of(model: Path, work: Path, engines: Sequence[Engine]) -> list[str]:
    """Return the rows of the page for one model."""
    rows, wanted = [], dict[str, list[list[int]]]()
    checkpoints = variants_of(model, work)
    for engine in engines:
        head = f"| {engine.name} "
        try:
            python = python_of(engine, work)
        except Failure as error:
            rows.append(f"{head}| | {model.name} | is not installed: {error} | |")
            continue
        head += f"| {version_of(python, engine.package)} | {model.name}, "
        for name, path in checkpoints.items():
            try:
                found = completions(engine, python, path, work)
            except Failure as error:
                rows.append(f"{head}{name} | no: {error} | |")
                continue
            first = wanted.setdefault(name, found)
            same = sum(map(list.__eq__, first, found))
            texts = "compared with" if first is found else f"{same} of {len(found)}"
            rows.append(f"{head}{name} | yes | {texts} |")
            click.echo(rows[-1])
    return rows


@click.command()
@click.option("--model", "models", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Environments.")
@click.option("--engine", "names", multiple=True, help="Only these, and the first.")
def main(models: tuple[Path, ...], work: Path, names: tuple[str, ...]) -> None:
    """Try models in engines, and write the table of docs/engines.md."""
    work.mkdir(parents=True, exist_ok=True)
    first, *others = ENGINES
    engines = [first, *(e for e in others if not names or e.name in names)]
    rows = ["| engine | version | model | loads | greedy texts equal |", "|---|---|---|---|---|"]
    for model in models:
        rows += rows_of(model.absolute(), work.absolute(), engines)
    before, rest = PAGE.read_text("utf-8").split(MARKS[0])
    table = "\n".join(rows)
    PAGE.write_text(
        f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}", "utf-8"
    )


if __name__ == "__main__":
    main()
