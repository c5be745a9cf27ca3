"""Whole shards on this disk while they are used: a directory's own, or one by one from the hub."""

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
from surgery.hub.skeleton import OWN, Skeleton

CAPACITY = 2
"""Shards on the disk: the one that is used and the next, whole or in part."""

SMALL_BYTES = 1 << 20
"""Tensors up to here do not wait for their shard: a norm, or the scales of an FP8 weight."""

USE = ".use"
"""What the names of the files end with that users of a shard hold locks on."""

PATIENCE_SECONDS = 5.0
"""For a download that nobody waits for any more to end; the process' own end will do else."""


class Shards:
    """The shards of a local directory, which are simply there."""

    remote = False

    @staticmethod
    def of(path: Path) -> "Shards":
        """The shards of the model that directory ``path`` holds or stands for."""
        skeleton = Skeleton.at(path)
        return Shards() if skeleton is None else HubShards(skeleton)

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Use them no more."""

    def expect(self, steps: Sequence[Collection[str]]) -> None:
        """Say which shards will be used together, step by step, so that they can be had in time."""

    @contextmanager
    def lease(self, names: Collection[str]) -> Iterator[None]:
        """Have the shards ``names`` under their paths until the block ends."""
        yield

    @contextmanager
    def tensor(self, ref: TensorRef) -> Iterator[TensorRef]:
        """Have the bytes of a tensor where the result says until the block ends."""
        yield ref


class HubShards(Shards):
    """Shards that are downloaded on a thread of their own and deleted when nothing needs them.

    Several processes may use a shard at a time: each then holds a lock of its own, on a file beside
    the shard's lock. Whoever holds the shard's lock downloads the shard, enters as a user of it, or
    leaves, and deletes it where the locks of all users are free. The locks of a process that is
    killed are free.

    Memory of the future is what ``expect`` was told: of two shards that could go, the one goes that
    is needed later. What an interrupted run leaves behind is used or deleted by the next one.
    """

    remote = True

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._changed = Condition()
        self._uses: dict[str, list[int]] = {}
        self._steps: list[frozenset[str]] = []
        self._position = 0
        self._here: dict[str, FileLock] = {}
        self._leased: Counter[str] = Counter()
        self._error: BaseException | None = None
        self._closing = False
        self._thread: Thread | None = None

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Delete what is here; after an error it stays, for the run that goes on."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(0 if error_type else PATIENCE_SECONDS)
        for name in list(self._here):
            self._drop(name, delete=error_type is None)
        if error_type is None:
            self._remove_incomplete(())

    def expect(self, steps: Sequence[Collection[str]]) -> None:
        """Take ``steps`` for all that is to come.

        Raises:
            OutputError: two shards do not fit on the disk.
        """
        with self._changed:
            self._steps, self._position, self._uses = [frozenset(s) for s in steps], 0, {}
            for position, step in enumerate(self._steps):
                for name in step:
                    self._uses.setdefault(name, []).append(position)
            self._start()
            self._drop_unneeded()
            self._changed.notify_all()

    @contextmanager
    def lease(self, names: Collection[str]) -> Iterator[None]:
        """Wait for the shards ``names``, have them until the block ends.

        Raises:
            CheckpointError: the hub does not give one out.
        """
        with self._leased_for(frozenset(names), self._step_of(names)):
            yield

    @contextmanager
    def _leased_for(self, wanted: frozenset[str], step: int | None) -> Iterator[None]:
        """Have ``wanted`` for one of the steps, or for none of them."""
        with self._changed:
            self._start()
            self._position = self._position if step is None else step
            self._leased.update(wanted)
            self._changed.notify_all()
            while not wanted <= self._here.keys() and self._error is None:
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
                self._drop_unneeded()
                self._changed.notify_all()

    @contextmanager
    def tensor(self, ref: TensorRef) -> Iterator[TensorRef]:
        """Have a tensor by its shard; a small one by itself where its shard is not here."""
        name = ref.path.name
        small = ref.nbytes <= SMALL_BYTES
        with self._changed:
            here = name in self._here
            self._leased[name] += here  # so that it stays until the lease
        try:
            if here or not small:
                with self._leased_for(frozenset([name]), None if small else self._step_of([name])):
                    yield ref
                return
        finally:
            with self._changed:
                self._leased[name] -= here
        place = self._skeleton.path / OWN / f"tensor-{os.getpid()}"
        try:
            place.write_bytes(self._skeleton.shards[name].read(ref.start, ref.start + ref.nbytes))
            yield replace(ref, path=place, start=0)
        finally:
            place.unlink(missing_ok=True)

    def _start(self) -> None:
        """Begin with what lies there already, on the first call."""
        if self._thread is not None:
            return
        for name in self._skeleton.shards:
            place = self._skeleton.path / name
            if place.exists():
                with self._lock(name):
                    if place.exists():  # no other process has deleted it meanwhile
                        self._here[name] = self._enter(name)
        upcoming = sorted(self._uses, key=self._next_use)[:CAPACITY]
        self._remove_incomplete(upcoming)
        self._check_space()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _check_space(self) -> None:
        sizes = sorted(shard.size for shard in self._skeleton.shards.values())
        needed, free = sum(sizes[-CAPACITY:]), shutil.disk_usage(self._skeleton.path).free
        there = sum(self._skeleton.shards[name].size for name in self._here)
        if free + there < needed:
            raise OutputError(
                self._skeleton.path,
                "no space for two shards",
                expected=f"{needed:,} bytes",
                found=f"{free:,} free",
                fix="free space, or name another place with HF_HOME",
            )

    def _run(self) -> None:
        """Download one shard after the other, as long as there is room and use for them."""
        try:
            while (name := self._wait_for_work()) is not None:
                use = self._fetch(name)
                with self._changed:
                    self._here[name] = use
                    self._changed.notify_all()
        except _Closing:
            return
        except BaseException as error:  # raised again by whoever waits for a shard
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_work(self) -> str | None:
        """The next shard to download, when there is one; None at the end."""
        with self._changed:
            while not self._closing:
                if (name := self._next_download()) is not None:
                    return name
                self._changed.wait()
        return None

    def _fetch(self, name: str) -> FileLock:
        """Have shard ``name`` whole, by our own hands or those of another process."""
        place = self._skeleton.path / name
        with self._lock(name):
            if not place.exists():
                arrived = self._skeleton.path / OWN / name
                arrived.unlink(missing_ok=True)
                self._skeleton.shards[name].download(arrived, self._stop_if_closing)
                self._check_header(name, arrived)
                arrived.rename(place)
            return self._enter(name)

    def _enter(self, name: str) -> FileLock:
        """Become a user of a shard that is here; its lock is held."""
        import tempfile

        descriptor, path = tempfile.mkstemp(USE, f"{name}.", self._skeleton.path / OWN)
        os.close(descriptor)
        use = FileLock(Path(path))
        use.acquire()
        return use

    def _used(self, name: str) -> bool:
        """Whether anyone uses a shard, whose lock is held; what killed users left is deleted."""
        used = False
        for path in (self._skeleton.path / OWN).glob(f"{glob.escape(name)}.*{USE}"):
            use = FileLock(path)
            if use.try_acquire():
                use.remove()
            else:
                use.close()
                used = True
        return used

    def _check_header(self, name: str, arrived: Path) -> None:
        """A hub that names no digests could still have sent something else."""
        raw = self._skeleton.raw_header(name)
        with open(arrived, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length != len(raw) or file.read(len(raw)) != raw:
                raise CheckpointError(
                    self._skeleton.shards[name].where,
                    "is not the shard whose header was read",
                    fix=f"delete {self._skeleton.path} and run again",
                )

    def _next_download(self) -> str | None:
        """What to download now; makes room for it."""
        waiting = {n for n, count in self._leased.items() if count and n not in self._here}
        missing = waiting.union(n for n in self._uses if n not in self._here and self._needed(n))
        if not missing:
            return None
        name = min(missing, key=lambda n: (n not in waiting, self._next_use(n)))
        if len(self._here) < CAPACITY:
            return name
        idle = [n for n in self._here if not self._leased[n]]
        last = max(idle, key=self._next_use, default=None)
        if last is not None and (name in waiting or self._next_use(last) > self._next_use(name)):
            self._drop(last)
            return name
        return name if name in waiting and last is None else None

    def _step_of(self, names: Collection[str]) -> int | None:
        """The next step that ``names`` belong to."""
        with self._changed:
            first = min((self._next_use(name) for name in names), default=math.inf)
        return None if math.isinf(first) else int(first)

    def _next_use(self, name: str) -> float:
        """The step that needs ``name`` next; infinity where none does."""
        uses = self._uses.get(name, [])
        place = bisect_left(uses, self._position)
        return uses[place] if place < len(uses) else math.inf

    def _needed(self, name: str) -> bool:
        return bool(self._leased[name]) or not math.isinf(self._next_use(name))

    def _drop_unneeded(self) -> None:
        for name in [name for name in self._here if not self._needed(name)]:
            self._drop(name)

    def _drop(self, name: str, *, delete: bool = True) -> None:
        use = self._here.pop(name)
        with self._lock(name):
            use.remove()
            if delete and not self._used(name):  # else another process will delete it
                (self._skeleton.path / name).unlink(missing_ok=True)

    def _remove_incomplete(self, keep: Collection[str]) -> None:
        """Delete cut downloads that nobody is at."""
        for place in (self._skeleton.path / OWN).glob(f"*{INCOMPLETE}"):
            name = place.name.removesuffix(INCOMPLETE)
            lock = self._lock(name)
            if name not in keep and lock.try_acquire():
                place.unlink(missing_ok=True)
            lock.close()

    def _lock(self, name: str) -> FileLock:
        return FileLock(self._skeleton.path / OWN / f"{name}.lock")

    def _stop_if_closing(self, nbytes: int) -> None:
        if self._closing:
            raise _Closing


class _Closing(Exception):
    """Ends a download that nobody waits for any more."""
