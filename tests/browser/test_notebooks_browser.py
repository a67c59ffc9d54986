"""The notebooks that end in controls, opened and run whole in JupyterLab, at their small parameters; the controls answer.

Skipped where there is no chromium; `make browser` installs one.
"""

import shutil
from pathlib import Path

import nbformat
import pytest
from lab import MARKS, browser_page, playwright, run_all, serve, shot

from workbench.notebooks import find

ROOT = Path(__file__).parents[2]
pytestmark = MARKS
expect = playwright.expect


def pool(page):
    expect(page.locator(".workbench-table")).to_contain_text("of 72")
    page.get_by_role("button", name="Select none").click()
    expect(page.get_by_text("0 of 72 adapters selected")).to_be_visible()


def units(page):
    expect(page.locator("canvas").first).to_be_visible()
    before = page.locator(".widget-readout").first.inner_text()
    page.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".widget-readout").first).not_to_have_text(before)


def merges(page):
    page.get_by_label("Method", exact=True).select_option("ties")
    expect(page.get_by_label("density", exact=True)).to_have_value("0.2")
    page.get_by_role("button", name="Show the code").click()
    expect(page.get_by_text("try_merge(base, pool").first).to_be_visible()


@pytest.mark.parametrize(("number", "touch"), [("01", pool), ("02", units), ("03", merges)])
def test_run_all(tmp_path, number, touch):
    root = tmp_path / "root"
    shutil.copytree(ROOT / "figures", root / "figures", ignore=lambda _, names: [n for n in names if "grid" not in n])
    (source,) = find(ROOT / "notebooks", [number])
    notebook = nbformat.read(source, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (given,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    given.source += "".join(f"\n{name} = {value!r}" for name, value in notebook.metadata.workbench["small"].items())
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    (root / "notebooks").mkdir()
    nbformat.write(notebook, root / "notebooks" / source.name)
    with serve(tmp_path, root) as url, browser_page(webgl=True) as page:
        page.set_default_timeout(240_000)
        run_all(page, url, f"notebooks/{source.name}")
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
        touch(page)
        shot(page, f"notebook_{number}")
        assert (page.errors, page.outside) == ([], [])
