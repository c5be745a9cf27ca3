"""Measure what the project claims: speed and memory, of served models too; what training buys.

    python -m tools.bench apply --work DIR
    python -m tools.bench experts --work DIR
    python -m tools.bench calibrate MODEL --data TEXT
    python -m tools.bench forward MODEL --data TEXT
    python -m tools.bench large --layers N --work DIR
    python -m tools.bench mixture --work DIR
    python -m tools.bench hub --work DIR
    python -m tools.bench serve DENSE PRUNED --work DIR
    python -m tools.bench start --work DIR
    python -m tools.bench wide --work DIR
    python -m tools.bench recover MODEL PRUNED --data TEXT --unseen OTHER --work DIR
    python -m tools.bench gpu --work DIR

Every stage runs in a child process of its own. Linux only. This process stays small: what needs
numpy or torch is done by children.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import click

from calib.recovery.options import METHODS
from surgery.cli.options import gathered
from tools.bench import serve
from tools.bench.child import ROOT, Usage, compact_surgery, measure, python_module, summary
from tools.bench.hub import COMMIT, NAME, PeakDisk, on_hub, running_hub
from tools.bench.recover import Training, bench_methods, draw, table

MB = 10**6
COLUMNS = {
    "seconds": "wall s",
    "synced_seconds": "synced s",
    "pass_seconds": "pass s",
    "load_seconds": "load s",
    "user_seconds": "user s",
    "system_seconds": "sys s",
    "peak_rss_bytes": "RSS MB",
    "peak_anonymous_bytes": "anon MB",
}
"""Fact of a stage → its heading in the table."""
START_RUNS = 5
WORDS = "one surgeon cut the model and the other one held the lamp, and none of them slept. "
PROSE = ROOT / "tools" / "text" / "calibration.txt"
ASK_FOR_MODULES = """
import sys
from surgery.cli.main import main
main(sys.argv[1:], standalone_mode=False)
print(*(name for name in ("torch", "transformers", "tokenizers") if name in sys.modules))
"""
"""Run a command and print, last, which of the heavy libraries it imported."""

Facts = dict[str, Any]
file_type = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
work_option = click.option(
    "--work",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the checkpoints that are made; made ones are used again.",
)


@click.group()
def main() -> None:
    """Measure seconds, peak memory and bytes read."""


@main.command("apply")
@click.option("--layers", default=8, show_default=True, help="Of the 8B-shaped checkpoint.")
@click.option("--jobs", default=4, show_default=True, help="Of apply.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
@click.option("--full-load", is_flag=True, help="Compare with transformers, too.")
@work_option
@json_option
def bench_apply(
    layers: int, jobs: int, repeat: int, full_load: bool, work: Path, as_json: bool
) -> None:
    """Prune an 8B-shaped checkpoint to the paper's 35 % sizes, against cp of the result."""
    measure(python_module("make", "plan", work, str(layers)))
    beside = {}
    if full_load:
        full = work / "full"
        beside["full load"] = (python_module("full_load", work / "plan.json", full), full)
    facts = {"layers": layers, "jobs": jobs, "repeat": repeat}
    facts |= _against_cp(work, jobs, repeat, beside)
    _show(facts, as_json, ["apply", "cp", *beside])


@main.command("experts")
@click.option("--layers", default=4, show_default=True, help="Of Qwen3-30B-A3B's shape.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
@work_option
@json_option
def bench_experts(layers: int, repeat: int, work: Path, as_json: bool) -> None:
    """Remove a quarter of the experts of a mixture, against cp of the result."""
    measure(python_module("make", "experts", work, str(layers)))
    facts = {"layers": layers, "repeat": repeat, **_against_cp(work, 4, repeat)}
    _show(facts, as_json, ["apply", "cp"])


Stage = tuple[Sequence[str | Path], Path]
"""A command, and the directory that it writes."""


def _against_cp(
    work: Path, jobs: int, repeat: int, beside: Mapping[str, Stage] | None = None
) -> Facts:
    """Apply ``plan.json`` to ``model``, both in ``work``, in turns with cp and ``beside``."""
    out, copy = work / "out", work / "copy"
    apply = compact_surgery("apply", work / "plan.json", "-o", out, "--jobs", str(jobs), "--json")
    stages: dict[str, Stage] = {
        "apply": (apply, out),
        "cp": (["cp", "-r", out, copy], copy),
        **(beside or {}),
    }
    _warm(work / "model")
    runs: dict[str, list[tuple[Usage, float]]] = {name: [] for name in stages}
    for _ in range(repeat):
        _remove(place for _, place in stages.values())
        for name, (command, place) in stages.items():
            os.sync()
            usage = measure(command)
            runs[name].append((usage, _sync(place)))
    facts: Facts = {"source_bytes": _nbytes(work / "model"), "output_bytes": _nbytes(out)}
    _remove(place for _, place in stages.values())
    applied = [json.loads(usage.output.splitlines()[-1]) for usage, _ in runs["apply"]]
    facts["read_over_kept"] = max(each["read_bytes"] / each["nbytes"] for each in applied)
    for name, measured in runs.items():
        synced = [usage.seconds + seconds for usage, seconds in measured]
        facts[name] = summary([u for u, _ in measured]) | {"synced_seconds": median(synced)}
    for key in ("seconds", "synced_seconds"):
        facts[f"{key}_over_cp"] = facts["apply"][key] / facts["cp"][key]
    return facts


@main.command("calibrate")
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, metavar="TEXT")
@click.option("--samples", default=16, show_default=True)
@click.option("--seq-len", default=256, show_default=True)
@json_option
def bench_calibrate(model: Path, data: str, samples: int, seq_len: int, as_json: bool) -> None:
    """Take the statistics of MODEL streamed, and by a full load with hooks."""
    stages: dict[str, Facts] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in ("streamed", "full"):
            sizes = (str(samples), str(seq_len), Path(directory) / "stats.safetensors")
            usage = measure(python_module("calibrate", name, model, data, *sizes))
            stages[name] = summary([usage]) | json.loads(usage.output.splitlines()[-1])
    streamed, full = stages["streamed"], stages["full"]
    facts: Facts = {**stages}
    facts["pass_over_full"] = streamed["pass_seconds"] / full["pass_seconds"]
    both = full["load_seconds"] + full["pass_seconds"]
    facts["pass_over_full_with_load"] = streamed["pass_seconds"] / both
    facts["anonymous_over_bound"] = streamed["peak_anonymous_bytes"] / streamed["bound_bytes"]
    facts["read_over_file"] = streamed["bytes_read"] / streamed["file_bytes"]
    facts["read_over_needed"] = streamed["bytes_read"] / streamed["needed_bytes"]
    facts["identical"] = full["identical"]
    _show(facts, as_json, list(stages))


@main.command("forward")
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, metavar="TEXT")
@click.option("--samples", default=16, show_default=True)
@click.option("--seq-len", default=512, show_default=True)
@click.option("--windows", default=16, show_default=True, help="Held-out ones of search.")
@click.option("--candidates", default=12, show_default=True, help="Of search; 0 measures none.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
@json_option
def bench_forward(model: Path, data: str, as_json: bool, **sizes: int) -> None:
    """Set calibrate beside the bare forward of its windows, and search beside one score.

    All run in turns in one process on one thread. Times are CPU times, medians of the runs. The
    score is of all text that the search reads.
    """
    names = ("samples", "seq_len", "windows", "candidates", "repeat")
    asked = [str(sizes[name]) for name in names]
    usage = measure(python_module("forward", model, data, *asked))
    facts: Facts = {**sizes, **json.loads(usage.output.splitlines()[-1])}
    _show(facts, as_json, [name for name in facts if isinstance(facts[name], dict)])


@main.command("large")
@click.option("--layers", default=2, show_default=True, type=click.IntRange(1))
@click.option("--samples", default=4, show_default=True, type=click.IntRange(1))
@click.option("--seq-len", default=256, show_default=True, type=click.IntRange(2))
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(1))
@work_option
@json_option
def bench_large(
    layers: int, samples: int, seq_len: int, repeat: int, work: Path, as_json: bool
) -> None:
    """Calibrate layers of 70B shape on short text; say what the time goes into."""
    model, text, stats = work / f"large-{layers}", work / "text.txt", work / "large.stats"
    measure(python_module("make", "large", model, str(layers)))
    text.write_text(WORDS * samples * seq_len)
    sizes = ("--samples", str(samples), "--seq-len", str(seq_len))
    command = compact_surgery("calibrate", model, "--data", text, *sizes, "-o", stats, "--json")
    _warm(model)
    facts: Facts = {"layers": layers, "tokens": samples * seq_len, "source_bytes": _nbytes(model)}
    names = [f"run {number + 1}" for number in range(repeat)]
    for name in names:
        usage = measure(command)
        found = json.loads(usage.output)
        took, predicted = found["measured"], found["predicted"]
        stages = took["stages"]
        slower = max(stages["read"], stages["compute"])
        facts[name] = {
            **summary([usage]),
            **{key: stages[key] for key in ("read", "wait", "convert", "compute", "write")},
            "pass_seconds": stages["total"],
            "pass_over_slower": stages["total"] / slower,
            "peak_over_predicted": took["peak_memory"] / predicted["peak_memory"],
            "read_over_once": took["read"] / predicted["read"],
        }
        stats.unlink()
    _show(facts, as_json, names)


@main.command("mixture")
@click.option("--samples", default=16, show_default=True, type=click.IntRange(1))
@click.option("--seq-len", default=256, show_default=True, type=click.IntRange(2))
@work_option
@json_option
def bench_mixture(samples: int, seq_len: int, work: Path, as_json: bool) -> None:
    """Calibrate two and four layers of DeepSeek-V3's shape, with 256 narrow experts each.

    Memory is measured in one run and compared with the prediction. What the statistics take is
    measured in another one.
    """
    facts: Facts = {"tokens": samples * seq_len}
    names = {count: f"{count} layers" for count in (2, 4)}
    for count, name in names.items():
        model, stats = work / f"mixture-{count}", work / "mixture.stats"
        measure(python_module("make", "mixture", model, str(count)))
        stats.unlink(missing_ok=True)
        sizes = ("--samples", str(samples), "--seq-len", str(seq_len))
        options = ("--data", PROSE, *sizes, "-o", stats, "--json")
        usage = measure(compact_surgery("calibrate", model, *options))
        found = json.loads(usage.output)
        took, predicted = found["measured"], found["predicted"]
        stats.unlink()
        asked = (model, PROSE, str(samples), str(seq_len), stats)
        shares = measure(python_module("calibrate", "shares", *asked))
        stats.unlink()
        facts[name] = {
            **summary([usage]),
            "source_bytes": _nbytes(model),
            "predicted_bytes": predicted["peak_memory"],
            "peak_over_predicted": took["peak_memory"] / predicted["peak_memory"],
            "read_over_once": took["read"] / predicted["read"],
            **json.loads(shares.output.splitlines()[-1]),
        }
    two, four = (facts[name]["peak_rss_bytes"] for name in names.values())
    facts["four_layers_over_two"] = four / two
    _show(facts, as_json, list(names.values()))


@main.command("hub")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
@work_option
@json_option
def bench_hub(repeat: int, work: Path, as_json: bool) -> None:
    """Apply a plan whose source is on a hub on this machine, against a download and a local apply.

    The hub apply downloads, checks, cuts and deletes; its disk is sampled as it runs.
    """
    measure(python_module("make", "hub", work))
    model, plan, out, home = work / "model", work / "plan.json", work / "out", work / "home"
    remote = work / "remote.plan.json"
    written = json.loads(plan.read_text())
    remote.write_text(json.dumps(written | {"source": f"{NAME}@{COMMIT}"}))
    runs: dict[str, list[Usage]] = {"download": [], "local apply": [], "hub apply": []}
    peak = 0
    _warm(model)
    with running_hub(model) as url:
        commands = {
            "download": on_hub(url, home, python_module("hub", "download")),
            "local apply": compact_surgery("apply", plan, "-o", out),
            "hub apply": on_hub(url, home, compact_surgery("apply", remote, "-o", out)),
        }
        for _ in range(repeat):
            for name, command in commands.items():
                _remove([out, home])
                os.sync()
                with PeakDisk([out, out.with_name("out.partial"), home]) as disk:
                    runs[name].append(measure(command))
                peak = max(peak, disk.peak_bytes) if name == "hub apply" else peak
    shards = sorted(path.stat().st_size for path in model.glob("*.safetensors"))
    facts: Facts = {name: summary(measured) for name, measured in runs.items()}
    facts |= {"source_bytes": _nbytes(model), "output_bytes": _nbytes(out), "peak_disk_bytes": peak}
    facts["peak_disk_over_bound"] = peak / (facts["output_bytes"] + sum(shards[-2:]))
    slower = max(facts["download"]["seconds"], facts["local apply"]["seconds"])
    facts["seconds_over_slower"] = facts["hub apply"]["seconds"] / slower
    _remove([out, home])
    _show(facts, as_json, list(runs))


@main.command("serve")
@click.argument("dense", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("pruned", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="ENGINE=PATH",
    help="Python that has an engine (transformers, vLLM, llama.cpp), where it is another one.",
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice(list(serve.MODULES)),
    help="Only these.  [default: all]",
)
@click.option("--classify", default="32,256", show_default=True, help="Batches, in sequences.")
@click.option("--generate", default="1,16", show_default=True, help="Batches, in texts.")
@click.option("--questions", default=64, show_default=True, type=click.IntRange(1))
@click.option("--prompt-tokens", default=128, show_default=True, type=click.IntRange(8))
@click.option("--new-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--gguf-type", default="q8_0", show_default=True, help="Of export, for llama.cpp.")
@click.option("--threads", default=os.cpu_count(), show_default="all", type=click.IntRange(1))
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Pairs.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture to draw, .png or .svg.")
@work_option
@json_option
def bench_serve(dense: Path, pruned: Path, work: Path, as_json: bool, **options: Any) -> None:
    """Serve a dense and a pruned model in turns: the paper's Table 5 on this machine."""
    work.mkdir(parents=True, exist_ok=True)
    pythons = dict.fromkeys(serve.MODULES, sys.executable)
    for given in options["pythons"]:
        engine, _, path = given.partition("=")
        if engine not in pythons:
            raise click.UsageError(f"--python: {engine} is none of {', '.join(pythons)}")
        pythons[engine] = path
    pythons = {name: pythons[name] for name in options["engines"] or pythons}
    models, files = {"dense": dense, "pruned": pruned}, {}
    if "llama.cpp" in pythons and not serve.missing("llama.cpp", pythons["llama.cpp"]):
        for side, model in models.items():
            files[side] = work / f"{side}.gguf"
            kind = ("--type", options["gguf_type"], "--force")
            measure(compact_surgery("export", model, "-o", files[side], *kind))
    threads, questions = options["threads"], options["questions"]
    settings = [serve.Setting(b, questions, threads=threads) for b in _list(options["classify"])]
    tokens = (options["new_tokens"], options["prompt_tokens"], threads)
    settings += [serve.Setting(batch, batch, *tokens) for batch in _list(options["generate"])]
    found = []
    for pair, commands in serve.pairs(models, files, settings, pythons, work):
        serve.run_pair(pair, commands, options["repeat"])
        found.append(pair)
        click.echo(serve.row(pair), err=True)
    taken = serve.sizes(models, files)
    facts = {"sizes": taken, "pairs": [pair.facts() for pair in found]}
    click.echo(json.dumps(facts) if as_json else serve.table(found, taken))
    if options["plot"] is not None:
        serve.plot(found, options["plot"], f"{dense.name}: the pruned model beside the dense one")


def _list(text: str) -> list[int]:
    """Return the numbers of a list such as "1,16"; empty for an empty text."""
    return [int(part) for part in text.split(",") if part]


@main.command("start")
@work_option
@json_option
def bench_start(work: Path, as_json: bool) -> None:
    """Start commands that read no weights on a 70B-shaped checkpoint of headers only."""
    measure(python_module("make", "headers", work))
    model, plan = work / "model", work / "start.plan.json"
    sizes = ("--vocab-size", "110976", "--intermediate-size", "16256")
    stages: dict[str, tuple[str | Path, ...]] = {
        "--help": ("--help",),
        "inspect": ("inspect", model),
        "plan": ("plan", model, *sizes, "-o", plan),
    }
    facts: Facts = {"source_bytes": _nbytes(model)}
    for name, arguments in stages.items():
        runs = [measure(compact_surgery(*arguments)) for _ in range(START_RUNS)]
        asked = measure([sys.executable, "-c", ASK_FOR_MODULES, *arguments])
        facts[name] = {**summary(runs), "imported": asked.output.splitlines()[-1].split()}
    _show(facts, as_json, list(stages))


@main.command("wide")
@click.option("--channels", default=2**19, show_default=True, help="8 KB each, of every tensor.")
@work_option
@json_option
def bench_wide(channels: int, work: Path, as_json: bool) -> None:
    """Apply to single tensors of many gigabytes (sparse), and to ones a 128th of that."""
    facts: Facts = {"tensor_bytes": channels * 8192}
    for name, count in (("small", channels // 128), ("large", channels)):
        shutil.rmtree(work / name, ignore_errors=True)
        measure(python_module("make", "wide", work / name, str(count)))
        out = work / name / "out"
        facts[name] = summary(
            [measure(compact_surgery("apply", work / name / "plan.json", "-o", out))]
        )
        shutil.rmtree(work / name)
    facts["large_over_small"] = facts["large"]["peak_rss_bytes"] / facts["small"]["peak_rss_bytes"]
    _show(facts, as_json, ["small", "large"])


@main.command("recover")
@click.argument("model")
@click.argument("pruned", type=file_type)
@gathered(
    "how",
    Training,
    click.option(
        "--data", required=True, multiple=True, type=file_type, help="Text to train on; several."
    ),
    click.option("--unseen", required=True, type=file_type, help="Text to score on."),
    click.option("--tasks", multiple=True, type=file_type, help="Task file; several times."),
    click.option("--minutes", default=60.0, show_default=True, help="For each method."),
    click.option("--seq-len", default=512, show_default=True, help="Tokens of a window."),
    click.option("--windows", default=16, show_default=True, help="Windows that a run holds out."),
    click.option("--samples", default=256, show_default=True, help="Most windows to score on."),
    work_option,
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=METHODS,
    show_default=True,
    type=click.Choice(METHODS),
)
@click.option("--beside", multiple=True, type=file_type, help="More models, as a repaired one.")
@click.option("--plot", type=file_type, help="Write a picture, .png or .svg.")
@json_option
def bench_recover(  # noqa: PLR0913
    model: str,
    pruned: Path,
    how: Training,
    methods: Sequence[str],
    beside: Sequence[Path],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Train a pruned model by several methods for equal time: bits and right answers."""
    found = bench_methods(model, pruned, methods, beside, how)
    click.echo(json.dumps(found) if as_json else table(found))
    if plot is not None:
        draw(found, plot)


@main.command("gpu")
@click.option("--device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]))
@click.option("--toy", is_flag=True, help="Tiny shapes, to see that it runs to its end.")
@click.option("--output", type=click.Path(path_type=Path), help="File for the report as JSON.")
@work_option
@json_option
def bench_gpu(device: str, toy: bool, output: Path | None, work: Path, as_json: bool) -> None:
    """Prove on a card that tests pass, memory is as predicted and the card hardly waits.

    Exit status 1 where a check fails. What is missing is named before anything runs.
    """
    if missing := _missing_packages():
        raise click.ClickException(f"missing: {', '.join(missing)}; bring them as wheels")
    from calib.streaming.weights import DeviceError, choose_device
    from tools.bench.gpu import GpuBench

    try:
        choose_device(device)
    except DeviceError as error:
        raise click.ClickException(str(error)) from error
    work.mkdir(parents=True, exist_ok=True)
    report = GpuBench(device, work, toy=toy).run()
    if output is not None:
        output.write_text(json.dumps(report.facts(), indent=1), encoding="utf-8")
    click.echo(json.dumps(report.facts()) if as_json else report.text())
    sys.exit(0 if report.ok else 1)


def _missing_packages() -> list[str]:
    """Return the dependencies of this project that this Python lacks."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    missing = []
    for name in re.findall(r'"([\w-]+)', listed):
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def _show(facts: Facts, as_json: bool, stages: list[str]) -> None:
    """Print one object, or a row per stage and below it whatever else there is."""
    if as_json:
        click.echo(json.dumps(facts))
        return
    columns = [key for key in COLUMNS if any(key in facts[stage] for stage in stages)]
    heads = "".join(f"{COLUMNS[key]:>10}" for key in columns)
    click.echo(f"{'stage':<10}{heads}")
    for stage in stages:
        click.echo(f"{stage:<10}" + "".join(_cell(facts[stage], key) for key in columns))
    for key, value in facts.items():
        if key not in stages:
            click.echo(f"{key:<26}{_text(value)}")
    for stage in stages:
        for key, value in facts[stage].items():
            if key not in COLUMNS:
                click.echo(f"{stage + ' ' + key:<26}{_text(value)}")


def _cell(stage: Mapping[str, float], key: str) -> str:
    if key not in stage:
        return f"{'':>10}"
    return f"{stage[key] / MB:>10.1f}" if key.endswith("_bytes") else f"{stage[key]:>10.3f}"


def _text(value: Any) -> str:
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    return " ".join(map(str, value)) or "none"


def _warm(directory: Path) -> None:
    """Read every file once, so that each run finds its source in the page cache."""
    buffer = bytearray(MB)
    for path in directory.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _sync(directory: Path) -> float:
    """Bring the files of ``directory`` to the disk and return the seconds that took."""
    start = time.perf_counter()
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def _nbytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _remove(directories: Iterable[Path]) -> None:
    for directory in directories:
        for path in (directory, directory.with_name(directory.name + ".partial")):
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
