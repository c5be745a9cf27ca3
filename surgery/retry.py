"""Requests to the hub, tried again with backoff where the fault may pass."""

import re
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from surgery.errors import CheckpointError

Result = TypeVar("Result")

TRIES = 5
"""Attempts without any progress."""
FIRST_WAIT_SECONDS = 1.0
"""Doubled after each failure in a row, unless the hub says how long."""
MOST_WAIT_SECONDS = 300.0
"""The hub counts requests in windows of five minutes."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that a later attempt may not meet."""


class Garbled(Exception):
    """An answer that HTTP does not allow, or that ended early."""


class Attempts:
    """Failures in a row, and how long to wait after each."""

    def __init__(self, tries: int = TRIES) -> None:
        self.failures = 0
        self._tries = tries

    def wait(self, error: Exception) -> None:
        """Sleep after a failure that may pass; raise ``error`` where it will not, or often did."""
        response = getattr(error, "response", None)
        if response is not None and response.status_code not in PASSING:
            raise error
        self.failures += 1
        if self.failures >= self._tries:
            raise error
        told = _told_seconds(response.headers) if response is not None else None
        wait = FIRST_WAIT_SECONDS * 2 ** (self.failures - 1) if told is None else told
        time.sleep(min(wait, MOST_WAIT_SECONDS))


def retried(call: Callable[[], Result], tries: int = TRIES) -> Result:
    """Return what ``call`` returns, tried again after failures that may pass."""
    attempts, errors = Attempts(tries), (Garbled, client_errors())
    while True:
        try:
            return call()
        except errors as error:
            attempts.wait(error)


def client_errors() -> type[Exception]:
    """The base of the HTTP client's errors, whichever client huggingface_hub uses."""
    from huggingface_hub.utils import get_session

    client = import_module(type(get_session()).__module__.partition(".")[0])
    base: type[Exception] = client.HTTPError
    return base


def refused(where: object, error: Exception) -> CheckpointError:
    """What the hub's ``error`` means for the user, in one line."""
    return CheckpointError(
        where,
        "cannot be had from the hub",
        found=reason_of(error),
        fix="check the name, your token and the connection, or name a local directory",
    )


def reason_of(error: Exception) -> str:
    """The part of the hub's message that says what is wrong."""
    # "404 Client Error. (Request ID: …)", an empty line, then what it means
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _told_seconds(headers: Any) -> float | None:
    """Seconds to wait by Retry-After, or by the hub's own RateLimit where nothing remains."""
    told = headers.get("Retry-After", "")
    if re.fullmatch(r"\d+", told):
        return float(told)
    limit = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None
