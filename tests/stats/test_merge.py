"""Statistics of parts add up to those of the whole; those that do not fit are refused."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.text.windows import Part
from surgery.errors import DataError, StatsError
from surgery.planning.plan import Plan
from surgery.stats.channel_stats import PARTS, AxisSums, ChannelStats, StatsInfo
from surgery.stats.merge import merge_stats
from tests.support import tiny
from tests.support.command import Run

VOCAB, EDGES = 12, [4, 9, 12]
WIDTHS = [{"ffn": (1, 5)}, {"expert": (3, 4), "shared": (1, 2)}]
"""Experts and channels of each axis of two layers."""
SIZES = ("--vocab-size", 512, "--intermediate-size", 64)


def make_stats(name: str, seed: int, **changes: Any) -> ChannelStats:
    """Statistics of one run, over a text of its own."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(1, 100))
    info = StatsInfo("model", name, int(rng.integers(1, 9)), 8, tokens, EDGES, "float32")
    layers = [
        {
            axis: AxisSums(
                rng.lognormal(sigma=5, size=(3, *shape)),
                rng.lognormal(sigma=5, size=(3, *shape)),
                rng.integers(0, 1000, (3, shape[0])),
                rng.lognormal(sigma=5, size=shape),
                np.arange(1.0, 1 + np.prod(shape)).reshape(
                    shape
                ),  # of the model, so equal in all runs
            )
            for axis, shape in axes.items()
        }
        for axes in WIDTHS
    ]
    counts, buckets = rng.integers(0, 50, VOCAB), np.repeat([0, 1, 2], [4, 5, 3])
    info = msgspec.structs.replace(info, **changes)
    return ChannelStats(info, layers, counts, buckets, rng.normal(size=2))


def save(stats: ChannelStats, path: Path) -> Path:
    stats.save(path)
    return path


def assert_sums(found: ChannelStats, expected: list[ChannelStats]) -> None:
    """``found`` is the sum of ``expected``: counts exactly, sums to 1e-12."""
    assert np.array_equal(found.token_counts, sum(stats.token_counts for stats in expected))
    assert np.allclose(found.cosines, sum(stats.cosines for stats in expected), rtol=1e-12)
    for layer, axes in enumerate(found.layers):
        assert axes.keys() == expected[0].layers[layer].keys()
        for axis, sums in axes.items():
            assert np.array_equal(sums.weight_norm, expected[0].layers[layer][axis].weight_norm)
            for part in set(PARTS) - {"weight_norm"}:
                wanted = sum(getattr(stats.layers[layer][axis], part) for stats in expected)
                tolerance = 0 if part == "tokens" else 1e-12
                assert np.allclose(getattr(sums, part), wanted, rtol=tolerance, atol=0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_partition_merges_to_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """In any order, and in any two steps."""
    folder = tmp_path_factory.mktemp("parts")
    runs = [make_stats(f"text {i}", i) for i in range(data.draw(st.integers(1, 5)))]
    paths = [save(stats, folder / str(i)) for i, stats in enumerate(runs)]
    whole = merge_stats(paths)
    assert_sums(whole, runs)
    assert whole.info.samples == sum(stats.info.samples for stats in runs)
    assert whole.info.tokens == sum(stats.info.tokens for stats in runs)
    assert whole.info.texts == sorted(stats.info.text_digest for stats in runs)
    save(whole, folder / "whole")
    save(merge_stats(data.draw(st.permutations(paths))), folder / "shuffled")
    assert (folder / "whole").read_bytes() == (folder / "shuffled").read_bytes()
    group = [data.draw(st.integers(0, 1)) for _ in paths]
    halves = [
        save(merge_stats(chosen), folder / f"half {side}")
        for side in (0, 1)
        if (chosen := [path for path, number in zip(paths, group, strict=True) if number == side])
    ]
    in_steps = merge_stats(halves)
    assert_sums(in_steps, runs)
    assert in_steps.info == whole.info


def test_merged_statistics_are_read_back_as_they_were(tmp_path: Path) -> None:
    paths = [save(make_stats(str(i), i), tmp_path / str(i)) for i in range(3)]
    merged = merge_stats(paths)
    merged.save(tmp_path / "merged")
    again = ChannelStats.load(tmp_path / "merged")
    assert again.info == merged.info
    assert_sums(again, [merged])


def test_one_file_is_itself(tmp_path: Path) -> None:
    path = save(make_stats("text", 0), tmp_path / "one")
    merge_stats([path]).save(tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "other"}, ("another model's", "expected model", "found other")),
        ({"bucket_edges": [5, 9, 12]}, ("other buckets", "[4, 9, 12]", "--vocab-sizes")),
        ({"dtype": "bfloat16"}, ("another dtype", "expected float32", "--dtype")),
        ({"vocab_size": 9}, ("another vocabulary tokenized", "found 9", "--vocab-size")),
        ({"seq_len": 16}, ("other windows", "expected 8, found 16", "--seq-len")),
        ({"text_digest": "first"}, ("count twice", "text first", "one holds, too")),
        ({"parts": ["a", "first"]}, ("count twice", "text first", "one holds, too")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_is_named(
    tmp_path: Path, run: Run, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    one = save(make_stats("first", 0), tmp_path / "one")
    two = save(make_stats("second", 1, **changes), tmp_path / "two")
    result = run("stats", "merge", one, two, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    missing = [word for word in (f"{two}: ", *words) if word not in result.stderr]
    assert not missing, result.stderr
    assert not (tmp_path / "out").exists()


def _other_order(stats: ChannelStats) -> None:
    stats.bucket_of[:] = stats.bucket_of[::-1].copy()


def _other_layers(stats: ChannelStats) -> None:
    del stats.layers[1]["shared"]


def _other_weights(stats: ChannelStats) -> None:
    stats.layers[1]["shared"].weight_norm[0, 1] *= 1.001


def _huge_sums(stats: ChannelStats) -> None:
    stats.layers[0]["ffn"].sum_sq[:] = 1.7e308


def _huge_counts(stats: ChannelStats) -> None:
    stats.token_counts[:] = 2**62


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_other_order, "other buckets"),
        (_other_layers, "other shapes"),
        (_other_weights, "has other weights: expected the same norms"),
        (_huge_sums, "not finite"),
        (_huge_counts, "do not fit"),
    ],
)
def test_arrays_that_cannot_be_added_are_refused(tmp_path: Path, damage: Any, words: str) -> None:
    paths = []
    for number in range(2):
        stats = make_stats(str(number), number)
        if number or damage in (_huge_sums, _huge_counts):
            damage(stats)
        paths.append(save(stats, tmp_path / str(number)))
    with pytest.raises(StatsError, match=words):
        merge_stats(paths)


def test_another_file_is_refused(tmp_path: Path, run: Run, llama: Path) -> None:
    one = save(make_stats("text", 0), tmp_path / "one")
    for other in (tmp_path / "none", llama / "config.json", llama):
        result = run("stats", "merge", one, other, "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert str(other) in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert run("stats", "merge", "-o", tmp_path / "out").exit_code == 2


@settings(deadline=None)
@given(windows=st.lists(st.integers()), of=st.integers(1, 9))
def test_parts_hold_every_window_once(windows: list[int], of: int) -> None:
    found: list[int] = []
    for number in range(1, of + 1):
        if number > len(windows):
            with pytest.raises(DataError, match="has no window"):
                Part(number, of).choose(windows)
        else:
            found += Part.parse(f"{number}/{of}").choose(windows)
    assert sorted(found) == sorted(windows)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "¹/2"])
def test_no_part(text: str) -> None:
    with pytest.raises(DataError, match="expected K/N"):
        Part.parse(text)


def calibrated(run: Run, model: Path, text: Path, output: Path, *more: object) -> ChannelStats:
    calibration = ("--data", text, "--seq-len", 64, "--samples", 12, "-o", output)
    result = run("calibrate", model, *calibration, *more)
    assert result.exit_code == 0, result.output
    return ChannelStats.load(output)


@pytest.mark.parametrize("key", ["llama", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("alone", [True, False], ids=["window by window", "windows together"])
def test_parts_of_a_text_equal_one_run(
    tmp_path: Path, text: Path, run: Run, monkeypatch: pytest.MonkeyPatch, key: str, alone: bool
) -> None:
    """And make the same plan."""
    if alone:  # as any model of real size has it
        monkeypatch.setattr("calib.streaming.weights.MICRO_BATCH_VALUES", 1)
    model = tiny.save(tmp_path / "model", key)
    whole = calibrated(run, model, text, tmp_path / "whole")
    names = [tmp_path / f"part {number}" for number in (1, 2, 3)]
    for number, name in enumerate(names, 1):
        part = calibrated(run, model, text, name, "--part", f"{number}/3")
        assert part.info.samples == 4
    result = run("stats", "merge", *reversed(names), "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "12 windows" in result.output
    merged = ChannelStats.load(tmp_path / "merged")
    assert (merged.info.samples, merged.info.tokens) == (whole.info.samples, whole.info.tokens)
    assert np.array_equal(merged.token_counts, whole.token_counts)
    for axes, expected in zip(merged.layers, whole.layers, strict=True):
        for axis, sums in axes.items():
            assert np.array_equal(sums.tokens, expected[axis].tokens)
            assert np.array_equal(sums.weight_norm, expected[axis].weight_norm)
            for part_name in ("sum_sq", "sum_abs", "sum_l2"):
                one, other = (getattr(found, part_name) for found in (sums, expected[axis]))
                assert np.allclose(one, other, rtol=1e-12 if alone else 1e-4, atol=0)
    assert np.allclose(merged.cosines, whole.cosines, rtol=1e-12 if alone else 1e-5)
    kept = [kept_by(run, model, tmp_path / name) for name in ("whole", "merged")]
    assert kept[0] == kept[1]


def kept_by(run: Run, model: Path, stats: Path) -> Any:
    """The channels that a plan from ``stats`` keeps."""
    plan = stats.with_name(f"{stats.name}.plan.json")
    options = ("--ratio", 0.2, "--multiple-of", 8, "--min-expert-tokens", 0)
    result = run("plan", model, "--stats", stats, *options, "-o", plan)
    assert result.exit_code == 0, result.output
    data = json.loads(plan.read_text())
    assert Plan.load(plan).provenance.text_digest == ChannelStats.load(stats).info.text_digest
    return data["kept_channels"], data["after"]


def test_a_part_without_windows_is_refused(
    tmp_path: Path, llama: Path, text: Path, run: Run
) -> None:
    options = ("--data", text, "--seq-len", 64, "--samples", 2, "-o", tmp_path / "out")
    result = run("calibrate", llama, *options, "--part", "3/3")
    assert result.exit_code == 2
    assert "expected at most 2 parts, found 3/3" in result.stderr
    assert run("calibrate", llama, *options, "--part", "4/3").exit_code == 2
    assert not (tmp_path / "out").exists()
