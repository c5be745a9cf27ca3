"""From text to a pruned checkpoint: read documents, calibrate, prune."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.pipeline import (
    PlanFiles,
    apply_and_verify,
    calibrated_plan,
    write_page,
)
from calib.statistics.options import CalibrationOptions
from calib.statistics.prepare import (
    choose_before_calibration,
    open_calibration,
    run_calibration,
)
from calib.streaming.settings import compute_options
from calib.text.chat import documents_of
from surgery.api import Model, as_layout
from surgery.apply.run import ApplyOptions
from surgery.planning.plan import Plan
from surgery.planning.request import CutRequest, SizeRequest
from surgery.process import Progress
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.channels import (
    DEFAULT_CRITERION,
    DEFAULT_EXPERT_CRITERION,
    LEAST_TOKENS,
    ChannelOptions,
)
from surgery.text.documents import Text, TextOptions, sources_of
from surgery.verify.files import VerifyReport
from surgery.vocabulary.order import VocabularyOptions


def read_documents(
    model: Model | str | Path,
    data: Text,
    *,
    seed: int | None = None,
    field: str | None = None,
    strict: bool = False,
) -> Iterable[str]:
    """Read a text as the commands do: chats become text by the model's own chat template.

    Example:
        >>> documents = calib.read_documents(model, "chats.jsonl")
        >>> plan = surgery.make_plan(model, stats=stats, ratio=0.2, data=documents)

    Args:
        model: From ``surgery.open_model``, or what that takes.
        data: A path, ``hub:name``, documents, or several ``surgery.Source`` with weights.
        seed: Shuffles the documents.
        field: Field of a row that holds its document; None means ``text``, or else ``messages``.
        strict: Refuse the first bad row instead of skipping all of them.

    Raises:
        DataError: there is no text, or the model has no chat template and the text needs one.
    """
    text = TextOptions(sources_of(data), seed=seed, field=field, strict=strict)
    return documents_of(as_layout(model), text)


def calibrate(  # noqa: PLR0913
    model: Model | str | Path,
    *,
    data: Text,
    samples: int = 256,
    seq_len: int = 2048,
    seed: int | None = None,
    field: str | None = None,
    strict: bool = False,
    ratio: float | None = None,
    vocab_size: int | None = None,
    intermediate_size: int | None = None,
    widths: Mapping[str, int] | None = None,
    layers: str | None = None,
    num_hidden_layers: int | None = None,
    only: str | Sequence[str] = (),
    aim: str = "quality",
    multiple_of: int | None = None,
    target: str | None = None,
    dequantize: bool = False,
    vocab_sizes: Sequence[int] | str | None = None,
    vocab_by: str = "merge-order",
    drop_reserved: bool = False,
    keep_tokens: Path | str | Sequence[str] | None = None,
    keep_scripts: Sequence[str] = (),
    drop_scripts: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    max_memory: int | None = None,
    max_gpu_memory: int | None = None,
    spill: Path | str | None = None,
    part: str | None = None,
    engine: str = "local",
    parts: int | None = None,
    output: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    family: str | None = None,
    progress: Progress | None = None,
) -> ChannelStats:
    """Sum squared FFN activations over text, one layer in memory at a time (paper eq. 4 and 5).

    With sizes, or a ratio that they follow from, the text is tokenized as the pruned model will
    tokenize it. The statistics are then exact for a plan with the same sizes.

    Example:
        >>> stats = calib.calibrate(model, data="tools/text/calibration.txt", samples=32, ratio=0.2)

    Args:
        model: From ``surgery.open_model``, or anything that it takes.
        data: The text: a path, ``hub:name``, documents, or several ``Source`` with weights.
        samples: Most windows of text.
        seq_len: Tokens of a window.
        seed: Seed to shuffle the documents; None keeps their order.
        field: Field of a row that holds the document; None is ``text``, or ``messages``.
        strict: Whether the first bad row is an error; else bad rows are skipped.
        ratio: As for ``surgery.make_plan``.
        vocab_size: As for ``surgery.make_plan``.
        intermediate_size: As for ``surgery.make_plan``.
        widths: As for ``surgery.make_plan``.
        layers: As for ``surgery.make_plan``.
        num_hidden_layers: As for ``surgery.make_plan``.
        only: As for ``surgery.make_plan``.
        aim: As for ``surgery.make_plan``.
        multiple_of: As for ``surgery.make_plan``.
        target: As for ``surgery.make_plan``.
        dequantize: As for ``surgery.make_plan``.
        vocab_sizes: Sizes V' for which the statistics are to be exact.
        vocab_by: As for ``surgery.make_plan``.
        drop_reserved: As for ``surgery.make_plan``.
        keep_tokens: As for ``surgery.make_plan``.
        keep_scripts: As for ``surgery.make_plan``.
        drop_scripts: As for ``surgery.make_plan``.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
        max_memory: Cap on the memory of this process, in bytes.
        max_gpu_memory: Cap on the memory used on the device, in bytes.
        spill: Directory for files of hidden states.
        part: Use only some windows, such as "2/4"; ``surgery.merge_stats`` adds the parts.
        engine: "local", or "ray": tasks on a cluster whose nodes share the file system.
        parts: Number of Ray tasks; None is one for each node or GPU.
        output: File for the statistics. The directory to resume a killed run from is beside it.
        resume: Whether to continue an interrupted run, if there is one.
        force: Whether to replace an output that is there.
        family: As for ``surgery.open_model``.
        progress: Called with "calibrate", bytes of finished weights, and bytes of all weights.

    Raises:
        BudgetError: a cap on memory cannot be kept.
        DataError: there is no text.
        OutputError: there is an interrupted run, or the run to resume had other options.
    """
    layout = as_layout(model, family)
    text = TextOptions(sources_of(data), samples, seq_len, seed=seed, field=field, strict=strict)
    compute = compute_options(device, dtype, max_memory, max_gpu_memory, spill)
    path = Path(output) if output is not None else None
    exact = vocab_sizes
    if exact is not None and not isinstance(exact, str):
        exact = ",".join(map(str, exact))
    sizes = SizeRequest(
        ratio=ratio,
        vocab_size=vocab_size,
        intermediate_size=intermediate_size,
        widths=widths or {},
        layers=layers,
        num_hidden_layers=num_hidden_layers,
        only=only,
        aim=aim,
        multiple_of=multiple_of,
        target=target,
        dequantize=dequantize,
    )
    order = VocabularyOptions(vocab_by, drop_reserved, keep_tokens, keep_scripts, drop_scripts)
    options = CalibrationOptions(sizes, exact, part, engine, parts, path, resume, order, force)
    made = open_calibration(layout, text, compute, options)
    return run_calibration(made, compute, options, progress)


@dataclass(frozen=True)
class Pruned:
    """The result of ``prune``: a checkpoint, its plan, and the report of its checks."""

    output: Path
    plan: Plan
    report: VerifyReport
    seconds: Mapping[str, float]
    """Of each stage: "calibrate", "plan", "repair", "apply", "verify"."""

    @property
    def ok(self) -> bool:
        """Whether the checks found no fault."""
        return self.report.ok


def prune(  # noqa: PLR0913
    model: Model | str | Path,
    *,
    data: Text | None = None,
    output: Path | str,
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
    samples: int = 256,
    seq_len: int = 2048,
    seed: int | None = None,
    field: str | None = None,
    strict: bool = False,
    vocab_by: str = "merge-order",
    drop_reserved: bool = False,
    keep_tokens: Path | str | Sequence[str] | None = None,
    keep_scripts: Sequence[str] = (),
    drop_scripts: Sequence[str] = (),
    criterion: str = DEFAULT_CRITERION,
    min_expert_tokens: int = LEAST_TOKENS,
    expert_criterion: str = DEFAULT_EXPERT_CRITERION,
    repair: str = "none",
    device: str = "auto",
    dtype: str = "auto",
    max_memory: int | None = None,
    max_gpu_memory: int | None = None,
    spill: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    report: bool = False,
    base_model: str | None = None,
    family: str | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Calibrate, plan, apply and verify in one call.

    The statistics and the plan are kept beside the output, as ``OUTPUT.stats.safetensors`` and
    ``OUTPUT.plan.json``.

    Example:
        >>> made = calib.prune(model, data="tools/text/calibration.txt", ratio=0.2,
        ...                    output="smaller")
        >>> assert made.ok, made.report.table()

    Args:
        model: From ``surgery.open_model``, or anything that it takes.
        data: The text: a path, ``hub:name``, documents, or several ``Source`` with weights. None
            where nothing is chosen by a text.
        output: Directory to write; it must not exist.
        ratio: As for ``surgery.make_plan``.
        vocab_size: As for ``surgery.make_plan``.
        intermediate_size: As for ``surgery.make_plan``.
        widths: As for ``surgery.make_plan``.
        layers: As for ``surgery.make_plan``.
        num_hidden_layers: As for ``surgery.make_plan``.
        only: As for ``surgery.make_plan``.
        aim: As for ``surgery.make_plan``.
        num_experts: As for ``surgery.make_plan``.
        multiple_of: As for ``surgery.make_plan``.
        target: As for ``surgery.make_plan``.
        dequantize: As for ``surgery.make_plan``.
        samples: Most windows of text.
        seq_len: Tokens of a window.
        seed: Seed to shuffle the documents; None keeps their order.
        field: Field of a row that holds the document; None is ``text``, or ``messages``.
        strict: Whether the first bad row is an error; else bad rows are skipped.
        vocab_by: As for ``surgery.make_plan``.
        drop_reserved: As for ``surgery.make_plan``.
        keep_tokens: As for ``surgery.make_plan``.
        keep_scripts: As for ``surgery.make_plan``.
        drop_scripts: As for ``surgery.make_plan``.
        criterion: As for ``surgery.make_plan``.
        min_expert_tokens: As for ``surgery.make_plan``.
        expert_criterion: As for ``surgery.make_plan``.
        repair: "none"; "least-squares" to refit down_proj if held-out text confirms it; or
            "reconstruct" to train each FFN, too.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
        max_memory: As for ``calibrate``.
        max_gpu_memory: As for ``calibrate``.
        spill: As for ``calibrate``.
        resume: Whether to continue what a killed run of the same call left, if anything.
        force: Whether to replace a plan and statistics that are there; never the output.
        report: Whether to write ``OUTPUT.report.html`` also, a page that shows the cut.
        base_model: As for ``surgery.make_plan``.
        family: As for ``surgery.open_model``.
        progress: Called with a stage ("calibrate", "repair", "apply"), what is done, and the total.

    Raises:
        SurgeryError: any of the steps fails; then ``output`` does not exist.
    """
    compute = compute_options(device, dtype, max_memory, max_gpu_memory, spill)
    applied = ApplyOptions(Path(output), resume)
    layout = as_layout(model, family)
    sources = sources_of(data) if data is not None else ()
    text = TextOptions(sources, samples, seq_len, seed=seed, field=field, strict=strict)
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
    order = VocabularyOptions(vocab_by, drop_reserved, keep_tokens, keep_scripts, drop_scripts)
    channels = ChannelOptions(criterion, min_expert_tokens, repair, expert_criterion)
    asked = CutRequest(sizes, order, channels, base_model)
    read = [layout.checkpoint.path, *text.files, *order.files]
    files = PlanFiles.beside(Path(output), read, resume=resume, force=force, report=report)
    choice = choose_before_calibration(layout, asked, text)
    plan, first = calibrated_plan(layout, choice, text, compute, files, progress)
    checks, last = apply_and_verify(plan, layout, applied, progress)
    name = model.name if isinstance(model, Model) else str(model)
    write_page(plan, layout, text, files, name, checks)
    return Pruned(Path(output), plan, checks, {**first, **last})
