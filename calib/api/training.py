"""Train a pruned model back: recover, and teach for a teacher that does not fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.recovery.options import RecoverOptions, TeachOptions
from calib.streaming.settings import compute_options
from surgery.api import Model, as_layout
from surgery.planning.plan import Plan
from surgery.process import Progress
from surgery.text.documents import Text, TextOptions, sources_of
from surgery.verify.files import plan_at

if TYPE_CHECKING:
    from calib.recovery.teach import Taught
    from calib.recovery.written import Recovered


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
    return Recovery(as_layout(model), text, compute_options(device, dtype), options).run(progress)


def teach(  # noqa: PLR0913
    model: Model | str | Path,
    *,
    plan: Plan | Path | str | Sequence[Plan | Path | str],
    data: Text,
    output: Path | str | Sequence[Path | str],
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
        plan: The plan of the pruned model, its file, or the pruned model's directory. Several
            vocabularies are taught in one pass.
        data: The text: a path, ``hub:name``, documents, or several ``Source`` with weights.
        output: Directory to write, which must not exist; one for each plan, in their order.
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
    given = [plan] if isinstance(plan, Plan | Path | str) else plan
    plans = [each if isinstance(each, Plan) else plan_at(each) for each in given]
    names = [output] if isinstance(output, Path | str) else output
    options = TeachOptions(tuple(map(Path, names)), tokens, top_k, precision, resume)
    teaching = Teaching(as_layout(model), plans, text, compute_options(device, dtype), options)
    return teaching.run(progress)
