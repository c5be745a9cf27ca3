"""Apply a plan: stream every edit into a new checkpoint directory."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import msgspec

from surgery import __version__
from surgery.card import model_card
from surgery.checkpoint import INDEX_NAME, Checkpoint
from surgery.checksums import check_digest, known_digests
from surgery.companions import companion_files, pruned_config
from surgery.edits import OutputTensor, edits, sources
from surgery.errors import EngineError, SurgeryError
from surgery.header import encode_header
from surgery.heap import release_freed_memory
from surgery.jsonfile import dump_json, dump_table, read_file
from surgery.layout import Layout
from surgery.plan import Plan
from surgery.replacement_file import check_file
from surgery.shard_file import IO, open_shard
from surgery.shards import Shards
from surgery.stream import stream_edit, write_all
from surgery.writer import OutputDirectory, forget, new_shard

JOBS = 4
"""Shards at a time: while one is synced to the disk another is copied (8B shape: 2.4 s for 3.2)."""

PROVENANCE_NAME = "compact_surgery.json"


class ProvenanceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """compact_surgery.json: what made this checkpoint."""

    version: str
    """Of compact-surgery."""
    plan_digest: str
    plan: Plan
    """With ``output`` left out, so that the same plan gives the same bytes anywhere."""


def apply_plan(
    plan: Plan,
    source: Path,
    output: Path,
    *,
    resume: bool = False,
    jobs: int = JOBS,
    engine: str = "local",
    io: IO = "mmap",
    checksum: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> dict[str, float]:
    """Write the checkpoint that ``plan`` makes of ``source`` to the new directory ``output``.

    The files beside the weights are written first, for the tokenizer takes the most memory; then
    shards, config.json and the index, all in ``output.partial``, which is renamed at the end.
    Shards take two windows per job, five where FP8 becomes bf16.

    Args:
        plan: A complete plan made for ``source``.
        source: The checkpoint's directory; it is only read.
        output: Must not exist, and lie outside of ``source``.
        resume: Go on with an interrupted run of the same plan; a finished one is left as it is.
        jobs: Shards written at the same time in this process; those of the hub one by one.
        engine: "local", or "ray": each shard a task on a cluster that shares the file system.
        io: How shards are reached: mapped, or read by position.
        checksum: Compare each shard with its known SHA-256, which reads all of it, before any of
            it is used; those of the hub are compared in any case.
        progress: Called with the bytes of each finished tensor.

    Returns:
        Seconds by stage: prepare, shards, files. Empty where it was finished already.

    Raises:
        SurgeryError: see the modules this calls; nothing appears under ``output``.
    """
    if resume and _is_written(output, plan):
        forget(output)
        return {}
    times = [time.perf_counter()]
    checkpoint = Checkpoint.open(source.absolute() if engine == "ray" else source, plan.family)
    by_shard = {n: shard for n, shard in edits(plan, Layout.of(checkpoint)).items() if shard}
    digests = _digests(checkpoint, list(by_shard), checksum=checksum, engine=engine)
    if plan.replaced is not None:
        check_file(plan.replaced)
    files = companion_files(plan, checkpoint)
    files["README.md"] = model_card(plan, checkpoint)
    config = pruned_config(plan, checkpoint)
    directory = OutputDirectory(output, plan.digest, source=source, resume=resume)
    todo = {name: shard for name, shard in by_shard.items() if name not in directory.finished}
    with directory:
        directory.check_space(sum(t.nbytes for shard in todo.values() for t in shard))
        for name, data in files.items():
            directory.write(name, data)
        del files
        release_freed_memory()
        times.append(time.perf_counter())
        if engine == "ray":
            _write_shards_on_ray(directory, checkpoint, todo, digests, io, progress)
        else:
            _write_shards(directory, checkpoint, todo, digests, io, jobs, progress)
        times.append(time.perf_counter())
        directory.write(PROVENANCE_NAME, _provenance(plan))
        directory.write("config.json", config)
        if checkpoint.index is not None:
            directory.write(INDEX_NAME, _index(checkpoint.index, by_shard, plan))
        directory.commit()
    times.append(time.perf_counter())
    spent = (end - start for start, end in pairwise(times))
    return dict(zip(("prepare", "shards", "files"), spent, strict=True))


def _digests(
    checkpoint: Checkpoint, names: list[str], *, checksum: bool, engine: str
) -> dict[str, str]:
    """Shard → SHA-256 to compare it with; those of the hub are compared as they arrive."""
    remote = Shards.of(checkpoint.path).remote
    if remote and engine == "ray":
        raise EngineError(
            "--engine ray",
            "needs the model on the file system that all nodes share",
            fix="download it there first, and name its directory",
        )
    return known_digests(checkpoint.path, names) if checksum and not remote else {}


def _write_shards_on_ray(
    directory: OutputDirectory,
    checkpoint: Checkpoint,
    todo: dict[str, list[OutputTensor]],
    digests: dict[str, str],
    io: IO,
    progress: Callable[[int], object],
) -> None:
    from surgery.ray_engine import write_shards_on_ray

    for name in todo:
        _check_digest(checkpoint.path / name, digests)
    write_shards_on_ray(directory, checkpoint, todo, io, progress)


def _write_shards(
    directory: OutputDirectory,
    checkpoint: Checkpoint,
    todo: dict[str, list[OutputTensor]],
    digests: dict[str, str],
    io: IO,
    jobs: int,
    progress: Callable[[int], object],
) -> None:
    """Write the shards of ``todo``, ``jobs`` at a time; after an error no further one is begun."""
    stop = Event()
    shards = Shards.of(checkpoint.path)

    def write(name: str) -> None:
        if stop.is_set():
            return
        try:
            metadata, source = checkpoint.shards[name].metadata, checkpoint.path / name
            with shards.lease(sources(todo[name]) | {name}):
                _check_digest(source, digests)
                with directory.writing(name):
                    write_shard(directory.partial, source, todo[name], metadata, io, progress)
            directory.finish(name)
        except BaseException:
            stop.set()
            raise

    with shards, ThreadPoolExecutor(1 if shards.remote else jobs) as pool:
        shards.expect([sources(shard) for shard in todo.values()])
        try:
            for _ in pool.map(write, todo):
                pass
        finally:  # Ctrl-C lands here, in the main thread
            stop.set()


def write_shard(
    partial: Path,
    source: Path,
    shard: list[OutputTensor],
    metadata: Mapping[str, str],
    io: IO,
    progress: Callable[[int], object] = lambda nbytes: None,
    *,
    attempt: str = "",
) -> None:
    """Write one output shard: its header, then its tensors in the source's order.

    Args:
        partial: The directory it appears in, whole or not at all, under the source shard's name.
        source: The source shard.
        shard: Its tensors.
        metadata: Of its header.
        io: How the source's shards are reached.
        progress: Called with the bytes of each finished tensor.
        attempt: As for ``new_shard``.
    """
    paths = {source, *(edit.source.path for tensor in shard for edit in tensor.edits)}
    with ExitStack() as stack, new_shard(partial, source.name, attempt) as output:
        opened = {path: stack.enter_context(open_shard(path, io)) for path in paths}
        entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]
        write_all(output, memoryview(encode_header(entries, metadata)))
        for tensor in shard:
            for edit in tensor.edits:
                stream_edit(edit, opened[edit.source.path], output)
            progress(tensor.nbytes)


def _check_digest(source: Path, digests: Mapping[str, str]) -> None:
    if source.name in digests:
        check_digest(source, digests[source.name])


def _index(index: dict[str, Any], by_shard: dict[str, list[OutputTensor]], plan: Plan) -> bytes:
    lies = {tensor.name: name for name, shard in by_shard.items() for tensor in shard}
    names = dict.fromkeys([*index["weight_map"], *lies])
    weight_map = {name: lies[name] for name in names if name in lies}
    old = index.get("metadata")
    metadata = dict(old) if isinstance(old, dict) else {}
    metadata["total_size"] = plan.after.nbytes
    if "total_parameters" in metadata:
        # transformers does not count buffers, the plan does: only the difference is sure
        gone = plan.before.parameters - plan.after.parameters
        known = type(metadata["total_parameters"]) is int and not plan.dropped
        metadata["total_parameters"] = (
            metadata["total_parameters"] - gone if known else plan.after.parameters
        )
    return dump_json({**index, "metadata": metadata, "weight_map": weight_map})


def _is_written(output: Path, plan: Plan) -> bool:
    """Whether ``output`` is what ``plan`` makes: it appears whole, so its name is proof enough."""
    try:
        made = msgspec.json.decode(read_file(output / PROVENANCE_NAME), type=ProvenanceFile)
    except (OSError, ValueError, SurgeryError):
        return False
    return made.plan_digest == plan.digest


def _provenance(plan: Plan) -> bytes:
    place_free = msgspec.structs.replace(plan, output=None)
    file = ProvenanceFile(__version__, plan.digest, place_free)
    return dump_table(file)
