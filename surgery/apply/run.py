"""Apply a plan: stream every edit into a new directory, here or on a Ray cluster."""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import msgspec

from surgery.apply.companions import companion_files, pruned_config
from surgery.apply.cost import ApplyCost, apply_seconds, cost_of
from surgery.apply.edits import OutputTensor, edits, sources
from surgery.apply.model_card import model_card
from surgery.apply.output_directory import (
    OutputDirectory,
    check_space,
    remove_journal,
    shards_at_hand,
)
from surgery.apply.shard import ShardTask, from_spans, spans_of, write_shard
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.checksums import Checksums, known_digests
from surgery.cluster import ENGINES, RETRIES, cluster, results
from surgery.errors import EngineError, PlanError, SurgeryError, check_choice, check_least
from surgery.files.model_files import INDEX_NAME
from surgery.files.strict_json import dump_json, dump_table, read_file
from surgery.hub.shards import Shards
from surgery.layout.build import read_layout
from surgery.layout.layout import Layout
from surgery.planning.plan import PROVENANCE_NAME, Plan, ProvenanceFile
from surgery.planning.replacement import check_file
from surgery.process import (
    Advance,
    Progress,
    Seconds,
    moved_bytes,
    peak_rss_bytes,
    release_freed_memory,
    say_resumed,
    spoken_range,
    stage,
)
from surgery.version import __version__


def write_shards_on_ray(
    directory: OutputDirectory, tasks: Mapping[str, ShardTask], progress: Advance
) -> None:
    """Write the shards of ``tasks``, as many at a time as the cluster has CPUs.

    If a node is lost, its shards begin anew on other nodes. Only this process writes the journal.

    Raises:
        SurgeryError: as ``results``.
    """

    def done(name: str, _: object) -> None:
        directory.finish(name)
        progress(sum(tensor.nbytes for tensor in tasks[name].tensors))

    with cluster() as ray:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")(
            write_shard
        )
        results(ray, {remote.remote(task): name for name, task in tasks.items()}, done)


JOBS = 4
"""Shards at a time: one is copied while another is synced (8B shape: 2.4 s, not 3.2)."""


@dataclass(frozen=True)
class ApplyOptions:
    """Where and how a plan is applied."""

    output: Path | None = None
    """Directory to write, outside of the source; it must not exist. None is the plan's own."""
    resume: bool = False
    """Whether to continue an interrupted run of the same plan; a finished output is not changed."""
    jobs: int = JOBS
    """Shards written at the same time in this process; shards of the hub are written one by one."""
    engine: str = "local"
    """"local", or "ray": each shard a task on a cluster that shares the file system."""
    checksum: bool = False
    """Whether to compare each shard with its known SHA-256 before use, which reads all of it.
    Shards of the hub are always compared."""

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        check_least("jobs", self.jobs, 1)


@dataclass(frozen=True)
class Applied:
    """The checkpoint that was written, and what that took."""

    output: Path
    parameters: int
    nbytes: int
    """Bytes of its tensors."""
    seconds: float
    stage_seconds: Mapping[str, float]
    """Seconds of "prepare", "shards" and "files"; empty where the output was complete already."""
    moved: Mapping[str, int]
    """``read_bytes`` and ``written_bytes`` as the kernel counts them; empty where it does not."""
    peak_rss_bytes: int | None
    """Largest resident memory of the process so far."""

    def facts(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        facts = {key: value for key, value in asdict(self).items() if key != "moved"}
        facts |= {"output": str(self.output), **self.moved}
        if self.moved and self.seconds:
            facts["written_bytes_per_second"] = self.moved["written_bytes"] / self.seconds
        return facts


def apply_to(
    plan: Plan, source: Path, options: ApplyOptions, progress: Progress | None = None
) -> Applied:
    """Write the checkpoint that ``plan`` makes of the directory ``source``, which is only read.

    Raises:
        SurgeryError: as the modules that this calls; then no output appears.
    """
    output = _output(plan, options)
    start, before = time.perf_counter(), moved_bytes()
    advance = stage(progress, "apply", plan.after.nbytes)
    stage_seconds = _write_checkpoint(plan, source, replace(options, output=output), advance)
    seconds, after = time.perf_counter() - start, moved_bytes()
    moved = {key: after[key] - before[key] for key in after} if before and after else {}
    sizes = (plan.after.parameters, plan.after.nbytes)
    return Applied(output, *sizes, seconds, stage_seconds, moved, peak_rss_bytes())


def _write_checkpoint(
    plan: Plan, source: Path, options: ApplyOptions, progress: Advance
) -> dict[str, float]:
    """Write the checkpoint; return the seconds of each stage.

    The files beside the weights come first, as the tokenizer takes the most memory. Then come the
    shards, config.json and the index. All are written to ``output.partial``, which is renamed at
    the end. Shards take two windows per job, five where FP8 becomes bf16.
    """
    output, resume, engine = options.output, options.resume, options.engine
    assert output is not None
    if resume and _is_written(output, plan):
        say_resumed(1, 1, "outputs")
        remove_journal(output)
        return {}
    times = [time.perf_counter()]
    prepared = _prepare(plan, source, options)
    checkpoint, by_shard = prepared.layout.checkpoint, prepared.by_shard
    files, checksums = prepared.files, prepared.checksums
    directory = OutputDirectory(output, plan.digest, source=source, resume=resume)
    todo = {name: shard for name, shard in by_shard.items() if name not in directory.finished}
    with directory:
        for name in by_shard.keys() & directory.finished:  # perhaps by a run that checked nothing
            checksums.check(sources(by_shard[name]) | {name})
        check_space(output, sum(t.nbytes for shard in todo.values() for t in shard))
        if resume:
            say_resumed(len(by_shard) - len(todo), len(by_shard), "shards")
        for name, data in files.items():
            directory.write(name, data)
        files.clear()
        release_freed_memory()
        times.append(time.perf_counter())
        tasks = {
            name: ShardTask(
                directory.partial.absolute(),  # another node's working directory is its own
                checkpoint.path / name,
                shard,
                checkpoint.shards[name].metadata,
            )
            for name, shard in todo.items()
        }
        if engine == "ray":
            for task in tasks.values():
                checksums.check(_needed(task))
            write_shards_on_ray(directory, tasks, progress)
        else:
            _write_shards(directory, tasks, checksums, options, progress)
        times.append(time.perf_counter())
        directory.write(PROVENANCE_NAME, _provenance(plan))
        directory.write(checkpoint.config_path.name, prepared.config)
        if checkpoint.index is not None:
            directory.write(INDEX_NAME, _index(checkpoint.index, by_shard, plan))
        directory.commit()
    times.append(time.perf_counter())
    spent = (end - start for start, end in pairwise(times))
    return dict(zip(("prepare", "shards", "files"), spent, strict=True))


@dataclass(frozen=True, eq=False)
class _Prepared:
    """All that is known before the first byte is written."""

    layout: Layout
    by_shard: dict[str, list[OutputTensor]]
    checksums: Checksums
    files: dict[str, bytes | Iterator[bytes]]
    """The files beside the weights; the tokenizer takes the most memory."""
    config: bytes


def _prepare(plan: Plan, source: Path, options: ApplyOptions) -> _Prepared:
    """Open the source, and make what is beside the weights; write nothing."""
    where = source.absolute() if options.engine == "ray" else source
    checkpoint = Checkpoint.open(where, plan.family)
    layout = read_layout(checkpoint)
    by_shard = {n: shard for n, shard in edits(plan, layout).items() if shard}
    checksums = _checksums(checkpoint, by_shard, options)
    if plan.replaced is not None:
        check_file(plan.replaced)
    files = companion_files(plan, checkpoint)
    files["README.md"] = model_card(plan, checkpoint)
    return _Prepared(layout, by_shard, checksums, files, pruned_config(plan, checkpoint))


@dataclass(frozen=True)
class ApplyForecast:
    """What an apply would take and write."""

    output: Path
    shards: int
    """Shards to write, without those that an interrupted run has finished."""
    finished: int
    """Shards that it has finished."""
    cost: ApplyCost
    free_bytes: int
    """Of the output's disk."""
    seconds: Seconds | None
    """Estimated time, at least and at most; None for a model on the hub, and for a cluster."""

    def facts(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {**asdict(self), "output": str(self.output)}

    def table(self) -> str:
        """Return the figures as lines for people."""
        there = f", {self.finished} are there already" if self.finished else ""
        took = spoken_range(self.seconds) if self.seconds else "not estimated"
        return (
            f"{self.output}: {self.shards} shards to write{there}\n{self.cost.table()}\n"
            f"{'free on the disk':<26}{self.free_bytes / 1e6:>12,.0f} MB\n{'time':<26}{took:>15}"
        )


def forecast_apply(plan: Plan, source: Path, options: ApplyOptions) -> ApplyForecast:
    """Check what ``apply_to`` checks before it writes, and predict what it takes; write nothing.

    The time is estimated from the pace of both disks.

    Raises:
        SurgeryError: as ``apply_to``, but for a run that writes the same output meanwhile.
    """
    output, start = _output(plan, options), time.perf_counter()
    prepared = _prepare(plan, source, options)
    every, finished = frozenset(prepared.by_shard), frozenset[str]()
    if options.resume and _is_written(output, plan):
        finished = every
    else:
        finished = every & shards_at_hand(output, plan.digest, source=source, resume=options.resume)
    for data in prepared.files.values():
        for _ in data if not isinstance(data, bytes) else ():
            pass
    layout, took = prepared.layout, time.perf_counter() - start
    todo = {name: shard for name, shard in prepared.by_shard.items() if name not in finished}
    cost = cost_of(plan, layout.checkpoint, todo, options.jobs)
    local = options.engine == "local"
    return ApplyForecast(
        output,
        len(every - finished),
        len(finished),
        cost,
        check_space(output, cost.disk_bytes),
        apply_seconds(cost, layout, output, took) if local else None,
    )


def _output(plan: Plan, options: ApplyOptions) -> Path:
    output = options.output or (Path(plan.output) if plan.output else None)
    if output is None:
        raise PlanError("plan", "names no output", fix="give `output`")
    return output


def _checksums(
    checkpoint: Checkpoint, by_shard: Mapping[str, list[OutputTensor]], options: ApplyOptions
) -> Checksums:
    """Return what compares the shards that are read; those of the hub are compared as they come."""
    remote = Shards.of(checkpoint.path).remote
    if remote and options.engine == "ray":
        raise EngineError(
            "`engine` ray",
            "needs the model on the file system that all nodes share",
            fix="download it there first, and name its directory",
        )
    names = set(by_shard).union(*map(sources, by_shard.values()))
    known = known_digests(checkpoint.path, sorted(names)) if options.checksum and not remote else {}
    return Checksums(checkpoint.path, known)


def _needed(task: ShardTask) -> frozenset[str]:
    """Return the source's shards that a task reads, its own for the metadata of its header."""
    return sources(task.tensors) | {task.source.name}


def _write_shards(
    directory: OutputDirectory,
    tasks: Mapping[str, ShardTask],
    checksums: Checksums,
    options: ApplyOptions,
    progress: Advance,
) -> None:
    """Write shards, several at a time; after an error, begin no other one.

    From the hub, shards are fetched whole where they are to be compared: no digest is known of a
    part.
    """
    stop = Event()
    shards = Shards.of(next(iter(tasks.values())).source.parent) if tasks else Shards()

    fetches_parts = shards.remote and not options.checksum
    parts = {name: spans_of(task) for name, task in tasks.items() if fetches_parts}
    spans = {
        name: part
        for name, part in parts.items()
        if part is not None and shards.gives_spans(name, sum(stop - start for start, stop in part))
    }

    def write(name: str) -> None:
        if stop.is_set():
            return
        task = tasks[name]
        try:
            if name in spans:
                with shards.spans(name, spans[name]) as path, directory.writing(name):
                    write_shard(from_spans(task, path), progress)
            else:
                with shards.lease(_needed(task)):
                    checksums.check(_needed(task))
                    with directory.writing(name):
                        write_shard(task, progress)
            directory.finish(name)
        except BaseException:
            stop.set()
            raise

    with shards, ThreadPoolExecutor(1 if shards.remote else options.jobs) as pool:
        shards.expect([sources(task.tensors) for name, task in tasks.items() if name not in spans])
        try:
            for _ in pool.map(write, tasks):
                pass
        finally:  # Ctrl-C lands here, in the main thread
            stop.set()


def _index(index: dict[str, Any], by_shard: dict[str, list[OutputTensor]], plan: Plan) -> bytes:
    shard_of = {tensor.name: name for name, shard in by_shard.items() for tensor in shard}
    names = dict.fromkeys([*index["weight_map"], *shard_of])
    weight_map = {name: shard_of[name] for name in names if name in shard_of}
    old = index.get("metadata")
    metadata = dict(old) if isinstance(old, dict) else {}
    metadata["total_size"] = plan.after.nbytes
    if "total_parameters" in metadata:
        # Others may count in another way, such as tied weights twice: keep what they left out.
        removed = plan.before.parameters - plan.after.parameters
        known = type(metadata["total_parameters"]) is int and not plan.dropped
        metadata["total_parameters"] = (
            metadata["total_parameters"] - removed if known else plan.after.parameters
        )
    return dump_json({**index, "metadata": metadata, "weight_map": weight_map})


def _is_written(output: Path, plan: Plan) -> bool:
    """Whether ``output`` was made by ``plan``; an output that exists is always whole."""
    try:
        found = msgspec.json.decode(read_file(output / PROVENANCE_NAME), type=ProvenanceFile)
    except (OSError, ValueError, SurgeryError):
        return False
    return found.plan_digest == plan.digest


def _provenance(plan: Plan) -> bytes:
    return dump_table(ProvenanceFile(__version__, plan.digest, plan.published()))
