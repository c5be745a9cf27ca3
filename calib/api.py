"""The library's functions that run a model, from calibrate to recover and teach."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.pipeline import (
    PlanFiles,
    apply_and_verify,
    calibrated_plan,
    write_page,
)
from calib.recovery.options import RecoverOptions, TeachOptions
from calib.scoring.logits import Equality
from calib.scoring.logits import compare_logits as compare_logits_of
from calib.scoring.score import Score
from calib.scoring.tasks import Answers, Task, measure_models, read_tasks
from calib.statistics.options import CalibrationOptions
from calib.statistics.prepare import (
    choose_before_calibration,
    open_calibration,
    run_calibration,
)
from calib.streaming.settings import ComputeOptions
from calib.study.compare import check_methods, check_ratios, compare_methods, usable_methods
from calib.study.search import SearchResult, search_sizes, search_space
from calib.study.study import open_study
from calib.study.table import Row
from calib.text.chat import documents_of
from surgery.api import Model, as_layout
from surgery.apply.run import ApplyOptions
from surgery.errors import DataError, PlanError
from surgery.files.shard_file import IO
from surgery.planning.plan import Plan
from surgery.planning.request import CutRequest, SizeRequest, allowed_steps, choose_vocabulary
from surgery.process import Progress
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.channels import (
    DEFAULT_CRITERION,
    DEFAULT_EXPERT_CRITERION,
    LEAST_TOKENS,
    ChannelOptions,
)
from surgery.text.documents import Text, TextOptions, sources_of
from surgery.verify.files import VerifyReport, origin_of, plan_at
from surgery.vocabulary.order import VocabularyOptions

if TYPE_CHECKING:
    from calib.recovery.run import Recovered
    from calib.recovery.teach import Taught


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
    compute = _compute(device, dtype, max_memory, max_gpu_memory, spill)
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


def score(  # noqa: PLR0913
    model: Model | str | Path,
    *,
    data: Text,
    samples: int = 256,
    window_bytes: int = 2048,
    seed: int | None = None,
    field: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    family: str | None = None,
    progress: Progress | None = None,
) -> Score:
    """Measure bits per byte on text, one layer in memory at a time.

    Windows are measured in bytes, so that models with different vocabularies can be compared:
    ``Score.change_from`` does it, and says how much of a change may be chance.

    Example:
        >>> before = calib.score(model, data="tools/text/heldout.txt")
        >>> after = calib.score("smaller", data="tools/text/heldout.txt")
        >>> after.change_from(before)

    Args:
        model: From ``surgery.open_model``, or anything that it takes.
        data: The text: a path, ``hub:name``, documents, or several ``Source`` with weights.
        samples: Most windows of text.
        window_bytes: Bytes of a window.
        seed: Seed to shuffle the documents; None keeps their order.
        field: Field of a row that holds the document; None is ``text``, or ``messages``.
        strict: Whether the first bad row is an error; else bad rows are skipped.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
        family: As for ``surgery.open_model``.
        progress: Called with "score", bytes of finished weights, and bytes of all weights.

    Raises:
        DataError: there is no text.
    """
    text = TextOptions(sources_of(data), samples, seed=seed, field=field, strict=strict)
    compute = ComputeOptions(device, dtype)
    layouts = [as_layout(model, family)]
    found = next(measure_models(layouts, text, window_bytes, (), compute, progress)).score
    assert found is not None
    return found


def answer(
    model: Model | str | Path,
    *,
    tasks: Path | str | Sequence[Path | str],
    device: str = "auto",
    dtype: str = "auto",
    family: str | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Let a model answer multiple-choice items, one layer in memory at a time.

    The choice with the largest log-likelihood per byte counts as chosen (``acc_norm``).
    ``Answers.share_of`` compares two models, and says how much of a difference may be chance.

    Example:
        >>> before = calib.answer(model, tasks=["tools/tasks/science.jsonl"])
        >>> after = calib.answer("smaller", tasks=["tools/tasks/science.jsonl"])
        >>> after.share_of(before)

    Args:
        model: From ``surgery.open_model``, or anything that it takes.
        tasks: A file of items, or several: lines of JSON with ``context``, ``choices`` and the
            index ``answer``.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
        family: As for ``surgery.open_model``.
        progress: Called with "score", bytes of finished weights, and bytes of all weights.

    Raises:
        DataError: a file cannot be read, or has a bad item.
    """
    items = _tasks(tasks)
    if not items:
        raise DataError("`tasks`", "are none", fix="name a task file")
    compute, layouts = ComputeOptions(device, dtype), [as_layout(model, family)]
    found = next(measure_models(layouts, None, 0, items, compute, progress)).answers
    assert found is not None
    return found


def search(  # noqa: PLR0913
    model: Model | str | Path,
    *,
    data: Text,
    ratio: float | None = None,
    only: str | Sequence[str] = (),
    aim: str = "quality",
    candidates: str | None = None,
    multiple_of: int | None = None,
    target: str | None = None,
    dequantize: bool = False,
    repair: str = "none",
    samples: int = 256,
    seq_len: int = 2048,
    windows: int = 64,
    seed: int | None = None,
    field: str | None = None,
    strict: bool = False,
    vocab_by: str = "merge-order",
    drop_reserved: bool = False,
    keep_tokens: Path | str | Sequence[str] | None = None,
    keep_scripts: Sequence[str] = (),
    drop_scripts: Sequence[str] = (),
    criterion: str = DEFAULT_CRITERION,
    expert_criterion: str = DEFAULT_EXPERT_CRITERION,
    device: str = "auto",
    dtype: str = "auto",
    spill: Path | str | None = None,
    family: str | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Try several splits between V', I' and, of a mixture, E'; find the one that loses least.

    Every fourth block of the text is held out to judge by. Channels and experts are chosen by the
    rest.

    Example:
        >>> found = calib.search(model, data="tools/text/calibration.txt", ratio=0.2)
        >>> print(found.table())

    Args:
        model: From ``surgery.open_model``, or anything that it takes.
        data: The text: a path, ``hub:name``, documents, or several ``Source`` with weights.
        ratio: Share of all parameters to remove; None with ``candidates``.
        only: What to take the ratio from: some of vocabulary, channels and experts, or layers;
            empty is all that the model has, but layers.
        aim: "decode" or "memory" chooses, of the sizes that lose at most 1 point more than the
            best, those that read fewest bytes for each decoded token, or take fewest in memory.
        candidates: Sizes V:I to try, such as "32768:864,24576:928", instead of those of the ratio;
            of a mixture also V:E:I.
        multiple_of: As for ``surgery.make_plan``.
        target: As for ``surgery.make_plan``.
        dequantize: As for ``surgery.make_plan``.
        repair: "none"; "least-squares" to refit down_proj for all sizes; or "reconstruct" to train
            each FFN, too.
        samples: Most windows of text to choose channels by.
        seq_len: Tokens of such a window.
        windows: Most held-out windows, of 2,048 bytes each.
        seed: Seed to shuffle the documents; None keeps their order.
        field: Field of a row that holds the document; None is ``text``, or ``messages``.
        strict: Whether the first bad row is an error; else bad rows are skipped.
        vocab_by: As for ``surgery.make_plan``.
        drop_reserved: As for ``surgery.make_plan``.
        keep_tokens: As for ``surgery.make_plan``.
        keep_scripts: As for ``surgery.make_plan``.
        drop_scripts: As for ``surgery.make_plan``.
        criterion: Importance of a channel.
        expert_criterion: Importance of a routed expert.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
        spill: Directory for files of hidden states.
        family: As for ``surgery.open_model``.
        progress: Called with "search", finished windows × layers, and the total of a pass.

    Raises:
        BudgetError: no sizes meet the ratio.
        DataError: there is not enough text.
    """
    layout = as_layout(model, family)
    text = TextOptions(sources_of(data), samples, seq_len, windows, seed, field, strict)
    sizes = SizeRequest(
        ratio,
        multiple_of=multiple_of,
        target=target,
        dequantize=dequantize,
        only=only,
        aim=aim,
    )
    order = VocabularyOptions(vocab_by, drop_reserved, keep_tokens, keep_scripts, drop_scripts)
    channels = ChannelOptions(criterion, repair=repair, expert_criterion=expert_criterion)
    request, compute = CutRequest(sizes, order, channels), _compute(device, dtype, spill=spill)
    space = search_space(layout, request, candidates, documents_of(layout, text))
    study = open_study(layout, space.choice, text, compute)
    return search_sizes(study, space, progress)


def compare(  # noqa: PLR0913
    model: Model | str | Path,
    *,
    data: Text,
    ratio: float | Sequence[float],
    methods: Sequence[str] | None = None,
    multiple_of: int | None = None,
    target: str | None = None,
    dequantize: bool = False,
    tasks: Path | str | Sequence[Path | str] = (),
    samples: int = 256,
    seq_len: int = 2048,
    windows: int = 64,
    seed: int | None = None,
    field: str | None = None,
    strict: bool = False,
    vocab_by: str = "merge-order",
    drop_reserved: bool = False,
    keep_tokens: Path | str | Sequence[str] | None = None,
    keep_scripts: Sequence[str] = (),
    drop_scripts: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    spill: Path | str | None = None,
    family: str | None = None,
    progress: Progress | None = None,
) -> Mapping[float, Sequence[Row]]:
    """Compare methods at the same ratios, on the same text and the same held-out windows.

    Example:
        >>> rows = calib.compare(model, data="tools/text/calibration.txt", ratio=0.2,
        ...                      methods=["act2", "search"])
        >>> dense, act2, search = rows[0.2]

    Args:
        model: From ``surgery.open_model``, or anything that it takes.
        data: The text: a path, ``hub:name``, documents, or several ``Source`` with weights.
        ratio: Share of all parameters to remove, or several.
        methods: Some of random, abs-act, act2, wanda, l2, shortgpt, laco, vocabulary, compact,
            prune, search, slicegpt and 2ssp; None is all that the model allows.
        tasks: Files of items for all methods to answer, as for ``answer``.
        multiple_of: As for ``surgery.make_plan``.
        target: As for ``surgery.make_plan``.
        dequantize: As for ``surgery.make_plan``.
        samples: Most windows of text to choose channels by.
        seq_len: Tokens of such a window.
        windows: Most held-out windows, of 2,048 bytes each.
        seed: Seed to shuffle the documents; None keeps their order.
        field: Field of a row that holds the document; None is ``text``, or ``messages``.
        strict: Whether the first bad row is an error; else bad rows are skipped.
        vocab_by: As for ``surgery.make_plan``.
        drop_reserved: As for ``surgery.make_plan``.
        keep_tokens: As for ``surgery.make_plan``.
        keep_scripts: As for ``surgery.make_plan``.
        drop_scripts: As for ``surgery.make_plan``.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
        spill: Directory for files of hidden states.
        family: As for ``surgery.open_model``.
        progress: Called with "compare", finished windows × layers, and the total of a pass.

    Returns:
        Ratio → the dense model's row, then one row for each method.

    Raises:
        BudgetError: there is no ratio, or one that is no share.
        DataError: a method is unknown, or there is not enough text.
    """
    ratios = list(ratio) if isinstance(ratio, Sequence) else [ratio]
    check_ratios(ratios)
    layout = as_layout(model, family)
    names = list(methods) if methods is not None else usable_methods(layout)
    check_methods(layout, names)
    text = TextOptions(sources_of(data), samples, seq_len, windows, seed, field, strict)
    sizes = SizeRequest(ratios[0], multiple_of=multiple_of, target=target, dequantize=dequantize)
    order = VocabularyOptions(vocab_by, drop_reserved, keep_tokens, keep_scripts, drop_scripts)
    compute = _compute(device, dtype, spill=spill)
    documents = documents_of(layout, text)
    choice = choose_vocabulary(layout, CutRequest(sizes, order), documents=documents)
    study = open_study(layout, choice, text, compute, _tasks(tasks))
    return compare_methods(study, allowed_steps(layout, sizes), ratios, names, progress)


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
    io: IO = "mmap",
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
        io: "mmap", or "read" for network file systems.
        base_model: As for ``surgery.make_plan``.
        family: As for ``surgery.open_model``.
        progress: Called with a stage ("calibrate", "repair", "apply"), what is done, and the total.

    Raises:
        SurgeryError: any of the steps fails; then ``output`` does not exist.
    """
    compute = _compute(device, dtype, max_memory, max_gpu_memory, spill)
    applied = ApplyOptions(Path(output), resume, io=io)
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
    where, path = layout.checkpoint.path, Path(output)
    files = PlanFiles.beside(path, where, resume=resume, force=force, report=report)
    choice = choose_before_calibration(layout, asked, text)
    plan, first = calibrated_plan(layout, choice, text, compute, files, progress)
    checks, last = apply_and_verify(plan, layout, applied, progress)
    name = model.name if isinstance(model, Model) else str(model)
    write_page(plan, layout, text, files, name, checks)
    return Pruned(Path(output), plan, checks, {**first, **last})


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


def recover(  # noqa: PLR0913
    model: Model | str | Path,
    *,
    data: Text | None = None,
    output: Path | str,
    tokens: int | None = None,
    minutes: float | None = None,
    method: str = "distill",
    teacher: str | Path | None = None,
    lora: int | None = None,
    only: str | None = None,
    learning_rate: float | None = None,
    batch_size: int = 1,
    seq_len: int = 512,
    windows: int = 16,
    seed: int | None = None,
    field: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    training: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> "Recovered":
    """Train a pruned model back with transformers' Trainer, and write its best state.

    Some of the text is held out. The state that needs the fewest bits for it is written, a
    checkpoint like the model. If none is better than the model, nothing is written.

    Example:
        >>> made = calib.recover("smaller", data="text.txt", output="trained", tokens=100_000)
        >>> print(made.table())

    Args:
        model: The pruned model: a local directory, or what ``surgery.open_model`` returns for it.
        data: The text: a path, ``hub:name``, documents, or several ``Source`` with weights. None
            where ``teacher`` is a directory that ``teach`` wrote, which has the text.
        output: Directory to write. Its plan and the file of trained tensors are written beside it.
        tokens: Tokens to train on; a shorter text is repeated.
        minutes: Time to train, instead of ``tokens``; a first step says how many tokens that are.
        method: "distill": towards the dense model's distribution, renormalized over the kept
            tokens. "continue": as pretraining. "self-data": as pretraining, on text that the dense
            model has written.
        teacher: The dense model, or a directory that ``teach`` wrote; None is the source that the
            model's plan names.
        lora: Rank of adapters that are trained instead of the weights, and merged at the end.
        only: "ffn" trains the FFNs alone.
        learning_rate: Its peak; None is 1e-4, or 1e-3 for adapters.
        batch_size: Windows of a step, on each device.
        seq_len: Tokens of a window.
        windows: Most windows of 2,048 bytes to hold out.
        seed: Shuffles the documents, and the windows of each pass over the text.
        field: Field of a row that holds the document; None is ``text``, or ``messages``.
        strict: Whether the first bad row is an error; else bad rows are skipped.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16: what a step computes in. The weights that are
            trained are float32.
        training: transformers' ``TrainingArguments`` by name, over those that are chosen here.
        resume: Whether to continue an interrupted run of the same request, if there is one.
        progress: Called with "recover", finished tokens, and all tokens.

    Raises:
        BudgetError: the memory is too small, or the request contradicts itself.
        TrainingError: a library is missing, or the teacher is not known.
        PlanError: the teacher has another vocabulary.
    """
    from calib.recovery.run import Recovery

    sources = () if data is None else sources_of(data)
    text = TextOptions(
        sources, seq_len=seq_len, windows=windows, seed=seed, field=field, strict=strict
    )
    options = RecoverOptions(
        Path(output),
        tokens=tokens,
        minutes=minutes,
        method=method,
        teacher=None if teacher is None else str(teacher),
        lora=lora,
        only=only,
        learning_rate=learning_rate,
        batch_size=batch_size,
        resume=resume,
        training=training or {},
    )
    return Recovery(as_layout(model), text, ComputeOptions(device, dtype), options).run(progress)


def teach(  # noqa: PLR0913
    model: Model | str | Path,
    *,
    plan: Plan | Path | str,
    data: Text,
    output: Path | str,
    tokens: int,
    top_k: int = 64,
    precision: str = "float16",
    seq_len: int = 512,
    windows: int = 16,
    seed: int | None = None,
    field: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
) -> "Taught":
    """Write the likeliest tokens that a dense model predicts, one layer in memory at a time.

    The text is tokenized as the pruned model will tokenize it, and only kept tokens are predicted.

    Example:
        >>> calib.teach(model, plan=plan, data="text.txt", output="teacher", tokens=100_000)
        >>> calib.recover("smaller", teacher="teacher", output="trained", tokens=100_000)

    Args:
        model: The dense model: from ``surgery.open_model``, or anything that it takes.
        plan: The plan of the pruned model, its file, or the pruned model's directory.
        data: The text: a path, ``hub:name``, documents, or several ``Source`` with weights.
        output: Directory to write; it must not exist.
        tokens: Tokens of text.
        top_k: Likeliest kept tokens of each position.
        precision: Of the log-probabilities: float16 or float32.
        seq_len: Tokens of a window.
        windows: Most windows of 2,048 bytes to hold out, for ``recover`` to judge by.
        seed: Shuffles the documents.
        field: Field of a row that holds the document; None is ``text``, or ``messages``.
        strict: Whether the first bad row is an error; else bad rows are skipped.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
        resume: Whether to continue an interrupted run of the same request, if there is one.
        progress: Called with "teach", finished tokens, and all tokens.

    Raises:
        PlanError: the plan was made for another vocabulary.
        OutputError: the output exists, or was begun with other options.
    """
    from calib.recovery.teach import Teaching

    text = TextOptions(
        sources_of(data), seq_len=seq_len, windows=windows, seed=seed, field=field, strict=strict
    )
    made = plan if isinstance(plan, Plan) else plan_at(plan)
    options = TeachOptions(Path(output), tokens, top_k, precision, resume)
    return Teaching(as_layout(model), made, text, _compute(device, dtype), options).run(progress)


def compare_logits(
    output: Path | str,
    *,
    plan: Plan | Path | str | None = None,
    source: Path | str | None = None,
    device: str = "auto",
) -> Equality:
    """Compare a pruned model's logits with those of the dense model with the same channels masked.

    Example:
        >>> assert calib.compare_logits("smaller", plan=plan).ok

    Args:
        output: The pruned model's directory.
        plan: The plan, or its file; None is the file beside the directory, or the plan within.
        source: The source's directory or hub id; None is that of the plan. A source that only the
            plan within names is not looked up.
        device: auto, cpu, cuda or mps.

    Raises:
        PlanError: there is no plan, or its source does not exist any more.
    """
    directory = Path(output)
    loaded, found = origin_of(directory, plan, source)
    if loaded is None:
        raise PlanError(directory, "has no plan to compare by", fix="give `plan`")
    if found is None:
        raise PlanError(
            directory, "its source is not at hand", found=loaded.source, fix="give `source`"
        )
    return compare_logits_of(loaded, found, directory, device)


def _tasks(files: Path | str | Sequence[Path | str]) -> list[Task]:
    return read_tasks([files] if isinstance(files, str | Path) else list(files))


def _compute(
    device: str,
    dtype: str,
    max_memory: int | None = None,
    max_gpu_memory: int | None = None,
    spill: Path | str | None = None,
) -> ComputeOptions:
    directory = Path(spill) if spill is not None else None
    return ComputeOptions(device, dtype, max_memory, max_gpu_memory, directory)
