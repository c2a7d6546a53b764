"""Chromium without a window, where it is installed."""

import contextlib
import shutil

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@contextlib.contextmanager
def chromium():
    """A browser, or the test is skipped with the reason."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright, of the extra [dev]")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=program, args=OPTIONS)
        except playwright.Error as error:
            pytest.skip(f"no Chromium to be driven: {error.message.splitlines()[0]}")
        yield browser
        browser.close()
