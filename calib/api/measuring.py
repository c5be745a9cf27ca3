"""What a model predicts and answers, and which of several cuts loses least."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from calib.scoring.answers import Answers
from calib.scoring.logits import Equality
from calib.scoring.logits import compare_logits as compare_logits_of
from calib.scoring.score import Score
from calib.scoring.tasks import measure_models, read_tasks
from calib.streaming.settings import compute_options
from calib.study.compare import (
    Comparison,
    check_methods,
    check_ratios,
    compare_methods,
    usable_methods,
)
from calib.study.kept_rows import check_kept
from calib.study.search import MOST, SearchResult, search_sizes, search_space
from calib.study.study import open_study
from calib.study.table import Row
from calib.text.chat import documents_of
from surgery.api import Model, as_layout
from surgery.errors import DataError, PlanError
from surgery.planning.choice import choose_vocabulary
from surgery.planning.plan import Plan
from surgery.planning.request import CutRequest, SizeRequest, allowed_steps
from surgery.process import Progress
from surgery.stats.channels import DEFAULT_CRITERION, DEFAULT_EXPERT_CRITERION, ChannelOptions
from surgery.text.documents import Text, TextOptions, sources_of
from surgery.verify.files import origin_of
from surgery.vocabulary.order import VocabularyOptions


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
    compute = compute_options(device, dtype)
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
    items = read_tasks(_paths(tasks))
    if not items:
        raise DataError("`tasks`", "are none", fix="name a task file")
    compute, layouts = compute_options(device, dtype), [as_layout(model, family)]
    found = next(measure_models(layouts, None, 0, items, compute, progress)).answers
    assert found is not None
    return found


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
        tasks: Files of items for all sizes to answer, as for ``answer``. They choose nothing.
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
    request, compute = (
        CutRequest(sizes, order, channels),
        compute_options(device, dtype, spill=spill),
    )
    space = search_space(layout, request, candidates, documents_of(layout, text))
    study = open_study(layout, space.choice, text, compute, read_tasks(_paths(tasks)))
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
    tries: int = MOST,
    keep: Path | str | None = None,
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
        tries: Most pairs that ``compact`` and ``search`` try at a ratio; 1 is the rule of thumb's.
        keep: File for the rows, as they are made; those that it has are not made again.
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
        DataError: a method is unknown, there is not enough text, or ``keep`` holds other rows.
    """
    ratios = list(ratio) if isinstance(ratio, Sequence) else [ratio]
    check_ratios(ratios)
    layout = as_layout(model, family)
    names = list(methods) if methods is not None else usable_methods(layout)
    check_methods(layout, names)
    text = TextOptions(sources_of(data), samples, seq_len, windows, seed, field, strict)
    sizes = SizeRequest(ratios[0], multiple_of=multiple_of, target=target, dequantize=dequantize)
    order = VocabularyOptions(vocab_by, drop_reserved, keep_tokens, keep_scripts, drop_scripts)
    compute = compute_options(device, dtype, spill=spill)
    file, items = Path(keep) if keep is not None else None, _paths(tasks)
    check_kept(file, [layout.checkpoint.path, *text.files, *items, *order.files])
    documents = documents_of(layout, text)
    choice = choose_vocabulary(layout, CutRequest(sizes, order), documents=documents)
    study = open_study(layout, choice, text, compute, read_tasks(items))
    asked = Comparison(ratios, names, tries, file)
    return compare_methods(study, allowed_steps(layout, sizes), asked, progress)


def _paths(files: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(each) for each in ([files] if isinstance(files, str | Path) else files)]
