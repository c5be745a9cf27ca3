"""What is asked for becomes sizes: a ratio beside fixed sizes, taken from some parts alone."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import BudgetError
from surgery.layout.layout import Layout
from surgery.planning.choice import choose_sizes
from surgery.planning.layers import layers_by_influence
from surgery.planning.request import CutRequest, SizeRequest
from surgery.planning.sizes import TOLERANCE, Sizes
from surgery.vocabulary.order import VocabularyOptions
from tests.support import tiny
from tests.support.command import Run
from tests.support.plans import layout_of

KEY = "intermediate_size"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return layout_of(tiny.save(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=6))


def removed(layout: Layout, sizes: Sizes) -> float:
    left = layout.with_layers(sizes.layers)
    after = left.parameters(sizes.vocab_size, sizes.widths)
    return 1 - after / layout.parameters(layout.vocab_size, layout.widths)


@given(ratio=st.floats(0.02, 0.7), vocab_size=st.none() | st.integers(270, 640))
def test_a_ratio_chooses_the_channels_beside_a_given_vocabulary(
    layout: Layout, ratio: float, vocab_size: int | None
) -> None:
    only = "channels" if vocab_size is None else ()
    asked = SizeRequest(ratio=ratio, vocab_size=vocab_size, multiple_of=1, only=only)
    kept = layout.vocab_size if vocab_size is None else vocab_size
    possible = [
        removed(layout, Sizes(kept, {KEY: channels}))
        for channels in range(1, layout.widths[KEY] + 1)
    ]
    half_step = (max(possible) - min(possible)) / (len(possible) - 1) / 2
    if not min(possible) - TOLERANCE <= ratio <= max(possible) + TOLERANCE + half_step:
        with pytest.raises(BudgetError, match="cannot be met"):
            choose_sizes(layout, CutRequest(asked))
        return
    sizes = choose_sizes(layout, CutRequest(asked)).sizes
    assert sizes.vocab_size == kept
    nearest = min(abs(share - ratio) for share in possible)
    assert abs(removed(layout, sizes) - ratio) == pytest.approx(nearest)


@given(ratio=st.floats(0.02, 0.6), channels=st.none() | st.integers(1, 96))
def test_a_ratio_chooses_the_vocabulary_beside_given_channels(
    layout: Layout, ratio: float, channels: int | None
) -> None:
    only = "vocabulary" if channels is None else ()
    asked = SizeRequest(ratio=ratio, intermediate_size=channels, multiple_of=1, only=only)
    full = layout.widths[KEY]
    kept = full if channels is None else channels
    least = removed(layout, Sizes(layout.vocab_size, {KEY: kept}))
    if not least - TOLERANCE <= ratio <= removed(layout, Sizes(300, {KEY: kept})):
        with suppress(BudgetError):  # up to some 260 rows can be removed
            choose_sizes(layout, CutRequest(asked))
        return
    sizes = choose_sizes(layout, CutRequest(asked)).sizes
    assert sizes.widths == {KEY: kept}
    assert abs(removed(layout, sizes) - ratio) <= TOLERANCE


@given(ratio=st.floats(0.05, 0.8), seed=st.integers(0, 9))
def test_a_ratio_of_layers_alone_removes_those_of_least_influence(
    layout: Layout, ratio: float, seed: int
) -> None:
    influence = np.random.default_rng(seed).random(layout.num_hidden_layers)
    counts = range(1, layout.num_hidden_layers)
    whole = (layout.vocab_size, layout.widths)
    cuts = [Sizes(*whole, layers=layers_by_influence(influence, n)) for n in counts]
    errors = [abs(removed(layout, sizes) - ratio) for sizes in cuts]
    asked = CutRequest(SizeRequest(ratio=ratio, only=["layers"]))
    one = removed(layout, cuts[-1])
    if not one / 2 <= ratio <= removed(layout, cuts[0]) + one / 2:
        with pytest.raises(BudgetError, match="cannot be met by whole layers"):
            choose_sizes(layout, asked, influence=influence)
        return
    sizes = choose_sizes(layout, asked, influence=influence).sizes
    assert sizes == cuts[int(np.argmin(errors))]


def test_a_script_that_is_dropped_is_gone_and_nothing_else(layout: Layout) -> None:
    request = CutRequest(vocabulary=VocabularyOptions(drop_scripts=["latn"]))
    choice = choose_sizes(layout, request)
    assert choice.sizes.widths == layout.widths
    assert choice.tokenizer is not None
    ids, text = choice.rarity.id_map(choice.sizes.vocab_size), choice.tokenizer.kind.text
    lost = [text(token) for token, old in choice.tokenizer.vocab.items() if ids.new(old) is None]
    assert len(lost) > 200
    assert all(word is not None and word.strip().isalpha() for word in lost)


def test_dropped_scripts_come_before_all_others(llama: Path, tmp_path: Path, run: Run) -> None:
    options = ("--vocab-size", 590, "-o", tmp_path / "plan.json")
    shown = run("plan", llama, "--drop-script", "Latin", *options)
    assert shown.exit_code == 0, shown.output
    lost = [line.split()[0] for line in shown.output.splitlines() if line.endswith("%")]
    assert "Latin" in lost
    assert not {"Common", "Bytes"} & set(lost)


def test_a_script_is_not_kept_and_dropped(llama: Path, tmp_path: Path, run: Run) -> None:
    both = ("--drop-script", "latin", "--keep-script", "Latn", "-o", tmp_path / "plan.json")
    result = run("plan", llama, *both)
    assert result.exit_code == 2
    assert "--drop-script: Latin is also to be kept" in result.output


def test_percent_is_a_share(llama: Path, tmp_path: Path, run: Run) -> None:
    plans = [tmp_path / "share.json", tmp_path / "percent.json"]
    for path, ratio in zip(plans, ("0.2", "20%"), strict=True):
        assert run("plan", llama, "--ratio", ratio, "--multiple-of", 8, "-o", path).exit_code == 0
    assert plans[0].read_bytes() == plans[1].read_bytes()


def test_prune_by_layers_alone(llama: Path, text: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    options = ("--data", text, "--samples", 2, "--seq-len", 32, "-o", out)
    result = run("prune", llama, "--ratio", 0.15, "--only", "layers", *options)
    assert result.exit_code == 0, result.output
    found, before = layout_of(out), layout_of(llama)
    assert found.num_hidden_layers < before.num_hidden_layers
    assert (found.vocab_size, found.widths) == (before.vocab_size, before.widths)
