"""The serving benchmark: a dense and a pruned model in turns, in the engines that are installed."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tools.bench.child import ROOT, ChildError, compact_surgery, measure

CHILD = Path(__file__).with_name("serving.py")
HELDOUT = ROOT / "tools" / "text" / "heldout.txt"
MODULES = {"transformers": "transformers", "vLLM": "vllm", "llama.cpp": "xllamacpp"}
"""Engine → the module that has to be there."""
SIDES = ("dense", "pruned")
CONTEXT_WORDS, ENDING_WORDS, ENDINGS = 60, 20, 4
"""A question is shaped like one of HellaSwag: a context, and endings to choose from."""
PROMPT_CHARACTERS = 12
"""Characters of text for each token of a prompt, which are more than enough."""
MB = 10**6
HEADS = ("engine", "task", "memory MB", "per second", "gain", "per CPU second", "gain", "load s")

Facts = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What an engine is asked to do."""

    batch: int
    prompts: int
    """Texts that are continued, or questions that are answered."""
    new_tokens: int = 0
    """Tokens to generate for each text; 0 answers questions."""
    prompt_tokens: int = 0
    threads: int = 1

    @property
    def name(self) -> str:
        """For tables."""
        return f"{'generation' if self.new_tokens else 'classification'}, batch {self.batch}"

    @property
    def units(self) -> int:
        """New tokens, or questions."""
        return self.prompts * (self.new_tokens or 1)

    def texts(self) -> list[list[str]]:
        """Return the texts of each sequence: a prompt, or a context and one of its endings."""
        words = HELDOUT.read_text("utf-8").split()
        draw = random.Random(0)

        def passage(count: int) -> str:
            first = draw.randrange(len(words) - count)
            return " ".join(words[first : first + count])

        if self.new_tokens:
            return [
                [passage(PROMPT_CHARACTERS * self.prompt_tokens // 5)] for _ in range(self.prompts)
            ]
        contexts = [passage(CONTEXT_WORDS) for _ in range(self.prompts)]
        return [[text, f" {passage(ENDING_WORDS)}"] for text in contexts for _ in range(ENDINGS)]

    def task(self, model: Path, path: Path) -> Facts:
        """Write the task for a model's own tokenizer, and return it."""
        task = {
            "batch": self.batch,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "threads": self.threads,
            "texts": self.texts(),
        }
        path.write_text(json.dumps(task), "utf-8")
        measure([sys.executable, CHILD, "tokenize", model, path])
        made: Facts = json.loads(path.read_text("utf-8"))
        return made


@dataclass
class Pair:
    """What a dense and a pruned model took for one setting in one engine, run by run."""

    engine: str
    setting: Setting
    problem: str = ""
    """Why there are no runs."""
    runs: dict[str, list[Facts]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def speeds(self, side: str, key: str = "seconds") -> list[float]:
        """Return tokens or questions for each second, of each run."""
        return [self.setting.units / run[key] for run in self.runs[side]]

    def gains(self, key: str = "seconds") -> list[float]:
        """Return, of each pair of runs, how many times as fast the pruned model is."""
        dense, pruned = (self.speeds(side, key) for side in SIDES)
        return [after / before for before, after in zip(dense, pruned, strict=True)]

    def memory(self, side: str) -> float:
        """Return the peak, the largest of the runs: of the device where one was used."""
        return max(run["device_bytes"] or run["peak_rss_bytes"] for run in self.runs[side])

    def facts(self) -> Facts:
        """For JSON."""
        return {
            "engine": self.engine,
            "setting": self.setting.name,
            "problem": self.problem,
            "units": self.setting.units,
            **self.runs,
        }


def missing(engine: str, python: Path | str) -> str:
    """Return why an engine cannot run in an environment; empty where it can."""
    module = MODULES[engine]
    script = f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)"
    done = subprocess.run([python, "-c", script], capture_output=True, check=False)
    return f"is not installed: no module {module}" if done.returncode else ""


def free_bytes() -> int:
    """Return the memory that is available on this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def sizes(models: Mapping[str, Path], files: Mapping[str, Path]) -> dict[str, Facts]:
    """Return what each model takes: on disk, and in memory as predicted from headers, in bytes."""
    found = {}
    for side, model in models.items():
        usage = measure(compact_surgery("inspect", model, "--predict-serving", "--json"))
        facts = json.loads(usage.output)
        facts = facts.get("after", facts)
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        gguf = {"gguf_file": files[side].stat().st_size} if side in files else {}
        found[side] = {"file": weights, **gguf, **facts}
    return found


def pairs(
    models: Mapping[str, Path],
    files: Mapping[str, Path],
    settings: Sequence[Setting],
    pythons: Mapping[str, str],
    work: Path,
) -> Iterator[tuple[Pair, Mapping[str, Sequence[str | Path]]]]:
    """Yield each pair that is to be measured, and the command of each of its sides.

    Args:
        models: Side → directory.
        files: Side → GGUF file.
        settings: What each engine is asked to do.
        pythons: Engine → the Python that has it.
        work: Directory for tasks.
    """
    predicted = {side: each["logits"] or 0 for side, each in sizes(models, {}).items()}
    for number, setting in enumerate(settings):
        paths, needed = {}, 0
        for side, model in models.items():
            paths[side] = work / f"task-{number}-{side}.json"
            task = setting.task(model, paths[side])
            longest = max(map(len, task["sequences"]))
            needed = max(needed, 2 * setting.batch * longest * predicted[side])
        for engine, python in pythons.items():
            pair = Pair(engine, setting, missing(engine, python))
            whole_logits = engine == "transformers" and not setting.new_tokens
            if not pair.problem and whole_logits and needed > free_bytes():
                pair.problem = f"needs {needed / MB:,.0f} MB for logits, more than is free"
            targets = files if engine == "llama.cpp" else models
            if not pair.problem and not targets:
                pair.problem = "was given no GGUF files"
            yield (
                pair,
                {}
                if pair.problem
                else {s: [python, CHILD, engine, targets[s], paths[s]] for s in SIDES},
            )


def run_pair(pair: Pair, commands: Mapping[str, Sequence[str | Path]], repeat: int) -> None:
    """Run both sides in turns; every other time the pruned one first."""
    for number in range(repeat if commands else 0):
        for side in SIDES[:: -1 if number % 2 else 1]:
            try:
                usage = measure(commands[side])
            except ChildError as error:
                pair.problem = f"{side}: {error}"[:200]
                pair.runs = {each: [] for each in SIDES}
                return
            facts = json.loads(usage.output.splitlines()[-1])
            pair.runs[side].append({**facts, "peak_rss_bytes": usage.peak_rss_bytes})


def table(found: Sequence[Pair], taken: Mapping[str, Facts]) -> str:
    """Return the sizes and all pairs as tables in Markdown."""
    names = {
        "file": "file",
        "gguf_file": "GGUF file",
        "weights": "weights in memory",
        "decoded": "read for each decoded token",
        "cache": "cache of each position",
        "logits": "logits of each position",
    }
    lines = ["| bytes | dense | pruned | removed |", "|---|---|---|---|"]
    for key, name in names.items():
        if taken["dense"].get(key):
            before, after = (taken[side][key] for side in SIDES)
            lines.append(f"| {name} | {before:,} | {after:,} | {1 - after / before:.1%} |")
    lines += ["", f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", *map(row, found)]
    return "\n".join(lines)


def row(pair: Pair) -> str:
    """Return a pair as a row of the table: medians, and the spread of the gain."""
    head = f"| {pair.engine} | {pair.setting.name} |"
    if pair.problem:
        return f"{head} {pair.problem} |" + " |" * (len(HEADS) - 3)
    cells = [_two(pair.memory(side) / MB for side in SIDES)]
    for key in ("seconds", "cpu_seconds"):
        gains = pair.gains(key)
        cells.append(_two(median(pair.speeds(side, key)) for side in SIDES))
        cells.append(f"{median(gains):.2f} ({min(gains):.2f}–{max(gains):.2f})")
    loads = ([run["load_seconds"] for run in pair.runs[side]] for side in SIDES)
    cells.append(_two(map(median, loads)))
    return f"{head} {' | '.join(cells)} |"


def _two(values: Any) -> str:
    return " → ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)


def plot(found: Sequence[Pair], path: Path, title: str) -> None:
    """Draw how many times as fast, and how large, the pruned model is beside the dense one."""
    from surgery.plot import COLOURS, saved_figure

    found = [pair for pair in found if not pair.problem]
    names = [f"{pair.engine}\n{pair.setting.name}" for pair in found]
    rows = range(len(found))
    with saved_figure(path, 9, 1.4 + 0.55 * len(found)) as figure:
        speed, memory = figure.subplots(1, 2, sharey=True)
        for shift, key, label in ((-0.2, "seconds", "wall"), (0.2, "cpu_seconds", "CPU")):
            gains = [pair.gains(key) for pair in found]
            middle = [median(each) for each in gains]
            spread = [
                [m - min(each) for m, each in zip(middle, gains, strict=True)],
                [max(each) - m for m, each in zip(middle, gains, strict=True)],
            ]
            colour = COLOURS[key == "seconds"]
            places = [row + shift for row in rows]
            speed.barh(places, middle, 0.38, xerr=spread, color=colour, label=f"{label} time")
        speed.set(xlabel="times as fast as the dense model")
        speed.set_yticks(list(rows), names, fontsize="small")
        speed.legend(frameon=False, fontsize="small")
        shares = [pair.memory("pruned") / pair.memory("dense") for pair in found]
        memory.barh(list(rows), shares, 0.6, color=COLOURS[2])
        memory.set(xlabel="peak memory, in parts of the dense model's")
        for axes in (speed, memory):
            axes.axvline(1, color="grey", linestyle=":")
        speed.invert_yaxis()
        figure.suptitle(title, fontsize="medium")
