"""A wheel holds every package, and the command runs from it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support import ROOT

PACKAGES = ("surgery", "calib")
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")
OFFLINE = ("--no-deps", "--no-index")
WHERE = "import surgery, calib; print(surgery.__file__, calib.__file__, sep='\\n')"


def call(*command: object, cwd: Path) -> str:
    """Run a program that sees nothing of this checkout, and return what it prints."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(root: Path) -> set[str]:
    """Files of the packages below ``root``, relative to it."""
    return {
        path.relative_to(root).as_posix()
        for package in PACKAGES
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources: building leaves files beside them."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    build = ("wheel", ".", "--no-build-isolation", *OFFLINE, "--wheel-dir", output)
    call(sys.executable, *PIP, *build, cwd=source)
    (made,) = output.glob("*.whl")
    return made


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files_of(ROOT)
    assert names >= {f"{package}/py.typed" for package in PACKAGES}
    assert "surgery/families/derived.json" in names
    assert len(names) > 50


def test_the_command_runs_from_the_wheel(wheel: Path, tmp_path: Path, llama: Path) -> None:
    """In an environment of its own, which takes the dependencies from this one."""
    place = tmp_path / "env"
    venv.create(place, symlinks=os.name != "nt")
    paths = sysconfig.get_paths(vars={"base": str(place), "platbase": str(place)})
    scripts, packages = Path(paths["scripts"]), Path(paths["purelib"])
    python = scripts / Path(sys.executable).name
    call(sys.executable, *PIP, "--python", python, "install", *OFFLINE, wheel, cwd=tmp_path)
    assert files_of(packages) == files_of(ROOT)
    # Only as a path: an editable install hooks in by .pth files, which are not read from there.
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(others)), "utf-8")
    found = call(python, "-c", WHERE, cwd=tmp_path).splitlines()
    assert all(Path(file).is_relative_to(packages) for file in found), found
    shown = call(scripts / "compact-surgery", "--help", cwd=tmp_path)
    assert "Usage: compact-surgery" in shown
    assert "apply" in shown
    assert "vocabulary" in call(scripts / "compact-surgery", "inspect", llama, cwd=tmp_path)
