"""Shrink a checkpoint by 20 % and compare it with the original; `make demo` runs it.

    python tools/demo.py --model build/smollm2 --output build
    python tools/demo.py --generate build/smollm2

Every stage is a command that can be typed as it is printed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

RATIO = 0.20
CALIBRATION = Path("tools/text/calibration.txt")
HELDOUT = Path("tools/text/heldout.txt")
# The fewest windows that hold 200 KiB of calibration text and 100 KiB of held-out text. The seed
# mixes the file's documents, which would else come from one book.
SEED, CALIBRATION_SAMPLES, SEQ_LEN = 0, 56, 1024
HELDOUT_SAMPLES, WINDOW_BYTES = 54, 2048
PROMPT = "The most important thing to know about the ocean is"
MAX_NEW_TOKENS = 40
SENTENCE = re.compile(r""".*?[.!?]["'”’)\]]*(?=\s+["'“‘(]?[A-Z0-9]|\s*$|\s*\n)""", re.DOTALL)
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
INDENT = "    "


@dataclass(frozen=True)
class Paths:
    """Where the demo reads and writes."""

    model: Path
    """The dense checkpoint."""
    output: Path
    """Existing directory for everything that is written."""

    @property
    def pruned(self) -> Path:
        """The smaller checkpoint."""
        return self.output / f"{self.model.name}-pruned"

    @property
    def plot(self) -> Path:
        """The picture."""
        return self.output / f"{self.model.name}.png"

    @property
    def stats(self) -> Path:
        """The channel statistics."""
        return self.output / f"{self.model.name}.stats.safetensors"

    @property
    def plan(self) -> Path:
        """The plan."""
        return self.output / f"{self.model.name}.plan.json"

    def remove_old(self) -> None:
        """Delete what an earlier run wrote, also one that was interrupted; the model stays."""
        made = (self.pruned, self.plot, self.stats, self.plan)
        partial = [found for path in made for found in self.output.glob(f"{path.name}.partial*")]
        for path in (*made, *partial):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Finished:
    """What a stage took and printed."""

    seconds: float
    peak_rss_bytes: int | None
    """None where the system does not tell it of a child."""
    output: str


@dataclass(frozen=True)
class Comparison:
    """One figure before and after."""

    label: str
    before: float
    after: float
    spec: str = ",.0f"
    """Format of both figures."""


def surgery(command: str, *arguments: object) -> list[str]:
    """Return a `compact-surgery` command."""
    return ["compact-surgery", command, *map(str, arguments)]


def stages(paths: Paths) -> dict[str, list[str]]:
    """Return the commands by stage, in the order they run."""
    text = ("--data", CALIBRATION, "--samples", CALIBRATION_SAMPLES, "--seq-len", SEQ_LEN)
    heldout = ("--data", HELDOUT, "--samples", HELDOUT_SAMPLES, "--window-bytes", WINDOW_BYTES)
    say = ["python", "tools/demo.py", "--generate"]
    return {
        "inspect": surgery("inspect", paths.model, "--plot", paths.plot),
        "calibrate": surgery(
            *("calibrate", paths.model, *text, "--seed", SEED, "--ratio", f"{RATIO:.2f}"),
            *("-o", paths.stats),
        ),
        "plan": surgery(
            *("plan", paths.model, "--stats", paths.stats, "--ratio", f"{RATIO:.2f}"),
            *("--to", paths.pruned, "-o", paths.plan),
        ),
        "apply": surgery("apply", paths.plan),
        "verify": surgery("verify", paths.pruned, "--forward"),
        "score before": surgery("score", paths.model, *heldout, "--json"),
        "score after": surgery("score", paths.pruned, *heldout, "--json"),
        "generate before": [*say, str(paths.model)],
        "generate after": [*say, str(paths.pruned)],
    }


def run_stage(name: str, command: Sequence[str]) -> Finished:
    """Print and run a command, show its output as it comes, and measure it.

    Raises:
        click.exceptions.Exit: it failed, with its exit status; its message is on stderr already.
    """
    click.echo(f"\n$ {shlex.join(command)}")
    # Of this Python's environment, whether or not that is the active one.
    program = Path(sys.executable).with_name(command[0])
    start = time.perf_counter()
    try:
        child = subprocess.Popen([program, *command[1:]], stdout=subprocess.PIPE, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{program}: {error.strerror}; run `make demo`") from error
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        click.echo(INDENT + line, nl=False)
    peak = None
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * MAXRSS_UNIT
    code = child.wait()
    if code:
        how = f"was ended by signal {-code}" if code < 0 else f"failed with exit status {code}"
        click.echo(f"demo: stage '{name}' {how}", err=True)
        raise click.exceptions.Exit(128 - code if code < 0 else code)
    seconds = time.perf_counter() - start
    return Finished(seconds, peak, "".join(lines))


def first_sentence(text: str) -> str:
    """Cut ``text`` after its first sentence, if it ends one, and join its lines."""
    text = text.strip()
    match = SENTENCE.match(text)
    return " ".join((match.group() if match else text).split())


def generate(directory: str) -> str:
    """Continue ``PROMPT`` greedily with the checkpoint, as any user of transformers would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return first_sentence(tokenizer.decode(tokens[0], skip_special_tokens=True))


def calibration_bytes(model: Path) -> int:
    """Count the bytes of text in the calibration windows; needs a byte-level BPE tokenizer."""
    from calib.text.windows import token_windows
    from surgery.text.documents import read_documents
    from surgery.tokenizer.tokenizer_file import load_tokenizer

    tokenizer = load_tokenizer(model)
    documents = read_documents(str(CALIBRATION), SEED)
    windows = token_windows(documents, tokenizer, CALIBRATION_SAMPLES, SEQ_LEN)
    # A byte-level token is written with one character per byte.
    return sum(len(tokenizer.id_to_token(token) or "") for ids in windows for token in ids)


def compare_headers(paths: Paths) -> list[Comparison]:
    """Count parameters and bytes of both checkpoints from their headers."""
    from surgery import open_model

    before, after = (open_model(path).census() for path in (paths.model, paths.pruned))
    return [
        Comparison("parameters", before.parameters, after.parameters),
        Comparison("bytes of weights", before.nbytes, after.nbytes),
    ]


def comparison_table(rows: Sequence[Comparison]) -> str:
    """Both figures of each row and the change in per cent."""
    lines = [f"{'':<30}{'before':>14}{'after':>14}{'change':>11}"]
    for row in rows:
        change = f"{100 * (row.after / row.before - 1):+.1f} %"
        before, after = format(row.before, row.spec), format(row.after, row.spec)
        lines.append(f"{row.label:<30}{before:>14}{after:>14}{change:>11}")
    return "\n".join(lines)


def stage_table(finished: dict[str, Finished]) -> str:
    """Seconds and peak memory of each stage."""
    lines = [f"{'stage':<30}{'seconds':>14}{'peak RSS':>14}"]
    for name, stage in finished.items():
        peak = "-" if stage.peak_rss_bytes is None else f"{stage.peak_rss_bytes / 1e6:,.0f} MB"
        lines.append(f"{name:<30}{stage.seconds:>14.1f}{peak:>14}")
    total = sum(stage.seconds for stage in finished.values())
    return "\n".join([*lines, f"{'together':<30}{total:>14.1f}"])


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Dense checkpoint.")
@click.option("--output", type=click.Path(path_type=Path), help="Directory for all results.")
@click.option("--generate", "directory", metavar="DIR", help="Only continue the prompt with DIR.")
def main(model: Path | None, output: Path | None, directory: str | None) -> None:
    """Inspect, calibrate, plan, apply, verify and score; then compare before and after."""
    if directory is not None:
        click.echo(generate(directory))
        return
    if model is None or output is None:
        raise click.UsageError("give --model and --output, or --generate")
    paths = Paths(model, output)
    output.mkdir(parents=True, exist_ok=True)
    paths.remove_old()
    finished = {name: run_stage(name, command) for name, command in stages(paths).items()}
    before, after = (json.loads(finished[f"score {when}"].output) for when in ("before", "after"))
    old, new = before["bits_per_byte"], after["bits_per_byte"]
    rows = [*compare_headers(paths), Comparison("bits per byte, held-out text", old, new, ".4f")]
    click.echo(f"\n{comparison_table(rows)}\n")
    click.echo(f"before: {finished['generate before'].output}", nl=False)
    click.echo(f"after:  {finished['generate after'].output}\n{stage_table(finished)}\n")
    click.echo(f"calibrated on {calibration_bytes(model):,} bytes of {CALIBRATION}")
    click.echo(f"scored on {before['bytes']:,} bytes of {HELDOUT}")
    click.echo(f"picture: {paths.plot}   smaller checkpoint: {paths.pruned}")


if __name__ == "__main__":
    main()
