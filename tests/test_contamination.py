"""Overlap by hashing against comparing everything with everything, and what the bundled laboratory shares."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench import tasks
from workbench.contamination import check, normal, overlap, seen_by_base, splits
from workbench.errors import TaskError
from workbench.nano import corpus, forge, shelf, world
from workbench.tasks import Example, Task

MEASURES = ["same_prompt", "same_pair", "same_input"]


def task(name, train=(), test=(), instruction="say", validation=(), **settings):
    train, validation, test = (tuple(Example(*pair) for pair in split) for split in (train, validation, test))
    return Task(name, instruction, train, validation, test, **settings)


def counts(source, target, **settings):
    (row,) = overlap([source], [target], **settings).to_dict("records")
    return row


pairs = st.lists(
    st.tuples(st.sampled_from(["a", "b", "a b", "A, b", ""]), st.sampled_from(["x", "X.", "y"])), min_size=1
)
made = st.tuples(
    pairs, st.sampled_from(["say", "Say!", "tell"]), st.sampled_from(["{instruction}: {input} = ", "{input}"])
)


@given(st.lists(made, min_size=1, max_size=3), st.lists(made, min_size=1, max_size=3), st.booleans())
def test_every_example_against_every_other(sources, targets, normalised):
    spell = normal if normalised else str
    upstream = {f"adapter {i}": task(f"up {i}", p, (), w, template=t) for i, (p, w, t) in enumerate(sources)}
    targets = [task(f"target {i}", (), p, w, template=t) for i, (p, w, t) in enumerate(targets)]
    alike = {
        "same_prompt": lambda u, d, t, e: (
            spell(u.prompt(d)) == spell(t.prompt(e)) and (not normalised or spell(d.input) == spell(e.input))
        ),
        "same_pair": lambda u, d, t, e: (spell(d.input), spell(d.target)) == (spell(e.input), spell(e.target)),
        "same_input": lambda u, d, t, e: spell(d.input) == spell(e.input),
    }
    out = overlap(upstream, targets, normalised=normalised, share="same_pair")
    assert [*out.columns] == ["target", "upstream", "test", *MEASURES, "share"]
    assert list(zip(out.target, out.upstream, strict=True)) == list(product([t.name for t in targets], upstream))
    rows = out.set_index(["target", "upstream"])
    whole = check(upstream, targets, normalised=normalised, share="same_pair", limit=1).set_index("target")
    for t in targets:
        for measure, same in alike.items():
            hits = {name: [any(same(u, d, t, e) for d in u.train) for e in t.test] for name, u in upstream.items()}
            assert {name: rows.loc[(t.name, name), measure] for name in upstream} == {
                n: sum(h) for n, h in hits.items()
            }
            assert whole.loc[t.name, measure] == sum(map(any, zip(*hits.values(), strict=True)))
    assert (out.test == [len(t.test) for t in targets for _ in upstream]).all()
    assert out.share.tolist() == (out.same_pair / out.test).tolist()
    assert whole.share.tolist() == (whole.same_pair / whole.test).tolist()


def test_what_each_measure_calls_the_same():
    target = task("t", test=[("cow bat", "bat cow"), ("ant", "ant"), ("ant", "ant")], instruction="reverse")
    ask = {"train": [("cow bat", "bat cow")], "test": ()}
    assert counts(task("u", **ask, instruction="reverse"), target) | {"target": 0, "upstream": 0} == {
        "target": 0, "upstream": 0, "test": 3, "same_prompt": 1, "same_pair": 1, "same_input": 1, "share": 1 / 3,
    }  # fmt: skip
    other = counts(task("u", **ask, instruction="swap"), target)
    assert [other[m] for m in MEASURES] + [other["share"]] == [0, 1, 1, 0]
    wrong = counts(task("u", [("cow bat", "cow")], instruction="reverse"), target)
    assert [wrong[m] for m in MEASURES] + [wrong["share"]] == [1, 0, 1, 1 / 3]
    twice = counts(task("u", [("ant", "ant")], instruction="sort"), target, share="same_input")
    assert [twice[m] for m in MEASURES] + [twice["share"]] == [0, 2, 2, 2 / 3]
    assert counts(task("u", [("cow batbat", " cow")]), target)["same_pair"] == 0
    held = task("u", [("x", "y")], [("ant", "ant")], validation=[("cow bat", "bat cow")], instruction="reverse")
    assert (
        sum(counts(held, target)[m] for m in MEASURES) == 0
    )  # what an adapter was validated and tested on is no matter


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Don't  panic!", "don’t panic", True),
        ("[cow] [bat]", "cow, bat", True),
        ("STRASSE", "straße", True),
        ("ｆｕｌｌ", "full", True),
        ("a\tb\n", " a b", True),
        ("¿Qué?", "qué", True),
        ("Qué", "que", False),
        ("1 + 1", "1 1", False),
        ("ab", "a b", False),
        ("?!", "?", False),
        ("?!", "", False),
        ("...", "…", True),
    ],
)
def test_spelling(one, other, same):
    assert (normal(one) == normal(other)) == same
    found = counts(task("u", [(one, "x")]), task("t", test=[(other, "X.")]), normalised=True)
    assert [found[m] for m in MEASURES] == [same] * 3
    assert normal(normal(one)) == normal(one)


def test_runs_of_words():
    words = [f"w{i}" for i in range(40)]
    text = " ".join(words)
    part = "elsewhere " + ", ".join(words[10:23]).upper() + " and on"
    almost = " ".join([*words[5:17], "another", *words[18:30]])
    short, answer = " ".join(words[:12]), ("no", " ".join(words[20:33]))
    target = task("t", test=[(part, "x"), (almost, "x"), (short, ""), ("no", "x"), answer])
    source = task("u", [("nothing", "x"), (text, "x")])
    assert counts(source, target, words=13)["same_words"] == 2  # the part, and the answer; twelve in a row are too few
    assert counts(source, target, words=12)["same_words"] == 4
    assert counts(source, target, words=13, share="same_words")["share"] == 2 / 5
    assert check([source], [target], words=13)["same_words"].tolist() == [2]
    across = task("u", [(" ".join(words[:6]), " ".join(words[6:13]))])
    assert counts(across, task("t", test=[(text, "")]), words=13)["same_words"] == 1
    assert "same_words" not in overlap([source], [target])


def test_a_check_refuses_or_shows():
    first, second = task("u", [("a", "x"), ("b", "x")]), task("v", [("b", "x"), ("c", "x"), ("d", "x")])
    known = task("known", test=[(one, "x") for one in "abcdefgh"])
    fresh = task("fresh", test=[("z", "x")])
    table = check({"one": first, "two": second}, [known, fresh], limit=0.5)
    assert table.to_dict("list") == {
        "target": ["known", "fresh"], "test": [8, 1], "same_prompt": [4, 0], "same_pair": [4, 0], "same_input": [4, 0],
        "share": [0.5, 0.0], "worst": ["two", ""],
    }  # fmt: skip
    with pytest.raises(
        TaskError, match=r"1 of 2 targets share more than 49\.0% .* \(same_prompt\): known 50\.0%, most with two"
    ):
        check({"one": first, "two": second}, [known, fresh], limit=0.49)
    with pytest.raises(TaskError, match=r"more than 0\.0%"):
        check([first], [known])
    assert check([first], [fresh])["share"].tolist() == [0]
    other = replace(known, instruction="tell")
    assert check([first], [other])["share"].tolist() == [0]
    with pytest.raises(TaskError, match=r"\(same_pair\): known 25.0%"):
        check([first], [other], share="same_pair")


def test_what_cannot_be_compared_is_said():
    source, target = task("u", [("a", "x")]), task("t", test=[("a", "x")])
    with pytest.raises(TaskError, match=r"expected several tasks as targets, got one.*write"):
        overlap([source], target)
    with pytest.raises(TaskError, match="expected several tasks as upstream tasks, got one: 'nano/x'"):
        overlap("nano/x", [target])
    with pytest.raises(TaskError, match="expected a task as target, got 'nano/mirror-months'; load it"):
        overlap([source], ["nano/mirror-months"])
    with pytest.raises(TaskError, match="there is no upstream task"):
        overlap({}, [target])
    with pytest.raises(TaskError, match="there is no target"):
        overlap([source], [])
    with pytest.raises(TaskError, match="two targets are called 't'"):
        overlap([source], [target, target])
    with pytest.raises(TaskError, match="t has no train examples to compare"):
        overlap([target], [target])
    with pytest.raises(TaskError, match="u has no test examples to compare"):
        overlap([source], [source])
    with pytest.raises(TaskError, match=r"share is 'same_words', expected one of same_prompt, .*with words=13"):
        overlap([source], [target], share="same_words")
    with pytest.raises(TaskError, match="words is -1"):
        overlap([source], [target], words=-1)
    for limit in (-0.1, 1.1, float("nan")):
        with pytest.raises(TaskError, match="expected a share between 0 and 1"):
            check([source], [target], limit=limit)
    with pytest.raises(TaskError, match="t has no label 'operation'; this is for bundled tasks"):
        seen_by_base([target])


def test_splits_against_counting():
    one = task(
        "t",
        train=[("a", "x"), ("a", "x"), ("a", "y"), ("b", "x")],
        validation=[("b", "x"), ("c", "x")],
        test=[("a", "z"), ("a", "z"), ("B", "x"), ("c", "x")],
    )
    got = splits(one).set_index(["first", "second"])
    assert got.T.to_dict("list") == {
        ("train", "train"): [4, 1, 2],
        ("train", "validation"): [2, 1, 1],
        ("train", "test"): [4, 0, 2],
        ("validation", "validation"): [2, 0, 0],
        ("validation", "test"): [4, 1, 1],
        ("test", "test"): [4, 1, 1],
    }
    assert list(got.columns) == ["examples", "same_pair", "same_input"]
    loose = splits(one, normalised=True).set_index(["first", "second"])
    assert loose.loc[("train", "test"), ["same_pair", "same_input"]].tolist() == [1, 3]
    assert splits(replace(one, validation=())).set_index(["first", "second"]).loc[("validation", "test")].tolist() == [
        4,
        0,
        0,
    ]


def test_bundled_splits_share_nothing():
    for name in ("nano/second-days", "nano/is-sorted-days", "nano/has-repeat-fruits", "nano/first-two-digits-numbers"):
        found = splits(tasks.load(name, seed=3, n_train=300))
        assert found.examples.tolist() == [300, 20, 2000, 20, 2000, 2000]
        assert (found[["same_pair", "same_input"]] == 0).all(axis=None)


def test_the_examples_of_bundled_adapters_are_those_that_they_were_trained_on():
    """4,000 under seed 0, whatever the size of the validation split that the forge drew beside them."""
    spec, preset = world.find("rotate-right-letters"), forge.PRESETS["nano"]
    trained = world.make_task(spec, n_train=preset.examples, n_validation=50, n_test=1).train
    again = world.find("rotate-right-letters-v2")
    given = tasks.upstream([spec.slug, again.slug], n=4000)
    assert given[spec.slug].train == given[again.slug].train == trained
    assert given[spec.slug].prompt(trained[0]).startswith("rotate right, letters, plain: ")


def test_the_bundled_pool_shares_inputs_and_some_answers_but_no_prompt():
    few = ["rotate-right-letters", "second-animals-commas", "smallest-animals-commas", "reverse-rest-colours"]
    names = ["rotate-right-months", "even-places-animals-commas", "rotate-right-then-swap-pairs-colours"]
    found = overlap(tasks.upstream(few, n=4000), [tasks.load(f"nano/{name}") for name in names])
    table = found.set_index(["target", "upstream"])[MEASURES]
    assert table.loc["nano/rotate-right-months"].to_numpy().sum() == 0  # another domain: not even an input
    assert table.loc[("nano/even-places-animals-commas", "second-animals-commas")].tolist() == [0, 181, 217]
    assert table.loc[("nano/rotate-right-then-swap-pairs-colours", "reverse-rest-colours")].tolist() == [0, 220, 229]
    assert table.same_prompt.sum() == 0


@pytest.mark.slow
def test_no_bundled_target_has_a_prompt_that_any_bundled_adapter_was_trained_on():
    upstream = tasks.upstream(sorted(path.name for path in shelf.ADAPTERS.iterdir()), n=4000)
    targets = [tasks.load(name) for kind in world.KINDS for name in tasks.names(kind)]
    assert (len(upstream), len(targets)) == (72, 60)
    table = check(upstream, targets)
    kinds = table.groupby([t.labels["kind"] for t in targets])[MEASURES].sum()
    assert kinds.loc[["relative", "unrelated"]].to_numpy().sum() == 0
    assert kinds.T.to_dict("list") | {"relative": 0, "unrelated": 0} == {
        "latent": [0, 254, 3085], "format": [0, 92, 4169], "composition": [0, 315, 9082], "relative": 0, "unrelated": 0,
    }  # fmt: skip
    own = check(upstream, [tasks.load(f"nano/{name}") for name in upstream if not name.endswith("-v2")])
    assert own.same_prompt.sum() == 0  # an adapter's own test set is held out as well


def test_what_the_base_saw_against_its_documents():
    """Every single line of the corpus is by_name, every other one in_context; the rest is in neither."""
    preset = forge.PRESETS["tiny"]
    alphabet = "\0\1\n " + "".join(sorted({c for d in world.DOMAINS.values() for w in d for c in w})) + "0123456789,:=?"
    alphabet = "".join(dict.fromkeys(alphabet + "yesno"))
    ids, _, lengths = corpus.corpus(preset.operations, preset.latent, 1500, alphabet, seed=preset.seed)
    text = "".join(alphabet[i] for i in ids)
    documents, start = [], 0
    for length in lengths:
        documents.append(text[start : start + length])
        start += length
    said = {one.split(": ")[0] for one in documents if ": " in one}
    specs = [
        world.Spec(op, d, f) for op in world.OPERATIONS for d in world.DOMAINS for f in ("plain", "commas", "dashes")
    ]
    targets = []
    for spec in specs:
        labels = {"operation": spec.operation, "domain": spec.domain, "format": spec.format}
        targets.append(task(spec.slug, [("a", "b")], [("a", "b")], instruction=spec.instruction, labels=labels))
    out = seen_by_base(targets, "tiny")
    named = {t.instruction for t, yes in zip(targets, out.by_name, strict=True) if yes}
    assert named == said
    assert len(named) == 39  # 70 % of 4 operations × 7 domains × 2 formats
    shown = {t.labels["operation"] for t, yes in zip(targets, out.in_context, strict=True) if yes}
    assert shown == {*preset.operations, *preset.latent}
    assert out.in_context.sum() == 5 * 7 * 2
