"""Upload a finished output to the hub."""

import re
import sys
from pathlib import Path

from surgery.errors import OutputError
from surgery.files.model_files import INDEX_NAME, TEMPLATE_FOLDER
from surgery.hub.remote_file import client_errors, reason_of, retried

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""A model on the hub, without its revision."""

STALE = ["*.safetensors", INDEX_NAME, f"{TEMPLATE_FOLDER}/*"]
"""Weights and chat templates that an earlier push left and this one does not have: loaders would
take them."""

SILENCE_SECONDS = 120
"""Timeout of an upload; the hub needs time for a commit of many large files."""


def check_push(repo: str) -> None:
    """Check before the work that an upload is possible.

    Raises:
        OutputError: not a repository name, no token, or offline.
    """
    from huggingface_hub import constants, get_token

    if not HUB_NAME.fullmatch(repo):
        raise OutputError(repo, "is not a repository name", expected="org/name", fix="correct it")
    if constants.HF_HUB_OFFLINE:
        raise OutputError(repo, "cannot be uploaded offline", fix="unset HF_HUB_OFFLINE")
    if not get_token():
        raise OutputError(repo, "needs a token to upload", fix="run hf auth login, or set HF_TOKEN")


def push(directory: Path, repo: str) -> str:
    """Upload the checkpoint in ``directory`` as one commit and return its address.

    The repository is created if there is none. Large files that it has already are not sent
    again.

    Raises:
        OutputError: the upload failed; the output in ``directory`` is whole.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, get_session

    if not sys.stderr.isatty():
        disable_progress_bars()
    get_session().timeout = SILENCE_SECONDS  # by default the library waits for ever
    api = HfApi(library_name="compact-surgery")
    try:
        retried(lambda: api.create_repo(repo, exist_ok=True))
        commit = retried(
            lambda: api.upload_folder(
                repo_id=repo,
                folder_path=directory,
                commit_message="Pruned with compact-surgery",
                delete_patterns=STALE,
            )
        )
    except (OSError, ValueError, RuntimeError, client_errors()) as error:
        raise OutputError(
            repo,
            "was not uploaded",
            found=reason_of(error),
            fix=f"check the name and your token, then hf upload {repo} {directory}",
        ) from error
    return str(commit.commit_url)
