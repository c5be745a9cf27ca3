"""Resolve MODEL, a directory or a model id on the hub, to a local directory."""

import re
import sys
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, did_you_mean
from surgery.files.atomic import write_atomic
from surgery.files.model_files import (
    ADAPTER_NAME,
    CONFIG_NAME,
    GLINER_NAME,
    INDEX_NAME,
    JSON_NAMES,
    MODELOPT_NAME,
    MODULE_FILE,
    MODULES_NAME,
    SINGLE_NAME,
    TEMPLATE,
    config_path,
    modules_of,
    weight_map_of,
)
from surgery.files.strict_json import read_json
from surgery.hub.remote_file import TRIES, RemoteFile, client_errors, hub_error, retried
from surgery.hub.skeleton import LIBRARY, Skeleton, download_small

PATTERNS = [*JSON_NAMES, ADAPTER_NAME, MODELOPT_NAME, "*.safetensors", "merges.txt", "vocab.txt"]
PATTERNS += [
    "*.jinja",
    "*.model",
    "*.spm",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "COPYRIGHT*",
]
"""Files that pruning reads or carries over, or says something about."""

IGNORED = ["*/*", ".*", "consolidated*"]
"""Folders, and weights a second time in another layout; "*" alone matches across folders. The
folders that are wanted are that of ``TEMPLATE`` and those that modules.json names."""

FIRST_TRIES = 2
"""Attempts to reach the hub before it has answered once; most names without an answer are typos."""

COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_model(repo: str, revision: str | None) -> tuple[Path, str]:
    """Return the directory of a model on the hub and its commit.

    The directory is the snapshot in huggingface_hub's cache if that has all shards. Otherwise it
    is a skeleton among huggingface_hub's assets, with what inspecting and planning need. If the hub
    does not answer, an earlier directory of the same commit is used.

    Raises:
        CheckpointError: the hub has no such checkpoint, or refuses it.
    """
    from huggingface_hub.utils import validate_repo_id

    where = f"{repo}@{revision or 'main'}"
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise hub_error(where, error) from error
    pinned = revision if revision and COMMIT.fullmatch(revision) else None
    known = pinned or _known_commit(repo, revision or "main")
    earlier = _earlier_copy(repo, known) if known else None
    if pinned and earlier:
        return earlier, pinned
    try:  # as huggingface_hub does: do not wait long where a copy exists
        tries = 1 if earlier else TRIES
        commit, files = retried(lambda: _listing(repo, revision), tries, FIRST_TRIES)
    except (OSError, ValueError, client_errors()) as error:
        if known and earlier:
            return earlier, known
        raise hub_error(where, error) from error
    _record_commit(repo, revision or "main", commit)
    if snapshot := _complete_snapshot(repo, commit):
        small = [file for file in files if not _is_shard(file)]
        plain = [file.name for file in small if not MODULE_FILE.fullmatch(file.name)]
        download_snapshot(repo, commit, plain)
        if len(plain) < len(small):
            names = [file.name for file in _without_other_folders(snapshot, small)]
            download_snapshot(repo, commit, names)
        return snapshot, commit
    path = _assets(repo, commit)
    if Skeleton.at(path) is None:
        _build_skeleton(path, where, files)
    return path, commit


def download_snapshot(repo: str, commit: str, names: Sequence[str]) -> Path:
    """Bring what is missing of the files ``names`` of a model into the user's cache.

    Raises:
        CheckpointError: the hub refuses the download.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        path = snapshot_download(repo, revision=commit, allow_patterns=[*map(escape, names)])
    except (OSError, ValueError) as error:
        raise hub_error(f"{repo}@{commit}", error) from error
    return Path(path)


def _listing(repo: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """Return the commit of a revision, and those of its files that pruning needs."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import filter_repo_objects

    api, timeout = HfApi(library_name="compact-surgery"), constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("the answer does not describe a model") from error
    if not COMMIT.fullmatch(info.sha or ""):
        raise ValueError(f"the hub names no commit: {info.sha!r}")
    names = {sibling.rfilename: sibling for sibling in info.siblings or []}
    wanted = [*filter_repo_objects(names, allow_patterns=PATTERNS, ignore_patterns=IGNORED)]
    wanted += filter(TEMPLATE.fullmatch, names)
    wanted += filter(MODULE_FILE.fullmatch, names) if MODULES_NAME in names else ()
    return str(info.sha), [_remote_file(repo, str(info.sha), names[name]) for name in wanted]


def _remote_file(repo: str, commit: str, sibling: Any) -> RemoteFile:
    size, digest = sibling.size, sibling.blob_id
    if sibling.lfs is not None:
        size, digest = sibling.lfs.size, sibling.lfs.sha256
    if type(size) is not int or size < 0 or not isinstance(digest, str | None):
        raise ValueError(f"the hub gives no size of {sibling.rfilename}")
    return RemoteFile(repo, commit, sibling.rfilename, size, digest)


def _is_shard(file: RemoteFile) -> bool:
    """Whether a file holds weights of the model; those of a module after it are small."""
    return file.name.endswith(".safetensors") and not MODULE_FILE.fullmatch(file.name)


def _without_other_folders(path: Path, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Return ``files`` without those in folders that modules.json in ``path`` does not name."""
    folders = tuple(f"{name}/" for name in modules_of(path))
    return [f for f in files if not MODULE_FILE.fullmatch(f.name) or f.name.startswith(folders)]


def _build_skeleton(path: Path, where: str, files: Sequence[RemoteFile]) -> None:
    weights = {file.name: file for file in files if _is_shard(file)}
    small = {file.name: file for file in files if file.name not in weights}
    if MODULES_NAME in small:
        download_small(path, [small[MODULES_NAME]])
    small = {file.name: file for file in _without_other_folders(path, list(small.values()))}
    if SINGLE_NAME in weights:
        shards = [weights[SINGLE_NAME]]
    elif INDEX_NAME in small:
        download_small(path, [small[INDEX_NAME]])
        names = dict.fromkeys(weight_map_of(path, read_json(path / INDEX_NAME)).values())
        shards = [weights[name] for name in names if name in weights]
    else:
        shards = []
    if not shards:
        raise CheckpointError(
            where,
            "has no weights",
            expected=f"{SINGLE_NAME} or {INDEX_NAME}",
            fix="name a repository of safetensors",
        )
    Skeleton.build(path, list(small.values()), shards)


def _earlier_copy(repo: str, commit: str) -> Path | None:
    """A directory of this commit from an earlier run or download; planning needs no hub for it."""
    if snapshot := _complete_snapshot(repo, commit):
        return snapshot
    path = _assets(repo, commit)
    return path if Skeleton.at(path) else None


def _complete_snapshot(repo: str, commit: str) -> Path | None:
    """The snapshot in huggingface_hub's cache, if it has the config and every shard."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repo, n, revision=commit) for n in (CONFIG_NAME, GLINER_NAME))
    path = next((Path(config).parent for config in found if isinstance(config, str)), None)
    if path is None:
        return None
    if (path / SINGLE_NAME).exists():
        return path
    if not (path / INDEX_NAME).exists():
        return None
    names = set(weight_map_of(path, read_json(path / INDEX_NAME)).values())
    return path if all((path / name).exists() for name in names) else None


def _assets(repo: str, commit: str) -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path(LIBRARY, repo, commit)


def _record_commit(repo: str, revision: str, commit: str) -> None:
    write_atomic(_assets(repo, "refs") / revision.replace("/", "--"), commit.encode())


def _known_commit(repo: str, revision: str) -> str | None:
    """The commit of ``revision`` when we or huggingface_hub last asked the hub."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    paths = (_assets(repo, "refs") / revision.replace("/", "--"), cache / "refs" / revision)
    for path in paths:
        found = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        if COMMIT.fullmatch(found):
            return found
    return None


HUB_ID = re.compile(r"(?P<repo>(\w[\w.-]*/)?\w[\w.-]*)(@(?P<revision>(?!/|.*\.\.)[\w./-]+))?")


def resolve_model(model: str) -> tuple[Path, str]:
    """Return the directory of ``model``, and a name that finds the same model again.

    For a hub id, everything but the weights is downloaded, with the user's token, mirror and
    offline settings. Its name is ``org/name@commit``. A few old models have no organization.

    Raises:
        CheckpointError: neither a directory nor a checkpoint on the hub.
    """
    path = Path(model)
    if path.is_dir():
        return path, str(path.resolve())
    if path.is_file():
        raise CheckpointError(
            path, "is a file", expected="the directory of a model", fix=_file_advice(path)
        )
    match = HUB_ID.fullmatch(model)
    if not match or path.exists():
        raise CheckpointError(
            model,
            "is neither a directory nor a hub id",
            expected="DIR or org/name[@revision]",
            fix=f"{did_you_mean(path)}check the spelling",
        )
    try:
        directory, commit = fetch_model(match["repo"], match["revision"])
    except CheckpointError as error:
        if not (close := did_you_mean(path)):
            raise
        raise CheckpointError(
            error.where, error.problem, found=error.found, fix=f"{close}{error.fix}"
        ) from error
    return directory, f"{match['repo']}@{commit}"


def _file_advice(path: Path) -> str:
    """What to do where a file is named in place of a model."""
    if path.suffix == ".gguf":
        return "GGUF files are not read: prune the Hugging Face checkpoint, then convert the result"
    if config_path(path.parent).exists():
        return f"name {path.parent}"
    if path.suffix == ".json":
        return "name the model's directory, or look into a plan with `removed` or `channels`"
    return "name the directory that has config.json and the weights"


def resolve_source(source: str, moved: Path | str | None = None) -> Path:
    """Return the directory of a plan's source: a directory, or a hub id with its commit.

    A bare name is looked up nowhere: published plans name a directory of another machine so.

    Args:
        source: As the plan names it.
        moved: Where it is now, or its hub id; None is as the plan says.

    Raises:
        CheckpointError: neither a directory nor a checkpoint on the hub.
    """
    if moved is not None:
        return resolve_model(str(moved))[0]
    if "@" not in source and not Path(source).exists():
        raise CheckpointError(
            source,
            "is the plan's source, and neither a directory nor a hub id with its commit",
            fix=f"{did_you_mean(source)}check that it is still there, or name it with `source`",
        )
    return resolve_model(source)[0]


def source_at_hand(source: str) -> Path | None:
    """Return the directory of a plan's source, or None where it is gone or is a name alone."""
    if not Path(source).is_absolute() and not ("@" in source and HUB_ID.fullmatch(source)):
        return None
    try:
        return resolve_source(source)
    except CheckpointError:
        return None
