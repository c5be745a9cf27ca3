"""The whole pipeline: calibrate, plan, repair, apply and verify."""

from dataclasses import dataclass
from pathlib import Path

from calib.estimate import over_cap
from calib.statistics.options import CalibrationOptions
from calib.statistics.prepare import (
    documents_or_none,
    prepare_calibration,
    run_calibration,
)
from calib.streaming.settings import ComputeOptions
from calib.study.repair import repair_cost, repair_plan
from calib.study.study import open_study
from surgery.api import plan_choice
from surgery.apply.output_directory import check_output_path
from surgery.apply.run import ApplyOptions, apply_to
from surgery.files.atomic import check_file, check_no_partial
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.planning.replacement import replacement_file
from surgery.planning.request import SizeChoice, choose_sizes
from surgery.process import Progress
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

    @property
    def replaced(self) -> Path:
        """The file that a repair writes."""
        return replacement_file(self.plan)

    @classmethod
    def beside(
        cls, output: Path, model: Path, *, resume: bool = False, force: bool = False
    ) -> "PlanFiles":
        """Return ``DIR.plan.json`` and ``DIR.stats.safetensors`` beside the directory ``output``.

        Raises:
            OutputError: ``output`` cannot be written, or is inside the directory ``model``; or it
                was interrupted, and ``resume`` is not given; or one of the files is there, and
                neither ``force`` nor ``resume`` is given.
        """
        if not (resume and output.is_dir()):
            check_output_path(output, model)
        plan, stats = (output.with_name(output.name + end) for end in (PLAN_END, STATS_END))
        for interrupted in (output, stats):
            check_no_partial(interrupted, resume=resume)
        files = cls(plan, stats, output, resume, force)
        files.check(model)
        return files

    def check(self, model: Path) -> None:
        """Refuse files that cannot be written, are there, or are inside the directory ``model``.

        Raises:
            OutputError: it names the path.
        """
        for path in (self.plan, self.stats, self.replaced):
            if path is not None and path.absolute().parent.is_dir():  # else it is created
                check_file(path, model, force=self.force or self.resume)


PLAN_END, STATS_END = ".plan.json", ".stats.safetensors"


def calibrated_plan(
    layout: Layout,
    choice: SizeChoice,
    text: TextOptions,
    compute: ComputeOptions,
    files: PlanFiles,
    progress: Progress | None = None,
) -> Plan:
    """Calibrate on text as the pruned tokenizer tokenizes it, plan, repair if asked; save all.

    Nothing is calibrated where no channel and no layer is chosen by statistics. What a plan would
    refuse, and a repair that would take too much memory, is refused before the calibration.
    """
    sizes_only = plan_choice(layout, choice, output=files.output)
    repairs = choice.request.channels.repair != "none"
    if repairs and (compute.max_memory, compute.max_gpu_memory) != (None, None):
        needed = repair_cost(sizes_only, open_study(layout, choice, text, compute)).over(compute)
        if needed:
            name, need = next(iter(needed.items()))
            raise over_cap(name, need, compute, "give more, or leave out `repair`")
    files.plan.absolute().parent.mkdir(parents=True, exist_ok=True)
    stats = None
    if choice.needs_statistics(layout):
        options = CalibrationOptions(output=files.stats, resume=files.resume, force=files.force)
        vocab_size = choice.sizes.vocab_size
        made = prepare_calibration(layout, choice.rarity, text, compute, options, vocab_size)
        stats = run_calibration(made, compute, options, progress)
    if stats is not None and choice.request.sizes.ranks_layers:
        documents = documents_or_none(layout, text)
        choice = choose_sizes(layout, choice.request, documents, stats.block_influence)
    shown = documents_or_none(layout, text) or ()
    plan = plan_choice(layout, choice, stats, documents=shown, output=files.output)
    if repairs:
        plan = repair_plan(plan, open_study(layout, choice, text, compute), files.plan, progress)
    plan.save(files.plan)
    return plan


def apply_and_verify(
    plan: Plan, layout: Layout, options: ApplyOptions, progress: Progress | None = None
) -> VerifyReport:
    """Apply a plan to the model of ``layout`` and verify the output's files."""
    path = layout.checkpoint.path
    made = apply_to(plan, path, options, progress)
    return verify_files(made.output, plan, path, download=False, io=options.io)
