"""The page itself: its figures are gathered, put into one HTML file, and saved."""

import hashlib
import math
import shlex
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import TokenizerError, printable
from surgery.families.schema import EXPERT
from surgery.files.atomic import write_atomic
from surgery.layout.layout import Layout
from surgery.planning.layers import format_layers
from surgery.planning.plan import Plan
from surgery.planning.planner import check_stats
from surgery.report import charts
from surgery.report.choices import PLAN_FILE, Choices, Mark, choices_of, commands_for_sizes
from surgery.report.layers import LayerFacts, layer_facts
from surgery.report.passages import (
    MOST_WORD_CHARACTERS,
    TextFacts,
    Texts,
    text_facts,
    text_words,
)
from surgery.report.proof import Bill, Results, bill_of
from surgery.report.spelling import packed, packed_json, script_json, spelling_of
from surgery.report.vocabulary import NO_SCRIPTS, Vocabulary, VocabularyFacts, vocabulary_facts
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.channels import DEFAULT_CRITERION, DEFAULT_EXPERT_CRITERION
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.verify.files import VerifyReport
from surgery.version import __version__
from surgery.vocabulary.order import (
    Rarity,
    VocabularyChoice,
    identity_rarity,
    open_vocabulary,
    rarity_of,
)

SPACE = "\u00a0"
"""Between a number and its unit: a line does not break there."""

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_BYTES = 2_600_000
"""The tables of a page take no more, so that all of it stays below 3 MB."""

LEAST_WORD_CHARACTERS = 1 << 12
"""The sliders count the tokens of so much text at least, if there is as much."""

NOTEBOOK_HEIGHT = 720
"""Pixels of a page within a notebook."""


@dataclass(frozen=True)
class ReportSubject:
    """The cut that a page is about, and where it was found."""

    plan: Plan
    layout: Layout
    """The model that the plan was made for."""
    model: str
    """The same, as a command names it."""
    plan_file: Path | None = None
    """None where the plan is in no file."""
    output: Path | None = None
    """The directory that was made by the plan, if there is one."""
    by_rule: bool = False
    """Whether the plan was made for the page alone, by the rule of thumb."""


@dataclass(frozen=True)
class ReportSources:
    """What a page is made from beside its subject."""

    stats: ChannelStats | None = None
    """Curves of the layers, counts of tokens, and the sliders of "What if"."""
    stats_file: Path | None = None
    """Their file, as commands name it, where they have one."""
    texts: Texts = field(default_factory=dict)
    """The reader's own texts."""
    checks: VerifyReport | None = None
    """What verify said of the output."""
    results: Results = field(default_factory=Results)
    """What score, search and compare measured."""


@dataclass(frozen=True)
class Making:
    """The commands that make the cut of a page."""

    commands: list[str]
    output: str
    """The directory that they write."""
    note: str
    """What a reader must know first; text with backticks."""


@dataclass(frozen=True)
class ReportFacts:
    """All figures that a page shows."""

    name: str
    """Of the model, as people call it."""
    subject: ReportSubject
    bill: Bill
    vocabulary: VocabularyFacts
    text: TextFacts
    layers: LayerFacts
    sources: ReportSources
    choices: dict[str, Any] | None
    """``Choices.facts``; None where there is nothing to choose."""
    why_no_choices: str
    making: "Making"

    @property
    def plan(self) -> Plan:
        """The cut."""
        return self.subject.plan


@dataclass(frozen=True, eq=False)
class Report:
    """One page that shows what a cut keeps and loses; it needs no network and no server."""

    html: str
    facts: ReportFacts

    def save(self, path: Path | str) -> None:
        """Write the page atomically."""
        write_atomic(Path(path), self.html.encode("utf-8", "backslashreplace"))

    def _repr_html_(self) -> str:
        page = escape(self.html, quote=True)
        return (
            f'<iframe title="{escape(self.facts.name)}" sandbox="allow-scripts" '
            f'style="width:100%;height:{NOTEBOOK_HEIGHT}px;border:0" srcdoc="{page}"></iframe>'
        )


def report_on(subject: ReportSubject, sources: ReportSources) -> Report:
    """Gather the figures of a cut and put them into a page.

    The same sources give the same bytes.

    Raises:
        StatsError: the statistics belong to another model.
    """
    plan, layout, stats = subject.plan, subject.layout, sources.stats
    if stats is not None:
        check_stats(layout, stats)
    tokenizer, ids = _tokenizer(layout, plan), plan.ids()
    vocabulary, text = VocabularyFacts(ids.old_size, ids.new_size), TextFacts()
    data: dict[str, Any] = {"rows": ids.old_size}
    tables: dict[str, str] = {}
    library, can_spell = None, False
    if tokenizer is not None:
        gathered = Vocabulary.of(tokenizer, layout.vocab_size)
        library = tokenizer.library()
        library.no_truncation()
        library.no_padding()
        if sources.texts:
            text = text_facts(tokenizer, library, ids, sources.texts)
        counted = _counted(text, stats, ids.keep_mask())
        vocabulary = vocabulary_facts(gathered, layout, ids, plan.vocabulary, counted)
        data["scripts"] = [row.name for row in vocabulary.scripts if row.name not in NO_SCRIPTS]
        spelling = spelling_of(tokenizer, layout.vocab_size)
        data |= {"spelling": spelling.settings, "groups": gathered.group_names}
        tables |= {**spelling.tables, "groups": packed(gathered.group_numbers().tobytes())}
        tables["kept"] = packed(np.packbits(ids.keep_mask(), bitorder="little").tobytes())
        can_spell = spelling.able
    choices, why = _choices(subject, sources, tokenizer)
    making = _making(subject, sources)
    if choices is not None:
        names = {"model": subject.model, "stats": _stats_name(sources), "plan": PLAN_FILE}
        names["family"] = plan.family or ""
        data["choices"] = {**choices.facts, **names, "made_by": making.commands}
        tables |= choices.tables
    if tokenizer and library and choices and can_spell and sources.texts:
        room = MOST_BYTES - sum(map(len, tables.values()))
        tables["words"] = _words(tokenizer, library, sources.texts, room)
        data["text_bytes"] = text.total.nbytes
    facts = ReportFacts(
        printable(plan.base or Path(plan.source).name),
        subject,
        bill_of(layout, plan),
        vocabulary,
        text,
        layer_facts(layout, plan, stats),
        sources,
        choices.facts if choices else None,
        why,
        making,
    )
    return Report(_render(facts, data, tables), facts)


def _words(tokenizer: TokenizerFile, library: "Tokenizer", texts: Texts, room: int) -> str:
    """Return the words of as much of the texts as takes no more than ``room`` characters, packed.

    Text without spaces has long words, each of them once.
    """
    characters = MOST_WORD_CHARACTERS
    while True:
        found = packed_json(text_words(tokenizer, library, texts, characters).facts())
        if len(found) <= room or characters <= LEAST_WORD_CHARACTERS:
            return found
        characters //= 4


def _tokenizer(layout: Layout, plan: Plan) -> TokenizerFile | None:
    """Return the source's tokenizer; None where it cannot be pruned, and is not."""
    try:
        return open_vocabulary(layout)
    except TokenizerError:
        if not plan.ids().identity:
            raise
        return None


def _counted(
    text: TextFacts, stats: ChannelStats | None, kept: np.ndarray
) -> tuple[str, np.ndarray] | None:
    """Return the text that tells which removed tokens are common, and its counts.

    Statistics of text that the pruned vocabulary tokenized have no removed token.
    """
    if text.counts.any():
        return "counts in your text", text.counts
    if stats is not None and stats.token_counts[~kept].any():
        return "counts in the calibration text", stats.token_counts
    return None


def _choices(
    subject: ReportSubject, sources: ReportSources, tokenizer: TokenizerFile | None
) -> tuple[Choices | None, str]:
    """Return what the sliders choose among, or why there are none."""
    plan, layout, stats = subject.plan, subject.layout, sources.stats
    if stats is None:
        return None, "Give statistics with `stats` to choose other sizes on this page."
    rarity = identity_rarity(layout.vocab_size)
    if tokenizer is not None:
        rarity = rarity_of(layout, VocabularyChoice(), tokenizer)
    if why := _made_otherwise(plan, layout, rarity):
        return None, f"The sliders {why}."
    sums = [axes[EXPERT] for axes in stats.layers if EXPERT in axes]
    if plan.kept_experts and any(each.routed is None for each in sums):
        return None, "The sliders need sums of the experts' outputs, which the statistics lack."
    best = sources.results.best
    marks = [Mark("search's best", best.vocab_size, best.widths, best.experts)] if best else []
    return choices_of(layout, plan, stats, rarity, marks), ""


def _made_otherwise(plan: Plan, layout: Layout, rarity: Rarity) -> str:
    """Return how the sliders choose, where a plan was made otherwise; else nothing."""
    size, made = plan.after.vocab_size, plan.provenance
    ids = rarity.id_map(size) if rarity.must_keep <= size < layout.vocab_size else None
    checks = [
        (
            size != layout.vocab_size
            and (ids is None or not np.array_equal(ids.kept, plan.ids().kept)),
            "remove tokens in the order of merges; this plan removes others",
        ),
        (
            bool(plan.layers) and not made.layers_by_influence,
            "rank layers by their influence; this plan names its layers",
        ),
        (
            plan.after.widths != plan.before.widths and made.criterion != DEFAULT_CRITERION,
            f"rank channels by {DEFAULT_CRITERION}; this plan ranks them by {made.criterion}",
        ),
        (
            made.expert_criterion not in (None, DEFAULT_EXPERT_CRITERION),
            f"rank experts by {DEFAULT_EXPERT_CRITERION}; this plan ranks them by "
            f"{made.expert_criterion}",
        ),
        (plan.dequantize, "keep the format of the weights; this plan changes it"),
    ]
    return next((why for differs, why in checks if differs), "")


def _stats_name(sources: ReportSources) -> str:
    return str(sources.stats_file or "stats.safetensors")


def _making(subject: ReportSubject, sources: ReportSources) -> Making:
    """Return the commands that make exactly the cut of a page."""
    plan, model = subject.plan, subject.model
    output = "DIR" if subject.output else plan.output or "DIR"
    if plan.complete and not subject.by_rule:
        file = str(subject.plan_file or "plan.json")
        apply = ["compact-surgery", "apply", file, "--source", model, "-o", output]
        note = (
            "" if subject.plan_file else 'First save the plan, in Python: `plan.save("plan.json")`.'
        )
        return Making([shlex.join(apply)], output, note)
    stats = _stats_name(sources)
    commands = commands_for_sizes(subject.layout, plan, model, stats, output)
    if sources.stats is not None:
        return Making(commands, output, "")
    calibrate = ["compact-surgery", "calibrate", model, "--data", "TEXT", "-o", stats]
    note = (
        "This plan has sizes only. TEXT is a text like those that the model will be used on: it "
        "chooses what is kept of these sizes. Options of the vocabulary that the plan was made "
        "with, such as `--keep-script`, must be given again."
    )
    return Making([shlex.join(calibrate), *commands], output, note)


def _render(facts: ReportFacts, data: Mapping[str, Any], tables: Mapping[str, str]) -> str:
    """Put the figures into the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("surgery.report", "template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "number": _number,
        "counted": _counted_noun,
        "percent": _percent,
        "size": _size,
        "change": _change,
        "ticked": _ticked,
        "quoted": lambda word: shlex.quote(str(word)),
        "layers": format_layers,
    }
    source = environment.loader
    assert source is not None
    style, script = (source.get_source(environment, f"report.{kind}")[0] for kind in ("css", "js"))
    return environment.get_template("report.html").render(
        facts=facts,
        charts=charts,
        version=__version__,
        style=style,
        script=script,
        policy=_policy(style, script),
        data=script_json(data),
        tables=dict(tables),
    )


def _policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy: no network at all, no other script, no other style."""
    style_hash, script_hash = (
        b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _number(value: float) -> str:
    return f"{value:,}"


def _counted_noun(count: int, name: str) -> str:
    """A number with a noun, in the singular for one."""
    return f"{count:,} {name}{'s' * (count != 1)}"


def _percent(value: float) -> str:
    """A share in one decimal; two where it is nearly all or nearly nothing."""
    near = not 0.001 <= value <= 0.999 and value not in (0, 1)
    return f"{_rounded(value, 2):.2f}{SPACE}%" if near else f"{_rounded(value, 1):.1f}{SPACE}%"


def _change(value: float) -> str:
    return f"{_rounded(value, 1):+.1f}{SPACE}%"


def _rounded(share: float, digits: int) -> float:
    """A share in per cent, halves rounded up as the page's script does."""
    scale: int = 10**digits
    return math.floor(100 * share * scale + 0.5) / scale


def _ticked(text: str) -> str:
    """Text with what stands between backticks as code, for HTML."""
    parts = map(escape, text.split("`"))
    return "".join(f"<code>{part}</code>" if n % 2 else part for n, part in enumerate(parts))


def _size(nbytes: float) -> str:
    """Bytes as people read them."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while nbytes >= 1000 and len(units) > 1:
        nbytes, units = nbytes / 1000, units[1:]
    return f"{nbytes:,.{0 if units[0] == 'bytes' else 1}f}{SPACE}{units[0]}"
