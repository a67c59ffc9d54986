"""The notebooks opened and run whole in JupyterLab, at their small parameters: what is seen, and controls that answer.

Skipped where there is no chromium; `make browser` installs one.
"""

import math
import shutil
from pathlib import Path

import nbformat
import pytest
from lab import MARKS, browser_page, cell, playwright, run_all, serve, shot, write

from workbench.notebooks import find

ROOT = Path(__file__).parents[2]
pytestmark = MARKS
expect = playwright.expect
NOTEBOOK = "document.querySelector('.jp-WindowedPanel-outer')"
ERROR = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']"
# Wider than its place: the page, the notebook, a picture; a wide table has a scroll bar of its own.
TOO_WIDE = """
[
  ...[document.documentElement, ...document.querySelectorAll(".jp-WindowedPanel-outer")]
    .filter((one) => one.scrollWidth > one.clientWidth + 1),
  ...[...document.querySelectorAll(".jp-OutputArea-output img")]
    .filter((one) => one.getBoundingClientRect().right > one.closest(".jp-OutputArea").getBoundingClientRect().right + 1),
].map((one) => `${one.tagName} ${one.className}`)
"""


def pool(page):
    expect(page.locator(".workbench-table")).to_contain_text("of 72")
    page.get_by_role("button", name="Select none").click()
    expect(page.get_by_text("0 of 72 adapters selected")).to_be_visible()


def units(page, key="ArrowRight"):
    expect(page.locator("canvas").first).to_be_visible()
    before = page.locator(".widget-readout").first.inner_text()
    page.locator(".noUi-handle").first.focus()
    page.keyboard.press(key)
    expect(page.locator(".widget-readout").first).not_to_have_text(before)


def merges(page):
    page.get_by_label("Method", exact=True).select_option("ties")
    expect(page.get_by_label("density", exact=True)).to_have_value("0.2")
    page.get_by_role("button", name="Show the code").click()
    expect(page.get_by_text("try_merge(base, pool").first).to_be_visible()


def small(root, number):
    """A copy of a notebook, without outputs, whose parameters are its small ones; and how many figures it stores."""
    (source,) = find(ROOT / "notebooks", [number])
    notebook = nbformat.read(source, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (given,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    given.source += "".join(f"\n{name} = {value!r}" for name, value in notebook.metadata.workbench["small"].items())
    figures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    for one in cells:
        one.outputs, one.execution_count = [], None
    (root / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, root / "notebooks" / source.name)
    return f"notebooks/{source.name}", figures


def folder(tmp_path):
    root = tmp_path / "root"
    shutil.copytree(ROOT / "figures", root / "figures", ignore=lambda _, names: [n for n in names if "grid" not in n])
    return root


@pytest.mark.parametrize(("number", "touch"), [("01", pool), ("02", units), ("03", merges)])
def test_run_all(tmp_path, number, touch):
    root = folder(tmp_path)
    notebook, _ = small(root, number)
    with serve(tmp_path, root) as url, browser_page(webgl=True) as page:
        run_all(page, url, notebook)
        assert page.locator(ERROR).count() == 0
        touch(page)
        shot(page, f"notebook_{number}")
        assert (page.errors, page.outside) == ([], [])


def test_notebook_7_shows_the_controls_too(tmp_path):
    root = tmp_path / "root"
    opened = """
    import workbench as wb
    from workbench.widgets import MergeBench, PoolExplorer, UnitExplorer
    pool = wb.Pool.open("nano")
    base = wb.Base.load(pool.base)
    task = wb.tasks.load("nano/second-days", n_train=5, n_test=10)
    """
    shown = ["PoolExplorer(pool)", "UnitExplorer(pool)", "MergeBench(base, pool, task)"]
    write(root / "controls.ipynb", [opened, *shown])
    with serve(tmp_path, root) as url, browser_page(webgl=True) as page:
        run_all(page, url, "controls.ipynb", app="notebooks")
        assert page.locator("#jp-MainLogo, #top-panel").count()  # it is Notebook 7, not JupyterLab
        page.errors.clear()  # of its own start, whatever the notebook
        pool(page)
        shot(page, "notebook_7_pool", cell(page, 1))
        units(page, "PageUp")  # arrows are its own keys
        shot(page, "notebook_7_units", cell(page, 2))
        merges(page)
        shot(page, "notebook_7_merges", cell(page, 3))
        assert page.locator(ERROR).count() == 0
        assert page.evaluate(TOO_WIDE) == []
        assert (page.errors, page.outside) == ([], [])


def test_the_others_are_seen_whole(tmp_path):
    root = folder(tmp_path)
    copies = {path.name[:2]: small(root, path.name[:2]) for path in find(ROOT / "notebooks") if path.name[:2] > "03"}
    with serve(tmp_path, root) as url, browser_page() as page:
        for number, (notebook, figures) in copies.items():
            page.set_viewport_size({"width": 1280, "height": 800})
            run_all(page, url, notebook)
            assert page.locator(ERROR).count() == 0, number
            expect(page.locator(".jp-OutputArea-output img")).to_have_count(figures)
            page.wait_for_function(
                "[...document.querySelectorAll('.jp-OutputArea-output img')].every((image) => image.naturalWidth > 0)"
            )
            assert page.evaluate(TOO_WIDE) == [], number
            page.set_viewport_size({"width": 1280, "height": 2400})
            for i in range(math.ceil(page.evaluate(f"{NOTEBOOK}.scrollHeight") / 2200)):
                page.evaluate(f"{NOTEBOOK}.scrollTop = {2200 * i}")
                shot(page, f"notebook_{number}_{i}")
            for kernel in page.request.get(f"{url}/api/kernels").json():
                page.request.delete(f"{url}/api/kernels/{kernel['id']}")
        assert (page.errors, page.outside) == ([], [])
