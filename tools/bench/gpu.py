"""The proof for a card: tests, an 8B-shaped checkpoint and layers of 70B shape, in one report.

It needs a Python with torch and no network. The checkpoints are generated. Every line but CUDA's
own runs on a CPU, too, and on tiny shapes with ``toy``.
"""

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import calib
import surgery
from calib.estimate import Prediction
from calib.statistics.calibrate import Calibration, take_statistics
from calib.statistics.prepare import _settings
from calib.streaming.settings import ComputeOptions
from surgery.apply.cost import apply_cost
from surgery.layout.layout import Layout
from surgery.process import spoken
from surgery.stats.channel_stats import ChannelStats
from surgery.vocabulary.order import rarity_of
from tools.bench.child import ROOT, measure
from tools.published import PUBLISHED, llama_config
from tools.shapes import Config, write_random, write_tokenizer

Facts = dict[str, Any]
CARD_BYTES = 80 * 10**9
"""The card that the promise is about."""
MINUTES = 8
"""The whole run, on such a card."""
MOST_IDLE = 0.15
"""Share of the 8B pass in which the card may wait."""
SLACK = 1.1
"""A measured peak of memory over its prediction."""
NOT_LINEAR = 0.1
"""By how much the seconds of a layer may differ between few layers and twice as many."""
PAPER_70B_SECONDS = 137
"""The paper's Table 4: COMPACT prunes LLaMA 3.1-70B in 2:17."""
LAYERS_70B = 80
JOBS = 4
"""Of apply."""
PROSE = ROOT / "tools" / "text" / "heldout.txt"


@dataclass(frozen=True)
class Shapes:
    """What is generated, and how much text passes through it."""

    whole: Config
    """Of the model that goes through all steps."""
    sizes: tuple[int, int]
    """V' and I' that it is pruned to."""
    windows: tuple[int, int]
    """Windows of its calibration, and tokens of a window."""
    large: Config
    """Layers of a larger model; as many again are added."""
    large_windows: tuple[int, int]
    matmul: int
    """Side of the square matrices whose product stands for the card's peak."""


FULL = Shapes(
    PUBLISHED["Llama-3.1-8B"],
    (67840, 8448),
    (32, 2048),
    llama_config(8192, 28672, 4, 64, 8, 4096),
    (256, 2048),
    8192,
)
TOY = Shapes(
    llama_config(64, 256, 2, 4, 2, 1024),
    (768, 128),
    (4, 64),
    llama_config(64, 256, 2, 4, 2, 1024),
    (8, 64),
    128,
)


@dataclass
class Check:
    """A line of the table that the report ends in."""

    name: str
    passed: bool | None
    """None where it was not run."""
    found: str
    expected: str


@dataclass
class GpuReport:
    """Everything that was measured."""

    device: str
    toy: bool
    stages: dict[str, Facts] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def facts(self) -> Facts:
        """Return all of it for JSON."""
        return asdict(self) | {"ok": self.ok}

    def text(self) -> str:
        """Return all of it for people; the table of checks comes last."""
        lines = [f"tools.bench gpu on {self.device}{', toy shapes' * self.toy}"]
        for name, facts in self.stages.items():
            lines += [
                "",
                name,
                *(f"  {key:<34}{_shown(key, value)}" for key, value in facts.items()),
            ]
        words = {True: "pass", False: "FAIL", None: "not run"}
        wide = 2 + max(len(check.name) for check in self.checks)
        rows = [(c.name, words[c.passed], c.found, c.expected) for c in self.checks]
        lines += ["", f"{'check':<{wide}}{'result':<10}{'found':<24}expected"]
        lines += [f"{name:<{wide}}{word:<10}{found:<24}{want}" for name, word, found, want in rows]
        return "\n".join(lines)


class GpuBench:
    """Runs the stages on one device."""

    def __init__(self, device: str, work: Path, *, toy: bool) -> None:
        self._device = torch.device(device)
        self._work = work
        self._shapes = TOY if toy else FULL
        self._cuda = self._device.type == "cuda"
        self._start = time.perf_counter()
        self.report = GpuReport(device, toy)

    def run(self) -> GpuReport:
        """Run everything, the most telling first; a stage that fails ends no other one."""
        for stage in (self._environment, self._tests, self._whole_model, self._large_layers):
            try:
                stage()
            except Exception as error:  # the report of a machine that is far away must come back
                self._check(
                    stage.__name__.strip("_").replace("_", " "), False, str(error)[:200], ""
                )
        took = time.perf_counter() - self._start
        self._check("time", took <= 60 * MINUTES, spoken(took), f"at most {MINUTES} min")
        return self.report

    def _check(self, name: str, passed: bool | None, found: object, expected: str) -> None:
        self.report.checks.append(Check(name, passed, str(found), expected))

    @contextmanager
    def _stage(self, name: str, predicted: Mapping[str, int] | None = None) -> Iterator[Facts]:
        """Measure a stage: seconds, and the peaks of memory beside what was predicted."""
        facts = self.report.stages.setdefault(name, {})
        _reset_host_peak()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield facts
        if self._cuda:
            torch.cuda.synchronize()
            facts["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        facts["seconds"] = time.perf_counter() - start
        facts["host_peak_bytes"] = _host_peak()
        facts |= predicted or {}

    def _within(self, name: str, facts: Facts) -> None:
        """Check the peaks of a stage against their predictions."""
        for part in ("host", "device"):
            found, bound = (
                facts.get(f"{part}_peak_bytes", 0),
                facts.get(f"{part}_predicted_bytes", 0),
            )
            run = found and bound and not self.report.toy
            shown = f"{found / 1e9:.2f} GB" if found else ""
            expected = f"at most {SLACK:g} × {bound / 1e9:.2f} GB" if bound else "a prediction"
            passed = found <= SLACK * bound if run else None
            self._check(f"{name}: {part} memory", passed, shown, expected)

    def _environment(self) -> None:
        facts = self.report.stages.setdefault("environment", {})
        facts |= {"python": platform.python_version(), "system": platform.platform()}
        facts |= {name: version(name) for name in ("torch", "transformers", "numpy")}
        facts["cuda"] = torch.version.cuda or "none"
        if self._cuda:
            properties = torch.cuda.get_device_properties(self._device)
            facts |= {"card": properties.name, "card_bytes": properties.total_memory}
            facts["driver"] = _driver()
        side, dtype = self._shapes.matmul, torch.bfloat16 if self._cuda else torch.float32
        matrix = torch.ones(side, side, device=self._device, dtype=dtype)
        with self._stage("environment"):
            matrix @ matrix
        with self._stage("environment"):
            for _ in range(runs := 20):
                matrix @ matrix
        facts["matmul_flops"] = self._peak_flops = runs * 2 * side**3 / facts.pop("seconds")
        with self._stage("warming up: imports, and the device's libraries"):
            layout = surgery.open_model(self._generated("toy", TOY.whole)).layout
            take_statistics(self._calibration(layout, TOY.windows, [layout.vocab_size]))

    def _tests(self) -> None:
        name = f"tests on {self._device.type}"
        if find_spec("pytest") is None:
            self._check(name, None, "pytest is missing", "all pass")
            return
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
        wanted = self._device.type + (" and float32 and agrees" if self.report.toy else "")
        command += [str(ROOT / "tests" / "streaming" / "test_on_device.py"), "-k", wanted]
        with self._stage(name) as facts:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            facts["result"] = (done.stdout.strip().splitlines() or ["nothing"])[-1]
        self._check(name, done.returncode == 0, facts["result"].partition(" in ")[0], "all pass")

    def _calibration(
        self, layout: Layout, windows: tuple[int, int], edges: list[int]
    ) -> Calibration:
        """Return a calibration on random tokens, with the settings that the command chooses."""
        count, length = windows
        generator = np.random.default_rng(0)
        tokens = list(generator.integers(0, edges[0] - 64, (count, length)))
        buckets = rarity_of(layout).buckets(edges)
        compute = ComputeOptions(self._device.type)
        settings = _settings(layout, tokens, compute, buckets=len(edges), journal=False)
        return Calibration(layout, tokens, length, buckets, edges, settings)

    def _whole_model(self) -> None:
        """Take the generated model through calibrate, plan, apply, verify and score."""
        vocab_size, channels = self._shapes.sizes
        with self._stage("whole model: generate"):
            path = self._generated("whole", self._shapes.whole)
        model = surgery.open_model(path)
        layout = model.layout
        made = self._calibration(layout, self._shapes.windows, [vocab_size, layout.vocab_size])
        with self._stage("whole model: calibrate", _peaks(made.prediction())) as facts:
            stats = take_statistics(made)
        self._pass_figures(layout, made, facts)
        self._within("calibrate", facts)
        self._resident(path, made, facts)
        plan = self._planned(model, stats, vocab_size, channels)
        out, file = self._work / "out", self._work / "plan.json"
        plan.save(file)
        shutil.rmtree(out, ignore_errors=True)
        with self._stage("whole model: apply") as facts:
            program = [sys.executable, "-c", "from surgery.cli.main import main; main()"]
            usage = measure([*program, "apply", file, "-o", out, "--jobs", str(JOBS)])
        facts["host_peak_bytes"] = usage.peak_rss_bytes
        facts["host_predicted_bytes"] = apply_cost(plan, layout, JOBS).memory_bytes
        self._within("apply", facts)
        with self._stage("whole model: verify"):
            checked = surgery.verify_checkpoint(out, plan=plan, source=path)
            logits = calib.compare_logits(out, plan=plan, source=path, device=self._device.type)
        self._check("verify", checked.ok, "no fault" if checked.ok else "faults", "no fault")
        self._check("logits", logits.ok, f"{logits.largest:.1e}", f"at most {logits.allowed:.0e}")
        with self._stage("whole model: score") as facts:
            score = calib.score(out, data=PROSE, samples=8, device=self._device.type)
            facts["bits_per_byte"] = score.bits_per_byte
        self._check("score", score.finite, f"{score.bits_per_byte:.3f}", "a finite number")

    def _planned(
        self, model: surgery.Model, stats: ChannelStats, vocab_size: int, channels: int
    ) -> surgery.Plan:
        with self._stage("whole model: plan"):
            return surgery.make_plan(
                model, stats=stats, vocab_size=vocab_size, intermediate_size=channels
            )

    def _pass_figures(self, layout: Layout, made: Calibration, facts: Facts) -> None:
        """Add what the seconds of a pass went into, and check that the card hardly waited."""
        timings = made.timings
        flops = _flops(layout, made)
        facts |= {f"{key}_seconds": value for key, value in asdict(timings).items()}
        facts["bytes_read"] = facts.pop("bytes_read_seconds")
        hidden = 1 - timings.wait / timings.read if timings.read else 1.0
        facts["reading_hidden_share"] = max(0.0, hidden)
        facts["idle_share"] = 1 - timings.compute / timings.total
        facts["mfu_of_matmul"] = flops / timings.compute / self._peak_flops
        idle = facts["idle_share"]
        passed = idle <= MOST_IDLE if self._cuda else None
        self._check("calibrate: card idle", passed, f"{idle:.1%}", f"at most {MOST_IDLE:.0%}")

    @torch.no_grad()
    def _resident(self, path: Path, made: Calibration, facts: Facts) -> None:
        """Run the same windows through the model with all weights on the device: the bound."""
        with self._stage("whole model: resident"):
            whole: Any = AutoModelForCausalLM.from_pretrained(path, dtype=made.settings.dtype)
            body = whole.to(self._device).eval().base_model
            body(torch.from_numpy(made.windows[0])[None].to(self._device))
        with self._stage("whole model: resident pass") as resident:
            for window in made.windows:
                body(torch.from_numpy(window)[None].to(self._device), use_cache=False)
        facts["seconds_over_resident"] = facts["seconds"] / resident["seconds"]
        del whole, body
        if self._cuda:
            torch.cuda.empty_cache()

    def _large_layers(self) -> None:
        """Calibrate some layers of the large shape and as many again; extrapolate to all."""
        config = dict(self._shapes.large)
        per_layer: dict[int, float] = {}
        for count in (config["num_hidden_layers"], 2 * config["num_hidden_layers"]):
            path = self._generated("large", config | {"num_hidden_layers": count})
            layout = surgery.open_model(path).layout
            made = self._calibration(layout, self._shapes.large_windows, [layout.vocab_size])
            name = f"large shape: {count} layers"
            with self._stage(name, _peaks(made.prediction())) as facts:
                take_statistics(made)
            facts["seconds_per_layer"] = per_layer[count] = made.timings.total / count
            self._within(name, facts)
        few, many = per_layer.values()
        ratio, peak = many / few, facts.get("device_peak_bytes")
        facts["estimated_70b_seconds"] = LAYERS_70B * many
        facts["paper_70b_seconds"] = PAPER_70B_SECONDS
        linear = abs(ratio - 1) <= NOT_LINEAR if not self.report.toy else None
        self._check("large: linear in layers", linear, f"{ratio:.2f}", f"1 ± {NOT_LINEAR:g}")
        fits = peak <= CARD_BYTES if peak else None
        shown = f"{peak / 1e9:.1f} GB" if peak else ""
        self._check("large: fits the card", fits, shown, f"at most {CARD_BYTES / 1e9:.0f} GB")

    def _generated(self, name: str, config: Config) -> Path:
        """Return a generated checkpoint with a tokenizer."""
        path = self._work / f"{name}-{config['num_hidden_layers']}"
        if not (path / "tokenizer.json").exists():
            write_tokenizer(write_random(path, config), config)
        return path


def _flops(layout: Layout, made: Calibration) -> float:
    """Return the operations of the layers on all tokens: matrices, and causal attention."""
    matrices = sum(
        ref.parameters for layer in layout.of_layer for ref in layer.values() if len(ref.shape) > 1
    )
    heads = layout.config["num_attention_heads"]
    width = heads * (layout.config.get("head_dim") or layout.config["hidden_size"] // heads)
    attention = 2 * made.seq_len * width * layout.num_hidden_layers
    return float(made.tokens * (2 * matrices + attention))


def _peaks(prediction: Prediction) -> dict[str, int]:
    found = {"host_predicted_bytes": prediction.peak_memory}
    if prediction.peak_device:
        found["device_predicted_bytes"] = prediction.peak_device
    return found


def _driver() -> str:
    """Return the version of the card's driver, as its own program says."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError):
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        return done.stdout.strip() or "unknown"
    return "unknown"


def _reset_host_peak() -> None:
    """Let the kernel's high-water mark of this process begin anew (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _host_peak() -> int:
    """Return the high-water mark of this process since it was reset, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _shown(key: str, value: Any) -> str:
    if key.endswith("bytes") and isinstance(value, int):
        return f"{value / 1e9:,.3f} GB"
    if key.endswith("seconds") and isinstance(value, float):
        return f"{value:,.3f} s"
    if key.endswith("share") and isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
