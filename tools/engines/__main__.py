"""Try pruned checkpoints in engines, each in an environment of its own, and write docs/engines.md.

    python -m tools.engines --model build/smollm2 --model build/gemma3 --work build/engines

A model is tried dense and pruned in several ways. What is kept is chosen by chance: it is not the
texts' quality that counts, but whether an engine's greedy texts are those of transformers. Results
are kept in the folder of ``--work``: what is there is not run again. With ``--engine``, the page
keeps its rows of other engines and models.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from tokenizers import Tokenizer

import surgery
from surgery.errors import SurgeryError
from tools.engines.comparison import Comparison, compare, compare_embeddings
from tools.engines.environments import (
    EMBEDDERS,
    ENGINES,
    ROOT,
    Engine,
    Failure,
    call,
    python_of,
    version_of,
)
from tools.engines.jobs import Jobs

SCRIPTS = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "engines.md"
MARKS = ("<!-- engines: made by python -m tools.engines -->", "<!-- end of engines -->")
PROMPTS = SCRIPTS / "prompts.txt"
NEW_TOKENS = 12
LARGE_BYTES = 2_000_000_000
"""A model with more weights is tried in fewer ways, in fewer engines, and for fewer tokens."""
LARGE_NEW_TOKENS = 6

HEAD = (
    "| engine | version | model | loads | greedy texts equal | log-probabilities within |",
    "|---|---|---|---|---|---|",
)

PRUNE = "from surgery.cli.main import main; main()"

Variants = dict[str, tuple[str, ...]]
"""Variant → options of prune; "layers" stands for all but two in the middle."""

DENSE_VARIANTS: Variants = {
    "vocabulary": ("--ratio", "0.2", "--only", "vocabulary"),
    "both": ("--ratio", "0.2"),
    "both, −33 %": ("--ratio", "0.33"),
    "both and layers": ("--ratio", "0.33", "--layers", "layers"),
}
MIXTURE_VARIANTS: Variants = {
    "vocabulary": ("--vocab-size", "1536"),
    "both": ("--vocab-size", "1536", "--width", "moe_intermediate_size=96"),
    "both and layers": (
        *("--vocab-size", "1536", "--width", "moe_intermediate_size=96"),
        *("--layers", "layers"),
    ),
    "experts": ("--num-experts", "12", "--expert-criterion", "random"),
}
"""Those of ``tools/mixture.py``, of which the vocabulary is a small part."""
LARGE_VARIANTS = {name: DENSE_VARIANTS[name] for name in ("both", "both, −33 %")}
EMBEDDER_VARIANTS = {name: DENSE_VARIANTS[name] for name in ("vocabulary", "both")}
MIXTURE_PRE = "gpt-2"
"""How its tokenizer splits text, which nobody but us knows."""


def variants_of(model: Path, work: Path) -> dict[str, Path]:
    """Return name → checkpoint, made unless it is there."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    layers = config["num_hidden_layers"]
    removed = (layers // 2, layers // 2 + 1)
    kept = ",".join(str(layer) for layer in range(layers) if layer not in removed)
    made = {"dense": model}
    variants = MIXTURE_VARIANTS if "moe_intermediate_size" in config else DENSE_VARIANTS
    if embeds(model):
        variants = EMBEDDER_VARIANTS
    elif is_large(model):
        variants = LARGE_VARIANTS
    for name, options in variants.items():
        made[name] = out = work / f"{model.name}-{slug(name)}"
        if not out.exists():
            how = [kept if option == "layers" else option for option in options]
            prune = (sys.executable, "-c", PRUNE, "prune", model)
            call(*prune, *how, "--criterion", "random", "-o", out)
    return made


def engines_for(model: Path) -> tuple[Engine, ...]:
    """Return the engines that a model is tried in; the others are compared with the first."""
    if is_large(model):
        return (ENGINES[0], *(engine for engine in ENGINES if engine.gguf))
    return EMBEDDERS if embeds(model) else ENGINES


def is_large(model: Path) -> bool:
    """Whether a model has more than ``LARGE_BYTES`` of weights."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) > LARGE_BYTES


def embeds(model: Path) -> bool:
    """Whether a model is one of sentence-transformers."""
    return (model / "modules.json").is_file()


def slug(name: str) -> str:
    """Return a name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def ends_of(model: Path) -> set[int]:
    """Return the ids of a checkpoint's end-of-text tokens."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = model / name
        ids = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.exists() else None
        found |= set(ids if isinstance(ids, list) else () if ids is None else (ids,))
    return found


def results_of(
    engine: Engine, python: Path, checkpoints: dict[str, Path], work: Path
) -> Iterator[tuple[str, Jobs]]:
    """Yield name → results of each checkpoint; those that are kept in ``work`` are not run."""
    files: dict[str, Path] = {}
    new_tokens = LARGE_NEW_TOKENS if any(map(is_large, checkpoints.values())) else NEW_TOKENS
    for name, model in checkpoints.items():
        files[name] = path = work / f"{slug(engine.name)}-{slug(model.name)}.json"
        if not _done(_read(path)):
            tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
            texts = PROMPTS.read_text("utf-8").splitlines()
            jobs = {"prompts": [tokenizer.encode(text).ids for text in texts], "texts": texts}
            jobs |= {"model": str(model), "new_tokens": new_tokens}
            path.write_text(json.dumps(jobs), encoding="utf-8")
    todo = [name for name, path in files.items() if not _done(_read(path))]
    reason = ""
    try:
        if engine.gguf:
            for name in todo:
                run_gguf(engine, python, checkpoints[name], files[name])
        elif todo:
            call(python, "-m", f"tools.engines.{engine.script}", *(files[name] for name in todo))
    except (Failure, SurgeryError) as error:
        reason = str(error)
    for name, path in files.items():
        found = _read(path)
        if not _done(found):
            found.setdefault("error", reason or "gave no texts")
        yield name, found


def _done(found: Jobs) -> bool:
    return "completions" in found or "embeddings" in found


def run_gguf(engine: Engine, python: Path, model: Path, jobs: Path, pre: str | None = None) -> None:
    """Let an engine do a file of jobs on a model, whose GGUF file is there only meanwhile."""
    target = jobs.with_suffix(".gguf")
    if pre is None and "moe_intermediate_size" in _read(model / "config.json"):
        pre = MIXTURE_PRE
    try:
        surgery.export_gguf(model, target, type="f32", pre=pre, force=True)
        jobs.write_text(json.dumps({**_read(jobs), "model": str(target)}), encoding="utf-8")
        call(python, "-m", f"tools.engines.{engine.script}", jobs)
    finally:
        target.unlink(missing_ok=True)


def _read(path: Path) -> Jobs:
    found: Jobs = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def rows_of(model: Path, work: Path, engines: Sequence[Engine]) -> tuple[list[str], list[str]]:
    """Return the rows of the page for one model, and those of them that should not be there."""
    rows, faults, wanted = list[str](), list[str](), dict[str, Jobs]()
    checkpoints = variants_of(model, work)
    for engine in engines:
        try:
            python = python_of(engine, work)
        except Failure as error:
            python, reason = None, str(error)
        head = f"| {engine.name} | {version_of(python, engine.package) if python else ''} "
        if python is None:
            row = f"{head}| {model.name} | is not installed: {reason} | | |"
            rows.append(row)
            faults += [row] if engine.required else []
            continue
        for name, found in results_of(engine, python, checkpoints, work):
            row, right = f"{head}| {model.name}, {name} ", True
            if not _done(found):
                row, right = f"{row}| no: {found['error']} | | |", False
            elif wanted.setdefault(name, found) is found:
                row += "| yes | compared with | |"
            else:
                both = _compared(wanted[name], found, checkpoints[name])
                row, right = f"{row}| yes | {both.cell} | {both.difference} |", both.right
            click.echo(row)
            rows.append(row)
            faults += [row] if engine.required and not right else []
    return rows, faults


def _compared(wanted: Jobs, found: Jobs, model: Path) -> Comparison:
    if "embeddings" in found:
        return compare_embeddings(wanted, found)
    return compare(wanted, found, ends_of(model))


def merged(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Return rows of the page, ``new`` ones in place of ``old`` ones on an engine and a model."""
    groups: dict[tuple[str, str], list[str]] = {}
    for rows in (old, new):
        fresh: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            engine, _, model, *_ = (cell.strip() for cell in row.strip("|").split("|"))
            fresh.setdefault((model.split(",")[0], engine), []).append(row)
        groups |= fresh
    models = list(dict.fromkeys(model for model, _ in groups))
    engines = [engine.name for engine in (*ENGINES, *EMBEDDERS)]
    ordered = sorted(groups, key=lambda key: (models.index(key[0]), engines.index(key[1])))
    return [row for key in ordered for row in groups[key]]


def write_page(page: Path, rows: Sequence[str], keep: bool) -> None:
    """Write the table of the page; ``keep`` also keeps the rows that ``rows`` say nothing of."""
    before, rest = page.read_text("utf-8").split(MARKS[0])
    table, after = rest.split(MARKS[1])
    old = [line for line in table.splitlines() if line.startswith("|")][len(HEAD) :]
    lines = "\n".join([*HEAD, *merged(old if keep else [], rows)])
    page.write_text(f"{before}{MARKS[0]}\n\n{lines}\n\n{MARKS[1]}{after}", "utf-8")


@click.command()
@click.option("--model", "models", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Environments.")
@click.option(
    "--engine",
    "names",
    type=click.Choice([engine.name for engine in (*ENGINES, *EMBEDDERS)]),
    multiple=True,
    help="Only these, and the first; the page keeps its rows of the others.",
)
def main(models: tuple[Path, ...], work: Path, names: tuple[str, ...]) -> None:
    """Try models in engines, and write the table of docs/engines.md."""
    work.mkdir(parents=True, exist_ok=True)
    rows, faults = list[str](), list[str]()
    for model in models:
        first, *others = engines_for(model)
        engines = [first, *(e for e in others if not names or e.name in names)]
        try:
            more, wrong = rows_of(model.absolute(), work.absolute(), engines)
        except Failure as error:
            raise click.ClickException(f"{model} cannot be pruned: {error}") from error
        rows, faults = rows + more, faults + wrong
    write_page(PAGE, rows, keep=bool(names))
    click.echo(f"wrote {PAGE}: {len(rows)} rows are of this run")
    if faults:
        raise click.ClickException("\n".join(["these have to be right:", *faults]))
    required = ", ".join(engine.name for engine in ENGINES if engine.required)
    click.echo(f"what has to be right is right: every row of {required}")


if __name__ == "__main__":
    main()
