"""The merge bench in JupyterLab, in a real browser, by mouse and keyboard.

Needs a chromium and the Python package playwright; skipped without them.
"""

from dataclasses import replace

import torch
from lab import MARKS, browser_page, cell, playwright, run_all, serve, shot, write

from helpers import hook_logits, peft_logits
from workbench.adapters import Adapter
from workbench.base import Base
from workbench.pool import Pool

pytestmark = MARKS
expect = playwright.expect

IMG, MATHS = "<img src=x onerror=window.stranger=1>", r"$\frac{1}{2}$"
CHOSEN = ("rotate-right-animals", "rotate-right-letters")
CELLS = (
    """
    import workbench as wb
    from workbench.merge import method
    from workbench.options import Share
    from workbench.widgets import MergeBench
    pool = wb.Pool.open("nano")
    base = wb.Base.load(pool.base, device="cpu")
    task = wb.tasks.load("nano/rotate-right-months", n_train=8, n_validation=4, n_test=20)
    @method("my <b>own</b> way", paper="", invariances=set())
    def own(units, weights, *, part: Share = 0.5):
        return units.times(part * weights[units.owner]), units.A
""",
    "bench = MergeBench(base, pool, task, new={'steps': 8}, key='one'); bench",
    "strangers = wb.Pool.open('strangers')\nMergeBench(base, strangers, task, chosen=strangers.names, method='sum', new={'steps': 1})",
    "MergeBench(base, pool, task, key='one')",
)
GAPS = """
table => [...table.rows].flatMap((row) => [...row.cells].slice(1).map((cell) =>
    cell.getBoundingClientRect().left - cell.previousElementSibling.getBoundingClientRect().right))
"""  # between the cells of a row, in pixels


def choose(bench, text):
    bench.get_by_label("Method", exact=True).select_option(text)


def settled(bench):
    """A job has ended: the button that starts one may be pressed again."""
    expect(bench.get_by_role("button", name="Merge", exact=True)).to_be_enabled()


def merge(bench):
    button = bench.get_by_role("button", name="Merge", exact=True)
    button.click()
    expect(button).to_be_disabled()


def within(page, bench):
    """Nothing in the bench is wider than the bench, or cut off by its own box."""
    return bench.evaluate(
        """bench => [...bench.querySelectorAll('*')].filter(one => one.offsetParent && !one.closest('select, svg, .noUi-target')
            && one.getBoundingClientRect().right > bench.getBoundingClientRect().right + 1).map(one => one.outerHTML.slice(0, 200))"""
    )


def test_the_merge_bench_in_jupyterlab(tmp_path):
    root, pool = tmp_path / "root", Pool.open("nano")
    for name in (IMG, MATHS):
        replace(pool.adapter(pool.names[0]), name=name).save(root / "strangers" / name)
    write(root / "bench.ipynb", CELLS)
    with serve(tmp_path, root) as url, browser_page() as page:
        run_all(page, url, "bench.ipynb")
        bench = cell(page, 1).locator(".jp-OutputArea-output .widget-vbox").first
        expect(bench.get_by_text("Adapters: 0 of 72 chosen")).to_be_visible()
        bench.get_by_label("Filter").fill("rotate right")
        expect(bench).to_contain_text("pass the filter")
        for name in CHOSEN:
            bench.locator("select option", has_text=name).first.click(modifiers=["Control"])
        expect(bench.get_by_text("Adapters: 2 of 72 chosen")).to_be_visible()
        shot(page, "merge_choice", bench)
        bench.get_by_text("Adapters: 2 of 72 chosen").click()

        # the form follows the method, and one's own method has one
        steps = bench.get_by_label("steps", exact=True)
        expect(steps).to_have_value("100")
        choose(bench, "my <b>own</b> way")
        expect(bench.get_by_label("part", exact=True)).to_have_value("0.5")
        expect(steps).to_have_count(0)
        bench.get_by_label("part", exact=True).fill("1.5")
        page.keyboard.press("Enter")
        expect(bench).to_contain_text("part is '1.5', expected a finite number in [0, 1]")
        choose(bench, "coefficients")

        # an option by keyboard alone, from the list of methods on
        bench.get_by_label("Method", exact=True).focus()
        for _ in range(40):
            page.keyboard.press("Tab")
            if steps.evaluate("one => one === document.activeElement"):
                break
        page.keyboard.press("Control+A")
        page.keyboard.type("12")
        page.keyboard.press("Tab")
        bench.get_by_text("Show the code").click()
        expect(bench.locator("pre").first).to_contain_text("'coefficients', {'steps': 12}, new={'steps': 8})")

        # a fit that is stopped
        steps.fill("3000")
        page.keyboard.press("Enter")
        merge(bench)
        stop = bench.get_by_role("button", name="Stop")
        expect(bench).to_contain_text("random control: loss")
        stop.click()
        settled(bench)
        expect(bench).to_contain_text("no merge is shown without them")
        steps.fill("12")
        page.keyboard.press("Enter")
        bench.get_by_label("Control matched by").select_option("norm")
        merge(bench)
        expect(bench).to_contain_text("random control: loss")
        settled(bench)
        table = bench.locator("table", has_text="base alone").first
        page.add_style_tag(content="table { border-collapse: collapse }")  # as pages other than JupyterLab's have it
        assert min(table.evaluate(GAPS)) > 8
        for row in ("merge", "base alone", "new adapter (steps=8)", "random control (matched by norm)"):
            expect(table.locator("tr", has_text=row).first).to_be_visible()
        expect(bench).to_contain_text("coefficients (steps=12) of 2 adapters")
        shot(page, "merge_form", bench)
        shot(page, "merge_result", table)
        assert within(page, bench) == []

        # pages
        bench.get_by_role("tab", name="Try a prompt").click()
        prompt = bench.get_by_label("Prompt", exact=True)
        assert "rotate" in prompt.input_value().lower() or prompt.input_value()
        bench.get_by_role("button", name="Answer").click()
        answers = bench.locator("table", has_text="new adapter").last
        expect(answers.locator("td")).to_have_count(4)
        settled(bench)
        shot(page, "merge_prompt", bench.locator(".jupyter-widget-tab, .widget-tab").first)
        bench.get_by_role("tab", name="Weights by hand").click()
        bench.get_by_role("button", name="Open the sliders").click()
        expect(bench.locator(".noUi-handle")).to_have_count(2)
        settled(bench)
        bench.locator(".noUi-handle").first.focus()
        page.keyboard.press("ArrowRight")
        expect(bench.locator("img[title^='Loss over the weight']")).to_be_visible()
        shot(page, "merge_weights", bench.locator(".jupyter-widget-tab, .widget-tab").first)
        bench.get_by_role("tab", name="Save").click()
        bench.get_by_label("Folder").fill("made")
        page.keyboard.press("Tab")
        bench.get_by_role("button", name="Save", exact=True).click()
        expect(bench).to_contain_text("PeftModel.from_pretrained(model, 'made') loads it")
        settled(bench)
        bench.get_by_role("button", name="Save", exact=True).click()
        expect(bench).to_contain_text("made exists already; choose another folder")
        settled(bench)
        shot(page, "merge_save", bench.locator(".jupyter-widget-tab, .widget-tab").first)

        # what was set is there again where the key is
        page.locator("#jp-MainMenu li.lm-MenuBar-item:has-text('Run')").click()
        page.locator("li.lm-Menu-item[data-command='runmenu:run-all']").click()
        again = cell(page, 3).locator(".jp-OutputArea-output .widget-vbox").first
        expect(again.get_by_text("Adapters: 2 of 72 chosen")).to_be_visible()
        expect(again.get_by_label("steps", exact=True)).to_have_value("12")

        # strangers' names
        evil = cell(page, 2).locator(".jp-OutputArea-output .widget-vbox").first
        evil.get_by_text("Show the code").click()
        merge(evil)
        settled(evil)
        evil.get_by_role("tab", name="Weights by hand").click()
        evil.get_by_role("button", name="Open the sliders").click()
        expect(evil.locator(".noUi-handle")).to_have_count(2)
        choose(evil, "coefficients")
        evil.get_by_label("steps", exact=True).fill("2")
        page.keyboard.press("Enter")
        settled(evil)
        merge(evil)
        settled(evil)
        expect(evil).to_contain_text("coefficients (steps=2) of 2 adapters")
        evil.get_by_role("tab", name="Coefficients").click()
        expect(evil).to_contain_text("one panel per adapter")
        expect(evil).to_contain_text(IMG)
        expect(evil).to_contain_text("Not listed: regmean, fisher")
        expect(evil.locator("img[onerror]")).to_have_count(0)
        expect(evil.locator("mjx-container")).to_have_count(0)
        shot(page, "merge_strangers", evil)
        assert page.evaluate("window.stranger") is None
        assert page.errors == []
        assert page.outside == []
    base = Base.load(pool.base, device="cpu")
    ids = torch.tensor([base.tokenizer("rotate right: jan feb mar = ")["input_ids"]])
    ours = hook_logits(base, Adapter.load(root / "made"), ids)
    torch.testing.assert_close(peft_logits(base, root / "made", ids), ours, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (ours - base.model(ids).logits).abs().max() > 1e-2
