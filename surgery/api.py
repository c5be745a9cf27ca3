"""The library's functions: open a model, make a plan, apply it, verify the output."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.apply.companions import check_companions
from surgery.apply.run import JOBS, Applied, ApplyOptions, apply_to
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import BudgetError, PlanError, UnknownTypeError
from surgery.export.gguf_file import Exported, ExportOptions, export_layout
from surgery.hub.fetch import resolve_model, resolve_source
from surgery.layout.build import read_layout
from surgery.layout.census import Census, RoutingCensus
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice, choose_sizes
from surgery.planning.plan import PROVENANCE_NAME, Plan
from surgery.planning.planner import check_stats, plan_cut
from surgery.planning.request import CutRequest, SizeRequest
from surgery.probe.probe import Proposal, propose, unknown_type
from surgery.process import Progress
from surgery.report.page import Report, ReportSources, ReportSubject, report_on
from surgery.report.passages import Texts, read_texts
from surgery.report.proof import read_results
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.channels import (
    DEFAULT_CRITERION,
    DEFAULT_EXPERT_CRITERION,
    LEAST_TOKENS,
    ChannelOptions,
)
from surgery.text.documents import Text, TextOptions, sources_of
from surgery.verify.files import VerifyReport, origin_of, plan_and_source, verify_files
from surgery.vocabulary.census import VocabCensus, vocabulary_census
from surgery.vocabulary.cost import RemovedTokens, list_removed, vocabulary_cost
from surgery.vocabulary.order import VocabularyOptions, count_tokens, open_vocabulary


@dataclass(frozen=True)
class Model:
    """A checkpoint whose tensors are all recognized; no weights are read."""

    layout: Layout
    name: str
    """The argument of ``open_model``."""

    @property
    def path(self) -> Path:
        """Directory of the checkpoint."""
        return self.layout.checkpoint.path

    @property
    def source(self) -> str:
        """Absolute path, or ``org/name@commit``: what a plan names as its source."""
        return self.layout.checkpoint.source

    def census(self) -> Census:
        """Count parameters by group of tensors (paper eq. 1–3, figure 1)."""
        return Census.of(self.layout, self.name)

    def routing(self, stats: ChannelStats | Path | str) -> RoutingCensus:
        """Count how the routers spread the tokens of a calibration over their experts.

        Raises:
            StatsError: the statistics belong to another model, or it has no experts.
        """
        loaded = ChannelStats.load(stats) if isinstance(stats, str | Path) else stats
        check_stats(self.layout, loaded)
        return RoutingCensus.of(loaded, self.name)

    def vocabulary(self) -> VocabCensus:
        """Count the rows of the vocabulary by script and by kind of token."""
        return vocabulary_census(self.layout)


def open_model(model: str | Path, *, family: str | None = None) -> Model:
    """Open a checkpoint and check every tensor's name and shape.

    Example:
        >>> model = surgery.open_model("build/smollm2")
        >>> print(model.census().table())

    Args:
        model: A local directory, or a hub id ``org/name[@revision]``.
        family: Treat it as this model type, whatever config.json says.

    Returns:
        The model, which plans are made from.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or its quantization is not supported.
        UnknownTypeError: the model type is not supported.
    """
    here = Path(model).absolute() if Path(model).is_dir() else model
    return Model(open_layout(here, family), str(model))


def open_layout(model: str | Path, family: str | None = None) -> Layout:
    """Open a checkpoint as ``open_model`` does, and return its layout."""
    path, origin = resolve_model(str(model))
    checkpoint = Checkpoint.open(path, family, origin=origin)
    try:
        return read_layout(checkpoint)
    except UnknownTypeError as error:
        raise unknown_type(checkpoint, error) from error


def as_layout(model: Model | str | Path, family: str | None = None) -> Layout:
    """Return the layout of an open model, or open the model first."""
    return model.layout if isinstance(model, Model) else open_layout(model, family)


def probe_model(model: str | Path) -> Proposal:
    """Return the families that fit a checkpoint of any model type, or a proposed entry."""
    return propose(Checkpoint.open(resolve_model(str(model))[0]))


def make_plan(  # noqa: PLR0913
    model: Model | str | Path,
    *,
    stats: ChannelStats | Path | str | None = None,
    ratio: float | None = None,
    vocab_size: int | None = None,
    intermediate_size: int | None = None,
    widths: Mapping[str, int] | None = None,
    layers: str | None = None,
    num_hidden_layers: int | None = None,
    only: str | Sequence[str] = (),
    aim: str = "quality",
    num_experts: int | None = None,
    multiple_of: int | None = None,
    target: str | None = None,
    dequantize: bool = False,
    vocab_by: str = "merge-order",
    drop_reserved: bool = False,
    keep_tokens: Path | str | Sequence[str] | None = None,
    keep_scripts: Sequence[str] = (),
    drop_scripts: Sequence[str] = (),
    criterion: str = DEFAULT_CRITERION,
    min_expert_tokens: int = LEAST_TOKENS,
    expert_criterion: str = DEFAULT_EXPERT_CRITERION,
    data: Text | None = None,
    seed: int | None = None,
    field: str | None = None,
    strict: bool = False,
    to: Path | str | None = None,
    base_model: str | None = None,
    family: str | None = None,
) -> Plan:
    """Choose what to remove and predict the result; no weights are read.

    A size that is not named does not change. Without ``stats`` the plan predicts sizes. Such a plan
    cannot be applied if it removes channels.

    Example:
        >>> plan = surgery.make_plan(model, stats="stats.safetensors", ratio=0.2)
        >>> print(plan.table())

    Args:
        model: From ``open_model``, or what ``open_model`` takes.
        stats: Channel statistics, or their file.
        ratio: Share of all parameters to remove. V' and I' follow by the rule of thumb; a size that
            is given stays, and the others follow.
        vocab_size: V', rows of the embedding to keep.
        intermediate_size: I', channels of each layer to keep.
        widths: Key of config.json → channels to keep, for models with several widths.
        layers: Layers to keep or to merge, such as "0-20,21+22+23,24-29".
        num_hidden_layers: How many layers to keep, those of the largest block influence.
        only: What ``ratio`` is taken from: "vocabulary", "channels", "experts", or "layers" of the
            least block influence; empty is the vocabulary and the channels.
        aim: What the split between vocabulary and channels serves at the ratio: "quality",
            "decode" (fewest bytes read for each decoded token) or "memory".
        num_experts: E', routed experts of each layer to keep.
        multiple_of: What V' and I' must be multiples of; 128 with ``ratio``.
        target: What an engine divides the sizes by, such as "tp=4,group=128".
        dequantize: Whether FP8 weights become bf16, which can be pruned anywhere.
        vocab_by: "merge-order", or "frequency" over ``data``.
        drop_reserved: Whether to remove tokens that are reserved for later use.
        keep_tokens: Tokens or texts whose tokens to keep, or a file of them.
        keep_scripts: Unicode scripts whose tokens to keep.
        drop_scripts: Unicode scripts whose tokens are removed before all others; without a size or
            a ratio, they alone are removed.
        criterion: Importance of a channel: common-act2, act2, abs-act, wanda, l2 or random.
        min_expert_tokens: Fewest tokens that a kept expert must have seen for its channels to be
            ranked.
        expert_criterion: Importance of an expert: reap, man, msan, frequency, gate, aimer (which
            reads the experts' weights) or random.
        data: Text: a path, ``hub:name``, or documents. It shows what a smaller vocabulary costs,
            and "frequency" counts its tokens.
        seed: Shuffles the documents.
        field: Field of a row that holds its document; None means ``text``.
        strict: Refuse the first bad row instead of skipping all of them.
        to: Directory that ``apply_plan`` writes, unless it is given another.
        base_model: Hub id ``org/name`` that the model card names as the base; None is ``model``, if
            that is one.
        family: As for ``open_model``.

    Raises:
        BudgetError: the sizes or the ratio are out of reach.
        StatsError: the statistics belong to another model.
        TokenizerError: the vocabulary cannot be pruned.
    """
    sizes = SizeRequest(
        ratio=ratio,
        vocab_size=vocab_size,
        intermediate_size=intermediate_size,
        widths=widths or {},
        layers=layers,
        num_hidden_layers=num_hidden_layers,
        only=only,
        aim=aim,
        num_experts=num_experts,
        multiple_of=multiple_of,
        target=target,
        dequantize=dequantize,
    )
    vocabulary = VocabularyOptions(vocab_by, drop_reserved, keep_tokens, keep_scripts, drop_scripts)
    channels = ChannelOptions(criterion, min_expert_tokens, expert_criterion=expert_criterion)
    return plan_model(
        as_layout(model, family),
        CutRequest(sizes, vocabulary, channels, base_model),
        ChannelStats.load(stats) if isinstance(stats, str | Path) else stats,
        documents=None
        if data is None
        else TextOptions(sources_of(data), seed=seed, field=field, strict=strict).documents,
        output=None if to is None else Path(to),
    )


Documents = Callable[[], Iterable[str]]
"""Returns the documents of a text, read anew at each call."""


def plan_model(
    layout: Layout,
    request: CutRequest,
    stats: ChannelStats | None = None,
    *,
    documents: Documents | None = None,
    output: Path | None = None,
) -> Plan:
    """Choose the sizes and make the plan, as ``make_plan`` does."""
    influence = stats.block_influence if stats is not None else None
    choice = choose_sizes(layout, request, documents() if documents else None, influence)
    shown = documents() if documents else ()
    return plan_choice(layout, choice, stats, documents=shown, output=output)


def plan_choice(
    layout: Layout,
    choice: SizeChoice,
    stats: ChannelStats | None = None,
    *,
    documents: Iterable[str] = (),
    output: Path | None = None,
) -> Plan:
    """Make a plan with chosen sizes; ``documents`` show what the smaller vocabulary costs."""
    ids, cost = choice.rarity.id_map(choice.sizes.vocab_size), None
    if choice.tokenizer is not None and not ids.identity:
        cost = vocabulary_cost(
            choice.tokenizer,
            choice.rarity,
            choice.sizes.vocab_size,
            choice.request.vocabulary,
            documents,
        )
    plan = plan_cut(layout, choice, stats, cost=cost, output=output)
    # Refuse now what apply would refuse in the files beside the weights.
    check_companions(plan, layout.checkpoint, choice.tokenizer)
    return plan


def apply_plan(  # noqa: PLR0913
    plan: Plan | Path | str,
    *,
    output: Path | str | None = None,
    source: Path | str | None = None,
    resume: bool = False,
    jobs: int = JOBS,
    engine: str = "local",
    checksum: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Stream a plan's source into a new checkpoint directory.

    The directory appears whole at the end, or not at all. Memory is bounded by a window for each
    job, not by the model.

    Example:
        >>> surgery.apply_plan(plan, output="smaller")

    Args:
        plan: A plan, or its file.
        output: Directory to write; None is the plan's own. It must not exist.
        source: The model's directory or hub id; None is the plan's own.
        resume: Whether to continue an interrupted run of the same plan.
        jobs: Shards to write at the same time.
        engine: "local", or "ray": each shard a task on a cluster that shares the file system.
        checksum: Whether to compare each shard with its known SHA-256 before any of it is used.
        progress: Called with "apply", the bytes written so far, and all bytes to write.

    Returns:
        The checkpoint's directory, and what the run took.

    Raises:
        PlanError: the plan names no output, or was made for another source.
        OutputError: the output exists, or cannot be written.
    """
    loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
    directory = Path(output) if output is not None else None
    options = ApplyOptions(directory, resume, jobs, engine, checksum)
    return apply_to(loaded, resolve_source(loaded.source, source), options, progress)


def export_gguf(
    model: Model | str | Path,
    output: Path | str,
    *,
    type: str | None = None,
    pre: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a checkpoint as one GGUF file for llama.cpp (extra ``gguf``).

    The file appears whole at the end, or not at all. Memory is bounded by some windows and the
    tokenizer, not by the model.

    Example:
        >>> surgery.export_gguf("smaller", "smaller.gguf", type="q8_0")

    Args:
        model: The checkpoint, pruned or not: an open model or its directory.
        output: File to write.
        type: What weights become: f32, f16, bf16 or q8_0; None is what most of them are.
        pre: llama.cpp's name for the way that the tokenizer splits text, where nobody knows it. It
            is known where the vocabulary is whole, or where the plan that pruned it has kept it.
        force: Replace a file that is there.
        progress: Called with "export", the bytes written so far, and all bytes to write.

    Returns:
        What was written.

    Raises:
        OptionError: ``type`` or ``pre`` is no such name, or another name of it is known.
        FamilyError: llama.cpp would run the model as another one, or its type is not known.
        TokenizerError: nobody knows ``pre``, or this kind of tokenizer cannot be exported.
        OutputError: the file is there, or cannot be written.
    """
    options = ExportOptions(type, pre, force)
    return export_layout(as_layout(model), Path(output), options, progress)


def removed_tokens(
    plan: Plan | Path | str,
    *,
    source: Path | str | None = None,
    data: Text | None = None,
    field: str | None = None,
    strict: bool = False,
) -> RemovedTokens:
    """List the tokens that a plan removes, by script, the most common first.

    A text is tokenized with the source's tokenizer. Its tokens are counted; then the most common
    ones are those that it has most of.

    Example:
        >>> removed = surgery.removed_tokens("smaller", data="heldout.txt")
        >>> print(removed.table(limit=20))

    Args:
        plan: A plan, its file, or the directory of an output that was made by it.
        source: The source's directory or hub id; None is the plan's own.
        data: Text to count the tokens in: a path, ``hub:name``, or documents.
        field: Field of a row that holds its document; None means ``text``.
        strict: Refuse the first bad row instead of skipping all of them.

    Raises:
        PlanError: there is no plan, or its source is not at hand.
        DataError: the text holds nothing.
    """
    made, layout = plan_and_source(plan, source)
    text = None if data is None else TextOptions(sources_of(data), field=field, strict=strict)
    return removed_by(made, layout, text.documents() if text is not None else None)


def removed_by(plan: Plan, layout: Layout, documents: Iterable[str] | None = None) -> RemovedTokens:
    """List the tokens that ``plan`` removes of its source, and count them in ``documents``."""
    ids = plan.ids()
    if ids.identity:  # of any kind of tokenizer
        return RemovedTokens({}, {})
    tokenizer, counts = open_vocabulary(layout), None
    if documents is not None:
        counts = count_tokens(tokenizer.library(), documents, ids.old_size + ids.rowless)
    return list_removed(tokenizer, ids, counts=counts)


def verify_checkpoint(
    output: Path | str,
    *,
    plan: Plan | Path | str | None = None,
    source: Path | str | None = None,
    download: bool = True,
) -> VerifyReport:
    """Check a checkpoint by its files, and against the plan and the source it was made from.

    Example:
        >>> report = surgery.verify_checkpoint("smaller", plan=plan)
        >>> assert report.ok, report.table()

    Args:
        output: The checkpoint's directory.
        plan: The plan, or its file; None is the file beside the directory, or the plan within.
        source: The source's directory or hub id; None is that of the plan, if it still exists. A
            source that only the plan within names is not looked up.
        download: Whether to download weights of a source on the hub to compare them.

    Raises:
        CheckpointError: the directory is no checkpoint.
        PlanError: the plan is damaged.
    """
    directory = Path(output)
    loaded, found = origin_of(directory, plan, source)
    return verify_files(directory, loaded, found, download=download)


RATIO = 0.2
"""Share of the parameters that a page on a model starts from, where it can be removed."""


def report_subject(
    subject: Plan | Model | Path | str,
    stats: ChannelStats | None = None,
    source: Path | str | None = None,
) -> ReportSubject:
    """Return the cut that a page is about.

    Args:
        subject: A plan, its file, an output's directory, or a model.
        stats: Statistics of the model; the rule of thumb then chooses the cut of a model.
        source: The plan's model, if it has moved.

    Raises:
        PlanError: ``subject`` is a model, and there are no statistics; or the plan's source is not
            at hand.
    """
    path = Path(subject) if isinstance(subject, str | Path) else None
    output = path if path is not None and (path / PROVENANCE_NAME).exists() else None
    if isinstance(subject, Plan) or output is not None or (path is not None and path.is_file()):
        plan, layout = plan_and_source(subject, source)  # type: ignore[arg-type]
        name = str(source) if source is not None else plan.hub_id or layout.checkpoint.source
        file = output / PROVENANCE_NAME if output is not None else path
        return ReportSubject(plan, layout, name, file, output)
    if stats is None:
        raise PlanError(
            subject.name if isinstance(subject, Model) else subject,
            "is a model: nothing says what to remove from it",
            fix="make a plan, for which a ratio such as 0.2 is enough, and name its file; or give "
            "`stats`, which calibrate makes",
        )
    layout = as_layout(subject)
    check_stats(layout, stats)
    try:
        plan = plan_model(layout, CutRequest(SizeRequest(ratio=RATIO)), stats)
    except BudgetError:
        plan = plan_model(layout, CutRequest(SizeRequest(vocab_size=layout.vocab_size)), stats)
    name = subject.name if isinstance(subject, Model) else str(subject)
    return ReportSubject(plan, layout, name, by_rule=True)


def make_report(  # noqa: PLR0913
    subject: Plan | Model | Path | str,
    *,
    stats: ChannelStats | Path | str | None = None,
    data: Text | None = None,
    field: str | None = None,
    strict: bool = False,
    results: Sequence[Path | str] = (),
    source: Path | str | None = None,
) -> Report:
    """Make one page that shows what a cut keeps and loses.

    Example:
        >>> surgery.make_report(plan, stats=stats, data="heldout.txt").save("report.html")

    Args:
        subject: A plan, its file, the directory of an output that was made by it, or a model. Of a
            model, the rule of thumb removes a fifth; the page's sliders choose other sizes.
        stats: Channel statistics of the model, or their file.
        data: Text to show before and after; several ``Source`` are shown one by one.
        field: Field of a row that holds its document; None means ``text``.
        strict: Refuse the first bad row instead of skipping all of them.
        results: Files of what score, search and compare print as JSON.
        source: The plan's model, if it has moved.

    Raises:
        PlanError: there is no plan, or its source is not at hand.
        StatsError: the statistics belong to another model.
        DataError: a text or a file of results cannot be read.
    """
    loaded = ChannelStats.load(stats) if isinstance(stats, str | Path) else stats
    opened = report_subject(subject, loaded, source)
    texts: Texts = {}
    if data is not None:
        options = TextOptions(sources_of(data), field=field, strict=strict)
        texts = read_texts(options, lambda each: each.documents())
    checks = None
    if opened.output is not None:
        where = opened.layout.checkpoint.path
        checks = verify_files(opened.output, opened.plan, where, download=False)
    found = read_results([Path(path) for path in results])
    file = Path(stats) if isinstance(stats, str | Path) else None
    return report_on(opened, ReportSources(loaded, file, texts, checks, found))
