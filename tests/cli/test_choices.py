"""What the command line does not take, the library does not take either."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

import calib
import surgery
from calib.statistics.options import CalibrationOptions
from calib.streaming.settings import ComputeOptions
from surgery.apply.run import ApplyOptions
from surgery.cli.main import main
from surgery.errors import SurgeryError
from surgery.planning.request import SizeRequest
from surgery.stats.channels import ChannelOptions
from surgery.text.documents import TextOptions
from surgery.vocabulary.order import VocabularyOptions
from tests.support import tiny
from tests.support.command import Run, assert_refused

KINDS: tuple[type[Any], ...] = (
    ApplyOptions,
    CalibrationOptions,
    ChannelOptions,
    ComputeOptions,
    SizeRequest,
    TextOptions,
    VocabularyOptions,
)


def limited() -> Iterator[tuple[str, type[Any], Any]]:
    """Option, class of options that has it, and values that the command line refuses."""
    parameters = {
        (parameter.name, type(parameter.type)): parameter.type
        for command in main.commands.values()
        for parameter in command.params
    }
    for (name, _), kind in parameters.items():
        wrong: list[object] = []
        if isinstance(kind, click.Choice):
            wrong = [kind.choices[0].title(), "", None, 3]
        elif isinstance(kind, click.IntRange):
            wrong = [(kind.min or 0) - 1, "many", 1.5]
        for owner in KINDS:
            if (name, owner) == ("only", SizeRequest):  # the choice is that of recover
                continue
            if wrong and name in {field.name for field in fields(owner)}:
                yield from ((str(name), owner, value) for value in wrong)


CASES = list(limited())


def test_options_with_limits_are_seen() -> None:
    names = {name for name, _, _ in CASES}
    assert {"engine", "device", "dtype", "repair", "criterion", "vocab_by"} <= names
    assert {"samples", "seq_len", "windows", "jobs", "parts", "multiple_of"} <= names


@pytest.mark.parametrize(("name", "owner", "value"), CASES)
def test_the_library_refuses_what_the_commands_refuse(
    name: str, owner: type[Any], value: object
) -> None:
    with pytest.raises(SurgeryError, match=f"^`{name}`: "):
        owner(**{name: value})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("choices") / "model")


TEXT = {"data": ["some text, of no use"]}
WRONG: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (calib.calibrate, {**TEXT, "engine": "Ray"}, "`engine`: does not take this value"),
    (calib.calibrate, {**TEXT, "dtype": "fp16"}, "`dtype`: does not take"),
    (calib.score, {**TEXT, "device": "gpu"}, "`device`: does not take .* found 'gpu'"),
    (calib.search, {**TEXT, "ratio": 0.2, "repair": "best"}, "`repair`: .* none, least-squares"),
    (calib.search, {**TEXT, "ratio": 0}, "`ratio`: is no share"),
    (calib.compare, {**TEXT, "ratio": []}, "`ratio`: is an empty list"),
    (calib.compare, {**TEXT, "ratio": [0.2, -0.1]}, "`ratio`: is no share"),
    (calib.compare, {**TEXT, "ratio": "0.2"}, "`ratio`: is no share"),
    (calib.compare, {**TEXT, "ratio": 0.2, "methods": []}, "`methods`: are none"),
    (surgery.make_plan, {"ratio": -1}, "`ratio`: is no share"),
    (surgery.make_plan, {"ratio": float("nan")}, "`ratio`: is no share"),
    (surgery.make_plan, {"ratio": "0.2"}, "`ratio`: is no share"),
    (surgery.make_plan, {"ratio": 0.2, "multiple_of": 0}, "`multiple_of`: is no valid step"),
    (surgery.make_plan, {"vocab_size": 500, "vocab_by": "merges"}, "`vocab_by`: does not take"),
    (surgery.make_plan, {"vocab_size": 500, "criterion": "best"}, "`criterion`: does not take"),
    (surgery.make_plan, {"vocab_size": 500, "base_model": "name"}, "`base_model`: .* ORG/NAME"),
]


@pytest.mark.parametrize(("function", "given", "message"), WRONG)
def test_functions_refuse_wrong_values_before_they_work(
    model: Path, function: Callable[..., Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(SurgeryError, match=message):
        function(model, **given)


IDLE = [
    ("inspect MODEL --probe", "--plot a.png"),
    ("inspect MODEL --probe", "--vocab"),
    ("inspect MODEL --probe", "--family llama"),
    ("inspect MODEL --removed", "--probe"),
    ("inspect MODEL", "--script Latin"),
    ("inspect MODEL --vocab", "--limit 3"),
    ("inspect MODEL --channels", "--source MODEL"),
    ("inspect MODEL", "--data t"),
    ("inspect MODEL --removed", "--channels"),
    ("inspect MODEL --removed", "--vocab"),
    ("inspect MODEL --removed", "--family llama"),
    ("inspect MODEL --removed", "--field text"),
    ("inspect MODEL --channels", "--plot a.png"),
    ("inspect MODEL --channels", "--data t"),
    ("plan MODEL --vocab-size 500", "--field text"),
    ("plan MODEL --vocab-size 500", "--strict"),
    ("plan MODEL --vocab-size 500", "--seed 1"),
    ("plan MODEL --vocab-size 500", "--device cpu"),
    ("plan MODEL --vocab-size 500", "--dtype float32"),
    ("plan MODEL --vocab-size 500", "--spill ."),
    ("verify MODEL", "--device cpu"),
    ("apply plan.json -o out --dry-run", "--push-to org/name"),
    ("prune MODEL --vocab-size 500 -o out --dry-run", "--push-to org/name"),
    ("prune MODEL --vocab-size 500 -o out --dry-run", "--resume"),
    ("apply plan.json --engine ray", "--jobs 2"),
    ("compare MODEL --data t --ratio 0.2 --by-samples 2", "--methods act2"),
    ("recover MODEL --data t --tokens 9 -o out", "--force"),
    ("recover MODEL --data t --tokens 9 -o out --dry-run", "--json"),
    ("teach MODEL --plan p --data t --tokens 9 -o out --dry-run", "--json"),
]


@pytest.mark.parametrize(("command", "option"), IDLE)
def test_an_option_without_effect_is_refused(
    model: Path, tmp_path: Path, run: Run, command: str, option: str
) -> None:
    words = command.replace("MODEL", str(model)).split()
    result = run(*words, *option.split())
    assert_refused(result, f"{option.split()[0]}: has no effect", "leave it out")


def test_several_ratios_with_amounts_of_text_are_refused(model: Path, run: Run) -> None:
    result = run("compare", model, "--data", "t", "--ratio", "0.1,0.2", "--by-samples", 2)
    assert_refused(result, "--ratio: takes one share with --by-samples")
