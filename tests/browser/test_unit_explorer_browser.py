"""The explorer of units in JupyterLab: a map drawn by WebGL, moved by mouse and keyboard, and what reaches Python."""

from dataclasses import replace

from lab import MARKS, browser_page, playwright, run_all, serve, shot, write

from workbench.pool import Pool

pytestmark = MARKS

IMG, MATHS = "<img src=x onerror=window.stranger=1>", r"$\frac{1}{2}$"
CELLS = (
    """
    import workbench as wb
    from workbench.widgets import UnitExplorer
    pool = wb.Pool.open("nano")
    base = wb.Base.load(pool.base, device="cpu")
    merged = ["rotate-right-animals", "second-animals-commas"]""",
    """
    units = UnitExplorer(pool, base=base, merged=merged, canonical="balanced", ks="2, 3, 4, 5, 6, 7, 8", n_test=4)
    units""",
    "strangers = UnitExplorer(wb.Pool.open('strangers'))\nstrangers",
    "len(units.selected), sorted(set(units.selected['adapter']))",
)


def cell(page, place):
    return page.locator(".jp-CodeCell").nth(place)


def look(page, where):
    """What a part of the page looks like; the map is a canvas, so that nothing else tells."""
    return where.screenshot(animations="disabled")


def until_changed(page, where, before):
    for _ in range(100):
        page.wait_for_timeout(100)
        if (now := look(page, where)) != before:
            return now
    raise AssertionError("the map looks as it did")


def lasso(page, explorer, canvas):
    """Drag around the middle of the map, in the lasso's mode."""
    explorer.get_by_title("Activate lasso selection").click()
    box = canvas.bounding_box()
    x, y, r = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box["height"] / 4
    corners = [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r), (x - r, y - r + 5)]
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in corners[1:]:
        page.mouse.move(*corner, steps=10)
        page.wait_for_timeout(100)
    page.mouse.up()


def test_units_in_jupyterlab(tmp_path):
    root = tmp_path / "root"
    pool = Pool.open("nano")
    for name in (IMG, MATHS):
        replace(pool.adapter(pool.names[1]), name=name).save(root / "strangers" / name)
    write(root / "units.ipynb", CELLS)
    with serve(tmp_path, root) as url, browser_page(webgl=True) as page:
        run_all(page, url, "units.ipynb")
        page.keyboard.press("Control+b")  # without the file browser

        explorer = cell(page, 1)
        explorer.scroll_into_view_if_needed()
        canvas = explorer.locator("canvas").first
        playwright.expect(canvas).to_be_visible()
        canvas.scroll_into_view_if_needed()
        page.wait_for_timeout(1500)
        first = look(page, canvas)
        shot(page, "units_map")

        explorer.get_by_label("Colour", exact=True).select_option("operation")
        playwright.expect(explorer).to_contain_text("swap ends (")
        second = until_changed(page, canvas, first)
        shot(page, "units_operation")

        playwright.expect(explorer).to_contain_text("8 clusters;")
        handle = explorer.locator(".noUi-handle")
        handle.focus()
        page.keyboard.press("ArrowRight")
        playwright.expect(explorer.locator(".widget-readout")).to_have_text("9")
        playwright.expect(explorer).to_contain_text("9 clusters;")
        playwright.expect(explorer).to_contain_text("cluster_units(stack, 9, canonical='balanced'")

        explorer.get_by_label("Layer").select_option("2")
        playwright.expect(explorer).to_contain_text("model.layers.2.mlp.down_proj: ")
        until_changed(page, canvas, second)
        explorer.get_by_label("Projection").select_option("v_proj")
        playwright.expect(explorer).to_contain_text("model.layers.2.self_attn.v_proj: ")

        canvas.scroll_into_view_if_needed()
        page.wait_for_timeout(1500)
        lasso(page, explorer, canvas)
        playwright.expect(explorer).to_contain_text(" adapters picked")
        shot(page, "units_lasso")
        said = explorer.get_by_text(" adapters picked").inner_text()
        cell(page, 3).click()
        page.keyboard.press("Control+Enter")
        n = said.partition(" ")[0].replace(",", "")
        playwright.expect(cell(page, 3).locator(".jp-OutputArea-output").last).to_contain_text(f"({n}, [")
        assert int(n) > 10

        button = explorer.get_by_role("button", name="Accuracy by k")
        button.scroll_into_view_if_needed()
        playwright.expect(explorer.locator("img")).to_be_hidden()
        button.click()
        stop = explorer.get_by_role("button", name="Stop").locator("visible=true")
        playwright.expect(stop).to_have_count(1)
        picture = explorer.locator("img")
        playwright.expect(picture).to_be_visible()
        stop.click()
        playwright.expect(stop).to_have_count(0)
        playwright.expect(explorer).to_contain_text("Stopped. 2 adapters, 2 tasks")
        rows = explorer.locator("td", has_text="random adapters, merged alike").count()
        assert 1 <= rows < 7  # stopped before the last k, and what had come is still there
        picture.scroll_into_view_if_needed()
        shot(page, "units_curve")

        strangers = cell(page, 2)
        strangers.scroll_into_view_if_needed()
        strangers.get_by_label("Colour", exact=True).select_option("adapter")
        playwright.expect(strangers).to_contain_text(f"{IMG} (")
        strangers.get_by_label("Pick cluster").select_option(index=1)
        playwright.expect(strangers).to_contain_text("picked:")
        playwright.expect(strangers).to_contain_text(IMG)
        playwright.expect(strangers.locator("img[onerror]")).to_have_count(0)
        playwright.expect(strangers.locator("mjx-container")).to_have_count(0)
        shot(page, "units_strangers")
        assert page.evaluate("window.stranger") is None
        assert page.errors == []
        assert page.outside == []
