"""The page in Chromium: it tokenizes as the library does, and its sliders say what plan says."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import surgery
from surgery.families.schema import EXPERT
from surgery.planning.plan import Plan
from surgery.report.page import Report
from surgery.stats.channel_stats import RoutedSums
from surgery.tokenizer.tokenizer_file import TokenizerFile, prune_tokenizer
from surgery.vocabulary.order import rarity_of
from tests.support import ROOT, tiny
from tests.support.browser import REQUIRED, Opened, chromium, open_page
from tests.support.languages import ARTICLE_1
from tests.support.plans import layout_of, random_stats
from tests.support.published_tokenizers import PUBLISHED, save_tiny
from tools import real_tokenizers

WORDS = 1000
MOST_BYTES = 3_000_000
HOSTILE = (
    "</script><script>document.title='taken'</script>",
    "\u202etxt.exe",
    "nu\0ll",
    "x" * 10_000,
)
"""Texts that must be shown as they are."""

ORDINALS = ("first", "second", "third", "fourth")

ALL_IN_ONE = """
async ([words, spaced]) => {
  const query = document.getElementById("query");
  const found = document.getElementById("found");
  document.getElementById("spaced").checked = spaced;
  const results = [];
  for (const word of words) {
    query.value = word;
    query.dispatchEvent(new Event("input"));
    for (let n = 0; n < 2000 && found.dataset.query !== query.value; n++) {
      await (n < 20 ? null : new Promise((go) => setTimeout(go, 1)));
    }
    results.push([found.dataset.before, found.dataset.after]);
  }
  return results;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def some_words(count: int = WORDS) -> list[str]:
    """Words and short texts of many languages, each once."""
    texts = [tiny.prose(), *ARTICLE_1.values(), "🙂👩‍👩‍👧 e\u0301\u200b don't I'LL 12,345.67 x²"]
    words = dict.fromkeys(word for text in texts for word in text.split())
    lines = [text[:80] for text in texts[1:]]
    special = ["a  b", "tab\tand\nline", "<s>", "<|im_start|>user", "<bos>", "ſ'ſ", "a\n\nb", "  "]
    return [*special, *lines, *words][:count]


def assert_spells(opened: Opened, source: Path, plan: Plan, words: Sequence[str]) -> None:
    """Compare what the search box says with both tokenizers of the library."""
    tokenizer = TokenizerFile.open(source)
    old, (new, old_ids) = tokenizer.library(), prune_tokenizer(tokenizer, plan.ids())
    for spaced in (False, True):
        found = opened.page.evaluate(ALL_IN_ONE, [list(words), spaced])
        for word, (before, after) in zip(words, found, strict=True):
            text = f" {word}" if spaced and not word[0].isspace() else word
            ids = old.encode(text, add_special_tokens=False).ids
            left = new.encode(text, add_special_tokens=False).ids
            assert before.split() == list(map(str, ids)), text
            assert after.split() == [str(old_ids[id_]) for id_ in left], text


def assert_quiet(opened: Opened, path: Path) -> None:
    assert opened.faults == []
    assert opened.requests == [path.as_uri()]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A page of a tiny model with hostile tokens and texts, and its model."""
    root = tmp_path_factory.mktemp("page")
    model = tiny.save(root / "model", sharded=True)
    library = tiny.tokenizer()
    library.add_tokens([AddedToken(text, normalized=False) for text in HOSTILE])
    library.save(str(model / "tokenizer.json"))
    stats = random_stats(layout_of(model))
    plan = surgery.make_plan(model, stats=stats, vocab_size=512, intermediate_size=64)
    texts = [surgery.Source(list(HOSTILE)), surgery.Source([tiny.prose(5000)])]
    report = surgery.make_report(plan, stats=stats, data=texts)
    report.save(root / "page.html")
    return model, report


def test_the_page_spells_as_the_library_and_shows_hostile_text(
    browser: Any, shown: tuple[Path, Report]
) -> None:
    model, report = shown
    path = model.parent / "page.html"
    opened = open_page(browser, path)
    assert_spells(opened, model, report.facts.plan, some_words())
    for text in HOSTILE:
        opened.page.fill("#query", text)
        line = opened.page.wait_for_selector("#found .token")
        assert line.get_attribute("data-kept") == "1"
    opened.page.evaluate(ALL_IN_ONE, [["\ud800", "a\udfffb", "\u2028", "x" * 10_000], True])
    assert opened.page.title() == f"{report.facts.name}: what this cut keeps and loses"
    shown_text = opened.page.inner_text("body")
    assert "document.title='taken'" in shown_text
    assert "\\u202etxt.exe" in shown_text
    assert "nu\\u0000ll" in shown_text
    assert_quiet(opened, path)


def test_what_the_page_cannot_spell_it_says(browser: Any, tmp_path: Path) -> None:
    """It finds the tokens of a Unigram vocabulary, and says what it lacks for more."""
    model = tiny.save(tmp_path / "model")
    pieces = [(token, 0.0) for token in tiny.SPECIAL]
    pieces += [(letter, -9.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"]
    pieces += [(f"\u2581{word}", -float(n)) for n, word in enumerate(ORDINALS, 10)]
    library = Tokenizer(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.add_special_tokens(list(tiny.SPECIAL))
    library.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").unlink()
    fewest = rarity_of(layout_of(model)).must_keep
    plan = surgery.make_plan(model, vocab_size=fewest + 1)
    surgery.make_report(plan).save(tmp_path / "page.html")
    opened = open_page(browser, tmp_path / "page.html")
    seen = set()
    for word in ORDINALS:
        opened.page.fill("#query", word)
        line = opened.page.wait_for_selector(f"#found .token:has-text('{word}')")
        stays = plan.ids().new(library.get_vocab()[f"\u2581{word}"]) is not None
        assert line.get_attribute("data-kept") == str(int(stays))
        seen.add(stays)
        assert "lacks the model Unigram" in opened.page.inner_text("#found")
    assert seen == {False, True}
    opened.page.fill("#query", "neither")
    opened.page.wait_for_selector("#found:has-text('No token is spelled like this')")
    assert_quiet(opened, tmp_path / "page.html")


def test_nothing_can_be_asked_for_from_the_page(browser: Any, shown: tuple[Path, Report]) -> None:
    """The browser itself refuses scripts and connections that the page does not have."""
    opened = open_page(browser, shown[0].parent / "page.html")
    refused = opened.page.evaluate(
        "fetch('https://example.org').then(() => 'sent', (error) => error.name)"
    )
    assert refused == "TypeError"
    opened.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'),"
        "{textContent: 'document.title = 1'}))"
    )
    assert opened.page.title() != "1"
    assert all("Content Security Policy" in fault for fault in opened.faults), opened.faults
    assert len(opened.requests) == 1
    assert len(opened.faults) >= 2


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_a_screen(
    browser: Any, shown: tuple[Path, Report], width: int, scheme: str
) -> None:
    path = shown[0].parent / "page.html"
    size = {"width": width, "height": 800}
    opened = open_page(browser, path, viewport=size, color_scheme=scheme)
    opened.page.wait_for_selector("#choose[data-ready]")
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    colours = opened.page.evaluate(
        "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
    )
    paper, ink = (sum(map(int, re.findall(r"\d+", colour))) for colour in colours)
    assert (paper < ink) is (scheme == "dark")
    assert_quiet(opened, path)


def test_every_chart_is_named_and_has_a_table(browser: Any, shown: tuple[Path, Report]) -> None:
    opened = open_page(browser, shown[0].parent / "page.html")
    opened.page.wait_for_selector("#choose[data-ready]")
    unnamed = opened.page.evaluate(
        "[...document.querySelectorAll('svg')].filter((svg) => !svg.getAttribute('aria-label')"
        " && svg.getAttribute('aria-hidden') !== 'true').length"
    )
    assert unnamed == 0
    lonely = opened.page.evaluate(
        "[...document.querySelectorAll('svg')].filter((svg) =>"
        " !svg.closest('table') && !svg.closest('section').querySelector('table')).length"
    )
    assert lonely == 0
    unlabelled = opened.page.evaluate(
        "[...document.querySelectorAll('input')].filter((input) => !input.labels.length).length"
    )
    assert unlabelled == 0


def test_the_keyboard_moves_a_slider(browser: Any, shown: tuple[Path, Report]) -> None:
    opened = open_page(browser, shown[0].parent / "page.html")
    opened.page.wait_for_selector("#choose[data-ready]")
    opened.page.focus("#slide-vocab")
    before = opened.page.inner_text("#outcome-command")
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.inner_text("#outcome-command") != before
    assert opened.page.get_attribute("#slide-vocab", "aria-valuetext").replace(",", "").isdigit()
    assert opened.page.inner_text("#outcome-said").startswith("parameters ")


READ = """
(state) => {
  for (const [key, value] of Object.entries(state)) {
    const input = document.getElementById("slide-" + key);
    input.value = value;
    input.dispatchEvent(new Event("input"));
  }
  const exact = (name) => {
    const shown = document.querySelector(`#outcome [data-name="${name}"] dd`);
    return Number(shown.dataset.exact);
  };
  const cells = (id) => [...document.querySelectorAll(`#${id} tbody tr`)].map(
    (row) => [...row.children].map((cell) => cell.textContent));
  return {
    parameters: exact("parameters"),
    nbytes: exact("weights on disk"),
    tokens: exact("your text takes"),
    layers: cells("outcome-layers"),
    scripts: cells("outcome-scripts"),
    command: document.getElementById("outcome-command").textContent,
  };
}
"""


def assert_follows(
    opened: Opened, model: Path, stats: surgery.ChannelStats, text: str, report: Report, step: int
) -> int:
    """Move the sliders over a grid, and compare each place with the plan of the same sizes."""
    choices = report.facts.choices
    assert choices is not None
    stops = {name: range(len(choices[name])) for name in ("vocab", "widths", "experts", "layers")}
    places = [
        {"vocab": v, "widths": i, "experts": e, "layers": n}
        for v in stops["vocab"]
        for i in stops["widths"]
        for e in stops["experts"]
        for n in stops["layers"]
    ][1::step]
    opened.page.wait_for_selector("#choose[data-ready]", timeout=60_000)
    opened.page.evaluate("document.querySelector('#outcome-layers details').open = true")
    for place in places:
        found = opened.page.evaluate(READ, place)
        count = choices["layers"][place["layers"]]
        plan = surgery.make_plan(
            model,
            stats=stats,
            vocab_size=choices["vocab"][place["vocab"]],
            widths=choices["widths"][place["widths"]],
            num_experts=choices["experts"][place["experts"]] or None,
            num_hidden_layers=count if count < len(stats.layers) else None,
            data=[text],
        )
        assert found["parameters"] == plan.after.parameters, place
        assert found["nbytes"] == plan.after.nbytes, place
        assert_same_shares(found["layers"], plan)
        assert_same_scripts(found, plan)
        assert_same_command(found["command"], plan)
    return len(places)


def assert_same_shares(rows: list[list[str]], plan: Plan) -> None:
    shares = plan.provenance.channel_shares
    if plan.after.widths == plan.before.widths and plan.after.experts == plan.before.experts:
        assert {row[1] for row in rows} == {"100.00 %"}
        return
    assert shares is not None
    wanted = [share for layer in shares.kept for share in layer.values()]
    assert len(rows) == len(wanted)
    for (_, shown), share in zip(rows, wanted, strict=True):
        assert abs(float(shown.split()[0]) - 100 * share) <= 0.0051, (shown, share)


def assert_same_scripts(found: dict[str, Any], plan: Plan) -> None:
    cost = plan.vocabulary
    if cost is None:
        assert not found["scripts"]
        return
    assert found["tokens"] == sum(script.text_tokens_after for script in cost.scripts)
    by_name = {script.script: script for script in cost.scripts}
    for name, before, after, *_ in found["scripts"]:
        shown = int(before.replace(",", "")), int(after.replace(",", ""))
        assert shown == (by_name[name].tokens_before, by_name[name].tokens_after), name


def assert_same_command(command: str, plan: Plan) -> None:
    if plan.after == plan.before:
        assert command == "Nothing is removed: move a slider."
        return
    if plan.after.vocab_size != plan.before.vocab_size:
        assert f"--vocab-size {plan.after.vocab_size}" in command
    for key, size in plan.after.widths.items():
        if size != plan.before.widths[key]:
            assert f"--width {key}={size}" in command or f"--intermediate-size {size}" in command
    assert " --stats stats.safetensors " in command
    assert command.endswith("\ncompact-surgery apply cut.plan.json -o DIR")


def test_both_places_of_a_page_name_the_same_commands(
    browser: Any, shown: tuple[Path, Report]
) -> None:
    """Away from the page's cut, the sliders have commands of their own."""
    opened = open_page(browser, shown[0].parent / "page.html")
    opened.page.wait_for_selector("#choose[data-ready]")
    made = opened.page.inner_text("#make pre >> nth=0")
    assert opened.page.inner_text("#outcome-command") == made
    opened.page.focus("#slide-vocab")
    opened.page.keyboard.press("ArrowRight")
    other = opened.page.inner_text("#outcome-command")
    assert other.startswith("compact-surgery plan ")
    assert "--intermediate-size 64 " in other
    assert opened.page.inner_text("#make pre >> nth=0") == made
    opened.page.click(".marks button >> nth=0")
    assert opened.page.inner_text("#outcome-command") == made


def with_routed_sums(stats: surgery.ChannelStats) -> surgery.ChannelStats:
    """Give chance a say in what experts put out, too."""
    rng = np.random.default_rng(1)
    for axes in stats.layers:
        if EXPERT in axes:
            shape = axes[EXPERT].tokens.shape
            routed = RoutedSums(*(rng.random(shape) for _ in range(5)))
            axes[EXPERT] = replace(axes[EXPERT], routed=routed)
    return stats


@pytest.mark.parametrize(("key", "step"), [("llama", 3), ("qwen3_moe", 3), ("deepseek_v3", 1)])
def test_the_sliders_say_what_plan_says(browser: Any, tmp_path: Path, key: str, step: int) -> None:
    widths: dict[str, Any] = {"intermediate_size": 512}
    if key != "llama":
        widths |= {"moe_intermediate_size": 256}
    model = tiny.save(tmp_path / "model", key, **widths)
    stats = with_routed_sums(random_stats(layout_of(model)))
    text = "\n".join(ARTICLE_1.values()) + tiny.prose(2000)
    report = surgery.make_report(surgery.open_model(model), stats=stats, data=[text])
    report.save(tmp_path / "page.html")
    opened = open_page(browser, tmp_path / "page.html")
    assert assert_follows(opened, model, stats, text, report, step) >= 5
    assert_quiet(opened, tmp_path / "page.html")


@pytest.fixture(scope="module")
def published(request: pytest.FixtureRequest) -> dict[str, Path]:
    """Name → directory with a published tokenizer's files."""
    assert request.config.cache is not None
    named = os.environ.get("COMPACT_SURGERY_TOKENIZERS")
    folder = Path(named) if named else request.config.cache.mkdir("real_tokenizers")
    try:
        return real_tokenizers.fetch(folder)
    except real_tokenizers.FetchError as error:
        pytest.skip(f"needs published tokenizers: {error.message}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_spells_as_published_tokenizers(
    browser: Any, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not os.environ.get(REQUIRED):
        pytest.skip("takes a minute: make test-page runs it")
    model, files = tmp_path / name, request.getfixturevalue("published")
    save_tiny(PUBLISHED[name], model)
    for file in real_tokenizers.FILES:
        shutil.copy(files[name] / file, model / file)
    rows = PUBLISHED[name].rows
    plan = surgery.make_plan(model, vocab_size=rows // 4 // 128 * 128)
    report = surgery.make_report(plan)
    report.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < MOST_BYTES
    opened = open_page(browser, tmp_path / "page.html")
    assert_spells(opened, model, plan, some_words())
    assert_quiet(opened, tmp_path / "page.html")


def test_the_page_of_smollm2(browser: Any, tmp_path: Path) -> None:
    """A real model: its sliders over a grid, and a thousand words."""
    model = ROOT / "build" / "smollm2"
    if not model.exists():
        pytest.skip("build/smollm2 is not there: make test-page builds it")
    stats, text = random_stats(layout_of(model)), tiny.prose(20_000)
    report = surgery.make_report(surgery.open_model(model), stats=stats, data=[text])
    path = tmp_path / "page.html"
    report.save(path)
    assert path.stat().st_size < MOST_BYTES
    opened = open_page(browser, path)
    step = 997 if os.environ.get(REQUIRED) else 4999
    assert assert_follows(opened, model, stats, text, report, step) >= 3
    opened.page.click(".marks button >> nth=0")
    assert_spells(opened, model, report.facts.plan, some_words())
    assert_quiet(opened, path)
