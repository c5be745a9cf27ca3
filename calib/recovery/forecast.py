"""Predict the memory of a training from headers, and its time from a first step."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch

from calib.estimate import BASE_BYTES, MB, ROW_BYTES
from calib.recovery.options import EVALUATIONS
from surgery.errors import BudgetError
from surgery.layout.layout import Layout
from surgery.process import Seconds, spoken_range, with_slack

TRAINING_BYTES = 250 * MB
"""accelerate and what Trainer imports; measured on tiny models."""
LOGIT_COPIES = 6
"""Values of float32 for each logit of a batch: the student's and the teacher's, their log-softmax,
a product and a gradient; measured."""
WIDTH_COPIES, CHANNEL_COPIES = 16, 5
"""Values that a layer keeps of each token for the backward pass, times D and times I."""
STATE_COPIES = 4
"""Weight, gradient and AdamW's two averages, for each parameter that is trained."""


@dataclass(frozen=True)
class Forecast:
    """What a training takes."""

    steps: int
    tokens: int
    """Of all steps."""
    memory: Mapping[str, int]
    """Parts of the peak memory in bytes, on the device that trains."""
    seconds: Seconds | None = None
    """Estimated from a first step; None where none was made."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.memory.values())

    def table(self) -> str:
        """Return the figures as lines for people."""
        took = "not estimated" if self.seconds is None else spoken_range(self.seconds)
        lines = [f"{self.steps:,} steps, {self.tokens:,} tokens, {took}"]
        lines.append(f"{'peak memory':<26}{self.peak / MB:>12,.0f} MB")
        lines += [f"  {name:<24}{size / MB:>12,.0f} MB" for name, size in self.memory.items()]
        return "\n".join(lines)


def predict_memory(
    student: Layout,
    teacher: Layout | None,
    *,
    trained: int,
    batch_tokens: int,
    itemsizes: tuple[int, int],
) -> dict[str, int]:
    """Return the parts of the peak memory, in bytes.

    Args:
        student: The model that is trained.
        teacher: The dense model where it is resident, else None.
        trained: Parameters that are trained.
        batch_tokens: Tokens of a step on a device.
        itemsizes: Bytes of a weight of the student and of the teacher.
    """
    parameters = sum(ref.parameters for ref in student.checkpoint.tensors.values())
    width = student.by_name[student.family.embedding].shape[1]
    channels = max([1, *map(student.channels_of, student.family.widths)])
    kept = width * WIDTH_COPIES + channels * CHANNEL_COPIES
    memory = {
        "base": BASE_BYTES + TRAINING_BYTES + ROW_BYTES * student.vocab_size,
        "weights": parameters * itemsizes[0],
        "gradients, optimizer": trained * 4 * (STATE_COPIES - 1),
        "activations": 4 * batch_tokens * student.num_hidden_layers * kept,
        "logits": 4 * batch_tokens * student.vocab_size * LOGIT_COPIES,
    }
    if teacher is not None:
        whole = sum(ref.parameters for ref in teacher.checkpoint.tensors.values())
        head = student.vocab_size * width
        memory["teacher"] = (whole + head) * itemsizes[1]
    return memory


def trained_parameters(layout: Layout, lora: int | None, only: str | None) -> int:
    """Return how many parameters are trained: of adapters, of the FFNs, or all."""
    refs = [
        ref
        for ref in layout.checkpoint.tensors.values()
        if only is None or layout.roles[ref.name].slot.width
    ]
    if lora is None:
        return sum(ref.parameters for ref in refs)
    matrices = [r for r in refs if len(r.shape) == 2 and layout.roles[r.name].layer is not None]
    return sum(lora * sum(ref.shape) for ref in matrices)


def check_memory(device: torch.device, need: int) -> None:
    """Refuse a training that takes more than is free.

    Raises:
        BudgetError: naming ``device``.
    """
    if need > (free := free_memory(device)):
        raise BudgetError(
            f"`device` {device}",
            "has too little memory to train this model",
            expected=f"{need / MB:,.0f} MB free",
            found=f"{free / MB:,.0f} MB",
            fix="give `lora` a rank, a smaller `seq_len`, or the directory that teach writes as "
            "`teacher`",
        )


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free where the training runs, once a writing teacher has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def timed(work: Callable[[], object], seconds: float = 0.0) -> float:
    """Return the least seconds that ``work`` takes: of two runs, or of as many as ``seconds``
    allow, for other programs may slow one of them."""
    found: list[float] = []
    while len(found) < 2 or sum(found) + found[-1] < seconds:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def fitting_steps(seconds: float, step: float, evaluation: float) -> tuple[int, int]:
    """Return how many steps and evaluations fit into a time; one of each, if it is too short.

    Evaluations take half of the time at most. Once more is measured what is written.
    """
    left = max(0.0, seconds - evaluation)
    evaluations = max(1, min(EVALUATIONS, int(left / 2 / evaluation)))
    return max(1, int((left - evaluations * evaluation) / step)), evaluations


def expected_seconds(steps: int, step: float, evaluations: int, evaluation: float) -> Seconds:
    """Return the time of all steps and evaluations."""
    whole = steps * step + evaluations * evaluation
    return with_slack(whole, 1.5 * whole)
