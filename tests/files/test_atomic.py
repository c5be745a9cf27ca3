"""Files are written whole or not at all."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from surgery.errors import OutputError
from surgery.files.atomic import NewFile, move_into_place, new_file, sync_directory, write_atomic
from surgery.plot import saved_figure
from surgery.stats.channel_stats import save_arrays


def broken() -> Iterator[bytes]:
    yield b"half"
    raise ValueError("no more")


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, [b"o", b"ld"])
    with pytest.raises(ValueError, match="no more"):
        write_atomic(path, broken())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_what_the_system_refuses_names_the_file_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if name == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_arrays(tmp_path / "file", {"a": np.zeros(2)}, {})
    assert caught.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", ["write_atomic", "move_into_place"])
def test_the_file_is_synced_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    path, real = tmp_path / "file", os.fsync
    done: list[tuple[str, bool]] = []

    def note(descriptor: int) -> None:
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        done.append((kind, path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    if write == "write_atomic":
        write_atomic(path, b"new")
    else:
        (tmp_path / "arrived").write_bytes(b"new")
        move_into_place(tmp_path / "arrived", path)
    assert path.read_bytes() == b"new"
    assert done == [("file", False), ("directory", True)]


def test_two_writers_of_one_name_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with new_file(path) as one, new_file(path) as other:
        one.file.write(b"one")
        other.file.write(b"other")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_runs_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    path, running = tmp_path / "file", NewFile(tmp_path / "file")
    outside = tmp_path / "outside"
    names = ("file.0123abcd.tmp", "file.tmp", "file.x.tmp", "other.0123abcd.tmp", "outside")
    left, *others = (tmp_path / name for name in names)
    for each in (left, *others):
        each.write_bytes(b"mine")
    link = tmp_path / "file.89abcdef.tmp"
    link.symlink_to(outside)
    write_atomic(path, b"new")
    assert not left.exists()
    assert {each.read_bytes() for each in others} == {b"mine"}
    assert link.is_symlink()
    running.file.write(b"still running")
    running.commit()
    assert path.read_bytes() == b"still running"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_syncs_no_directory_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with nullcontext() if code == errno.EINVAL else pytest.raises(OSError, match="error"):
        sync_directory(tmp_path)


def test_a_picture_that_cannot_be_drawn_leaves_no_file(tmp_path: Path) -> None:
    for name, harm in (("a.nonsense", "cannot be drawn"), ("a.png", "drawing")):
        with (  # noqa: PT012
            pytest.raises((OutputError, KeyError), match=harm),
            saved_figure(tmp_path / name, 1, 1) as figure,
        ):
            figure.add_subplot()
            if harm == "drawing":
                raise KeyError(harm)
    assert not list(tmp_path.iterdir())
    with saved_figure(tmp_path / "a.png", 1, 1) as figure:
        figure.add_subplot()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    for path in (Path(os.devnull), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            write_atomic(path, b"x")
    assert not Path(os.devnull).is_file()
