"""The pool's explorer, moved by setting its values as a browser would: what it lists, draws, hands on and remembers."""

import json
import struct
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import many_adapters, strange_pool, tiny_base
from workbench.errors import AdapterError, SelectionError
from workbench.pool import Pool
from workbench.similarity import similarity, tree
from workbench.widgets import PoolExplorer, maps, table, views
from workbench.widgets.parts import MEMORY

PNG, WAIT = b"\x89PNG", 60
EVIL = "<script>alert(1)</script>"  # a folder `<script>alert(1)<` that holds a folder `script>`
MATHS = r"$\frac{ & 漢$"
FRUIT = ("apple", "banana", "cherry", "damson")
REFUSED = "refused"


@pytest.fixture(scope="module")
def base():
    return tiny_base(seed=1, spread=10.0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, base):
    """Six adapters of unequal ranks and targets, two of them named by someone who means harm, and one refused."""
    folder = tmp_path_factory.mktemp("pool")
    return strange_pool(folder, base, [*FRUIT, EVIL, MATHS], narrow=(1, 4), refused=REFUSED)


@pytest.fixture(scope="module")
def many():
    return many_adapters(1000, refused=30)


@pytest.fixture(autouse=True)
def forgotten():
    MEMORY.clear()
    views._MAPS.clear()


@pytest.fixture(scope="module")
def still(pool):
    """An explorer without pictures, which are other tests'."""
    explorer = PoolExplorer(pool)
    explorer._draw = lambda: None
    return explorer


def drawn(explorer):
    return bytes(explorer._picture.value)


def size(explorer):
    """Width and height of the picture, from its header."""
    return struct.unpack(">II", drawn(explorer)[16:24])


def row(explorer, name):
    return list(explorer.pool.table["name"]).index(name)


def shown(explorer):
    """The cells as they go to the browser."""
    return json.loads(explorer.table._dt_args["data_json"])


def dense(pool, name):
    return {module: factors.delta().double() for module, factors in pool.adapter(name).modules.items()}


# selecting and handing on


def test_a_selection_is_handed_on(pool):
    told = []
    explorer = PoolExplorer(pool, chosen=["cherry", "apple"], on_use=told.append)
    assert explorer.names == ("apple", "cherry")
    assert list(explorer.table.selected_rows) == [row(explorer, "apple"), row(explorer, "cherry")]
    explorer.table.selected_rows = [row(explorer, "banana"), row(explorer, EVIL)]
    assert set(explorer.names) == set(explorer.stack().names) == {"banana", EVIL}
    same = eval(explorer.code, {"pool": pool})
    assert (same.names, same.digest()) == (explorer.stack().names, explorer.stack().digest())
    assert (explorer.used, told) == ((), [])
    explorer.use.click()
    assert explorer.used == explorer.names
    assert told == [explorer.names]
    explorer.none.click()
    assert (explorer.names, list(explorer.table.selected_rows), len(explorer.used)) == ((), [], 2)
    assert "Handed on (explorer.used): " in explorer.summary.value
    assert repr(explorer).startswith(f"PoolExplorer(pool {pool.name!r}): 0 of 6 adapters selected.")
    assert repr(explorer).endswith("\npool.stack([])")


def test_nothing_to_hand_on(pool):
    told = []
    explorer = PoolExplorer(pool, on_use=told.append)
    explorer.use.click()
    assert (explorer.used, told) == ((), [])
    assert "Nothing is selected" in explorer._note.value
    explorer.names = ["apple"]
    assert explorer._note.value == ""
    explorer.none.click()
    with pytest.raises(SelectionError, match="empty"):
        explorer.stack()


def test_a_refused_adapter_cannot_be_selected_and_says_why(pool):
    explorer = PoolExplorer(pool, chosen=["apple"])
    explorer.table.selected_rows = [row(explorer, "apple"), row(explorer, REFUSED)]
    assert explorer.names == ("apple",)
    assert list(explorer.table.selected_rows) == [row(explorer, "apple")]
    (verdict,) = pool.table[pool.table["name"] == REFUSED].itertuples()
    assert f"{REFUSED} cannot be selected; the rule &#x27;{verdict.rule}&#x27; refused it: " in explorer._note.value
    assert verdict.reason[:20] in explorer._note.value.replace("&#x27;", "'")
    assert any(cells[0] == REFUSED and f"no, {verdict.rule}: " in " ".join(cells) for cells in shown(explorer))


def test_all_that_pass_a_filter_may_hold_refused_ones(many):
    explorer = PoolExplorer(many)
    explorer.table.selected_rows = list(range(1030))
    assert explorer.names == many.names
    assert list(explorer.table.selected_rows) == list(range(1000))
    assert "refused-0000 cannot be selected" in explorer._note.value
    assert "NaN in 3 tensors (and 29 more refused adapters)" in explorer._note.value
    assert len(explorer._code.value) < 1200
    assert explorer.code.count("adapter-") == 1000


@pytest.mark.parametrize(
    ("chosen", "error", "says"),
    [
        (["aple"], SelectionError, "did you mean apple"),
        ("apple", SelectionError, "write"),
        ([REFUSED], AdapterError, "refused by the rule"),
    ],
)
def test_names_that_cannot_be_selected(pool, chosen, error, says):
    with pytest.raises(error, match=says):
        PoolExplorer(pool, chosen=chosen)
    explorer = PoolExplorer(pool, chosen=["banana"])
    with pytest.raises(error, match=says):
        explorer.names = chosen
    assert explorer.names == ("banana",)


def test_what_fails_when_a_selection_is_used_is_told(pool):
    explorer = PoolExplorer(pool, chosen=["apple"], on_use=lambda names: [][0])
    explorer.use.click()
    assert explorer.used == ("apple",)
    assert isinstance(explorer.error, IndexError)
    assert "list index out of range" in explorer._message.value


@given(st.lists(st.lists(st.integers(0, 6), unique=True), min_size=1, max_size=4))
def test_any_sequence_of_selections(pool, still, steps):
    still.none.click()
    explorer = still
    for rows in steps:
        explorer.table.selected_rows = rows
        want = {pool.table["name"][i] for i in rows} & set(pool.names)
        assert set(explorer.names) == want
        assert {pool.table["name"][i] for i in explorer.table.selected_rows} == want


# the table


def test_the_table_s_cells(pool):
    explorer = PoolExplorer(pool, scores=pd.Series({"apple": 0.25, "cherry": np.nan, "elsewhere": 1.0}))
    titles = list(table.cells(pool, explorer.scores)[0])
    assert titles == ["name", "accuracy", "rank", "α/r", "targets", "norm", "accepted"]
    rows = {cells[0]: dict(zip(titles, cells, strict=True)) for cells in shown(explorer)}
    facts = pool.table.set_index("name")
    assert len(rows) == len(facts) == 7
    apple = rows["apple"]
    assert apple["norm"] == f"{facts.at['apple', 'norm']:.4g}"
    del apple["norm"]
    targets = "q k v o gate up down"
    assert apple == {
        "name": "apple",
        "accuracy": "0.250",
        "rank": "2",
        "α/r": "1",
        "targets": targets,
        "accepted": "yes",
    }
    assert [rows[name]["accuracy"] for name in ("banana", "cherry", REFUSED)] == ["", "", ""]
    assert rows["banana"]["targets"] == "q v"
    assert rows[REFUSED]["rank"] == ""
    args = explorer.table._dt_args
    assert args["order"] == [[1, "desc"], [0, "asc"]]
    kinds = {each["targets"]: each["type"] for each in args["columnDefs"]}
    assert [kinds[i] for i in range(7)] == ["string", "num", "num", "num", "string", "num", "string"]


def test_strangers_texts_are_text(pool, monkeypatch):
    import itables.options

    monkeypatch.setattr(itables.options, "allow_html", True)
    explorer = PoolExplorer(pool, chosen=[EVIL, MATHS], scores=pd.Series({"apple": 1.0}, name="<b>$x$</b>"))
    sent = json.dumps({k: v for k, v in explorer.table._dt_args.items() if k != "table_html"})
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in sent
    assert "<script" not in sent
    assert "<b>" not in explorer.table._dt_args["table_html"]
    assert "keys_to_be_evaluated" not in explorer.table._dt_args
    assert {"tex2jax_ignore", "mathjax_ignore"} <= set(explorer.table.classes.split())
    for name in views.VIEWS:
        explorer.view.value = name
        assert explorer.error is None
        for text in (explorer.summary, explorer._code, explorer._caption, explorer._line):
            assert "<script" not in text.value
            assert text.value == "" or "mathjax_ignore" in text.value


def test_no_table_is_cut_short(many):
    assert len(shown(PoolExplorer(many))) == 1030


def test_a_pool_without_accepted_adapters(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    explorer = PoolExplorer(Pool.open(tmp_path))
    assert (explorer.names, explorer.error, drawn(explorer)) == ((), None, b"")
    assert "no accepted adapter among 1" in explorer.summary.value
    assert "needs two accepted adapters" in explorer._caption.value
    assert len(shown(explorer)) == 1


SCORES = pd.DataFrame({"name": ["apple", "banana"], "loss": [1.5, 0.5], "accuracy": [0.1, 0.9], "rank": [2, 3]})


@pytest.mark.parametrize(
    ("scores", "columns", "order"),
    [
        (SCORES, ["accuracy", "loss"], [[1, "desc"], [0, "asc"]]),
        (SCORES.set_index("name")[["loss"]], ["loss"], [[1, "asc"], [0, "asc"]]),
        (SCORES.set_index("name")["loss"].rename("cost"), ["cost"], [[1, "desc"], [0, "asc"]]),
        (None, [], [[0, "asc"]]),
    ],
)
def test_scores(pool, scores, columns, order):
    explorer = PoolExplorer(pool, scores=scores)
    titles = list(table.cells(pool, explorer.scores)[0])
    assert titles[1 : 1 + len(columns)] == columns
    assert "rank" in titles
    assert explorer.table._dt_args["order"] == order
    if scores is not None:
        rows = {cells[0]: cells for cells in shown(explorer)}
        assert rows["banana"][1] == f"{explorer.scores.iloc[1, 0]:.3f}"


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (pd.DataFrame({"name": ["apple"], "f1": [1.0]}), "no column accuracy or loss; they have f1"),
        (pd.Series([1.0, 2.0], index=["apple", "apple"]), "'apple' has more than one row"),
        (pd.Series({"elsewhere": 1.0}), "none of 1 scores is of an adapter of pool"),
        (pd.Series({"apple": 1.0}, name="rank"), "has a column 'rank' already"),
    ],
)
def test_scores_that_do_not_suit(pool, scores, says):
    with pytest.raises(SelectionError, match=says):
        PoolExplorer(pool, scores=scores)


# the pictures


@pytest.mark.parametrize("view", views.VIEWS)
def test_each_picture_follows_the_selection(pool, view):
    explorer = PoolExplorer(pool, chosen=["apple", "banana"])
    explorer.view.value = view
    assert explorer.error is None
    first = drawn(explorer)
    assert first.startswith(PNG)
    assert explorer._picture.layout.display == "block"
    explorer.names = ["apple", "banana", "cherry"]
    assert drawn(explorer) not in (first, b"")
    explorer.names = ["apple", "banana"]
    assert drawn(explorer) == first
    explorer.none.click()
    assert (drawn(explorer) == b"") == (view != "map")  # which marks nothing then
    assert explorer.module.layout.display == ("" if view == "spectra" else "none")


def test_the_map_says_who_is_most_alike(pool):
    explorer = PoolExplorer(pool, chosen=["apple"], scores=pd.Series({"apple": 1.0, "banana": 0.5}))
    plain = PoolExplorer(pool, chosen=["apple"])
    assert drawn(plain) != drawn(explorer)  # which is coloured
    matrix = similarity(pool.stack()).to_numpy() - 2 * np.eye(6)
    i, j = sorted(np.unravel_index(matrix.argmax(), matrix.shape))
    said = f"Most alike: {pool.names[i]} and {pool.names[j]} (cosine {matrix[i, j]:.2f})."
    assert explorer._picture.tooltip == f"Similarity of 6 adapters, 1 of them marked. {said}"


def test_cosines_of_the_selected_without_those_of_the_pool(pool, monkeypatch):
    read = []
    monkeypatch.setattr(views, "similarity", lambda stack, **k: read.append(stack.names) or similarity(stack, **k))
    monkeypatch.setattr(views, "AT_ONCE", 3)  # a large pool
    explorer = PoolExplorer(pool, chosen=["apple", "cherry"])
    explorer.view.value = "cosines"
    a, b = (torch.cat([d.flatten() for d in dense(pool, name).values()]) for name in ("apple", "cherry"))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, 0))
    assert f"apple and cherry (cosine {cosine:.2f})" in explorer._picture.tooltip
    assert read == [("apple", "cherry")]
    explorer.view.value = "norms"
    explorer.view.value = "cosines"
    assert len(read) == 1


def test_norms_by_layer(pool, monkeypatch):
    tables = []
    monkeypatch.setattr(views, "profiles", lambda t, **k: tables.append(t) or maps.profiles(t, **k))
    explorer = PoolExplorer(pool, chosen=["apple", "banana"])
    explorer.view.value = "norms"
    (found,) = tables
    assert (list(found.index), list(found.columns)) == (["apple", "banana"], ["0", "1"])
    for name in found.index:
        for layer in "01":
            squares = [float((d**2).sum()) for m, d in dense(pool, name).items() if f"layers.{layer}." in m]
            assert found.at[name, layer] == pytest.approx(sum(squares) ** 0.5, rel=1e-5)


def test_singular_values_of_all_modules_and_of_one(pool, monkeypatch):
    tables = []
    monkeypatch.setattr(views, "profiles", lambda t, **k: tables.append(t) or maps.profiles(t, **k))
    explorer = PoolExplorer(pool, chosen=["apple", "cherry"])
    explorer.view.value = "spectra"
    modules = [value for _, value in explorer.module.options]
    assert modules == [views.ALL, *pool.adapter("apple").modules]
    every = torch.stack([torch.linalg.svdvals(d)[:2] for d in dense(pool, "apple").values()])
    assert tables[0].loc["apple"].dropna().to_list() == pytest.approx(np.median(every.numpy(), 0).tolist(), rel=1e-4)
    assert tables[0].loc["cherry"].notna().sum() == 4
    module = next(m for m in modules if m.endswith("up_proj"))
    explorer.module.value = module
    want = torch.linalg.svdvals(dense(pool, "cherry")[module])[:4].tolist()
    assert tables[1].loc["cherry"].to_list() == pytest.approx(want, rel=1e-4)
    assert module in explorer._caption.value
    assert f"singular_values(adapter), {module!r})" in explorer._views.code("spectra", explorer.names, module)
    explorer.names = ["apple", "banana"]  # which has q and v alone
    assert explorer.module.value == module
    assert "1 of them do not have it" in explorer._caption.value
    explorer.names = ["banana"]
    assert explorer.module.value == views.ALL
    assert explorer.error is None


def test_the_lines_of_code_give_what_is_shown(pool):
    explorer = PoolExplorer(pool, chosen=["apple", "banana"])
    import workbench.similarity as s
    import workbench.spectra as p

    known = {**vars(s), **vars(p), "pool": pool, "explorer": explorer}
    code = {view: explorer._views.code(view, explorer.names) for view in views.VIEWS}
    assert eval(code["map"], known).equals(similarity(pool.stack()))
    assert eval(code["cosines"], known).equals(similarity(pool.stack(["apple", "banana"])))
    assert list(eval(code["norms"], known).columns) == ["0", "1"]
    assert [len(each) for each in eval(code["spectra"], known)] == [2, 3]


def test_a_failing_picture_is_told_and_the_next_one_drawn(pool, monkeypatch):
    explorer = PoolExplorer(pool)
    explorer.view.value = "norms"
    with monkeypatch.context() as broken:
        broken.setattr(Pool, "stack", lambda *_: (_ for _ in ()).throw(AdapterError(f"{EVIL} is damaged")))
        explorer.names = ["apple"]
        assert drawn(explorer) == b""
        assert isinstance(explorer.error, AdapterError)
        assert "&lt;script&gt;alert(1)&lt;/script&gt; is damaged" in explorer._message.value
    explorer.names = ["apple", "banana"]
    assert explorer.error is None
    assert drawn(explorer).startswith(PNG)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_pools(n):
    explorer = PoolExplorer(many_adapters(n), chosen=["adapter-0000"])
    for view in views.VIEWS:
        explorer.view.value = view
        assert explorer.error is None
        assert drawn(explorer).startswith(PNG) == (n > 1 if view == "map" else view != "cosines")


# at size


def takes_less(seconds, act, tries=4):
    """Whether it takes less of this process's own seconds; one of a few times will do, since the machine may be busy."""
    for _ in range(tries):
        start = time.process_time()
        act()
        if time.process_time() - start < seconds:
            return True
    return False


def test_a_thousand_adapters(many):
    """Building and answering take under a second, all pictures included, which stay of a size that fits a page."""
    scores = pd.Series(np.linspace(0, 1, 1000), index=list(many.names))
    assert takes_less(1, lambda: PoolExplorer(many, scores=scores))
    explorer = PoolExplorer(many, scores=scores)
    assert drawn(explorer) == b""
    assert "is computed when you ask for it" in explorer._caption.value
    explorer.compute.click()
    assert explorer._mapping.wait(WAIT)
    assert explorer._caption.value.count("Similarity of 1000 adapters, 0 of them marked.") == 1

    def select(count):
        explorer.table.selected_rows = list(range(count - (len(explorer.names) == count)))  # another one each time

    for view in views.VIEWS:
        explorer.view.value = view
        for count in (9, 1000):
            assert takes_less(1, lambda count=count: select(count)), (view, count)
            assert len(explorer.names) in (count, count - 1)
            assert explorer.error is None
            if drawn(explorer):
                width, height = size(explorer)
                assert width <= 1000
                assert height <= 850
    assert drawn(explorer).startswith(PNG)
    assert "the first 40 of " in explorer._caption.value


def test_a_long_chain_of_adapters_is_drawn(many):
    n = 1500
    x = 1.5 ** -np.arange(n)
    matrix = pd.DataFrame(1 - np.abs(x[:, None] - x[None]), index=range(n), columns=range(n))
    linkage = tree(matrix, optimal=False)
    assert maps.branches(linkage).shape == (n - 1, 4, 2)


def test_branches_are_scipy_s():
    from scipy.cluster.hierarchy import dendrogram

    linkage = tree(pd.DataFrame(similarity(many_adapters(12).stack())))
    want = dendrogram(linkage, no_plot=True)
    ours = {tuple(np.round(b, 6).ravel()) for b in maps.branches(linkage)}
    theirs = {
        tuple(np.round(np.stack([d, (np.array(i) - 5) / 10], 1), 6).ravel())
        for d, i in zip(want["dcoord"], want["icoord"], strict=True)
    }
    assert ours == theirs


# beside the kernel's thread


def test_similarity_of_a_large_pool_is_computed_beside_and_can_be_stopped(pool, monkeypatch):
    started, free = threading.Event(), threading.Event()

    def slow(stack, *, watch):
        assert not watch(0, 2, "first")
        started.set()
        assert free.wait(WAIT)
        return similarity(stack, watch=watch)

    monkeypatch.setattr(views, "AT_ONCE", 3)
    monkeypatch.setattr(views, "similarity", slow)
    explorer = PoolExplorer(pool, chosen=["apple"])
    assert explorer.compute.layout.display == ""
    explorer.compute.click()
    assert started.wait(WAIT)
    assert (explorer.compute.layout.display, explorer._mapping.layout.display) == ("none", "flex")
    assert "is being computed" in explorer._caption.value
    explorer.view.value = "norms"  # which can be looked at meanwhile
    assert drawn(explorer).startswith(PNG)
    explorer.view.value = "map"
    assert drawn(explorer) == b""
    explorer._mapping._stop.click()
    free.set()
    assert explorer._mapping.wait(WAIT)
    assert (explorer.compute.layout.display, explorer.error, drawn(explorer)) == ("", None, b"")
    explorer.compute.click()
    assert explorer._mapping.wait(WAIT)
    assert drawn(explorer).startswith(PNG)
    assert explorer.compute.layout.display == "none"
    again = PoolExplorer(pool)  # of the same pool: nothing is computed twice
    assert drawn(again).startswith(PNG)


def test_a_similarity_that_fails_is_told(pool, monkeypatch):
    monkeypatch.setattr(views, "AT_ONCE", 3)
    monkeypatch.setattr(views, "similarity", lambda *a, **k: [][0])
    explorer = PoolExplorer(pool)
    explorer.compute.click()
    assert explorer._mapping.wait(WAIT)
    assert isinstance(explorer.error, IndexError)
    explorer.names = ["apple"]
    assert isinstance(explorer.error, IndexError)  # for there is still no map
    explorer.view.value = "norms"
    assert explorer.error is None


def test_large_adapters_are_read_beside(pool, monkeypatch):
    seen, free, profile = [], threading.Event(), views.norm_profile

    def slow(stack):
        seen.append(stack.names[0])
        assert free.wait(WAIT)
        return profile(stack)

    monkeypatch.setattr(views, "QUICK", 0)
    monkeypatch.setattr(views, "norm_profile", slow)
    explorer = PoolExplorer(pool, chosen=["apple", "banana", "cherry"])
    explorer.view.value = "norms"
    assert "Reading 3 adapters" in explorer._caption.value
    explorer._reading._stop.click()
    free.set()
    assert explorer._reading.wait(WAIT)
    assert "Stopped" in explorer._caption.value
    assert drawn(explorer) == b""
    explorer.names = ["apple", "banana"]
    assert explorer._reading.wait(WAIT)
    assert drawn(explorer).startswith(PNG)
    assert "by layer" in explorer._caption.value
    assert len(seen) == len(set(seen)) == 2  # each adapter is read once


def test_what_is_read_for_an_earlier_selection_is_not_shown(pool, monkeypatch):
    free, started, profile = threading.Event(), threading.Event(), views.norm_profile

    def slow(stack):
        started.set()
        assert free.wait(WAIT)
        return profile(stack)

    explorer = PoolExplorer(pool, chosen=["banana", "cherry"])
    explorer.view.value = "norms"
    monkeypatch.setattr(views, "QUICK", 0)
    monkeypatch.setattr(views, "norm_profile", slow)
    explorer.names = ["apple"]
    assert started.wait(WAIT)
    explorer.names = ["banana"]
    shown = drawn(explorer)
    assert shown.startswith(PNG)
    free.set()
    assert explorer._reading.wait(WAIT)
    assert drawn(explorer) == shown


# memory


def test_settings_survive_building_it_anew(pool):
    first = PoolExplorer(pool, chosen=["apple"], key="mine")
    first.names = ["banana", "cherry"]
    first.use.click()
    first.names = ["cherry"]
    first.view.value = "spectra"
    module = first.module.options[3][1]
    first.module.value = module
    second = PoolExplorer(pool, chosen=["apple"], key="mine")
    assert (second.names, second.used, second.view.value) == (("cherry",), ("banana", "cherry"), "spectra")
    assert second.module.value == module
    assert drawn(second) == drawn(first)
    assert list(second.table.selected_rows) == [row(second, "cherry")]
    assert second._note.value == ""
    for other in (PoolExplorer(pool, chosen=["apple"], key="other"), PoolExplorer(pool, chosen=["apple"])):
        assert (other.names, other.used, other.view.value) == (("apple",), (), "map")


def test_what_does_not_fit_any_more_is_dropped_and_said(pool, many):
    first = PoolExplorer(pool, chosen=["apple", EVIL], key="mine")
    first.use.click()
    second = PoolExplorer(many, key="mine")
    assert (second.names, second.used) == ((), ())
    assert "Selected before, but not accepted in this pool: " in second._note.value
    assert "apple" in second._note.value
    assert "&lt;script&gt;" in second._note.value
