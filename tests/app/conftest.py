"""A browser and a server with the demo pipeline, shared by the tests of this folder."""

import os
import shutil
from zlib import crc32

import pytest
from support.app_server import AppServer
from support.web_page import SCHEMES, SIZES, Visitor

# Debian's browser. Where CLEAR_DIT_NEEDS_BROWSER is set, tests fail without it.
CHROMIUM = shutil.which("chromium")
# How wide the page is, and light or dark, where a test does not say it.
LOOKS = [f"{size}-{scheme}" for size in SIZES for scheme in SCHEMES]


def pytest_generate_tests(metafunc):
    """A test that opens the page has one look of `LOOKS`, by its name; CLEAR_DIT_LOOK=all: each."""
    if "look" not in metafunc.fixturenames:
        return
    asked = os.environ.get("CLEAR_DIT_LOOK")
    assert asked in (None, "all", *LOOKS), f"CLEAR_DIT_LOOK={asked}"
    if asked == "all" and not {"size", "scheme"} & set(metafunc.fixturenames):
        looks = LOOKS
    elif asked in LOOKS:
        looks = [asked]
    else:
        looks = [LOOKS[crc32(metafunc.function.__name__.encode()) % len(LOOKS)]]
    metafunc.parametrize("look", looks)


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
def visit(browser, app_server, look):
    """Opens the page as a new visitor, see `Visitor`; in the end nothing has gone wrong there."""
    visitors = []
    look = dict(zip(("size", "scheme"), look.split("-"), strict=True))

    def opened(*, part="", jobs=None, setup=None, **options):
        visitors.append(Visitor(browser, app_server, **look | options))
        return visitors[-1].open(part, jobs, setup)

    yield opened
    for visitor in visitors:
        visitor.close()
