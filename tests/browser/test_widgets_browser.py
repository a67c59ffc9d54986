"""The controls in JupyterLab, in a real browser: moved by mouse and keyboard, and what changes on the page.

Skipped where there is no chromium; `make browser` installs one.
"""

from dataclasses import replace

from lab import MARKS, browser_page, cell, playwright, run_all, serve, shot, write

from workbench.pool import Pool

pytestmark = MARKS

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


def loss(page):
    row = cell(page, 2).locator("tr", has_text="these weights")
    return row.locator("td").first.inner_text()


def source(image):
    return image.get_attribute("src")


def test_controls_in_jupyterlab(tmp_path):
    """On a pool whose adapters have names that would do harm, too."""
    root, pool = tmp_path / "root", Pool.open("nano")
    for name in (IMG, MATHS):
        replace(pool.adapter(pool.names[0]), name=name).save(root / "strangers" / name)
    write(root / "controls.ipynb", CELLS)
    with serve(tmp_path, root) as url, browser_page(1300, 2600) as page:
        run_all(page, url, "controls.ipynb")
        look(page)
        assert page.errors == []
        assert page.outside == []


def look(page):
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
    shot(page, "widgets_controls")

    for place in (3, 4):
        strangers = cell(page, place)
        playwright.expect(strangers).to_contain_text(IMG)
        playwright.expect(strangers.locator("img[onerror]")).to_have_count(0)
        playwright.expect(strangers.locator("mjx-container")).to_have_count(0)
    strangers.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowLeft")
    playwright.expect(strangers.locator("img")).to_be_visible()
    strangers.scroll_into_view_if_needed()
    shot(page, "widgets_strangers")
    assert page.evaluate("window.stranger") is None
