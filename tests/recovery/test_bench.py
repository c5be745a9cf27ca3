"""tools.bench recover: equal time for each method, measured with the models beside it."""

import json
from pathlib import Path

from click.testing import CliRunner

from tests.recovery.conftest import Pair
from tools.bench.__main__ import main
from tools.bench.recover import draw, table


def test_what_training_buys_is_measured_beside_the_dense_model(pair: Pair, tmp_path: Path) -> None:
    tasks = tmp_path / "words.jsonl"
    items = [{"context": "one two", "choices": ["three", "x"], "answer": n % 2} for n in range(8)]
    tasks.write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    texts = ("--data", pair.text, "--unseen", pair.text, "--tasks", tasks)
    take = ("--minutes", 0.05, "--seq-len", 32, "--method", "continue", "--work", tmp_path / "work")
    command = ["recover", pair.dense, pair.pruned, *texts, *take, "--json"]
    result = CliRunner().invoke(main, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [facts["name"] for facts in found[:2]] == ["dense", "pruned"]
    assert found[1]["change"]["share"] > 0
    again = CliRunner().invoke(main, [str(part) for part in command])  # without training
    assert again.exit_code == 0, again.output
    kept = ("name", "minutes", "curve", "bits_per_byte")
    for first, second in zip(found, json.loads(again.stdout), strict=True):
        assert [first.get(key) for key in kept] == [second.get(key) for key in kept]
    if len(found) == 3:  # else it was no better after so short a time, and nothing was written
        assert found[2]["tokens"] == found[2]["curve"][-1][0] > 0
    lines = table(found).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [facts["name"] for facts in found]
    trained = {
        **found[1],
        "name": "continue",
        "tokens": 9,
        "minutes": 1.0,
        "cpu_minutes": 1.0,
        "written": 0.5,
        "curve": [[0, 2.0], [9, 1.0]],
    }
    assert "+" in table([*found[:2], trained])
    draw([trained], tmp_path / "curve.svg")
    assert "minutes" in (tmp_path / "curve.svg").read_text(encoding="utf-8")
