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
             ("ratio", "expected above 0, below 1", f"found {float(ratio)}", "choose"))
        for ratio in ("0", "1.5", "-0.1", "1", "nan")
    ),
    Case("ratio 0.99", nothing, "plan model --ratio 0.99 -o new.json",
         ("ratio", "expected at most 0.", "found 0.99", "--vocab-size")),
    *(
        Case(f"target {given or 'missing'}", nothing, f"plan model {given} -o new.json",
             ("expected --ratio, or --vocab-size and --intermediate-size", "give one or the other"))
        for given in ("", f"--ratio 0.2 {SIZES}", "--ratio 0.2 --vocab-size 512")
    ),
    *(
        Case(f"bucket sizes {sizes}", nothing, f"{CALIBRATE} text.txt --vocab-sizes {sizes}",
             ("--vocab-sizes", "expected numbers from 1 to 640", f"found {sizes}", "correct"))
        for sizes in ("0,512", "641", "a", "512,")
    ),
    Case("model is a file", nothing, "inspect text.txt",
         ("text.txt", "neither", "expected DIR or org/name", "check the spelling")),
    Case("picture of no known kind", nothing, "inspect model --plot x.foo", ("x.foo", "foo")),
    Case("model is a path that is not there", nothing, "inspect ./nowhere",
         ("./nowhere", "neither", "expected DIR or org/name", "check the spelling")),
    Case("model is not there", nothing, "inspect nowhere",
         ("nowhere", "neither", "expected DIR or org/name", "check the spelling")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    assert_refused_and_nothing_written(case, bench, run)
