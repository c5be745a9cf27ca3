"""Options that several commands share."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from calib.streaming.settings import DEVICES, DTYPE_NAMES, ComputeOptions
from surgery.cluster import ENGINES
from surgery.plot import check_picture
from surgery.text.documents import Source, TextOptions

if TYPE_CHECKING:
    from surgery.layout.layout import Layout


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Refusal(click.ClickException):
    """Bad usage or bad input: one line on stderr."""

    exit_code = 2


def refuse_idle(why: str, *names: str) -> None:
    """Refuse options that were given and that the running command would not look at.

    Args:
        why: When they have no effect, such as "without --data".
        names: Their parameters.
    """
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "")
        if option.name in names and given is ParameterSource.COMMANDLINE:
            raise Refusal(f"{option.opts[0]}: has no effect {why}; leave it out")


def combined(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Return one decorator that adds all of ``options``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def gathered(name: str, kind: type[Any], *options: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that adds ``options`` and passes them as one argument ``name``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def gather(*arguments: Any, **given: Any) -> Any:
            parts = {f.name: given.pop(f.name) for f in fields(kind) if f.name in given}
            return command(*arguments, **given, **{name: kind(**parts)})

        return combined(*options)(gather)

    return decorate


def number_option(name: str, *, default: int, least: int = 1, help: str) -> Callable[..., Any]:
    """Return an option that takes a whole number from ``least`` on."""
    kind = click.IntRange(least)
    return click.option(name, default=default, show_default=True, type=kind, help=help)


def choice_option(*names: str, of: Iterable[str], default: str, help: str) -> Callable[..., Any]:
    """Return an option that takes one of some names."""
    kind = click.Choice([*of])
    return click.option(*names, default=default, show_default=True, type=kind, help=help)


class Size(click.ParamType):
    """A number of bytes such as 8GB or 1.5GiB."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the bytes."""
        match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) *([KMG]I?B|)", str(value).upper())
        if not match:
            self.fail(f"{value!r} is no size such as 8GB or 900MiB", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


def share(text: object) -> float:
    """Return the number in "0.2" or in "20%".

    Raises:
        ValueError: ``text`` is no number.
    """
    number = str(text).strip()
    return float(number[:-1]) / 100 if number.endswith("%") else float(number)


class Numbers(click.ParamType):
    """Numbers separated by commas."""

    name = "numbers"

    def __init__(self, kind: Callable[[str], float]) -> None:
        self._kind = kind

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Any]:
        """Return the numbers, ascending, each once."""
        try:
            found = sorted({self._kind(part) for part in str(value).split(",")})
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 4,16", param, ctx)
        if not all(0 < number < 1e6 for number in found):
            self.fail(f"{value!r} has a number that is not between 0 and 1,000,000", param, ctx)
        return found


path_type = click.Path(path_type=Path)
directory_type = click.Path(path_type=Path, exists=True, file_okay=False, writable=True)


@dataclass(frozen=True)
class ModelOptions:
    """The model that a command works on."""

    model: str
    """A local directory, or a hub id."""
    family: str | None = None
    """Model type to treat it as; None is that of config.json."""

    def layout(self) -> "Layout":
        """Open the model."""
        from surgery.api import open_layout

        return open_layout(self.model, self.family)


@dataclass(frozen=True)
class ShowOptions:
    """How a command shows its table: as a picture, as JSON, or as text."""

    plot: Path | None = None
    as_json: bool = False
    force: bool = False
    """Whether a file that is there is replaced."""

    def check(self, *read: str | Path | None) -> None:
        """Refuse a picture that could not be drawn after the work.

        Args:
            read: All that the command reads, as for ``check_file``; None counts as nothing.

        Raises:
            OutputError: it names the file.
        """
        paths = [Path(each) for each in read if each is not None]
        check_picture(self.plot, paths, force=self.force)


family_option = click.option(
    "--family",
    metavar="NAME",
    help="Treat the model as this model type, whatever config.json says.",
)
model_options = gathered(
    "model", ModelOptions, click.argument("model", metavar="MODEL"), family_option
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
engines_option = click.option(
    "--engines",
    is_flag=True,
    help="Show all that engines are known to do with the sizes, not only with those that change.",
)
plot_option = click.option(
    "--plot", type=path_type, metavar="FILE", help="Write a picture, .png or .svg (extra 'plot')."
)
force_option = click.option("--force", is_flag=True, help="Replace files that are there.")
show_options = gathered("show", ShowOptions, plot_option, json_option, force_option)
push_option = click.option(
    "--push-to", metavar="ORG/NAME", help="Also upload the result to this model on the hub."
)


def data_options(*, required: bool, use: str = "") -> Callable[..., Any]:
    """Return a decorator that adds --data, --field and --strict."""
    return combined(
        click.option(
            "--data",
            required=required,
            multiple=True,
            metavar="TEXT[=WEIGHT]",
            callback=lambda _, __, given: tuple(map(Source.parse, given)),
            help=f"{use}A .txt, .jsonl or .parquet file (also .gz or .zst), a directory of them, "
            "or hub:name[:config][:split][:field]. Several sources take turns by weight, 1 each.",
        ),
        click.option(
            "--field",
            metavar="NAME",
            help="Field of a row that has its text or messages.  [default: text, else messages]",
        ),
        click.option("--strict", is_flag=True, help="Refuse bad rows instead of skipping them."),
    )


samples_option = number_option("--samples", default=256, help="Most windows of text to use.")
seq_len_option = number_option("--seq-len", default=2048, least=2, help="Tokens per window.")
seed_option = click.option("--seed", type=int, help="Shuffle the documents first.")
windows_option = number_option(
    "--windows", default=64, help="Most windows of 2,048 bytes to hold out."
)
data_option = data_options(required=True)
text_options = gathered(
    "text", TextOptions, data_option, samples_option, seq_len_option, seed_option
)
study_text_options = gathered(
    "text", TextOptions, data_option, samples_option, seq_len_option, seed_option, windows_option
)
prune_text_options = gathered(
    "text",
    TextOptions,
    data_options(required=False, use="Text by which channels and layers are chosen. "),
    samples_option,
    seq_len_option,
    seed_option,
)
score_text_options = gathered(
    "text",
    TextOptions,
    data_options(required=False, use="Held-out text. "),
    samples_option,
    seed_option,
)
tasks_option = click.option(
    "--tasks",
    multiple=True,
    type=path_type,
    metavar="FILE",
    help="Multiple-choice items to answer: lines of JSON with context, choices, answer. May be "
    "given several times.",
)
plan_text_options = gathered(
    "text",
    TextOptions,
    data_options(
        required=False,
        use="Text that shows what a smaller vocabulary costs, and whose tokens are counted. ",
    ),
    seed_option,
)

engine_option = choice_option(
    "--engine",
    of=ENGINES,
    default="local",
    help="ray: run tasks on a cluster whose nodes share the file system (extra 'ray').",
)
device_option = choice_option(
    "--device", of=DEVICES, default="auto", help="auto: CUDA where there is one."
)
dtype_option = choice_option(
    "--dtype",
    of=DTYPE_NAMES,
    default="auto",
    help="auto: float32 on the CPU, else the checkpoint's.",
)
spill_option = click.option(
    "--spill",
    type=directory_type,
    metavar="DIR",
    help="Keep hidden states in files in DIR instead of memory.",
)
cap_options = combined(
    click.option(
        "--max-memory",
        type=Size(),
        metavar="SIZE",
        help="Cap on the memory of this process, such as 8GB; refused if it cannot be kept.",
    ),
    click.option(
        "--max-gpu-memory",
        type=Size(),
        metavar="SIZE",
        help="Cap on the memory used on the device.",
    ),
)
compute_options = gathered("compute", ComputeOptions, device_option, dtype_option)
spilling_options = gathered("compute", ComputeOptions, device_option, dtype_option, spill_option)
capped_options = gathered(
    "compute", ComputeOptions, device_option, dtype_option, cap_options, spill_option
)
