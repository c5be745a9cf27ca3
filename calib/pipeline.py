"""The whole pipeline: calibrate, plan, repair, apply and verify."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from calib.estimate import BASE_BYTES, MB, Prediction, over_cap
from calib.statistics.calibrate import Calibration
from calib.statistics.options import CalibrationOptions
from calib.statistics.prepare import documents_or_none, prepare_calibration, run_calibration
from calib.streaming.empty_model import shape_faults
from calib.streaming.settings import ComputeOptions
from calib.study.repair import open_repair, repair_cost, repair_plan, repair_tokens
from calib.study.study import Study
from calib.text.chat import documents_of
from surgery.api import plan_choice
from surgery.apply.companions import pruned_config
from surgery.apply.cost import PROGRAM_BYTES
from surgery.apply.edits import edits
from surgery.apply.output_directory import check_output_path
from surgery.apply.run import ApplyForecast, ApplyOptions, apply_to, forecast_apply
from surgery.errors import CheckpointError
from surgery.files.atomic import check_file, check_no_partial
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice, choose_sizes
from surgery.planning.plan import Plan
from surgery.planning.replacement import replacement_file
from surgery.process import Progress, Seconds, Stopwatch, spoken_range
from surgery.report.page import ReportSources, ReportSubject, report_on
from surgery.report.passages import read_texts
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.channels import RANDOM, RECONSTRUCT, ChannelOptions, too_few_tokens
from surgery.text.documents import TextOptions
from surgery.verify.files import VerifyReport, verify_files


@dataclass(frozen=True)
class PlanFiles:
    """The files that a plan and its statistics are written to."""

    plan: Path
    stats: Path | None = None
    """None writes no statistics."""
    output: Path | None = None
    """Output directory that the plan names."""
    resume: bool = False
    """Whether to continue what a killed run left, if it left anything."""
    force: bool = False
    """Whether to replace files that are there."""
    page: Path | None = None
    """File of a page on the cut; None writes none."""

    @classmethod
    def beside(
        cls,
        output: Path,
        read: Collection[Path],
        *,
        resume: bool = False,
        force: bool = False,
        report: bool = False,
    ) -> "PlanFiles":
        """Return ``DIR.plan.json`` and ``DIR.stats.safetensors`` beside the directory ``output``.

        With ``report``, also ``DIR.report.html``. ``read`` is as for ``check``.

        Raises:
            OutputError: ``output`` cannot be written, or is inside what is read; or it was
                interrupted, and ``resume`` is not given; or one of the files is there, and neither
                ``force`` nor ``resume`` is given; or it is one of those that are read.
        """
        if not (resume and output.name and output.is_dir()):  # "." has no name
            check_output_path(output, read)
        ends = (PLAN_END, STATS_END, PAGE_END)
        plan, stats, page = (output.with_name(output.name + end) for end in ends)
        for interrupted in (output, stats):
            check_no_partial(interrupted, resume=resume)
        files = cls(plan, stats, output, resume, force, page if report else None)
        files.check(read)
        return files

    def check(self, read: Collection[Path]) -> None:
        """Refuse files that cannot be written, or are there; ``read`` is as for ``check_file``.

        Raises:
            OutputError: it names the path.
        """
        for path in (self.plan, self.stats, replacement_file(self.plan), self.page):
            if path is not None and path.absolute().parent.is_dir():  # else it is created
                check_file(path, read, force=self.force or self.resume)


PLAN_END, STATS_END, PAGE_END = ".plan.json", ".stats.safetensors", ".report.html"


@dataclass(frozen=True)
class PruneForecast:
    """What a ``prune`` would make and take."""

    plan: Plan
    """With the sizes of the result. Which channels are kept is not known yet."""
    calibration: Calibration | None
    """None where no channels are chosen."""
    calibration_seconds: Seconds | None
    repair: Prediction | None
    repair_seconds: Seconds | None
    apply: ApplyForecast
    ranks_layers: bool
    """Whether the calibration will choose the layers."""

    def table(self) -> str:
        """Return what each stage takes, as text for people."""
        lines = []
        made = self.calibration
        if made is not None:
            lines.append(f"text: {len(made.windows):,} windows, {made.tokens:,} tokens")
            if self.plan.after.widths != self.plan.before.widths:
                lines += [f"note: {few}" for few in [too_few_tokens(made.tokens)] if few]
        if self.ranks_layers:
            lines.append("note: how many layers are kept is certain; calibration says which")
        heads = ("time", "peak memory", "disk", "read", "written")
        lines.append(" " * 12 + "".join(f"{head:>16}" for head in heads))
        rows: list[tuple[str, Seconds | None, Sequence[int]]] = []
        if made is not None:
            need = made.prediction()
            sizes = (need.peak_memory, need.disk, need.read, need.written)
            rows.append(("calibrate", self.calibration_seconds, sizes))
        if self.repair is not None:
            rows.append(("repair", self.repair_seconds, (self.repair.peak_memory,)))
        cost = self.apply.cost
        memory = BASE_BYTES + cost.memory_bytes - PROGRAM_BYTES  # torch is loaded already
        sizes = (memory, cost.disk_bytes, cost.read_bytes, cost.written_bytes)
        rows.append(("apply", self.apply.seconds, sizes))
        for name, seconds, nbytes in rows:
            cells = [spoken_range(seconds) if seconds else "not estimated"]
            cells += [f"{size / MB:,.0f} MB" for size in nbytes]
            lines.append(f"{name:<12}" + "".join(f"{cell:>16}" for cell in cells))
        lines.append(f"free on the disk of the output: {self.apply.free_bytes / MB:,.0f} MB")
        lines.append("disk: what a stage needs at its peak; calibrate frees its part at its end")
        return "\n".join(lines)


def forecast_prune(
    layout: Layout,
    choice: SizeChoice,
    text: TextOptions,
    compute: ComputeOptions,
    files: PlanFiles,
    options: ApplyOptions,
) -> PruneForecast:
    """Check what ``prune`` checks before it works, and predict what it takes; write nothing.

    Channels and experts at random stand for those that statistics will choose: any take as much.
    A few windows pass through one layer to estimate the time of the calibration.
    """
    shown = documents_or_none(layout, text) or ()
    channels = replace(choice.request.channels, criterion=RANDOM, expert_criterion=RANDOM)
    chosen = _with_channels(choice, channels)
    plan = plan_choice(layout, chosen, documents=shown, output=files.output)
    made, pace, repair, repair_seconds = None, None, None, None
    if choice.needs_statistics(layout):
        asked, vocab_size = CalibrationOptions(output=files.stats), choice.sizes.vocab_size
        made = prepare_calibration(layout, choice.rarity, text, compute, asked, vocab_size)
        pace = made.pace()
    if choice.request.channels.repair != "none":
        study = open_repair(layout, choice, text, compute)
        trains = choice.request.channels.repair == RECONSTRUCT
        repair = _repair_within_caps(plan, study, compute, trains)
        if pace is not None:
            low, high = pace.seconds(repair, repair_tokens(plan, study, trains=trains))
            repair_seconds = low, high * REFITTING
    applied = forecast_apply(plan, layout.checkpoint.path, options)
    seconds = pace.seconds(made.prediction(), made.tokens) if made and pace else None
    ranks = choice.request.sizes.ranks_layers
    return PruneForecast(plan, made, seconds, repair, repair_seconds, applied, ranks)


def _with_channels(choice: SizeChoice, channels: ChannelOptions) -> SizeChoice:
    """Return the choice of the same sizes, whose channels and experts are chosen otherwise."""
    return replace(choice, request=replace(choice.request, channels=channels))


REFITTING = 2
"""How many times as long as its passes a repair takes at most: layers are run once more to be
refitted, and their equations are solved."""


def calibrated_plan(
    layout: Layout,
    choice: SizeChoice,
    text: TextOptions,
    compute: ComputeOptions,
    files: PlanFiles,
    progress: Progress | None = None,
) -> tuple[Plan, dict[str, float]]:
    """Calibrate on text as the pruned tokenizer tokenizes it, plan, repair if asked; save all.

    Nothing is calibrated where no channel and no layer is chosen by statistics. What a plan would
    refuse, and a repair that would take too much memory, is refused before the calibration.

    Returns the plan, and the seconds of each stage.
    """
    watch = Stopwatch()
    channels = replace(choice.request.channels, expert_criterion=RANDOM)  # aimer reads weights
    sizes_only = plan_choice(layout, _with_channels(choice, channels), output=files.output)
    repairs = choice.request.channels.repair != "none"
    trains = choice.request.channels.repair == RECONSTRUCT
    if repairs and (compute.max_memory, compute.max_gpu_memory) != (None, None):
        study = open_repair(layout, choice, text, compute)
        _repair_within_caps(sizes_only, study, compute, trains)
    files.plan.absolute().parent.mkdir(parents=True, exist_ok=True)
    stats = None
    if choice.needs_statistics(layout):
        options = CalibrationOptions(output=files.stats, resume=files.resume, force=files.force)
        vocab_size = choice.sizes.vocab_size
        with watch.timed("calibrate"):
            made = prepare_calibration(layout, choice.rarity, text, compute, options, vocab_size)
            stats = run_calibration(made, compute, options, progress)
    if stats is not None and choice.request.sizes.ranks_layers:
        documents = documents_or_none(layout, text)
        choice = choose_sizes(layout, choice.request, documents, stats.block_influence)
    shown = documents_or_none(layout, text) or ()
    with watch.timed("plan"):
        plan = plan_choice(layout, choice, stats, documents=shown, output=files.output)
    if repairs:
        with watch.timed("repair"):
            study = open_repair(layout, choice, text, compute)
            plan = repair_plan(plan, study, files.plan, progress, trains=trains)
    plan.save(files.plan)
    return plan, watch.seconds


def _repair_within_caps(
    plan: Plan, study: Study, compute: ComputeOptions, trains: bool
) -> Prediction:
    """Predict what a repair takes, and refuse one that does not keep the caps."""
    made = repair_cost(plan, study, trains=trains)
    for name, need in made.over(compute).items():
        raise over_cap(name, need, compute, "give more, or leave out `repair`")
    return made


def check_output(plan: Plan, layout: Layout) -> None:
    """Build the model of the output's config.json without weights, and compare every shape.

    Raises:
        CheckpointError: transformers would not load the output of ``plan``.
    """
    config = json.loads(pruned_config(plan, layout.checkpoint))
    shapes = {tensor.name: tensor.shape for made in edits(plan, layout).values() for tensor in made}
    faults = shape_faults(config, shapes, plan.family)
    if faults:
        raise CheckpointError(
            layout.checkpoint.path,
            "transformers would not load the output, so that nothing is written",
            found=faults[0],
            fix="its entry in the table of families may be wrong: report it",
        )


def apply_and_verify(
    plan: Plan, layout: Layout, options: ApplyOptions, progress: Progress | None = None
) -> tuple[VerifyReport, dict[str, float]]:
    """Apply a plan to the model of ``layout`` and verify the output's files.

    Returns the report, and the seconds of each stage.
    """
    path, watch = layout.checkpoint.path, Stopwatch()
    check_output(plan, layout)
    with watch.timed("apply"):
        made = apply_to(plan, path, options, progress)
    with watch.timed("verify"):
        report = verify_files(made.output, plan, path, download=False)
    return report, watch.seconds


def write_page(
    plan: Plan,
    layout: Layout,
    text: TextOptions,
    files: PlanFiles,
    model: str,
    checks: VerifyReport,
) -> None:
    """Write the page on a cut that ``files`` names, if it names one.

    Args:
        plan: The cut.
        layout: The model that it was made from.
        text: What the page shows before and after.
        files: Files beside the output.
        model: The model, as a command names it.
        checks: What verify said of the output.
    """
    if files.page is None:
        return
    stats = None
    if plan.provenance.text_digest is not None and files.stats is not None:
        stats = ChannelStats.load(files.stats)
    texts = read_texts(text, partial(documents_of, layout))
    subject = ReportSubject(plan, layout, model, files.plan, files.output)
    report_on(subject, ReportSources(stats, files.stats, texts, checks)).save(files.page)
