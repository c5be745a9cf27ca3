"""Chromium, without a window and without a network, on a page of ours."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
REQUIRED = "COMPACT_SURGERY_PAGE"
"""Where this variable is set, as ``make test-page`` does, a missing Chromium is a failure."""


@dataclass
class Opened:
    """A page in the browser, and what went wrong on it."""

    page: Any
    """Of playwright."""
    faults: list[str] = field(default_factory=list)
    """Messages on the console and errors of scripts."""
    requests: list[str] = field(default_factory=list)


def need_chromium() -> str:
    """Return where Chromium is; skip the test where it, or what drives it, is not installed."""
    missing = "chromium" if CHROMIUM is None else "" if find_spec("playwright") else "playwright"
    if missing and os.environ.get(REQUIRED):
        pytest.fail(f"{missing} is not installed")
    if missing:
        pytest.skip(f"{missing} is not installed (make test-page installs it)")
    return str(CHROMIUM)


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield the browser."""
    executable = need_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Any, path: Path, **settings: Any) -> Opened:
    """Open a file, and note all that it logs and asks for."""
    opened = Opened(browser.new_page(**settings))
    opened.page.on("console", lambda message: opened.faults.append(message.text))
    opened.page.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.goto(path.absolute().as_uri())
    return opened
