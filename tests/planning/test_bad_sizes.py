"""Sizes and models that no command can work with are refused in one line."""

from pathlib import Path

import pytest

from tests.support.command import Run
from tests.support.damage import (
    CALIBRATE,
    SIZES,
    Case,
    assert_refused_and_nothing_written,
    nothing,
)

CASES = [
    Case("vocabulary below what must stay", nothing,
         "plan model --vocab-size 200 --intermediate-size 64 -o new.json",
         ("--vocab-size", "out of reach", "expected 260", "to 640", "found 200", "choose")),
    Case("vocabulary above the rows", nothing,
         "plan model --vocab-size 641 --intermediate-size 64 -o new.json",
         ("--vocab-size", "out of reach", "expected 260", "to 640", "found 641", "choose")),
    Case("channels above the model's", nothing,
         "plan model --vocab-size 512 --intermediate-size 97 -o new.json",
         ("--intermediate-size", "out of reach", "expected 1 to 96", "found 97", "choose")),
    Case("no channels", nothing, "plan model --vocab-size 512 --intermediate-size 0 -o new.json",
         ("--intermediate-size", "out of reach", "expected 1 to 96", "found 0", "choose")),
    *(
        Case(f"width {given}", nothing, f"plan model --vocab-size 512 --width {given} -o new.json",
             ("--width", "no width of this model", f"expected KEY=N with KEY {expected}",
              f"found {given}", "correct it"))
        for given, expected in (
            ("moe_intermediate_size=64", "one of intermediate_size"),
            *((given, "a key of config.json") for given in (
                "intermediate_size", "intermediate_size=x", "=64", "intermediate_size=-64",
                "intermediate_size=6.5")),
        )
    ),
    Case("rows that do not divide", nothing, f"plan model {SIZES} --multiple-of 96 -o new.json",
         ("vocab_size", "does not divide", "expected a multiple of 96, such as 480", "found 512")),
    Case("channels that do not divide", nothing,
         "plan model --vocab-size 512 --intermediate-size 60 --multiple-of 32 -o new.json",
         ("intermediate_size", "does not divide", "expected a multiple of 32, such as 64",
          "found 60")),
    Case("channels that do not divide for a target", nothing,
         "plan model --vocab-size 512 --intermediate-size 64 --target tp=2,group=64 -o new.json",
         ("intermediate_size", "does not divide", "expected a multiple of 128", "found 64")),
    *(
        Case(f"ratio {ratio}", nothing, f"plan model --ratio {ratio} -o new.json",
             ("ratio", "expected above 0, below 1", f"found {float(ratio)}", fix))
        for ratio, fix in (("0", "choose"), ("1.5", "did you mean 0.015?"), ("-0.1", "choose"),
                           ("1", "choose"), ("nan", "choose"))
    ),
    Case("ratio 0.99", nothing, "plan model --ratio 0.99 -o new.json",
         ("ratio", "expected at most 0.", "found 0.99", "--multiple-of")),
    *(
        Case(f"nothing to remove: {given}", nothing, f"plan model {given} -o new.json",
             ("nothing says how much to remove", "give --ratio", "--vocab-size"))
        for given in ("", "--multiple-of 8", "--target tp=2")
    ),
    Case("a ratio and all sizes", nothing, f"plan model --ratio 0.2 {SIZES} -o new.json",
         ("--ratio", "no size left to choose", "leave out")),
    Case("a size that takes more than the ratio", nothing,
         "plan model --ratio 0.05 --intermediate-size 8 -o new.json",
         ("--ratio", "cannot be met", "at least 0.", "found 0.05")),
    Case("percent", nothing, "plan model --ratio 20 -o new.json",
         ("--ratio", "found 20", "20 means 2000 %; did you mean 0.2?")),
    Case("no number", nothing, "plan model --ratio a% -o new.json",
         ("--ratio", "found 'a%'", "0.2 or 20%")),
    *(
        Case(f"only {only}", nothing, f"plan model --only {only} -o new.json", ("--only", *words))
        for only, words in (
            ("vocabulary", ("no effect without --ratio",)),
            ("rows --ratio 0.2", ("vocabulary, channels, experts, layers", "found 'rows'")),
            (f"channels --ratio 0.2 {SIZES}", ("and sizes exclude each other",)),
            ("layers,channels --ratio 0.2", ("layers goes with no other part",)),
            ("layers --ratio 0.2", ("needs statistics",)),
        )
    ),
    *(
        Case(f"{option} with a whole vocabulary", nothing,
             f"plan model --intermediate-size 64 {option} -o new.json",
             (option.split()[0], "no effect", "whole vocabulary"))
        for option in ("--keep-script Latin", "--keep-tokens text.txt")
    ),
    *(
        Case(f"bucket sizes {sizes}", nothing, f"{CALIBRATE} text.txt --vocab-sizes {sizes}",
             ("--vocab-sizes", "expected numbers from 1 to 640", f"found {sizes}", "correct"))
        for sizes in ("0,512", "641", "a", "512,")
    ),
    Case("model is a file", nothing, "inspect text.txt",
         ("text.txt", "is a file", "expected the directory of a model", "has config.json")),
    Case("picture of no known kind", nothing, "inspect model --plot x.foo", ("x.foo", "foo")),
    Case("model is a path that is not there", nothing, "inspect ./nowhere",
         ("./nowhere", "neither", "expected DIR or org/name", "check the spelling")),
    Case("model is not there", nothing, "inspect nowhere",
         ("nowhere", "cannot be read from the hub", "check the name")),
    Case("model has nearly this name", nothing, "inspect ./modle", ("did you mean model?",)),
    Case("model of the hub has nearly this name", nothing, "inspect modell",
         ("modell", "cannot be read from the hub", "did you mean model?")),
    Case("statistics have nearly this name", nothing,
         f"plan model {SIZES} --stats stats.safetensor -o new.json",
         ("cannot be read", "did you mean stats.safetensors?")),
    Case("plan has nearly this name", nothing, "apply plan.jsn", ("did you mean plan.json?",)),
    Case("text has nearly this name", nothing, f"{CALIBRATE} test.txt",
         ("does not exist", "did you mean text.txt?")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    assert_refused_and_nothing_written(case, bench, run)
