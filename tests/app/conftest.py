"""A browser and a server with the demo pipeline, shared by the tests of this folder."""

import os
import shutil

import pytest
from support.app_server import AppServer
from support.web_page import Visitor

# Debian's browser. Where CLEAR_DIT_NEEDS_BROWSER is set, tests fail without it.
CHROMIUM = shutil.which("chromium")
# How wide the page is, and light or dark, where a test does not say it.
LOOK = os.environ.get("CLEAR_DIT_LOOK", "desktop light")


@pytest.fixture(scope="session")
def app_server(tmp_path_factory):
    """With the demo pipeline."""
    with AppServer(tmp_path_factory.mktemp("app") / "out", "--max-pixels", str(2048**2)) as server:
        yield server


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by playwright."""
    if CHROMIUM is None:
        assert "CLEAR_DIT_NEEDS_BROWSER" not in os.environ, "there is no chromium"
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture
def visit(browser, app_server):
    """Opens the page as a new visitor, see `Visitor`; in the end nothing has gone wrong there."""
    visitors = []
    look = dict(zip(("size", "scheme"), LOOK.split(), strict=True))

    def opened(*, part="", jobs=None, setup=None, **options):
        visitors.append(Visitor(browser, app_server, **look | options))
        return visitors[-1].open(part, jobs, setup)

    yield opened
    for visitor in visitors:
        visitor.close()
