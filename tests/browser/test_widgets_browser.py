"""The controls in JupyterLab, in a real browser: moved by mouse and keyboard, and what changes on the page.

Needs a chromium and the Python package playwright, which the project does not install; skipped without them.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import nbformat
import pytest

from workbench.pool import Pool

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

IMG, MATHS = "<img src=x onerror=window.stranger=1>", r"$\frac{1}{2}$"
CHOSEN = ("first-two-letters-quotes", "first-two-colours-brackets")
CELLS = (
    """
    import workbench as wb
    from workbench.widgets import AdapterChooser, WeightExplorer
    pool = wb.Pool.open("nano")
    base = wb.Base.load(pool.base, device="cpu")
    task = wb.tasks.load("nano/first-two-animals-arrows", n_test=1)""",
    "chooser = AdapterChooser(pool); chooser",
    f"explorer = WeightExplorer(base, pool.stack({CHOSEN!r}), task, weights=[0.0, 0.0]); explorer",
    "strangers = wb.Pool.open('strangers')\nAdapterChooser(strangers, chosen=strangers.names)",
    "WeightExplorer(base, strangers.stack(), task, examples=2)",
)


@pytest.fixture
def server(tmp_path):
    """JupyterLab on a folder with one notebook and a pool whose adapters have names that would do harm."""
    root = tmp_path / "root"
    pool = Pool.open("nano")
    for name in (IMG, MATHS):
        replace(pool.adapter(pool.names[0]), name=name).save(root / "strangers" / name)
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(re.sub("\n    ", "\n", cell).strip()) for cell in CELLS],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(notebook, root / "controls.ipynb")
    quiet = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "IPYTHONDIR": str(tmp_path / "ipython")}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password="]
    command += ["--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={root}"]
    command += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(
            command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()  # the server stops its kernels
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def page():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1300, "height": 2600})
        page.set_default_timeout(45_000)
        yield page
        browser.close()


def run_all(page, server):
    """Open the notebook, run it, and wait until every cell has its number."""
    page.goto(f"{server}/lab/tree/controls.ipynb?reset")
    page.wait_for_function("/\\| Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText)")
    page.locator("#jp-MainMenu li.lm-MenuBar-item:has-text('Run')").click()
    page.locator("li.lm-Menu-item[data-command='runmenu:run-all']").click()
    numbered = (
        "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].every(p => /\\[\\d+\\]/.test(p.innerText))"
    )
    page.wait_for_function(numbered)


def cell(page, place):
    return page.locator(".jp-CodeCell").nth(place)


def loss(page):
    row = cell(page, 2).locator("tr", has_text="these weights")
    return row.locator("td").first.inner_text()


def source(image):
    return image.get_attribute("src")


def test_controls_in_jupyterlab(server, page, tmp_path):
    outside, errors = [], []
    page.on("request", lambda request: outside.append(request.url) if not local(request.url, server) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    run_all(page, server)

    chooser = cell(page, 1)
    options = chooser.locator("select option")
    playwright.expect(options).to_have_count(72)
    playwright.expect(chooser.locator("img")).to_be_hidden()
    chooser.get_by_label("Filter").fill("first two")
    playwright.expect(chooser).to_contain_text("pass the filter")
    assert 2 <= options.count() < 72
    for name in CHOSEN:
        chooser.locator("select option", has_text=name).click(modifiers=["Control"])
    playwright.expect(chooser).to_contain_text(f"pool.stack({sorted(CHOSEN)!r})")
    picture = chooser.locator("img")
    playwright.expect(picture).to_be_visible()
    first = source(picture)
    chooser.get_by_text("Choose all listed").click()
    page.wait_for_function("([image, src]) => image.src !== src", arg=[picture.element_handle(), first])
    assert "Cosine similarity of" in picture.get_attribute("title")

    explorer = cell(page, 2)
    picture = explorer.locator("img")
    before = loss(page)
    playwright.expect(picture).to_be_hidden()
    handles = explorer.locator(".noUi-handle")
    playwright.expect(handles).to_have_count(2)
    handles.first.scroll_into_view_if_needed()
    box = handles.first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=4)
    assert loss(page) == before  # only the release counts
    page.mouse.up()
    playwright.expect(picture).to_be_visible()
    moved, first = loss(page), source(picture)
    assert moved != before
    assert f"weight of {CHOSEN[0]}" in picture.get_attribute("title")
    handles.nth(1).focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("([image, src]) => image.src !== src", arg=[picture.element_handle(), first])
    playwright.expect(explorer.locator(".widget-readout").nth(1)).to_have_text("0.05")
    assert loss(page) != moved
    assert f"weight of {CHOSEN[1]}" in picture.get_attribute("title")
    page.screenshot(path=tmp_path / "controls.png")

    for place in (3, 4):
        strangers = cell(page, place)
        playwright.expect(strangers).to_contain_text(IMG)
        playwright.expect(strangers.locator("img[onerror]")).to_have_count(0)
        playwright.expect(strangers.locator("mjx-container")).to_have_count(0)
    strangers.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowLeft")
    playwright.expect(strangers.locator("img")).to_be_visible()
    strangers.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "strangers.png")
    assert page.evaluate("window.stranger") is None
    assert errors == []
    assert outside == []


def local(url, server):
    return url.startswith((server, "blob:", "data:", server.replace("http", "ws")))
