"""Options of a calibration. Imports no torch, so that the command line starts at once."""

from dataclasses import dataclass, field
from pathlib import Path

from calib.streaming.settings import ComputeOptions
from surgery.cluster import ENGINES
from surgery.errors import EngineError, check_choice, check_least
from surgery.planning.request import SizeRequest
from surgery.vocabulary.order import VocabularyOptions


@dataclass(frozen=True)
class CalibrationOptions:
    """For which sizes statistics are taken, and where and how they run."""

    sizes: SizeRequest = field(default_factory=SizeRequest)
    """The sizes of the plan to come. The tokenizer pruned to its V' tokenizes the text; without
    sizes, the source's does."""
    vocab_sizes: str | None = None
    """Sizes V' for which the sums are exact, such as "32768,24576"; None is that of ``sizes``, or
    the sizes of the usual ratios."""
    part: str | None = None
    """The windows that are used, such as "2/4"; None is all of them."""
    engine: str = "local"
    """"local", or "ray": tasks on a cluster whose nodes share the file system."""
    parts: int | None = None
    """Tasks of ``ray``; None is one for each node, or each GPU."""
    output: Path | None = None
    """File for the statistics; None only returns them."""
    resume: bool = False
    """Whether to continue an interrupted run, if there is one."""
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    """The order of the vocabulary, for which the statistics are exact."""
    force: bool = False
    """Whether to replace an output that is there."""

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        if self.parts is not None:
            check_least("parts", self.parts, 1)

    def check(self, compute: ComputeOptions) -> None:
        """Refuse options that do not work together.

        Raises:
            EngineError: it names them.
        """
        ray = self.engine == "ray"
        for wrong, problem, fix in (
            (
                ray and compute.capped,
                "takes no `max_memory`, `max_gpu_memory` or `spill`",
                "leave them out: each node uses the memory that it has",
            ),
            (
                ray and self.resume,
                "takes no `resume`",
                "leave it out: tasks of lost nodes start again by themselves",
            ),
        ):
            if wrong:
                raise EngineError("`engine` ray", problem, fix=fix)
        if self.parts is not None and not ray:
            raise EngineError(
                "`parts`", "is for `engine` ray", fix="use `part` K/N to take a part here"
            )
