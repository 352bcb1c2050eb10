"""Built sites for the tests of this folder, and Chromium over them."""

import fcntl
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("VITX_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def _built(kind: str, folder: Path) -> Path:
    """Build a site into ``folder``, once for all processes of pytest-xdist."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            if kind == "tiny":  # away from the repository, whose cache of rendered notebooks it would empty
                command, place = [sys.executable, str(ROOT / "tests" / "site" / "tiny.py"), str(folder)], folder
            else:
                command, place = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder / "site")], ROOT
            run = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            assert run.returncode == 0, f"the site does not build:\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
            done.touch()
    return folder / "site"


def _site(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if kind == "atlas" and os.environ.get("VITX_SITE"):
        return Path(os.environ["VITX_SITE"]).resolve()
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent
    return _built(kind, base / f"site-{kind}")


@pytest.fixture(scope="session")
def tiny_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the tiny atlas with hostile text in every field (see tiny.py)."""
    return _site("tiny", tmp_path_factory)


@pytest.fixture(scope="session")
def atlas_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real site: built strictly from the cache, or the one in ``$VITX_SITE``."""
    return _site("atlas", tmp_path_factory)


@pytest.fixture(scope="session", params=["tiny", "atlas"])
def site(request: pytest.FixtureRequest) -> Path:
    """Each of the two in turn."""
    return request.getfixturevalue(f"{request.param}_site")


# --- Chromium ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium found: install Debian's chromium or set VITX_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a browser that leaves a page hangs up on its pictures


@pytest.fixture(scope="session")
def serve() -> Iterator[Any]:
    """serve(folder) -> address of a server on this machine."""
    servers: dict[Path, _Server] = {}

    def start(folder: Path) -> str:
        if folder not in servers:
            handler = functools.partial(_Quiet, directory=str(folder))
            servers[folder] = _Server(("127.0.0.1", 0), handler)
            threading.Thread(target=servers[folder].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[folder].server_port}"

    yield start
    for server in servers.values():
        server.shutdown()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Any]:
    """open_page(address, width=..., ...) -> page. Fails at the end on any script error and any request elsewhere."""
    contexts, faults = [], []

    def open_(address: str, width: int = 1280, height: int = 900, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # patience with a busy machine
        page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on(
            "requestfailed",  # a picture that is left behind half loaded is no fault
            lambda request: (
                "ERR_ABORTED" in request.failure or faults.append(f"failed: {request.url} {request.failure}")
            ),
        )
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("http://127.0.0.1:", "file://", "data:", "about:", "blob:"))
                else faults.append(f"asks another host: {request.url}")
            ),
        )
        page.on(
            "response",
            lambda response: faults.append(f"{response.status}: {response.url}") if response.status >= 400 else None,
        )
        page.goto(address)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not faults
