"""Checkpoints loaded by both majors of transformers."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.support import load_matrix
from tests.support.load_matrix import observe

VARIABLE = "COMPACT_SURGERY_TRANSFORMERS4"

NOT_IN_4 = (
    "afmoe",
    "cohere2_moe",
    "eurobert",
    "exaone_moe",
    "gemma4_text",
    "gemma4_unified_text",
    "granite_swa",
    "internlm3",
    "jais2",
    "minimax_m2",
    "ministral3",
    "nanochat",
    "solar_open",
    "youtu",
)
"""Model types that came with transformers 5; 4.57 must say so."""


@dataclass(frozen=True)
class Job:
    """A checkpoint to load."""

    directory: str
    ids: list[list[int]]
    """Token ids to run, in rows of one length."""
    auto_class: str = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Loaded:
    """What one version of transformers made of a checkpoint."""

    version: str
    error: str | None
    """Type and message of what was raised; then nothing below is known but the warnings."""
    warnings: list[str]
    logits: np.ndarray | None = field(repr=False)
    """``(rows, length, vocab_size)`` in float32."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Missing, unexpected and mismatched keys and whatever else loading reports, if any."""
    tokens: int = 0
    encoded: list[int] = field(default_factory=list)
    """Ids of tests.support.load_matrix.SENTENCE."""
    decoded: str = ""
    """The sentence from its ids."""


def load_here(job: Job) -> Loaded:
    """Load ``job`` with the transformers that the tests run under."""
    facts, logits = observe(asdict(job))
    return Loaded(logits=logits, **facts)


def load_with_transformers4(jobs: Sequence[Job], directory: Path) -> list[Loaded]:
    """Load all jobs in one process of the Python that has transformers 4.57; else skip."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no Python with transformers 4.57")
    logits = directory / "logits.npz"
    result = subprocess.run(
        [python, load_matrix.__file__, str(logits)],
        input=json.dumps([asdict(job) for job in jobs]),
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    with np.load(logits) as arrays:
        return [
            Loaded(logits=arrays.get(str(place)), **facts)
            for place, facts in enumerate(json.loads(result.stdout))
        ]
