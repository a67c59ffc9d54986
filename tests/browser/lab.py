"""JupyterLab in a real Chromium: a server on a folder, a page, and a notebook run in it, for the tests of controls.

    with serve(tmp_path, root) as url, browser_page() as page:
        write(root / "controls.ipynb", ["import workbench as wb", "…"])
        run_all(page, url, "controls.ipynb")

Needs a chromium and the Python package playwright; tests that import this are skipped without them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from helpers import free_port

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it drives the browser")
WAIT = 240_000  # ms; a busy machine computes slowly
playwright.expect.set_options(timeout=WAIT)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NONE = CHROMIUM is None and not list(Path.home().glob(".cache/ms-playwright/chromium*"))  # nor playwright's own
MARKS = [pytest.mark.slow, pytest.mark.skipif(NONE, reason="no chromium on this machine; make browser installs one")]
LOCAL = ("http://127.0.0.1:", "ws://127.0.0.1:", "blob:", "data:")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SCREENS = Path(__file__).parents[2] / "runs" / "screens"  # kept, to be looked at
CONNECTED = """() => {
    const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
    return kernel?.connectionStatus === "connected" && kernel.status === "idle";
}"""  # asked of the application: what the page shows says idle before there is a kernel
WEBGL = ["--enable-unsafe-swiftshader"]  # in software, beside a page that is drawn without a GPU


def write(path: Path, cells: Sequence[str]) -> None:
    """A notebook of code cells; what is indented like the test around them is brought to the margin."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(re.sub("\n    ", "\n", cell).strip()) for cell in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@contextmanager
def serve(tmp_path: Path, root: Path) -> Iterator[str]:
    """JupyterLab on a folder, with no one's settings; its address. Its kernels can import the tests' helpers."""
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    whole = {"windowingMode": "none"}  # else cells out of sight are not on the page
    for plugin, settings in (("apputils-extension/notification", quiet), ("notebook-extension/tracker", whole)):
        path = tmp_path / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    port = free_port()
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "IPYTHONDIR": str(tmp_path / "ipython")}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"), "OMP_NUM_THREADS": "1"}
    own |= {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parents[1])]))}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password="]
    command += ["--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={root}"]
    command += ["--LabApp.extension_manager=readonly"]
    command += [f"--{app}.expose_app_in_browser=True" for app in ("LabApp", "JupyterNotebookApp")]
    own |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as in a kernel that no test has started
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(
            command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.1)
        else:
            pytest.fail("JupyterLab did not start:\n" + (tmp_path / "server.log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()  # the server stops its kernels
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def browser_page(width: int = 1280, height: int = 800, *, webgl: bool = False) -> Iterator:
    """A page of a headless Chromium; `webgl` draws by software what needs WebGL.

    `page.outside` has every address asked for that is not this machine's, `page.errors` what scripts raised.
    """
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *(WEBGL if webgl else [])])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(WAIT)
        page.outside, page.errors = [], []
        page.on("request", lambda request: None if request.url.startswith(LOCAL) else page.outside.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        browser.close()


def run_all(page, url: str, notebook: str, *, app: str = "lab/tree") -> None:
    """Open a notebook, run it, and wait until every cell has its number; `app`: "lab/tree", or "notebooks" of Notebook 7."""
    page.goto(f"{url}/{app}/{notebook}?reset")
    page.wait_for_function(CONNECTED)  # else a command to run is lost, without a word
    page.locator(".jp-CodeCell").first.wait_for()
    page.locator("#jp-MainMenu li.lm-MenuBar-item:has-text('Run')").click()
    page.locator("li.lm-Menu-item[data-command='runmenu:run-all']").click()
    numbered = (
        "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].every(p => /\\[\\d+\\]/.test(p.innerText))"
    )
    page.wait_for_function(numbered)


def cell(page, place: int):
    """The place-th code cell."""
    return page.locator(".jp-CodeCell").nth(place)


def shot(page, name: str, part=None) -> None:
    """Keep what is seen, from the top of a part of the page on, as runs/screens/NAME.png."""
    if part is not None:
        part.evaluate("part => part.scrollIntoView({block: 'start'})")
        page.wait_for_timeout(300)
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENS / f"{name}.png")
