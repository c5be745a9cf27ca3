"""What a page holds: figures of the plan, the commands that make pages, results, refusals."""

import base64
import gzip
import hashlib
import json
import re
import shlex
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest

import calib
import surgery
from calib.scoring.score import Score
from calib.study.search import SearchResult
from calib.study.table import Row
from surgery.cli.main import main as compact_surgery
from surgery.planning.plan import Plan
from surgery.planning.sizes import Sizes
from surgery.report import page as pages
from surgery.report.page import Report
from surgery.report.passages import TextGrowth
from surgery.report.proof import read_results
from surgery.report.spelling import javascript_regex, script_json
from surgery.report.vocabulary import LANGUAGES, GroupCount
from tests.support import tiny
from tests.support.command import Run, assert_refused
from tests.support.languages import ARTICLE_1
from tests.support.plans import layout_of, random_plan, random_stats

TEXTS = [surgery.Source([text]) for text in (ARTICLE_1["Latin"], ARTICLE_1["Hangul"])]


class Elements(HTMLParser):
    """The elements of a page, and the text of the last script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.texts[tag] = ""

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:  # within a script or a style
            self.texts[self.lasttag] += data


@pytest.fixture(scope="module")
def report(llama: Path) -> Report:
    stats = random_stats(layout_of(llama))
    plan = surgery.make_plan(
        llama, stats=stats, vocab_size=512, intermediate_size=64, data=list(ARTICLE_1.values())
    )
    return surgery.make_report(plan, stats=stats, data=list(ARTICLE_1.values()))


def test_the_policy_names_the_script_and_the_style_of_the_page(report: Report) -> None:
    elements = Elements(report.html)
    policy = next(a["content"] for tag, a in elements.found if a.get("http-equiv"))
    assert policy is not None
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(elements.texts[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


def test_a_page_refers_to_nothing_outside(report: Report) -> None:
    for tag, attributes in Elements(report.html).found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        if "href" in attributes:
            assert str(attributes["href"]).startswith("#")


def test_the_same_sources_give_the_same_page(llama: Path, report: Report) -> None:
    stats = random_stats(layout_of(llama))
    again = surgery.make_report(report.facts.plan, stats=stats, data=list(ARTICLE_1.values()))
    assert again.html == report.html


def test_tokens_are_counted_as_the_plan_counts_them(report: Report) -> None:
    facts, cost = report.facts, report.facts.plan.vocabulary
    assert cost is not None
    rows = {row.name: row for row in [*facts.vocabulary.scripts, *facts.vocabulary.kinds]}
    assert len(rows) >= 5
    for script in cost.scripts:
        if script.script in rows:
            row = rows[script.script]
            assert (row.before, row.after) == (script.tokens_before, script.tokens_after)
    grown = {row.name: row for row in facts.text.scripts}
    for script in cost.scripts:
        if script.text_bytes:
            text = grown[script.script]
            assert text.nbytes == script.text_bytes
            assert text.before == script.text_tokens_before
            assert text.after == script.text_tokens_after
    by_length = sum(row.before for row in facts.vocabulary.lengths)
    assert by_length == sum(r.before for r in facts.vocabulary.scripts if r.name != "Bytes")


def test_scripts_that_vanish_are_named_first(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"Latin": (900, 800), "Cuneiform": (99, 0), "Thai": (20, 1), "Han": (10, 9)}
    scripts = [GroupCount(name, LANGUAGES.get(name, ""), *n) for name, n in sizes.items()]
    facts = replace(report.facts.vocabulary, scripts=scripts)
    monkeypatch.setattr(pages, "vocabulary_facts", lambda *_: facts)
    html = surgery.make_report(report.facts.plan).html
    assert "of these scripts are removed: <b>Thai</b>, <b>Cuneiform</b>.</p>" in html
    assert re.findall(r"<li><b>(\w+)</b> \(", html) == ["Latin", "Han"]


def test_a_text_is_counted_alike_in_the_table_and_as_a_passage(report: Report) -> None:
    """Ends of lines are counted in both."""
    for document in ("One line.\n", "Two\nlines, the second without an end", "\n\nA late start\n"):
        text = surgery.make_report(report.facts.plan, data=[document.lstrip("\n")]).facts.text
        (passage,) = text.passages
        assert (len(passage.before), len(passage.after)) == (text.total.before, text.total.after)
    text = surgery.make_report(report.facts.plan, data=["One.\n\nTwo.\n"]).facts.text
    assert [passage.text for passage in text.passages] == ["One.\n", "Two.\n"]


@pytest.mark.parametrize(
    ("after", "words", "missing"),
    [
        ((100,), "Your text takes no more tokens than before.", "grows"),
        ((150,), "Your text grows in tokens: <b>0</b> +50.0", "Of your texts"),
        ((150, 100), "only this one grows in tokens: <b>0</b> +50.0", "least grows"),
        ((150, 120, 110, 130, 105, 102), "least grows <b>5</b> +2.0", "<b>5</b> +2.0\xa0%, "),
    ],
)
def test_what_grows_is_said_once(
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
    after: tuple[int, ...],
    words: str,
    missing: str,
) -> None:
    texts = [TextGrowth(str(n), 100, 100, count) for n, count in enumerate(after)]
    monkeypatch.setattr(pages, "text_facts", lambda *_: replace(report.facts.text, texts=texts))
    html = surgery.make_report(report.facts.plan, data=["a"]).html
    verdict = html[html.index('class="verdict"') : html.index("<nav")]
    assert words in verdict
    assert missing not in verdict


def test_one_is_not_many() -> None:
    assert pages._counted_noun(1, "note") == "1 note"
    assert pages._counted_noun(1200, "note") == "1,200 notes"


def test_the_most_common_removed_tokens_come_first(llama: Path, report: Report) -> None:
    found = report.facts.vocabulary.removed
    plan = report.facts.plan
    removed = surgery.removed_tokens(plan, data=list(ARTICLE_1.values())).tokens
    wanted = sorted((token.count for token in removed if token.count), reverse=True)
    assert [row.count for row in found if row.count] == wanted[: len(found)]
    assert "your text" in report.facts.vocabulary.ordered_by
    stats = random_stats(layout_of(llama))
    assert "calibration" in surgery.make_report(plan, stats=stats).facts.vocabulary.ordered_by
    assert "merges" in surgery.make_report(plan).facts.vocabulary.ordered_by


def test_special_tokens_say_why_they_stayed(report: Report) -> None:
    why = {row.text: row.why for row in report.facts.vocabulary.special}
    assert "config.json: bos_token_id" in why["<s>"]
    assert "tokenizer.json puts it into every text" in why["<s>"]
    assert "an added token" in why["<unk>"]


def test_passages_are_those_of_the_library_and_mark_what_is_removed(report: Report) -> None:
    facts = report.facts
    ids = facts.plan.ids()
    assert len(facts.text.passages) == 16
    for passage in facts.text.passages:
        assert [ids.new(piece.id) is None for piece in passage.before] == [
            piece.marked for piece in passage.before
        ]
        assert all(ids.new(piece.id) is not None for piece in passage.after)
        assert any(p.marked for p in passage.after) == any(p.marked for p in passage.before)
    total = facts.text.total
    assert total.before == sum(len(passage.before) for passage in facts.text.passages)
    assert total.after == sum(len(passage.after) for passage in facts.text.passages)


@pytest.mark.parametrize(
    ("key", "layers", "experts"),
    [
        ("llama", (), 0),
        ("llama", ([0], [1, 2]), 0),
        ("qwen3_moe", (), 3),
        ("deepseek_v3", (), 0),
        ("gemma3", (), 0),
    ],
)
def test_the_bill_adds_up(
    tmp_path: Path, key: str, layers: tuple[list[int], ...], experts: int
) -> None:
    model = tiny.save(tmp_path / "model", key)
    plan = random_plan(model, 512, 0.5, layers=layers, experts=experts)
    bill = surgery.make_report(plan).facts.bill
    *parts, total = bill.parameters
    assert (total.before, total.after) == (plan.before.parameters, plan.after.parameters)
    assert sum(row.before for row in parts) == total.before
    assert sum(row.after for row in parts) == total.after
    assert sum(count for _, count in bill.by_axis) == total.before - total.after
    axes = {name for name, _ in bill.by_axis}
    assert axes == {"vocabulary", "channels"} | ({"layers"} if layers else set()) | (
        {"experts"} if experts else set()
    )
    assert bill.memory[0].after == plan.after.nbytes


def test_a_mixture_has_a_map_of_its_experts(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model", "qwen3_moe")
    stats = random_stats(layout_of(model))
    plan = random_plan(model, 640, 1.0, experts=3)
    report = surgery.make_report(plan, stats=stats)
    experts = report.facts.layers.experts
    assert experts is not None
    for number, layer in enumerate(experts.layers):
        assert [n for n, kept in enumerate(experts.kept[number]) if kept] == plan.experts(
            layer
        ).tolist()
    assert report.html.count('class="crossed"') == 1
    assert report.html.count("(removed)") == sum(row.count(False) for row in experts.kept)


def test_layers_that_lose_much_stand_out(llama: Path) -> None:
    stats = random_stats(layout_of(llama))
    sums = stats.layers[1]["ffn"]
    steep = sums.sum_sq**8
    stats.layers[1]["ffn"] = replace(sums, sum_sq=steep)
    stats.layers[2]["ffn"] = replace(
        stats.layers[2]["ffn"], sum_sq=stats.layers[2]["ffn"].sum_sq ** 8
    )
    plan = surgery.make_plan(llama, stats=stats, intermediate_size=48)
    rows = surgery.make_report(plan, stats=stats).facts.layers.rows
    assert [row.stands_out for row in rows] == [True, False, False]
    shares = plan.provenance.channel_shares
    assert shares is not None
    assert [row.share for row in rows] == [layer["ffn"] for layer in shares.kept]


def parse(command: list[str]) -> None:
    """Refuse a command with options that it does not have; run nothing."""
    context = click.Context(compact_surgery)
    _, child, rest = compact_surgery.resolve_command(context, command[1:])
    assert child is not None
    child.make_context(command[1], rest)


def commands_on(page: str) -> list[list[str]]:
    """The words of the commands that make the output again, and of the one that verifies it."""
    found = re.findall(r"<pre tabindex=\"0\"><code>(compact-surgery .*?)</code>", page, re.DOTALL)
    assert len(found) == 2
    return [shlex.split(line) for text in found for line in unescape(text).splitlines()]


def run_commands_on(page: Path, run: Run, output: str, **instead: object) -> list[str]:
    """Run the commands of a page with another output, and return their names."""
    words = {"DIR": output, **{name: str(value) for name, value in instead.items()}}
    commands = commands_on(page.read_text("utf-8"))
    for command in commands:
        done = run(*(words.get(word, word) for word in command[1:]))
        assert done.exit_code == 0, (command, done.output)
    return [command[1] for command in commands]


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with a model from which the rule of thumb removes a fifth."""
    monkeypatch.chdir(tmp_path)
    return tiny.save(
        tmp_path / "model", hidden_size=64, intermediate_size=512, vocab_size=1536, tied=True
    )


def test_the_commands_of_a_model_with_statistics_make_the_cut_of_its_page(
    wide: Path, run: Run
) -> None:
    random_stats(layout_of(wide)).save("stats.safetensors")
    made = run("report", "model", "--stats", "stats.safetensors", "-o", "page.html")
    assert made.exit_code == 0, made.output
    page = Path("page.html")
    assert run_commands_on(page, run, "out") == ["plan", "apply", "verify"]
    shown = surgery.make_report("model", stats="stats.safetensors").facts
    again = Plan.load("cut.plan.json")
    for name in ("after", "kept_tokens", "kept_channels", "layers", "kept_experts"):
        assert getattr(again, name) == getattr(shown.plan, name)
    assert again.kept_channels
    assert {"--vocab-size", "--intermediate-size"} <= set(commands_on(page.read_text("utf-8"))[0])


def test_the_page_of_a_plan_of_sizes_says_how_its_channels_are_chosen(
    wide: Path, text: Path, run: Run
) -> None:
    done = run("plan", wide, "--ratio", 0.2, "-o", "quick.json")
    assert done.exit_code == 0, done.output
    made = run("report", "quick.json", "-o", "page.html")
    assert made.exit_code == 0, made.output
    page = Path("page.html")
    assert "has sizes only" in page.read_text("utf-8")
    found = run_commands_on(page, run, "out", TEXT=text)
    assert found == ["calibrate", "plan", "apply", "verify"]
    assert Plan.load("cut.plan.json").after == Plan.load("quick.json").after


def test_a_plan_in_no_file_is_saved_before_it_is_applied(report: Report) -> None:
    assert report.facts.making.note.startswith("First save the plan")
    assert commands_on(report.html)[0][1:3] == ["apply", "plan.json"]


def test_from_a_model_to_pages_by_commands(
    llama: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cut = ("--data", text, "--samples", 4, "--seq-len", 64, "--vocab-size", 512)
    done = run("prune", llama, *cut, "--intermediate-size", 64, "-o", "out", "--report")
    assert done.exit_code == 0, done.output
    assert "out.report.html" in done.output
    page = Path("out.report.html").read_text("utf-8")
    assert "verify says: ok" in page
    assert "What if?" in page
    for command in commands_on(page):
        again = run(*(word.replace("DIR", "again") for word in command[1:]))
        assert again.exit_code == 0, (command, again.output)
    made_again, made_first = (
        [path.read_bytes() for path in sorted(Path(name).iterdir())] for name in ("again", "out")
    )
    assert made_again == made_first
    for subject, more in (
        ("out", ()),
        ("out.plan.json", ("--data", text)),
        (llama, ("--stats", "out.stats.safetensors", "--data", text)),
    ):
        made = run("report", subject, *more, "-o", "page.html", "--force")
        assert made.exit_code == 0, made.output
        assert made.output.startswith("wrote page.html: ")
        page = Path("page.html").read_text("utf-8")
        if subject == llama:  # too small for the rule of thumb
            assert "This cut removes nothing" in page
            continue
        for command in commands_on(page):
            parse(command)
    again = run("report", "out", "-o", "page.html")
    assert_refused(again, "page.html", "--force")
    deep = run("report", "out", "--forward", "-o", "deep.html")
    assert deep.exit_code == 0, deep.output
    assert "logits equal the masked dense model" in Path("deep.html").read_text("utf-8")
    assert "largest difference" in Path("deep.html").read_text("utf-8")
    Path("third.report.html").write_text("mine")
    third = run("prune", llama, *cut, "--intermediate-size", 64, "-o", "third", "--report")
    assert_refused(third, "third.report.html")
    assert Path("third.report.html").read_text() == "mine"


def test_prune_in_python_writes_a_page_too(llama: Path, text: Path, tmp_path: Path) -> None:
    made = calib.prune(llama, data=text, vocab_size=512, output=tmp_path / "out", report=True)
    assert made.ok
    assert "512 of 640" in (tmp_path / "out.report.html").read_text("utf-8")


def test_results_are_shown(bench: Path, run: Run) -> None:
    size = {"num_hidden_layers": 3, "parameters": 9, "heldout_windows": 1, "heldout_bytes": 9}
    row = {"vocab_size": 512, "widths": {"intermediate_size": 64}, "bits_per_byte": 1.5}
    tried = {**size, **row, "name": "V' 512", "removed": 0.2, "loss": 0.25}
    files = {
        "score.json": [
            {"model": "dense", "bits_per_byte": 1.25, "bytes": 9, "windows": 1},
            {"model": "<b>smaller", "bits_per_byte": 1.5, "bytes": 9, "windows": 1, "margin": 0.1,
             "change": {"share": 0.2, "margin": 0.01}},
        ],
        "search.json": [{**tried, "name": "V' 600", "loss": 0.3}, tried],
        "compare.json": {"0.2": [{**tried, "name": "dense", "loss": 0.0}, tried]},
    }  # fmt: skip
    given = []
    for name, value in files.items():
        Path(name).write_text(json.dumps(value))
        given += ["--results", name]
    found = read_results([Path("search.json")])
    assert found.best == found.search[1]
    more = ("--stats", "stats.safetensors", "-o", "page.html")
    done = run("report", "plan.json", "--source", "model", *given, *more)
    assert done.exit_code == 0, done.output
    page = Path("page.html").read_text("utf-8")
    assert "&lt;b&gt;smaller" in page
    assert "<b>smaller" not in page
    assert re.search(r"\+20.0.%", page)
    assert "What search tried" in page
    assert "Methods compared at 0.2" in page


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "holds no results"),
        ("[]", "neither rows nor rows by ratio"),
        ("null", "neither rows nor rows by ratio"),
        ("[1]", "Expected `object`, got `int`"),
        ('[{"model": "a", "bits_per_byte": 1e308, "bytes": 1, "windows": 1}]', "<= 1000000000"),
        ('{"a": 1}', "holds no results"),
        ('[{"model": "a"}]', "bits_per_byte"),
        ("[" * 100_000, "holds no results"),
        (None, "No such file"),
    ],
)
def test_bad_results_are_refused(bench: Path, run: Run, content: str | None, words: str) -> None:
    if content is not None:
        Path("bad.json").write_text(content)
    given = ("--source", "model", "--results", "bad.json", "-o", "page.html")
    assert_refused(run("report", "plan.json", *given), "bad.json", words, "--json")
    assert not Path("page.html").exists()


def test_what_a_page_cannot_be_made_from_is_refused(bench: Path, run: Run) -> None:
    other = tiny.save(bench / "other", "mistral")
    assert_refused(run("report", "model"), "is a model", "plan", "0.2", "--stats", "calibrate")
    assert_refused(run("report", "nothing"), "nothing")
    assert_refused(run("report", other, "--stats", "stats.safetensors"), "another model")
    assert_refused(run("report", "plan.json", "--source", other), "other")
    assert_refused(run("report", "plan.json", "--source", "model", "--forward"), "--forward")
    assert_refused(run("report", "plan.json", "--device", "cpu"), "--device", "without --forward")
    assert_refused(run("report", "plan.json", "--source", "model", "-o", "model/a.html"), "inside")
    assert not Path("report.html").exists()


def test_a_vocabulary_that_cannot_be_pruned_has_a_page_without_it(bench: Path) -> None:
    path = bench / "model" / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    data["model"] = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    path.write_text(json.dumps(data), "utf-8")
    plan = surgery.make_plan(bench / "model", intermediate_size=64)
    facts = surgery.make_report(plan, data=["a text"]).facts
    assert facts.vocabulary.scripts == []
    assert facts.text.texts == []


def test_notebooks_show_a_page_in_a_frame(report: Report) -> None:
    shown = report._repr_html_()
    (frame,) = [a for tag, a in Elements(shown).found if tag == "iframe"]
    assert frame["sandbox"] == "allow-scripts"
    assert frame["srcdoc"] == report.html


def test_json_in_a_page_ends_no_element() -> None:
    value = ["</script>", "<!--", "\ud800", "\u2028", "a\0b"]
    text = script_json(value)
    assert "<" not in text
    assert text.encode("utf-8")
    assert json.loads(text) == value


def test_patterns_are_written_as_javascript_reads_them() -> None:
    assert javascript_regex(r"(?i:'s|'t)\s+(?!\S)[^\s\p{L}]") == (
        r"(?:'[sSſ]|'[tT])\p{White_Space}+(?!\P{White_Space})[^\p{White_Space}\p{L}]"
    )
    assert javascript_regex(r"\p{Han}[.$*+]\d") == r"\p{Script=Han}[.$*+]\p{Nd}"
    for pattern in (r"a++", r"(?>a)", r"\bword", r"[[:alpha:]]", r"a.b", "^a", r"[a&&b]"):
        with pytest.raises(Exception, match="Split by"):
            javascript_regex(pattern)


def test_notebooks_show_scores_and_searches() -> None:
    score = Score((20.0, 28.0), (16, 16), "digest", tokens=9, lossy_windows=0)
    dense = Row("dense", 640, {"intermediate_size": 96}, 3, 900, 0.0, 1.5, 0.0, 2, 32)
    tried = replace(dense, name="<V' 512>", vocab_size=512, removed=0.2, loss=0.1)
    search = SearchResult(dense, [tried], Sizes(512, {"intermediate_size": 96}))
    for shown, words in (
        (score, ("1.5000", "32", "bits per byte")),
        (search, ("&lt;V&#x27; 512&gt;", "512", "20.00%", "+10.00%", "dense")),
    ):
        html = shown._repr_html_()
        assert [tag for tag, _ in Elements(html).found].count("table") == 1
        for word in words:
            assert word in html, (shown, word)


def test_notebooks_show_what_the_library_returns(llama: Path, report: Report) -> None:
    plan, stats = report.facts.plan, report.facts.sources.stats
    assert stats is not None
    model = surgery.open_model(llama)
    for shown, words in (
        (plan, ("vocab_size", "640", "512", "20.00%", "tokens of Latin")),
        (stats, ("0 ffn", "block influence")),
        (model.census(), ("vocabulary", "model: llama")),
        (model.vocabulary(), ("ordinary", "620 tokens")),
        (surgery.verify_checkpoint(llama), ("no plan", "skipped")),
    ):
        html = shown._repr_html_()
        assert [tag for tag, _ in Elements(html).found].count("table") == 1
        for word in words:
            assert word in html, (shown, word)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_every_picture_takes_svg_and_png_and_names_its_model(
    llama: Path, tmp_path: Path, run: Run, ending: str
) -> None:
    for number, more in enumerate(((), ("--vocab",))):
        path = tmp_path / f"{number}.{ending}"
        done = run("inspect", llama, *more, "--plot", path)
        assert done.exit_code == 0, done.output
        raw = path.read_bytes()
        if ending == "svg":
            assert b">model: " in raw
            assert b"#0072b2" in raw
        else:
            assert raw.startswith(b"\x89PNG")


def test_a_page_holds_only_as_many_words_as_it_has_room_for(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, data = random_stats(layout_of(llama)), [tiny.prose(9000)]
    plan = surgery.make_plan(llama, stats=stats, vocab_size=512)
    sizes = []
    for room in (3_000_000, 0):
        monkeypatch.setattr("surgery.report.page.MOST_BYTES", room)
        page = surgery.make_report(plan, stats=stats, data=data).html
        table = re.search(r'id="table-words">([^<]+)<', page)
        assert table
        words = json.loads(gzip.decompress(base64.b64decode(table[1])))
        sizes.append(sum(words["nbytes"]))
        assert f'"text_bytes":{len(data[0].encode())}' in page
    assert sizes[0] == len(data[0].encode())
    assert sizes[1] < 5000
