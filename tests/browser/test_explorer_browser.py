"""The pool's explorer in JupyterLab, in a real browser: sorted, filtered and selected in by mouse and keyboard.

Skipped where there is no chromium; `make browser` installs one.
"""

import re
from dataclasses import replace

import pytest
from lab import MARKS, browser_page, cell, playwright, run_all, serve, shot, write

from workbench.pool import Pool

pytestmark = MARKS
expect = playwright.expect
IMG, MATHS, FRAME = (
    "<img src=x onerror=window.stranger=1>",
    r"$\frac{1}{2}$",
    "<iframe srcdoc=x onload=window.stranger=2>",
)
CELLS = (
    """
    import ipywidgets
    import pandas as pd
    import workbench as wb
    from helpers import many_adapters
    from workbench.widgets import PoolExplorer
    pool = wb.Pool.open("nano")
    scores = pd.Series([i / 72 for i in range(72)], index=list(pool.names), name="accuracy")
    handed = ipywidgets.Label()""",
    """
    explorer = PoolExplorer(pool, chosen=pool.names[:2], scores=scores, key="lab",
                            on_use=lambda names: setattr(handed, "value", f"handed on: {len(names)}"))
    display(explorer, handed)""",
    f"""
    strangers = wb.Pool.open("strangers")
    for verdict in strangers._verdicts.values():
        verdict.facts["author"] = {IMG!r}
    PoolExplorer(strangers, chosen=strangers.names, scores=pd.Series(1.0, strangers.names, name={MATHS!r}))""",
    "PoolExplorer(many_adapters(1000, refused=30))",
    "PoolExplorer(pool, key='lab')",
)
# milliseconds from an act on the table until its rows are others
TIMED = """([node, act]) => new Promise(resolve => {
    const start = performance.now();
    setTimeout(() => resolve(Infinity), 20000);
    new MutationObserver((_, seen) => { seen.disconnect(); resolve(performance.now() - start); })
        .observe(node.querySelector("tbody"), { childList: true, subtree: true });
    if (act === "sort") node.querySelector("thead th:nth-child(4)").click();
    else {
        const input = node.querySelector(".dt-search input");
        input.value = act;
        input.dispatchEvent(new Event("input", { bubbles: true }));
    }
})"""


@pytest.fixture
def server(tmp_path):
    """JupyterLab on a notebook and a pool whose adapters have names that would do harm, one of them refused."""
    root = tmp_path / "root"
    pool = Pool.open("nano")
    for name in (IMG, MATHS, *pool.names[:10]):
        replace(pool.adapter(pool.names[0]), name=name).save(root / "strangers" / name)
    (root / "strangers" / FRAME).mkdir()
    (root / "strangers" / FRAME / "adapter_config.json").write_text(f'{{"peft_type": "{FRAME}"}}')
    write(root / "explorer.ipynb", CELLS)
    with serve(tmp_path, root) as url:
        yield url


@pytest.fixture
def page():
    with browser_page() as page:
        yield page


def column(table, place):
    return table.locator(f"tbody tr td:nth-child({place})").all_inner_texts()


def test_the_explorer_in_jupyterlab(server, page):
    run_all(page, server, "explorer.ipynb")
    explorer = cell(page, 1)
    explorer.scroll_into_view_if_needed()
    table, image = explorer.locator(".workbench-table"), explorer.locator("img")
    said = explorer.get_by_text("adapters selected")
    expect(said).to_contain_text("2 of 72 adapters selected")
    expect(image).to_be_visible()
    picture = image.get_attribute("src")
    assert column(table, 2) == sorted(column(table, 2), reverse=True)  # the best on top
    assert table.bounding_box()["width"] <= 1000

    # sorting by a click on a header keeps the selection
    header = table.locator("thead th", has_text="rank").first
    header.click()
    expect(header).to_have_attribute("aria-sort", "ascending")
    assert set(column(table, 3)) == {"2"}
    header.click()
    expect(header).to_have_attribute("aria-sort", "descending")
    ranks = [int(rank) for rank in column(table, 3)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > 2

    # so does filtering by typing; rows are selected by click, all that pass, and by keyboard
    table.get_by_label("Filter").fill("swap ends")
    expect(table).to_contain_text("(of 72)")
    assert all("swap-ends" in name for name in column(table, 1))
    expect(said).to_contain_text("2 of 72")
    rows = table.locator("tbody tr")
    passed = rows.count()
    rows.first.click()
    expect(said).to_contain_text("3 of 72 adapters selected")
    expect(image).to_have_attribute("title", re.compile("3 of them marked"))
    rows.nth(1).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(said).to_contain_text("4 of 72 adapters selected")
    page.keyboard.press("Space")  # takes it back
    expect(said).to_contain_text("3 of 72 adapters selected")
    table.get_by_text("Select all that pass the filter").click()
    expect(said).to_contain_text(f"{2 + passed} of 72 adapters selected")
    table.get_by_label("Filter").fill("")
    table.get_by_text("Show only selected").click()
    expect(rows).to_have_count(2 + passed)
    shot(page, "pool_table")

    # each picture, then handing on, by keyboard
    pictures = {picture}
    for view, words in (
        ("Cosines", "Cosine similarity"),
        ("Norms by layer", "by layer"),
        ("Singular", "Singular values of"),
    ):
        explorer.locator("button", has_text=view).click()
        expect(image).to_have_attribute("title", re.compile(words))  # which comes after the picture
        assert image.get_attribute("src") not in pictures
        pictures.add(image.get_attribute("src"))
        image.scroll_into_view_if_needed()
        shot(page, f"pool_{view.split()[0].lower()}")
    module = explorer.get_by_label("Module")
    module.select_option(index=2)
    expect(image).to_have_attribute("title", re.compile("of model"))
    assert image.get_attribute("src") not in pictures
    explorer.get_by_text("Use these").focus()
    page.keyboard.press("Enter")
    expect(explorer.get_by_text(f"handed on: {2 + passed}")).to_be_visible()
    explorer.get_by_text("Select none").click()
    expect(said).to_contain_text("0 of 72 adapters selected. Handed on (explorer.used): ")

    # the last cell was run before all this, another run of it takes up what was done here
    cell(page, 4).scroll_into_view_if_needed()
    cell(page, 4).locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    expect(cell(page, 4).get_by_text("adapters selected")).to_contain_text("0 of 72 adapters selected. Handed on")
    assert (page.errors, page.outside) == ([], [])


def test_strangers_names_are_text(server, page):
    run_all(page, server, "explorer.ipynb")
    strangers = cell(page, 2)
    strangers.scroll_into_view_if_needed()
    table = strangers.locator(".workbench-table")
    expect(table.locator("tbody tr")).to_have_count(10)
    expect(strangers.get_by_text("12 of 12 adapters selected")).to_be_visible()
    table.locator("thead th").first.click()  # the refused one has no score, and was last
    expect(table.locator("tbody tr", has_text="<iframe")).to_be_visible()
    for name in (IMG, MATHS, FRAME):
        assert name in column(table, 1)
    expect(table.locator("thead").first).to_contain_text(MATHS)
    table.locator("tbody tr", has_text="<iframe").click()
    expect(strangers.get_by_role("alert")).to_contain_text("cannot be selected; the rule")
    expect(strangers.get_by_text("12 of 12 adapters selected")).to_be_visible()
    expect(table.locator("tbody tr.selected")).to_have_count(9)
    table.get_by_label("Filter").fill("onerror")  # which has the cells' text read
    expect(table).to_contain_text("of 13")  # by the author
    table.get_by_label("Filter").fill(r"\frac")
    expect(table.locator("tbody tr")).to_have_count(1)
    for name in ("Cosine", "Norm", "Singular"):
        strangers.locator("button", has_text=name).click()
        expect(strangers.locator("img")).to_have_attribute("title", re.compile(name, re.IGNORECASE))
    shot(page, "pool_strangers")
    expect(strangers.locator("img[onerror], iframe, mjx-container, .MathJax")).to_have_count(0)
    assert page.evaluate("window.stranger") is None
    assert (page.errors, page.outside) == ([], [])


def test_a_thousand_rows(server, page):
    run_all(page, server, "explorer.ipynb")
    many = cell(page, 3)
    many.scroll_into_view_if_needed()
    table = many.locator(".workbench-table")
    expect(table).to_contain_text("1 to 10 of 1,030")
    body = table.locator(".dt-scroll-body")
    assert body.evaluate("(body) => body.scrollWidth <= body.clientWidth")  # beside the file browser, in 1280 pixels
    node = table.element_handle()
    times = {act: page.evaluate(TIMED, [node, act]) for act in ("sort", "author 3", "adapter-07")}
    print({act: f"{taken:.0f} ms" for act, taken in times.items()})
    assert max(times.values()) < 3000  # under one on a machine that does nothing else
    expect(table).to_contain_text("1 to 10 of 100")
    table.get_by_text("Select all that pass the filter").click()
    expect(many.get_by_text("100 of 1000 adapters selected")).to_be_visible()
    expect(many.locator("img")).to_be_hidden()
    many.get_by_text("Compute the similarity of 1000 adapters").click()
    expect(many.locator("img")).to_be_visible()
    expect(many.locator("img")).to_have_attribute("title", re.compile("100 of them marked"))
    many.locator("img").scroll_into_view_if_needed()
    shot(page, "pool_thousand")
    assert (page.errors, page.outside) == ([], [])
