"""Model cards and the licences in them: read back by YAML, the Hub's client and a Markdown renderer."""

import html
import itertools
import os
import re
from dataclasses import replace

import mistune
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import (
    hook_logits,
    peft_s_own_warnings,
    random_adapter,
    relative,
    some_ids,
    tiny_base,
    write_raw,
)
from hub_server import LICENCES
from workbench import licences as licences_under_test
from workbench.adapt import adapt
from workbench.adapters import Adapter, Factors
from workbench.card import hub_id, model_card, printable
from workbench.licences import KINDS, Combined, combined, gathered, kind, stated
from workbench.merge import merge
from workbench.pool import Pool
from workbench.stack import Stack
from workbench.tasks import Example, Task

HUB = LICENCES.split()
EVIL = "<script>alert(1)</script>|`x`\n# y ![z](http://w.x/t.png) [a](javascript:b) $m$ **c** @d https://e.f www.g.hi __j__"


def render(card):
    """The card's text as HTML, with the extensions that the Hub's pages have; raw HTML is let through."""
    text = ModelCard(card).text
    return mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url", "footnotes", "math"])(text)


def header(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def small(
    name="a", seed=0, rank=2, base="org/base", shape=(6, 5), modules=("model.x.q_proj", "model.x.v_proj"), **info
):
    """An adapter of one or two tiny modules."""
    g = torch.Generator().manual_seed(seed)
    made = {
        m: Factors(torch.randn(shape[0], rank, generator=g), torch.randn(rank, shape[1], generator=g)) for m in modules
    }
    return Adapter(name, made, base, info)


# Reading a licence ---------------------------------------------------------------------------------------------------


def read(folder, text):
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return stated(folder)


def test_every_licence_of_the_hub_has_one_kind():
    listed = [one for names in KINDS.values() for one in names]
    assert sorted(listed) == sorted(HUB)
    assert {kind(one) for one in HUB} == set(KINDS)
    assert kind("qwen-research") == "terms of its own"


@pytest.mark.parametrize(
    ("front", "want"),
    [
        ("license: mit", "mit"),
        ("license: 'Apache-2.0'", "apache-2.0"),
        ("license: Apache 2.0", "apache-2.0"),
        ("base_model: a/b\nlicense: llama3.1\ntags:\n- lora\n- license", "llama3.1"),
        ('"license": openrail++', "openrail++"),
        ("license:\n- mit", "mit"),
        ("license:\n  - mit\n  - cc-by-4.0\ntags: [x]", "mit-and-cc-by-4.0"),
        ("license: [mit, gemma]", "mit-and-gemma"),
        ("license: other\nlicense_name: Qwen_Research", "qwen-research"),
        ("license: other", "other"),
        ("license: other\nlicense_name: ../../etc", "other"),
        ("license: qwen", "qwen"),
        ("license: unknown", "unknown"),
        ("license: mit # but ask first", "mit"),
        # not stated:
        ("", ""),
        ("license:", ""),
        ("license: null", ""),
        ("license: true", ""),
        ("license: 2.0", ""),
        ("license: {mit: 1}", ""),
        ("license: [mit, 3]", ""),
        ("license: [[mit]]", ""),
        ("license: <b>mit</b>", ""),
        ("license: 'mit\n", ""),
        ("license: mit: x", ""),
        ("license: &a mit", ""),
        ("license: *a", ""),
        ("license: !!python/object/apply:os.system [true]", ""),
        ("license: " + "m" * 200, ""),
        ("license: mit\n" + "license_link: " + "x" * 3000, ""),
        ("  license: mit", ""),
        ("text: |\n  license: mit", ""),
        ("licenses: mit", ""),
        ("license_name: mit", ""),
        ("license: __", ""),
    ],
)
def test_the_licence_in_a_card(tmp_path, front, want):
    assert read(tmp_path, f"---\n{front}\n---\n\n# A card\n\nlicense: wtfpl\n") == {"licence": want}
    assert read(tmp_path, f"\ufeff---\r\n{front}\r\n---\r\n".replace("\n", "\r\n").replace("\r\r", "\r")) == {
        "licence": want
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "license: mit",
        "---\nlicense: mit\n",
        "# x\n\n---\nlicense: mit\n---\n",
        b"---\nlicense: \xff\xfe\n---\n",
        b"\0" * 9,
    ],
)
def test_a_card_without_a_head_states_none(tmp_path, text):
    assert read(tmp_path, text) == {"licence": ""}


def test_no_card_at_all(tmp_path):
    assert stated(tmp_path) == {"licence": ""}
    assert stated(tmp_path / "nowhere") == {"licence": ""}
    os.mkfifo(tmp_path / "README.md")  # reading it would wait for ever
    assert stated(tmp_path) == {"licence": ""}
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert stated(tmp_path) == {"licence": ""}


def test_the_link_of_a_licence_of_its_own(tmp_path):
    link = "https://huggingface.co/Qwen/x/blob/main/LICENSE"
    own = "---\nlicense: other\nlicense_name: qwen\nlicense_link: {}\n---\n"
    assert read(tmp_path, own.format(link)) == {"licence": "qwen", "licence_link": link}
    for wrong in (
        "LICENSE",
        "javascript:alert(1)",
        "https://a b",
        'https://a"b',
        "https://a<b>",
        "https://x@y.z",
        "3",
        "[x]",
    ):
        assert read(tmp_path, own.format(wrong)) == {"licence": "qwen"}
    assert read(tmp_path, f"---\nlicense: mit\nlicense_link: {link}\n---\n") == {"licence": "mit"}


def test_little_of_a_strangers_card_reaches_the_parser(tmp_path, monkeypatch):
    """A few hundred bytes of YAML can take a gigabyte, and 2 kB of `[` seconds: size and shape are judged first."""
    seen, real = [], yaml.safe_load

    def spied(text):
        seen.append(text)
        return real(text)

    monkeypatch.setattr(yaml, "safe_load", spied)
    bomb = "a: &a [x,x]\n" + "\n".join(f"{y}: &{y} [*{x},*{x}]" for x, y in itertools.pairwise("abcdefghij")) + "\n"
    for front in (
        bomb + "license: mit",
        "tags: " + "[" * 60_000 + "\nlicense: mit",
        "tags: [x]\n" * 6000 + "license: mit",
    ):
        assert read(tmp_path, f"---\n{front}\n---\n") == {"licence": "mit"}
    assert seen == ["license: mit"] * 3
    for front in (
        "license: " + "[" * 1900,
        "license: [a, [b]]",
        "license: " + "{a: " * 400,
        "license: &a [x]\nlicense_name: *a",
        "license:\n  <<: x",
        "license: mit\n" * 20_000,
        "license: mit\n" + "# x" * 70_000,
    ):
        assert read(tmp_path, f"---\n{front}\n---\n") == {"licence": ""}
    assert len(seen) == 3


@settings(max_examples=150)
@given(st.one_of(st.text(), st.text("license: -[]{}&*'\"\n\r\t#|>?,.%@`~x"), st.binary()))
def test_no_card_raises(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("card")
    for whole in (
        text,
        f"---\nlicense: {text}\n---\n" if isinstance(text, str) else b"---\nlicense: " + text + b"\n---\n",
    ):
        said = read(folder, whole.encode("utf-8", "replace") if isinstance(whole, str) else whole)
        assert set(said) <= {"licence", "licence_link"}
        assert re.fullmatch(r"[a-z0-9.+-]*", said["licence"])


def test_an_adapter_knows_its_licence_and_a_pool_a_stack_and_a_merge_keep_it(tmp_path):
    for i, licence in enumerate(("mit", "gpl-3.0", None)):
        folder = write_raw(
            tmp_path / f"a{i}",
            {
                "base_model.model.model.q_proj.lora_A.weight": torch.ones(2, 4) + i,
                "base_model.model.model.q_proj.lora_B.weight": torch.ones(4, 2),
            },
        )
        if licence:
            (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    assert Adapter.load(tmp_path / "a1").info["licence"] == "gpl-3.0"
    want = {"a0": "mit", "a1": "gpl-3.0", "a2": ""}
    stack = Stack.of([Adapter.load(tmp_path / name) for name in want])
    assert merge(stack).info["licences"] == want
    assert merge(stack.choose(["a2", "a1"])).info["licences"] == {"a2": "", "a1": "gpl-3.0"}
    pool = Pool.open(tmp_path, rules=())
    assert merge(pool, "ties", rank=1).info["licences"] == want


# What licences come to -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "licence", "name", "conflicts"),
    [
        ([], "", "", 0),
        (["mit"], "mit", "", 0),
        (["cc0-1.0", "mit", "apache-2.0", "bsd-3-clause"], "apache-2.0", "", 0),
        (["cc0-1.0"], "cc0-1.0", "", 0),
        (["mit", "gpl-3.0"], "gpl-3.0", "", 0),
        (["mit", "llama3.1"], "llama3.1", "", 0),
        (["mit", "llama3.1", "llama3.1"], "llama3.1", "", 0),
        (["llama3", "llama3.1"], "other", "llama3-and-llama3.1", 0),
        (["gemma", "openrail++"], "other", "openrail-plus-plus-and-gemma", 0),
        (["llama3.1", "cc-by-nc-4.0"], "other", "llama3.1-and-cc-by-nc-4.0", 0),
        (["qwen-research", "mit"], "other", "qwen-research", 0),
        (["other"], "other", "", 0),
        # copyleft that may go under another
        (["gpl-3.0", "agpl-3.0", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "gpl", "lgpl"], "agpl-3.0", "", 0),
        (["cc-by-sa-4.0", "gpl-3.0"], "gpl-3.0", "", 0),
        (["cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-4.0"], "cc-by-sa-4.0", "", 0),
        (["cc-by-nc-2.0", "cc-by-nc-4.0", "cc-by-4.0"], "cc-by-nc-4.0", "", 0),
        (["cc-by-nc-4.0", "cc-by-nc-sa-3.0"], "cc-by-nc-sa-3.0", "", 0),
        (["eupl-1.2", "gpl-2.0"], "gpl-2.0", "", 0),
        (["cc-by-nc-sa-4.0", "llama3.1"], "other", "llama3.1-and-cc-by-nc-sa-4.0", 1),
        (["cc-by-nc-sa-4.0", "apple-amlr"], "other", "cc-by-nc-sa-4.0-and-apple-amlr", 1),
        # and that may not
        (["gpl-2.0", "gpl-3.0"], "other", "gpl-2.0-and-gpl-3.0", 1),
        (["gpl-3.0", "cc-by-sa-3.0"], "other", "cc-by-sa-3.0-and-gpl-3.0", 1),
        (["gpl-3.0", "cc-by-nc-4.0"], "other", "gpl-3.0-and-cc-by-nc-4.0", 1),
        (["cc-by-sa-4.0", "cc-by-nc-sa-4.0"], "other", "cc-by-sa-4.0-and-cc-by-nc-sa-4.0", 1),
        (["cc-by-sa-4.0", "cc-by-nc-4.0"], "other", "cc-by-sa-4.0-and-cc-by-nc-4.0", 1),
        (["gpl-3.0", "llama3.1"], "other", "gpl-3.0-and-llama3.1", 1),
        (["mpl-2.0", "gemma"], "other", "mpl-2.0-and-gemma", 1),
        (["gpl-2.0", "apache-2.0"], "gpl-2.0", "", 1),
        (["gpl-3.0", "apache-2.0"], "gpl-3.0", "", 0),
        (["gpl-2.0", "gpl-3.0", "odbl"], "other", "odbl-and-gpl-2.0-and-gpl-3.0", 3),
        # no merge at all
        (["mit", "cc-by-nd-4.0"], "cc-by-nd-4.0", "", 1),
        (["gpl-3.0", "cc-by-nc-nd-4.0"], "other", "gpl-3.0-and-cc-by-nc-nd-4.0", 1),
        (["mit", ""], "unknown", "", 1),
        (["gpl-3.0", "unknown", "cc-by-nc-4.0", "cc-by-nd-4.0"], "unknown", "", 3),
        # several of one source
        (["mit-and-gpl-3.0", "llama3"], "other", "gpl-3.0-and-llama3", 1),
        (["research-and-education"], "other", "research-and-education", 0),
        (["llama3-and-qwen", "llama3"], "other", "llama3-and-qwen", 0),
    ],
)
def test_what_licences_come_to(found, licence, name, conflicts):
    for order in itertools.islice(itertools.permutations(enumerate(found)), 24):
        got = combined({f"ann/{i}": one for i, one in order})
        assert (got.licence, got.name, len(got.conflicts)) == (licence, name, conflicts)


def test_conflicts_and_notes_name_the_adapters():
    got = combined({"ann/a": "gpl-3.0", "bob/b": "cc-by-nc-4.0", "eve/c": "", "eve/d": "cc-by-nd-4.0", "eve/e": "mit"})
    none, nd, nc = got.conflicts
    assert none == "eve/c states no licence: all rights are reserved until its author says otherwise"
    assert nd == "cc-by-nd-4.0 (eve/d) forbids to share what is made from it, a merge included"
    assert nc == (
        "gpl-3.0 (ann/a) asks that what is made from it be passed on under it, without further restrictions; "
        "cc-by-nc-4.0 (bob/b) has such (non-commercial or research)"
    )
    assert got.notes == ("what mit (eve/e) asks for (notices, credit) stays due",)
    both = combined({"a": "gpl-2.0", "b": "odbl"})
    assert both.conflicts == (
        "odbl (b) and gpl-2.0 (a) each ask that what is made from them be passed on under their own terms",
    )
    assert combined({"a": "lgpl-3.0", "b": "gpl-3.0"}).notes == ("lgpl-3.0 (a) may be passed on under gpl-3.0",)
    assert combined({"a": "qwen"}).notes == ("qwen (a): its terms are its own; read them",)
    assert combined({"a": "", "b": "gpl-3.0"}).carried == ("unknown", "gpl-3.0")
    many = combined({f"n{i}": "" for i in range(1005)})
    assert many.conflicts == (
        "n0, n1, n2 and 1,002 more state no licence: all rights are reserved until their authors say otherwise",
    )
    clash = combined({"a": "apache-2.0", "b": "gpl-2.0"})
    assert clash.conflicts == ("gpl-2.0 (b) allows no further restrictions, and apache-2.0 (a) has such",)


def test_any_two_licences_come_to_one_that_the_hub_takes():
    for one, other in itertools.product([*HUB, "", "qwen"], repeat=2):
        got = combined({"a": one, "b": other})
        assert got.licence in HUB
        assert re.fullmatch(r"[a-z0-9.-]*", got.name)
        assert (got.licence == "other") >= bool(got.name)
        swapped = combined({"b": other, "a": one})
        assert (got.licence, got.name, got.carried) == (swapped.licence, swapped.name, swapped.carried)
        assert len(got.conflicts) == len(swapped.conflicts)


@given(st.lists(st.sampled_from([*HUB, "", "qwen"]), min_size=1, max_size=5), st.sampled_from([*HUB, "", "qwen"]))
def test_nothing_that_binds_is_lost_when_a_source_is_added(found, more):
    before, after = (combined({f"a{i}": one for i, one in enumerate(all_)}) for all_ in (found, [*found, more]))
    binding = [one for one in before.carried if kind(one) not in ("public domain", "permissive")]
    for one in binding:
        under = licences_under_test._UNDER.get(one, ())
        assert one in after.carried or set(under) & {*found, more}
    assert len(after.conflicts) >= len(before.conflicts) or set(after.carried) != set(before.carried)
    if before.licence == "unknown":
        assert after.licence == "unknown"


@given(
    st.lists(st.sampled_from([one for one in (*HUB, "qwen") if one != "unknown"]), min_size=1, max_size=3, unique=True)
)
def test_a_merge_of_merges_comes_to_what_one_merge_of_all_would(found):
    first = merge([small(f"a{i}", i, licence=one) for i, one in enumerate(found)], "sum")
    whole = combined({f"a{i}": one for i, one in enumerate(found)})
    again = merge([replace(first, name="x")], "sum")
    assert again.info["licences"] == {"x": whole.token}
    assert set(combined(again.info["licences"]).carried) == set(whole.carried)


def test_a_saved_merge_is_a_source_with_its_licence(tmp_path):
    link = "https://example.org/qwen"
    sources = [small("a", 1, licence="qwen", licence_link=link), small("b", 2, licence="mit")]
    merged = merge(sources, "sum")
    merged.save(tmp_path / "m")
    said = header((tmp_path / "m/README.md").read_text())
    assert (said["license"], said["license_name"], said["license_link"]) == ("other", "qwen", link)
    read_back = Adapter.load(tmp_path / "m")
    assert (read_back.info["licence"], read_back.info["licence_link"]) == ("qwen", link)
    read_back.save(tmp_path / "again")
    assert header((tmp_path / "again/README.md").read_text())["license_link"] == link
    both = merge([small("a", 1, licence="llama3"), small("b", 2, licence="gemma")], "sum")
    both.save(tmp_path / "both")
    assert combined({"x": stated(tmp_path / "both")["licence"]}).carried == ("gemma", "llama3")


def test_sources_of_weight_zero_do_not_count():
    sources = [small("a", 1, licence="mit"), small("b", 2, licence="cc-by-nd-4.0"), small("c", 3)]
    merged = merge(sources, "sum", weights=[-1.0, 0.0, 0.0])
    card = model_card(merged)
    assert header(card)["license"] == "mit"
    assert "Conflicts" not in card
    assert "| b | 0 | cc-by-nd-4.0 |" in card
    nothing = model_card(merge(sources, "sum", weights=[0.0, 0.0, 0.0]))
    assert "license" not in header(nothing)
    assert "No source has a weight other than 0" in nothing


def test_gathered_keeps_the_links_of_licences_that_the_hub_does_not_list():
    infos = [{"licence": "qwen", "licence_link": "https://a"}, {"licence": "qwen", "licence_link": "https://b"}, {}]
    assert gathered(["x", "y", "z"], infos) == {
        "licences": {"x": "qwen", "y": "qwen", "z": ""},
        "licence_links": {"qwen": "https://a"},
    }
    made = {"sources": {"p": 1.0}, "licences": {"p": "qwen"}, "licence_links": {"qwen": "https://c"}}
    assert gathered(["m"], [made]) == {"licences": {"m": "qwen"}, "licence_links": {"qwen": "https://c"}}
    assert gathered(["m"], []) == {"licences": {}}


# The card -----------------------------------------------------------------------------------------------------------


def test_the_head_loads_and_says_what_the_hub_wants_to_know():
    sources = [small("ann/a", 1, licence="mit"), small("ann/b", 2, rank=3, licence="apache-2.0")]
    merged = merge(sources, "ties", rank=2, weights=[1, -0.5], scale=0.7, density=0.5)
    card = model_card(merged, "me/merged")
    assert header(card) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["merge", "lora", "workbench"],
    }
    data = ModelCard(card).data
    assert (data.base_model, data.license, data.tags) == ("org/base", "apache-2.0", ["merge", "lora", "workbench"])
    plain = header(model_card(small(licence="gemma")))
    assert (plain["license"], plain["tags"]) == ("gemma", ["lora", "workbench"])
    assert "license" not in header(model_card(small()))


def test_the_text_says_how_it_was_made():
    sources = [small("ann/a", 1), small("ann/b", 2, rank=3, modules=("model.x.q_proj",)), small("ann/c", 3)]
    merged = merge(sources, "ties", rank=2, weights=[1, -0.5, 0], scale=0.7, density=0.5)
    card = model_card(merged)
    assert "Made by `ties` from 2 of 3 adapters, the whole multiplied by λ = 0.7." in card
    assert 'density = 0.5; elect = "total"' in card
    assert f"‖ΔW‖ = {merged.norm():.4g}" in card
    rows = [line for line in card.splitlines() if line.startswith("| ann/")]
    assert rows == [
        "| ann/a | 1 | not stated | 2 | 0 |",
        "| ann/b | -0.5 | not stated | 1 | 1 |",
        "| ann/c | 0 | not stated | 0 | 0 |",
    ]
    error = merged.info["error"]
    worst = max(error, key=error.get)
    assert f"at most {error[worst]:.3g} ({worst})" in card
    for module, value in error.items():
        assert f"| {module} | {value:.3g} |" in card
    assert "rank = 2" in card
    assert "no legal advice" in card
    assert "The base model's own licence applies too" in card


def test_unequal_ranks_and_notes_are_told():
    sources = [small("a", 1), small("b", 2, rank=3, modules=("model.x.q_proj",))]
    assert "2 modules, rank up to 5 (2 in 1, 5 in 1)" in model_card(merge(sources, "sum"))
    noted = merge(sources, "lego", k=3)
    assert noted.info["notes"]
    for note in noted.info["notes"]:
        assert f"<li>{html.escape(note)}</li>" in render(model_card(noted))


def test_what_was_left_out_is_told_with_the_reason(tmp_path):
    sources = [small("ann/a", 1), small("ann/b", 2, left_out={"lm_head": "the base has no such layer", "x": "a copy"})]
    merged = merge(sources, "sum")
    for i, adapter in enumerate(sources):
        adapter.save(tmp_path / f"p{i}")
    config = tmp_path / "p1/adapter_config.json"
    config.write_text(config.read_text().replace('"bias": "none"', '"bias": "all"'))
    card = model_card(merged)
    assert "| ann/b | left out | 1 | the base has no such layer |" in card
    assert "| ann/b | left out | 1 | a copy |" in card
    pooled = model_card(merge(Pool.open(tmp_path, rules=()), "sum"))
    assert re.search(r"\| p1 \| refused \| all \| .*bias", pooled)
    assert "Left out" not in model_card(merge(sources[:1], "sum"))


def test_a_thousand_sources_stay_readable():
    shapes = {"model.q_proj": (3, 3)}
    sources = [replace(random_adapter(shapes, 1, seed=i, name=f"n{i}"), base="org/base") for i in range(1000)]
    weights = [(-1) ** i * ((i * 7919) % 1000 + 1) / 1000 for i in range(1000)]
    card = model_card(merge(sources, "sum", weights=weights))
    shown = render(card)
    folded = re.search(
        r"<details><summary>1,000 sources, largest weight first</summary>(.*?)</details>", shown, re.DOTALL
    )
    cells = re.findall(r"<tr>\s*<td>n(\d+)</td>\s*<td>([-0-9.e]+)</td>", folded[1])
    assert len(cells) == 1000
    sizes = [abs(float(weight)) for _, weight in cells]
    assert sizes == sorted(sizes, reverse=True)
    assert all(float(weight) == pytest.approx(weights[int(i)], rel=1e-3) for i, weight in cells)
    assert (
        len([line for line in re.sub(r"<details>.*?</details>", "", card, flags=re.DOTALL).splitlines() if line]) < 60
    )


TAGS = {
    "h1",
    "h2",
    "p",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "ul",
    "li",
    "pre",
    "code",
    "details",
    "summary",
    "strong",
}


def hostile(name):
    """A merge whose every text that can come from a stranger is this one."""
    module = "model." + name
    sources = [
        replace(small(name, 1, base=name, modules=(module,)), info={"licence": name}),
        small("b", 2, base="", modules=(module,), left_out={name: name}),
    ]
    merged = merge(sources, "svd", rank=1)
    info = {**merged.info, "task": name, "training": name, "result": {"x": name}, "notes": [name], "paper": name}
    return replace(
        merged, name=name, info={**info, "licence_links": {"unknown": name}, "method": name, "options": {"o": name}}
    )


def test_what_strangers_wrote_is_shown_and_nothing_else():
    card = model_card(hostile(EVIL), "me/x")
    shown = render(card)
    assert set(re.findall(r"<([a-z0-9]+)", shown)) <= TAGS | {"code"}
    assert card.count("www.g") == 1  # in a code span; elsewhere the Hub's pages would turn it into a link
    assert len(re.findall(r"<h1>", shown)) == 1
    told = html.unescape(re.sub(r"<[^>]*>", "", shown))
    assert told.count("<script>alert(1)</script>|`x` # y ![z](http://w.x/t.png) [a](javascript:b) $m$ **c**") >= 8
    assert header(card)["tags"] == ["merge", "lora", "workbench"]
    assert "base_model" not in header(card)


@settings(max_examples=60)
@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
    | st.text("<>|`*_[]()!#&~$:@\\\n -+=ab.w1", max_size=40)
)
@example("__j__")
@example("_a_ b_c _")
@example("* # - + 1. > ~~x~~ ```")
def test_any_text_in_a_table_is_one_cell_that_reads_as_it_was_written(name):
    card = model_card(hostile(name), "me/x")
    assert yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])["library_name"] == "peft"
    shown = render(card)
    assert set(re.findall(r"<([a-zA-Z0-9]+)", shown)) <= TAGS
    table = re.search(r"<h2>Sources</h2>.*?</table>", shown, re.DOTALL)[0]
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    ]
    rows = [row for row in rows if row]
    assert [len(row) for row in rows] == [5, 5]
    assert html.unescape(rows[0][0]).strip() == printable(" ".join(name.split()), 200)


def test_no_folder_of_this_machine_is_told():
    for path in ("/home/someone/models/base", "C:\\Users\\someone\\base", "~/someone/base/"):
        card = model_card(small(base=path))
        assert "someone" not in card
        assert "base_model" not in header(card)
        assert "A LoRA adapter for base, written by workbench" in card
        assert 'from_pretrained("path/to/the/base")' in card
    assert "an unnamed base" in model_card(small(base=""))
    assert [hub_id(one) for one in ("gpt2", "org/base", "a/b/c", "/x", "", "org/base\n", "-x")] == [True] * 2 + [
        False
    ] * 5


def load_by_the_card(folder, base_folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace("path/to/the/base", str(base_folder)).replace("path/to/this/folder", str(folder))
    names = {}
    with peft_s_own_warnings():
        exec(code, names)
    return names["model"].eval()


def test_the_card_s_own_lines_load_it(tmp_path):
    base = tiny_base(spread=4.0)
    base.model.save_pretrained(tmp_path / "base")
    sources = [random_adapter(base, r, seed=r) for r in (2, 3)]
    merged = replace(merge(sources, "average"), base=str(tmp_path / "base"))
    merged.save(tmp_path / "merged")
    ids = some_ids(base)
    with torch.no_grad():
        got = load_by_the_card(tmp_path / "merged", tmp_path / "base")(input_ids=ids).logits
    assert relative(got, hook_logits(base, merged, ids)) < 1e-5


def test_the_card_loads_the_kind_of_model_that_it_is():
    assert "AutoModelForCausalLM.from_pretrained" in model_card(small())
    seq = model_card(small(config={"task_type": "SEQ_2_SEQ_LM"}))
    assert "from transformers import AutoModelForSeq2SeqLM" in seq
    assert "pipeline_tag" not in header(seq)
    assert "pipeline_tag" not in header(model_card(small(config={"task_type": "FEATURE_EXTRACTION"})))


def test_the_method_is_cited():
    merged = merge([small("a", 1), small("b", 2)], "ties", rank=2)

    def cited(paper):
        card = model_card(replace(merged, info={**merged.info, "paper": paper}))
        return re.search(r"```bibtex\n(.*?)```", card, re.DOTALL)[1]

    ties = cited(merged.info["paper"])
    assert "title = {{TIES-Merging: Resolving Interference When Merging Models}}" in ties
    for line in (
        "year = {2023}",
        "eprint = {2306.01708}",
        "archivePrefix = {arXiv}",
        "url = {https://arxiv.org/abs/2306.01708}",
    ):
        assert line in ties
    assert "@misc{workbench," in ties
    unknown = cited("https://arxiv.org/abs/2412.99999")
    assert "eprint = {2412.99999}" in unknown
    assert "author" not in unknown
    assert "doi = {10.1145/325165.325242}" in cited("https://doi.org/10.1145/325165.325242")
    assert "url = {https://github.com/huggingface/peft/pull/364}" in cited(
        "https://github.com/huggingface/peft/pull/364"
    )
    for wrong in ("x}, note = {y", "javascript:alert(1)", "", "https://a```", "https://a\nb", None):
        assert "method" not in cited(wrong)
    for text in (ties, unknown):
        assert text.count("{") == text.count("}")


def test_every_method_s_paper_can_be_cited():
    from workbench.merge import methods

    for name, record in methods().items():
        card = model_card(replace(small(), info={"method": name, "paper": record.paper, "sources": {"a": 1.0}}))
        assert f"url = {{{record.paper}}}" in card, name


def test_a_fit_s_card(tmp_path):
    base = tiny_base()
    sources = [replace(random_adapter(base, 2, seed=i, name=f"a{i}"), info={"licence": "gpl-3.0"}) for i in range(2)]
    made = tuple(Example(f"{n} {n}", "ab") for n in range(6))
    fitted = adapt(base, sources, Task("own", "say", made[:4], (), made[4:]), "lorahub", budget=4)
    card = model_card(fitted.adapter)
    assert "Made by `lorahub`" in card
    assert "**Task.** own" in card
    assert "a source's weight is the mean of its coefficients over modules" in card
    assert "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" in card
    if any(fitted.adapter.info["sources"].values()):
        assert header(card)["license"] == "gpl-3.0"
    assert header(card)["tags"][0] == "merge"
    assert fitted.adapter.info["licences"] == {"a0": "gpl-3.0", "a1": "gpl-3.0"}


def test_a_combination_of_nothing():
    assert combined({}) == Combined()
    assert Combined().token == ""
