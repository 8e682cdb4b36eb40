"""A JupyterLab server and a headless Chromium for the browser tests, both private to the test run."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

REPO = Path(__file__).resolve().parents[2]
SCREENSHOTS = Path(__file__).resolve().parent / "screenshots"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# The texts and the marks of every figure on the page, as strings to compare. A point that moves has another transform only.
FIGURES = (
    "[...document.querySelectorAll('.labkit-live .js-plotly-plot')].map(p => "
    "[...p.querySelectorAll('text')].map(t => t.textContent).join('|') + "
    "[...p.querySelectorAll('.bars path, .scatterlayer path')]"
    ".map(t => t.getAttribute('d') + t.getAttribute('transform')).join('|'))"
)


@pytest.fixture(scope="session")
def chromium():
    """Path of a Chromium. Where there is none the tests are skipped and say so; in CI that is a failure."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    say("No Chromium was found for the browser tests: install chromium or google-chrome.")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A JupyterLab server on a free port, on a copy of the notebooks, with its own settings and workspace."""
    home = tmp_path_factory.mktemp("jupyter")
    root = home / "notebooks"
    shutil.copytree(REPO / "notebooks", root) if (REPO / "notebooks").is_dir() else root.mkdir()
    _cache(home / "cache")
    settings = home / "settings"
    quiet = {
        "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
    }
    for plugin, values in quiet.items():
        path = settings / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = os.urandom(16).hex()
    env = dict(os.environ, JUPYTER_CONFIG_DIR=str(home / "config"), IPYTHONDIR=str(home / "ipython"))
    env["JUPYTER_RUNTIME_DIR"] = str(home / "runtime")
    env["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [env.get("PYTHONPATH")])])
    env["LABKIT_CACHE"] = str(home / "cache")
    env.pop("LABKIT_STATIC", None)
    log = home / "server.log"
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyter", "lab", "--no-browser", f"--port={port}", "--ip=127.0.0.1", "--allow-root"]
        + [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}", "--ServerApp.port_retries=0"]
        + [f"--LabApp.user_settings_dir={settings}", f"--LabApp.workspaces_dir={home / 'workspaces'}"]
        + ["--expose-app-in-browser", "--LabApp.extension_manager=readonly"],
        env=env,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(f"{url}/api/status?token={token}", process, log)
        yield Server(url, token, root)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _cache(folder: Path) -> None:
    """The user's cache with its models and assets, but a store of results of its own."""
    from labkit.paths import cache

    folder.mkdir()
    for entry in cache().iterdir():
        if not entry.name.startswith("results.sqlite"):
            (folder / entry.name).symlink_to(entry)


def _wait(url: str, process, log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start within {seconds:.0f} s:\n{log.read_text()[-3000:]}")


class Server:
    def __init__(self, url: str, token: str, root: Path):
        self.url, self.token, self.root = url, token, root


@pytest.fixture(scope="session")
def browser(chromium):
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def lab(server, browser):
    """Opens notebooks: ``lab("00_start_here.ipynb") -> Notebook``; closes page and kernel afterwards."""
    opened = []

    def open_(name: str, dark: bool = False) -> Notebook:
        opened.append(Notebook(server, browser, name, dark))
        return opened[-1]

    yield open_
    for notebook in opened:
        notebook.close()


class Notebook:
    """One notebook in one page: run it, look at it, move its controls, and keep what the console says."""

    def __init__(self, server: Server, browser, name: str, dark: bool = False):
        self.server, self.name, self.errors = server, name, []
        self.page = browser.new_page(viewport={"width": 1500, "height": 1300})
        self.page.on(
            "console", lambda m: self.errors.append(f"{m.text} ({m.location['url']})") if m.type == "error" else None
        )
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(f"{server.url}/lab/tree/{name}?token={server.token}&reset")
        self.page.wait_for_selector(".jp-NotebookPanel:visible .jp-Cell", timeout=180_000)
        self.page.wait_for_function("window.jupyterapp !== undefined")
        theme = "JupyterLab Dark" if dark else "JupyterLab Light"  # said each time, since the server remembers it
        self.page.evaluate(f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
        self.page.wait_for_function(
            "() => { const s = window.jupyterapp.shell.currentWidget?.sessionContext;"
            " return s && s.session && s.session.kernel && s.session.kernel.status === 'idle' }",
            timeout=180_000,
        )

    def run_all(self, timeout: float = 600) -> None:
        """Run > Run All Cells, as a student does; returns when the kernel has finished, fails when a cell did."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        cells = (
            "[...window.jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type === 'code')"
            ".filter(c => c.sharedModel.source.trim())"
        )
        kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"
        self.page.wait_for_function(
            f"() => {cells}.every(c => c.executionCount) && {kernel} === 'idle'"
            f" || {cells}.some(c => c.outputs.toJSON().some(o => o.output_type === 'error'))",
            timeout=1000 * timeout,
        )
        failed = self.page.evaluate(
            f"() => {cells}.flatMap(c => c.outputs.toJSON()).filter(o => o.output_type === 'error')"
            ".map(o => o.ename + ': ' + o.evalue)"
        )
        assert not failed, f"{self.name}: {failed}"

    def text(self, part: str) -> str:
        """What a part of the panel says: "sentence", "status", "ask", "table" or "progress"."""
        return self.page.locator(f".labkit-at-{part}").first.inner_text()

    def slider(self, label: str):
        """The handle of the slider with this label."""
        row = self.page.locator(".widget-hslider", has=self.page.locator(f".widget-label:text-is('{label}')"))
        return row.first.locator(".noUi-handle")

    def press(self, label: str, key: str, timeout: float = 120) -> float:
        """Press an arrow key on a slider and wait for the sentence to change: ms from the event to the new label."""
        handle = self.slider(label)
        handle.scroll_into_view_if_needed()
        handle.focus()
        self.page.evaluate(
            """() => {
                const label = document.querySelector('.labkit-at-sentence'), old = label.innerText;
                window.moved = window.answered = null;
                const clock = () => { window.moved = performance.now() };
                document.addEventListener('keydown', clock, {capture: true, once: true});
                const watch = new MutationObserver(() => {
                    if (label.innerText !== old) { window.answered = performance.now(); watch.disconnect() }
                });
                watch.observe(label, {childList: true, subtree: true, characterData: true});
            }"""
        )
        handle.press(key)
        self.page.wait_for_function("window.answered !== null", timeout=1000 * timeout)
        return self.page.evaluate("window.answered - window.moved")

    def click(self, label: str) -> None:
        """Click one of the panel's buttons."""
        self.page.locator(".labkit-live button.jupyter-button:visible", has_text=label).click()

    def figures(self) -> list[str]:
        """The texts in each plotly figure of the panel: what a reader can see there."""
        return self.page.evaluate(FIGURES)

    def answered_ms(self) -> float:
        """What the panel says it took to answer, in Python."""
        return float(re.search(r"answered in (\d+) ms", self.text("status"), re.IGNORECASE).group(1))

    def wait_for_figures(self, count: int, seconds: float = 180) -> None:
        """Wait until the panel is drawn at full height, and bring it into view."""
        drawn = "p.querySelector('.bars path, .scatterlayer path') && p.clientHeight > 200"
        self.page.wait_for_function(
            f"[...document.querySelectorAll('.labkit-live .js-plotly-plot')].filter(p => {drawn}).length === {count}",
            timeout=1000 * seconds,
        )
        self.page.locator(".labkit-live").first.scroll_into_view_if_needed()

    def wait_for_new_figures(self, old: list[str], seconds: float = 180) -> None:
        """Wait until a figure's texts, bars or points differ from what ``figures()`` gave before."""
        self.page.wait_for_function(f"old => ({FIGURES}).some((f, i) => f !== old[i])", arg=old, timeout=1000 * seconds)

    def wait_for_sentence(self, start: str, seconds: float = 60) -> None:
        self.wait_for_text("sentence", "^" + re.escape(start), seconds)

    def wait_for_text(self, part: str, pattern: str, seconds: float = 60) -> None:
        """Wait until a part of the panel matches a regular expression."""
        self.page.wait_for_function(
            "([part, pattern]) => new RegExp(pattern).test(document.querySelector('.labkit-at-' + part).innerText)",
            arg=[part, pattern],
            timeout=1000 * seconds,
        )

    def screenshot(self, name: str) -> Path:
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def close(self) -> None:
        """Shut the kernel down and close the page."""
        try:
            self.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        finally:
            self.page.close()
