"""Whole shards on the local disk while they are used: a directory's own, or the hub's."""

import glob
import math
import os
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Condition, Thread

from surgery.errors import CheckpointError, OutputError
from surgery.files.atomic import FileLock
from surgery.files.safetensors_header import TensorRef
from surgery.hub.remote_file import INCOMPLETE
from surgery.hub.skeleton import HUB_FOLDER, Skeleton

CAPACITY = 2
"""Shards on the disk at a time, whole or in part: the one in use and the next."""

SMALL_BYTES = 1 << 20
"""Tensors up to this size are read by range, without their shard: norms, scales of FP8."""

WORTH_SPANS = 0.9
"""Share of a shard's bytes below which only these are fetched, at the price of more requests."""

USE = ".use"
"""Suffix of lock files; each process that uses a shard holds one."""

PATIENCE_SECONDS = 5.0
"""How long to wait for a download that is no longer needed; else it ends with the process."""


class Shards:
    """The shards of a local directory; they are always there."""

    remote = False

    @staticmethod
    def of(path: Path) -> "Shards":
        """Return the shards of the model in directory ``path``, which may be a skeleton."""
        skeleton = Skeleton.at(path)
        return Shards() if skeleton is None else HubShards(skeleton)

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """End their use."""

    def expect(self, steps: Sequence[Collection[str]]) -> None:
        """Announce the shards that each step will use, so that they can be downloaded in time."""

    @contextmanager
    def lease(self, names: Collection[str]) -> Iterator[None]:
        """Keep the shards ``names`` at their paths until the block ends."""
        yield

    @contextmanager
    def tensor(self, ref: TensorRef) -> Iterator[TensorRef]:
        """Yield where the tensor's bytes are; they are there until the block ends."""
        yield ref

    def gives_spans(self, name: str, nbytes: int) -> bool:
        """Whether it is better to fetch ``nbytes`` of the shard ``name`` than all of it."""
        return False

    @contextmanager
    def spans(self, name: str, spans: Sequence[tuple[int, int]]) -> Iterator[Path]:
        """Yield a file of the bytes of a shard from each start to each stop, one after another."""
        raise NotImplementedError


class HubShards(Shards):
    """Shards that a background thread downloads, and that are deleted after their last use.

    Several processes may use a shard at a time. Each holds a lock on a file of its own, its use
    file. A process holds the shard's own lock while it downloads the shard, begins to use it or
    ends its use. At the end of its use it deletes the shard if nobody holds a use file's lock. The
    system frees the locks of a killed process.

    ``expect`` announces the coming steps. If one of two shards must be deleted, it is the one that
    is needed later. The next run uses or deletes the files that an interrupted run left.
    """

    remote = True

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._changed = Condition()
        self._uses: dict[str, list[int]] = {}
        self._steps: list[frozenset[str]] = []
        self._position = 0
        self._on_disk: dict[str, FileLock] = {}
        self._leased: Counter[str] = Counter()
        self._error: BaseException | None = None
        self._closing = False
        self._thread: Thread | None = None
        self._ranged: bool | None = None
        """Whether the server gives ranges; None until it was asked."""

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Delete the shards on the disk; after an error, keep them for the resumed run."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(0 if error_type else PATIENCE_SECONDS)
        for name in list(self._on_disk):
            self._release(name, delete=error_type is None)
        if error_type is None:
            self._remove_incomplete(())

    def expect(self, steps: Sequence[Collection[str]]) -> None:
        """Replace the announced steps by ``steps``.

        Raises:
            OutputError: two shards do not fit on the disk.
        """
        with self._changed:
            self._steps, self._position, self._uses = [frozenset(s) for s in steps], 0, {}
            for position, step in enumerate(self._steps):
                for name in step:
                    self._uses.setdefault(name, []).append(position)
            self._start()
            self._release_unneeded()
            self._changed.notify_all()

    @contextmanager
    def lease(self, names: Collection[str]) -> Iterator[None]:
        """Wait for the shards ``names`` and keep them until the block ends.

        Raises:
            CheckpointError: the hub refuses one.
        """
        with self._leased_for(frozenset(names), self._step_of(names)):
            yield

    @contextmanager
    def _leased_for(self, wanted: frozenset[str], step: int | None) -> Iterator[None]:
        """Keep ``wanted`` on the disk for ``step``, one of the announced ones, or for none."""
        with self._changed:
            self._start()
            self._position = self._position if step is None else step
            self._leased.update(wanted)
            self._changed.notify_all()
            while not wanted <= self._on_disk.keys() and self._error is None:
                self._changed.wait()
            if self._error is not None:
                self._leased.subtract(wanted)
                raise self._error
        try:
            yield
        finally:
            with self._changed:
                self._leased.subtract(wanted)
                if step is not None:
                    self._position = max(self._position, step + 1)
                self._release_unneeded()
                self._changed.notify_all()

    @contextmanager
    def tensor(self, ref: TensorRef) -> Iterator[TensorRef]:
        """Yield a tensor in its shard, or a small one in its own file if the shard is not here."""
        name = ref.path.name
        small = ref.nbytes <= SMALL_BYTES
        with self._changed:
            here = name in self._on_disk
            self._leased[name] += here  # so that it is not deleted before the lease
        try:
            if here or not small:
                with self._leased_for(frozenset([name]), None if small else self._step_of([name])):
                    yield ref
                return
        finally:
            with self._changed:
                self._leased[name] -= here
        path = self._skeleton.path / HUB_FOLDER / f"tensor-{os.getpid()}"
        try:
            path.write_bytes(self._skeleton.shards[name].read(ref.start, ref.start + ref.nbytes))
            yield replace(ref, path=path, start=0)
        finally:
            path.unlink(missing_ok=True)

    def gives_spans(self, name: str, nbytes: int) -> bool:
        """Whether it is better to fetch ``nbytes`` of the shard ``name`` than all of it."""
        shard = self._skeleton.shards[name]
        worth = nbytes < WORTH_SPANS * shard.size and not (self._skeleton.path / name).exists()
        if worth and self._ranged is None:
            self._ranged = shard.gives_ranges()
        return worth and bool(self._ranged)

    @contextmanager
    def spans(self, name: str, spans: Sequence[tuple[int, int]]) -> Iterator[Path]:
        """Yield a file of the bytes of a shard from each start to each stop, one after another.

        No digest is known of them. The hub says which commit they belong to.

        Raises:
            CheckpointError: the hub refuses, or does not answer.
        """
        own = f"{name}.{os.getpid()}.spans"
        path, lock = self._skeleton.path / HUB_FOLDER / f"{own}{INCOMPLETE}", self._lock(own)
        lock.acquire()  # other processes delete an unfinished file whose lock is free
        try:
            with open(path, "wb") as file:
                for start, stop in spans:
                    for block in self._skeleton.shards[name].blocks(start, stop):
                        file.write(block)
            yield path
        finally:
            path.unlink(missing_ok=True)
            lock.remove()

    def _start(self) -> None:
        """On the first call, register the shards on the disk and start the download thread."""
        if self._thread is not None:
            return
        for name in self._skeleton.shards:
            path = self._skeleton.path / name
            if path.exists():
                with self._lock(name):
                    if path.exists():  # no other process has deleted it meanwhile
                        self._on_disk[name] = self._begin_use(name)
        upcoming = sorted(self._uses, key=self._next_use)[:CAPACITY]
        self._remove_incomplete(upcoming)
        self._check_space()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _check_space(self) -> None:
        sizes = sorted(shard.size for shard in self._skeleton.shards.values())
        needed, free = sum(sizes[-CAPACITY:]), shutil.disk_usage(self._skeleton.path).free
        present = sum(self._skeleton.shards[name].size for name in self._on_disk)
        if free + present < needed:
            raise OutputError(
                self._skeleton.path,
                "no space for two shards",
                expected=f"{needed:,} bytes",
                found=f"{free:,} free",
                fix="free space, or set HF_HOME to another disk",
            )

    def _run(self) -> None:
        """Download one shard after another, while there is room and a use for them."""
        try:
            while (name := self._wait_for_work()) is not None:
                use = self._fetch(name)
                with self._changed:
                    self._on_disk[name] = use
                    self._changed.notify_all()
        except _Closing:
            return
        except BaseException as error:  # threads that wait for a shard raise it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_work(self) -> str | None:
        """Wait for a shard to download and return its name; None at the end."""
        with self._changed:
            while not self._closing:
                if (name := self._next_download()) is not None:
                    return name
                self._changed.wait()
        return None

    def _fetch(self, name: str) -> FileLock:
        """Download shard ``name``, unless another process has done so; begin to use it."""
        path = self._skeleton.path / name
        with self._lock(name):
            if not path.exists():
                downloaded = self._skeleton.path / HUB_FOLDER / name
                downloaded.unlink(missing_ok=True)
                self._skeleton.shards[name].download(downloaded, self._stop_if_closing)
                self._check_header(name, downloaded)
                downloaded.rename(path)
            return self._begin_use(name)

    def _begin_use(self, name: str) -> FileLock:
        """Begin to use a shard on the disk; the caller holds the shard's lock."""
        import tempfile

        descriptor, path = tempfile.mkstemp(USE, f"{name}.", self._skeleton.path / HUB_FOLDER)
        os.close(descriptor)
        use = FileLock(Path(path))
        use.acquire()
        return use

    def _is_used(self, name: str) -> bool:
        """Whether anyone uses a shard; the caller holds its lock. Deletes killed users' files."""
        used = False
        for path in (self._skeleton.path / HUB_FOLDER).glob(f"{glob.escape(name)}.*{USE}"):
            use = FileLock(path)
            if use.try_acquire():
                use.remove()
            else:
                use.close()
                used = True
        return used

    def _check_header(self, name: str, downloaded: Path) -> None:
        """Compare the header with the one read before: the hub may have no digest to check."""
        raw = self._skeleton.raw_header(name)
        with open(downloaded, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length != len(raw) or file.read(len(raw)) != raw:
                raise CheckpointError(
                    self._skeleton.shards[name].where,
                    "is not the shard whose header was read",
                    fix=f"delete {self._skeleton.path} and run again",
                )

    def _next_download(self) -> str | None:
        """The shard to download now, or None; deletes another one if room is needed."""
        waiting = {n for n, count in self._leased.items() if count and n not in self._on_disk}
        missing = waiting.union(n for n in self._uses if n not in self._on_disk and self._needed(n))
        if not missing:
            return None
        name = min(missing, key=lambda n: (n not in waiting, self._next_use(n)))
        if len(self._on_disk) < CAPACITY:
            return name
        idle = [n for n in self._on_disk if not self._leased[n]]
        last = max(idle, key=self._next_use, default=None)
        if last is not None and (name in waiting or self._next_use(last) > self._next_use(name)):
            self._release(last)
            return name
        return name if name in waiting and last is None else None

    def _step_of(self, names: Collection[str]) -> int | None:
        """The next step that uses one of ``names``."""
        with self._changed:
            first = min((self._next_use(name) for name in names), default=math.inf)
        return None if math.isinf(first) else int(first)

    def _next_use(self, name: str) -> float:
        """The step that needs ``name`` next; infinity where none does."""
        uses = self._uses.get(name, [])
        index = bisect_left(uses, self._position)
        return uses[index] if index < len(uses) else math.inf

    def _needed(self, name: str) -> bool:
        return bool(self._leased[name]) or not math.isinf(self._next_use(name))

    def _release_unneeded(self) -> None:
        for name in [name for name in self._on_disk if not self._needed(name)]:
            self._release(name)

    def _release(self, name: str, *, delete: bool = True) -> None:
        use = self._on_disk.pop(name)
        with self._lock(name):
            use.remove()
            if delete and not self._is_used(name):  # else the last user will delete it
                (self._skeleton.path / name).unlink(missing_ok=True)

    def _remove_incomplete(self, keep: Collection[str]) -> None:
        """Delete unfinished downloads that no process continues."""
        for path in (self._skeleton.path / HUB_FOLDER).glob(f"*{INCOMPLETE}"):
            name = path.name.removesuffix(INCOMPLETE)
            lock = self._lock(name)
            if name not in keep and lock.try_acquire():
                path.unlink(missing_ok=True)
            lock.close()

    def _lock(self, name: str) -> FileLock:
        return FileLock(self._skeleton.path / HUB_FOLDER / f"{name}.lock")

    def _stop_if_closing(self, nbytes: int) -> None:
        if self._closing:
            raise _Closing


class _Closing(Exception):
    """Ends a download that is no longer needed."""
