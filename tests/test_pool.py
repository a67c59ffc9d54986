"""Pools: what is opened, what its table says, what can be had from it."""

import json
import os
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import pandas as pd
import pytest

from helpers import random_adapter, tiny_base
from workbench import screen, source
from workbench.adapters import Adapter
from workbench.errors import AdapterError, BaseError, SelectionError
from workbench.inventory import kept_shapes
from workbench.nano import shelf, wild, world
from workbench.pool import COLUMNS, Pool
from workbench.rules import Rule
from workbench.screen import STUDY, base_shapes, counts
from workbench.stack import Stack

NAMES = ("apple", "banana", "cherry", "damson")


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("base")
    base.model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, base):
    """Four sound adapters of unequal ranks and targets, written in another order than their names'."""
    for i, name in reversed(list(enumerate(NAMES))):
        targets = ["v_proj", "q_proj"] if i == 1 else None
        random_adapter(base, 2 + i, seed=i, targets=targets, name=name).save(tmp_path / "pool" / name)
    return tmp_path / "pool"


def rename_base(folder, name):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


def test_a_folder(folder, base):
    pool = Pool.open(folder)
    assert (pool.name, pool.base, pool.names, len(pool)) == ("pool", "tiny", NAMES, 4)
    table = pool.table
    assert list(table.columns) == list(COLUMNS)
    assert table["name"].tolist() == list(NAMES)
    assert table["accepted"].all()
    assert table["rank"].tolist() == [2, 3, 4, 5]
    assert table["targets"].tolist()[1] == "q_proj,v_proj"
    assert table["modules"].tolist() == [14, 4, 14, 14]
    for name, norm, parameters in zip(table["name"], table["norm"], table["parameters"], strict=True):
        deltas = [f.B.double() @ f.A.double() for f in Adapter.load(folder / name).modules.values()]
        assert norm == pytest.approx(sum(float(d.square().sum()) for d in deltas) ** 0.5, rel=1e-5)
        assert parameters == sum(f.A.numel() + f.B.numel() for f in Adapter.load(folder / name).modules.values())
    assert (table[["operation", "domain", "format"]] == "").all(axis=None)


def test_adapters_and_stacks(folder):
    pool = Pool.open(folder)
    assert pool.adapter("cherry") is pool.adapter("cherry")
    assert pool.adapter("cherry").digest() == Adapter.load(folder / "cherry").digest()
    assert pool.stack().digest() == Stack.of([Adapter.load(folder / name) for name in NAMES]).digest()
    assert pool.stack(["damson", "apple"]).names == ("damson", "apple")


def test_what_does_not_fit_into_memory_is_read_again(folder, monkeypatch):
    kept = Pool.open(folder)
    monkeypatch.setattr("workbench.pool.KEPT_IN_MEMORY", 0)
    lean = Pool.open(folder)
    assert lean._kept == {}
    assert lean.digest == kept.digest
    assert lean.stack().digest() == kept.stack().digest()
    assert lean._kept == {}
    pd.testing.assert_frame_equal(lean.table, kept.table)


def test_wrong_names_are_helped(folder):
    pool = Pool.open(folder)
    with pytest.raises(SelectionError, match="no adapter 'bananna' in pool 'pool'; did you mean banana"):
        pool.adapter("bananna")
    with pytest.raises(SelectionError, match=r"no adapter 'zzz'.*pool\.names lists them"):
        pool.stack(["apple", "zzz"])
    with pytest.raises(SelectionError, match="the selection is empty"):
        pool.stack([])
    with pytest.raises(SelectionError, match=r"write \['apple'\]"):
        pool.stack("apple")
    with pytest.raises(SelectionError, match="more than once: apple"):
        pool.stack(["apple", "apple"])


def test_the_digest_is_of_the_content(folder, tmp_path, base):
    digest = Pool.open(folder).digest
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert Pool.open(tmp_path / "elsewhere").digest == digest
    rename_base(random_adapter(base, 2, seed=9).save(folder / "egg"), "other")
    assert "egg" not in Pool.open(folder).names
    assert Pool.open(folder).digest == digest
    random_adapter(base, 2, seed=9).save(folder / "apple", overwrite=True)
    assert Pool.open(folder).digest != digest


def test_wild_adapters_are_refused_with_reasons(folder, base, base_folder, monkeypatch):
    expected = wild.make(folder, base)
    pool = Pool.open(folder, base=base_folder)
    monkeypatch.setattr("workbench.pool.KEPT_IN_MEMORY", 0)  # each then is read module by module and let go
    pd.testing.assert_frame_equal(Pool.open(folder, base=base_folder).table, pool.table)
    table = pool.table.set_index("name")
    assert table["rule"].to_dict() == expected | dict.fromkeys(NAMES, "")
    assert table.index.is_monotonic_increasing
    assert pool.names == tuple(table.index[table["accepted"]])
    assert (table.loc[~table["accepted"], "reason"] != "").all()
    assert counts(pool.table)["count"].sum() == (~table["accepted"]).sum()
    assert len(pool.stack()) == len(pool)
    with pytest.raises(AdapterError, match=r"dora was refused by the rule 'dora': use_dora is set"):
        pool.adapter("dora")
    strict = Pool.open(folder, base=base_folder, rules=STUDY)
    assert set(pool.names) - set(strict.names) == set(wild.STUDY_ONLY)


def test_all_refused_opens_and_says_why(folder):
    for name in NAMES:
        (folder / name / "adapter_model.safetensors").unlink()
    pool = Pool.open(folder)
    assert len(pool) == 0
    assert set(pool.table["rule"]) == {"weights-file"}
    with pytest.raises(SelectionError, match=r"all 4 adapters of pool 'pool' were refused; pool\.table says why"):
        pool.stack()
    assert pool.digest


def test_nothing_to_open(tmp_path, folder):
    with pytest.raises(AdapterError, match="missing: expected a folder of adapter folders, found nothing"):
        Pool.open(tmp_path / "missing")
    with pytest.raises(AdapterError, match="found a file"):
        Pool.open(folder / "apple" / "README.md")
    with pytest.raises(AdapterError, match="is itself one adapter"):
        Pool.open(folder / "apple")
    (tmp_path / "empty/docs").mkdir(parents=True)
    with pytest.raises(AdapterError, match="empty holds no adapter: expected folders with adapter_config"):
        Pool.open(tmp_path / "empty")


def test_a_path_named_nano_is_a_folder(folder, tmp_path, monkeypatch):
    folder.rename(tmp_path / "nano")
    monkeypatch.chdir(tmp_path)
    assert Pool.open(Path("nano")).names == NAMES


def test_authors_folders_and_hidden_ones(tmp_path, base):
    for name in ("ann/one", "bob/one", ".cache/one", "ann/.hidden"):
        random_adapter(base, 2).save(tmp_path / "mirror" / name)
    pool = Pool.open(tmp_path / "mirror")
    assert pool.names == ("ann/one", "bob/one")
    assert pool.stack().names == pool.names


def test_the_base_is_what_most_name(folder):
    rename_base(folder / "cherry", "someone/other")
    pool = Pool.open(folder)
    assert pool.base == "tiny"
    assert pool.table.set_index("name").loc["cherry", "reason"] == "its base is 'someone/other', expected 'tiny'"
    named = Pool.open(folder, base="someone/other")
    assert named.names == ("cherry",)
    assert named.base == "someone/other"
    foreign = Pool.open(folder, base="no/one")
    assert set(foreign.table["rule"]) == {"base-name"}


def test_a_local_copy_of_the_base_compares_shapes(folder, tmp_path, base, base_folder):
    """Its folder has another name than the configurations give: the shapes decide."""
    pool = Pool.open(folder, base=base_folder)
    assert pool.names == NAMES
    assert pool.checked
    assert pool.base == str(base_folder)
    assert pool.stack().base == "tiny"
    wide = {m: (2 * d_out, d_in) for m, (d_out, d_in) in base.projections.items()}
    rename_base(random_adapter(wide, 2).save(folder / "egg"), "tiny")
    refused = Pool.open(folder, base=base_folder)
    assert refused.table.set_index("name").loc["egg", "rule"] == "base-shape"
    unchecked = Pool.open(folder)
    assert not unchecked.checked
    assert "not compared with the base's layers" in repr(unchecked)
    with pytest.raises(AdapterError, match="egg"):
        unchecked.stack()
    (tmp_path / "no base").mkdir()
    with pytest.raises(BaseError, match="no base"):
        Pool.open(folder, base=tmp_path / "no base")


def test_what_is_shown_is_escaped(folder, base, base_folder):
    wild.make(folder, base)
    pool = Pool.open(folder, base=base_folder)
    script = "<script>alert(1)<script>"
    assert script in pool.names
    html = pool.show()._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in html
    assert html.startswith('<div class="tex2jax_ignore mathjax_ignore">')
    assert html.count("<tr") == 1 + len(pool.table)
    assert pool.show(2)._repr_html_().count("<tr") == 3
    longest = max(pool.table["reason"], key=len)
    assert len(longest) > 50
    assert escape(longest, quote=False) in html
    assert f"{len(pool)} adapters accepted, {len(pool.table) - len(pool)} refused" in html


def test_the_title_is_escaped_too(folder, tmp_path):
    folder.rename(tmp_path / "<img src=x onerror=alert(1)>")
    html = Pool.open(tmp_path / "<img src=x onerror=alert(1)>").show()._repr_html_()
    assert "<img" not in html


def test_a_name_that_is_no_text(folder, tmp_path):
    os.rename(folder / "apple", os.fsencode(folder) + b"/app\xff")
    pool = Pool.open(folder)
    assert pool.names == ("app\\udcff", *NAMES[1:])
    assert pool.adapter(pool.names[0]).digest() == pool.stack(lazy=True).adapter(0).digest()
    pool.table.to_parquet(tmp_path / "table.parquet")
    pool.show()._repr_html_().encode()


def test_the_table_survives_parquet(folder, base, tmp_path):
    wild.make(folder, base)
    table = Pool.open(folder).table
    table.to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)


def test_the_bundled_pool():
    pool = Pool.open("nano")
    assert pool.names == tuple(sorted(spec.slug for spec in world.UPSTREAM))
    assert pool.table["accepted"].all()
    assert pool.base == str(shelf.BASE)
    assert pool.checked
    for row in pool.table.itertuples():
        spec = world.find(row.name)
        assert (row.operation, row.domain, row.format) == (spec.operation, spec.domain, spec.format)
    assert pool.table["rank"].nunique() > 2
    assert pool.table["alpha_over_r"].nunique() > 2
    assert pool.table["rslora"].any()
    assert pool.table["targets"].nunique() > 2
    assert len(pool.stack()) == len(pool)


def test_the_bundled_base_s_shapes_are_its_configuration_s():
    from workbench.pool import _stored_shapes

    built = base_shapes(str(shelf.BASE))
    assert _stored_shapes(shelf.BASE) == {m: s for m, s in built.items() if m.endswith("_proj")}


def test_the_bundled_pool_opens_without_transformers():
    code = "import sys; from workbench.pool import Pool; Pool.open('nano').table; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_bundle_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "BASE", tmp_path / "base")
    with pytest.raises(AdapterError, match=r"python -m workbench\.nano\.forge"):
        Pool.open("nano")


# A pool that is opened again.


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Open a pool with an inventory, and say which adapters' weights were read."""
    read, header = [], source.read_header

    def watched(path):
        read.append(Path(path).parent.name)
        return header(path)

    monkeypatch.setattr(source, "read_header", watched)

    def open_it(folder, **settings):
        read.clear()
        pool = Pool.open(folder, **{"cache": tmp_path / "cache", "inventory": True} | settings)
        return pool, sorted(read)

    return open_it


def sixty(folder, base):
    """Adapters of which three in ten are broken."""
    for i in range(60):
        random_adapter(base, 2, i, ["q_proj"], name=f"a{i:02}").save(folder / f"a{i:02}")
        if i % 10 == 3:
            rename_base(folder / f"a{i:02}", "someone/other")
        if i % 10 == 5:
            weights = folder / f"a{i:02}" / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-3])
        if i % 10 == 7:
            (folder / f"a{i:02}" / "adapter_model.safetensors").unlink()
    return folder


def test_a_second_opening_reads_no_weights(tmp_path, base, opened, monkeypatch):
    folder = sixty(tmp_path / "pool", base)
    monkeypatch.setattr("workbench.pool.KEPT_IN_MEMORY", 0)
    first, read = opened(folder)
    assert len(first) == 42
    assert len(read) == 42  # broken ones are refused before
    for weights in folder.glob("*/adapter_model.safetensors"):  # of the weights only sizes and times are looked at
        before = weights.stat()
        weights.write_bytes(b"x" * before.st_size)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second, read = opened(folder)
    assert read == []
    assert (second.names, second.base, second.refused()) == (first.names, first.base, first.refused())
    pd.testing.assert_frame_equal(second.table, first.table)
    assert second.digest == first.digest


def test_a_changed_adapter_is_screened_again(folder, base, opened):
    first, read = opened(folder)
    assert read == sorted([*NAMES, *NAMES])  # each to be measured, and, in a small pool, to be kept
    random_adapter(base, 2, seed=9, name="apple").save(folder / "apple", overwrite=True)
    (folder / "cherry" / "adapter_model.safetensors").unlink()
    random_adapter(base, 2, seed=8).save(folder / "egg")
    os.utime(folder / "damson" / "README.md", ns=(1, 1))
    second, read = opened(folder)
    assert set(read) == {"apple", "egg", "damson"}
    assert second.names == ("apple", "banana", "damson", "egg")
    pd.testing.assert_frame_equal(second.table, Pool.open(folder).table)
    assert second.digest == Pool.open(folder).digest != first.digest
    shutil.rmtree(folder / "egg")
    third, read = opened(folder)
    assert (third.names, read) == (("apple", "banana", "damson"), [])
    (folder / "apple" / "adapter_model.bin").write_bytes(b"")
    assert opened(folder)[1] == ["apple", "apple"]


def test_what_a_verdict_depends_on_besides(folder, tmp_path, base_folder, opened):
    assert opened(folder)[1]
    assert not opened(folder)[1]
    assert opened(folder, rules=STUDY)[1]
    assert opened(folder, base=base_folder)[1]
    assert opened(folder, base="no/one")[0].names == ()
    for again in ({}, {"rules": STUDY}, {"base": base_folder}, {"base": "no/one"}, {"rules": STUDY[::-1]}):
        assert not opened(folder, **again)[1]
    assert opened(folder, inventory=False)[1]
    assert opened(folder, cache=tmp_path / "elsewhere")[1]
    calm = Rule("calm", "A norm under a million", lambda c: "" if c.norm < 1e6 else "wild", "values")
    assert opened(folder, rules=[calm])[1]
    assert opened(folder, rules=[calm])[1]  # a function's verdict is not kept
    assert len(list((tmp_path / "elsewhere" / "workbench").glob("*.parquet"))) == 1


def test_a_link_that_points_elsewhere_is_a_change(folder, tmp_path, opened):
    (folder / "apple").rename(tmp_path / "apple")
    (folder / "apple").mkdir()
    for path in (tmp_path / "apple").iterdir():
        shutil.copy2(path, folder / "apple")
    weights = folder / "apple" / "adapter_model.safetensors"
    assert "apple" in opened(folder)[0].names
    weights.unlink()
    weights.symlink_to(tmp_path / "apple" / weights.name)
    pool, _ = opened(folder)
    assert pool.table.set_index("name").loc["apple", "rule"] == "symlink"
    (tmp_path / "apple" / weights.name).unlink()
    assert opened(folder)[0].refused().keys() == {"apple"}


def test_small_pools_leave_nothing_behind(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    Pool.open(folder)
    assert not (tmp_path / "hub").exists()
    monkeypatch.setattr("workbench.pool.WORTH_AN_INVENTORY", 0)
    Pool.open("nano")
    assert not (tmp_path / "hub").exists()
    Pool.open(folder, inventory=False)
    assert not (tmp_path / "hub").exists()
    Pool.open(folder)
    assert len(list((tmp_path / "hub" / "workbench").glob("*pool*.parquet"))) == 1


def test_an_interrupted_screening_loses_nothing(tmp_path, base, opened, monkeypatch):
    folder = sixty(tmp_path / "pool", base)
    monkeypatch.setattr("workbench.folders.THREADS", 1)
    monkeypatch.setattr("workbench.folders.BATCH", 10)
    judge, names = screen.screen, []

    def interrupted(*args, name=None, **settings):
        names.append(name)
        if len(names) == 36:
            raise KeyboardInterrupt
        return judge(*args, name=name, **settings)

    monkeypatch.setattr(
        "workbench.pool.screen", lambda *args, **s: interrupted(*args, **s) if s.get("name") else judge(*args, **s)
    )
    with pytest.raises(KeyboardInterrupt):
        opened(folder)
    del names[:]
    names.append("never 36 again")
    assert len(opened(folder)[0]) == 42
    assert names[1:] == [f"a{i:02}" for i in range(35, 60)]


def test_the_base_s_layers_are_kept_too(folder, base_folder, tmp_path, monkeypatch):
    settings = {"base": base_folder, "cache": tmp_path / "cache", "inventory": True}
    first = Pool.open(folder, **settings)
    monkeypatch.setattr("workbench.inventory.base_shapes", None)
    second = Pool.open(folder, **settings)
    assert second.shapes == first.shapes == base_shapes(str(base_folder))
    assert second.checked
    (kept,) = (tmp_path / "cache" / "workbench").glob("layers*.parquet")
    kept.write_bytes(b"damaged")
    monkeypatch.setattr("workbench.inventory.base_shapes", base_shapes)
    assert Pool.open(folder, **settings).shapes == first.shapes
    with pytest.raises(BaseError, match="nowhere"):
        kept_shapes(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(BaseError, match="no layer shapes"):
        kept_shapes("../no id", tmp_path)


def test_what_the_hub_tells_has_columns(folder):
    pool = Pool.open(folder)
    told = {"author": "ann", "created": "2026-01-02", "downloads": 7, "likes": 0, "licence": "mit", "datasets": "a,b"}
    pool._verdicts["apple"].facts.update(told, tags="x")
    pool._verdicts["banana"].facts.update(author=None, downloads=None)
    table = pool.table.set_index("name")
    assert table.loc["apple", [*told, "tags"]].to_dict() == told | {"tags": "x"}
    assert table.loc["banana", "author"] == ""
    assert table["downloads"].isna().tolist() == [False, True, True, True]
    assert {"author", "downloads", "likes"} <= set(pool.show().table)
    plain = set(Pool.open(folder).show().table)
    assert plain.isdisjoint({*told, "tags", "rule", "reason", "operation"})
    assert {"name", "accepted", "rank", "norm", "rslora"} <= plain


def test_the_digest_of_what_was_screened(folder, monkeypatch):
    pool = Pool.open(folder)
    for name in NAMES:
        assert (
            pool._verdicts[name].facts["digest"] == Adapter.load(folder / name).digest() == pool.adapter(name).digest()
        )
    digest = Pool.open(folder).digest
    for name in NAMES:
        del pool._verdicts[name].facts["digest"]
    assert pool.digest == digest
