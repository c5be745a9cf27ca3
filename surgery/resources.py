"""What a run of a model may take: caps on memory, and room on a disk."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import click

from surgery.options import gathered, spill_option
from surgery.part import Division

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Resources:
    """Caps in bytes; None is no cap."""

    max_memory: int | None = None
    max_gpu_memory: int | None = None
    spill: Path | None = None
    """Directory in which hidden states live; None is memory, or beside the output."""


@dataclass(frozen=True)
class Running:
    """How a calibration is run, beside what is computed."""

    output: Path | None = None
    """Where the statistics are written, and beside it what a killed run goes on from."""
    resume: bool = False
    resources: Resources = field(default_factory=Resources)
    division: Division = field(default_factory=Division)
    """Of the windows over machines."""


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


resource_options = gathered(
    "resources",
    Resources,
    click.option(
        "--max-memory",
        type=Size(),
        metavar="SIZE",
        help="Cap on the memory of this process, such as 8GB; refused where it cannot be kept.",
    ),
    click.option(
        "--max-gpu-memory", type=Size(), metavar="SIZE", help="Cap on what is held on the device."
    ),
    spill_option,
)
