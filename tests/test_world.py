"""The laboratory's world: every operation on examples written by hand, and what the kinds of task promise."""

import itertools
import random
import string
from collections import Counter
from dataclasses import replace

import pytest

from helpers import tiny_base
from workbench import tasks
from workbench.errors import TaskError
from workbench.evaluate import encode_task
from workbench.nano import world
from workbench.nano.world import KINDS, TARGETS, UPSTREAM, Spec, find, make_examples, make_task, relevance

L, D, M, A = "letters", "digits", "months", "animals"
# operation: (domain, given, expected), … always in the format plain
BY_HAND = {
    "reverse": [(L, "a b c", "c b a"), (D, "1 2 2 9", "9 2 2 1")],
    "sort": [(L, "c a b a", "a a b c"), (M, "dec apr jan", "jan apr dec"), (A, "yak bat cow", "bat cow yak")],
    "rotate left": [(L, "a b c d", "b c d a")],
    "successor": [(L, "a y z", "b z a"), (D, "0 9 4", "1 0 5"), (M, "jan dec", "feb jan")],
    "first": [(L, "q b c", "q")],
    "last": [(L, "q b c", "c")],
    "drop first": [(L, "a b c", "b c")],
    "drop last": [(L, "a b c", "a b")],
    "swap ends": [(L, "a b c d", "d b c a")],
    "unique": [(L, "b a b c a", "b a c"), (L, "a a a", "a")],
    "double": [(L, "a b c", "a b c a b c")],
    "stutter": [(L, "a b c", "a a b b c c")],
    "first two": [(L, "a b c d", "a b")],
    "odd places": [(L, "a b c d e", "a c e"), (L, "a b c d", "a c")],
    "largest": [(L, "a q c", "q"), (M, "mar dec apr", "dec"), (D, "3 0 3", "3")],
    "count": [(L, "a b c", "3"), (A, "ant ant bat cow elk yak", "6")],
    "mirror": [(L, "a b c", "a b c c b a")],
    "swap halves": [(L, "a b c d", "c d a b"), (L, "a b c d e", "c d e a b")],
    "has repeat": [(L, "a b a", "yes"), (L, "a b c", "no")],
    "last two": [(L, "a b c d", "c d")],
    "ends": [(L, "a b c d", "a d")],
    "even places": [(L, "a b c d e", "b d"), (L, "a b c d", "b d")],
    "sort down": [(L, "c a b a", "c b a a"), (M, "apr dec jan", "dec apr jan")],
    "rotate right": [(L, "a b c d", "d a b c")],
    "second": [(L, "a b c", "b")],
    "predecessor": [(L, "a b z", "z a y"), (D, "0 9", "9 8"), (M, "jan feb", "dec jan")],
    "smallest": [(L, "q b c", "b"), (M, "dec apr mar", "mar")],
    "swap pairs": [(L, "a b c d", "b a d c"), (L, "a b c", "b a c")],
    "drop second": [(L, "a b c d", "a c d")],
    "first thrice": [(L, "a b c", "a a a")],
    "reverse rest": [(L, "a b c d", "a d c b")],
    "is sorted": [(L, "a b b c", "yes"), (L, "b a c", "no"), (M, "jan feb dec", "yes"), (M, "apr jan feb", "no")],
    "third": [(L, "a b c d", "c")],
    "rotate twice": [(L, "a b c d e", "c d e a b")],
    "drop ends": [(L, "a b c d", "b c")],
    "repeat last": [(L, "a b c", "a b c c")],
    "close ring": [(L, "a b c", "a b c a")],
    "swap front": [(L, "a b c d", "b a c d")],
    "skip one": [(L, "a y z", "c a b"), (D, "8 9 0", "0 1 2")],
    "reverse front": [(L, "a b c d e", "c b a d e"), (L, "a b c", "c b a")],
}
PRINTED = {
    "plain": "a b c",
    "commas": "a,b,c",
    "brackets": "[a] [b] [c]",
    "quotes": '"a" "b" "c"',
    "numbers": "1.a 2.b 3.c",
    "arrows": "a>b>c",
    "dashes": "a-b-c",
    "stars": "*a *b *c",
}


def test_every_operation_is_written_down_here():
    assert set(BY_HAND) == set(world.OPERATIONS)
    assert set(PRINTED) == set(world.FORMATS)
    assert len(world.OPERATIONS) >= 24
    groups = (world.BASE_OPS, world.LATENT_OPS, world.POOL_OPS, world.KEPT_OPS)
    assert sum(map(len, groups)) == len(world.OPERATIONS)  # each in one group


@pytest.mark.parametrize("operation", BY_HAND)
def test_operations(operation):
    for domain, given, expected in BY_HAND[operation]:
        items = given.split()
        assert Spec(operation, domain).answer(items) == expected
        assert items == given.split()  # not changed


@pytest.mark.parametrize("form", PRINTED)
def test_formats(form):
    assert Spec("drop last", L, form).answer(list("abcd")) == PRINTED[form]


def test_composed_operations_run_from_left_to_right():
    spec = Spec("reverse then first two", L, "commas")
    assert spec.parts == ("reverse", "first two")
    assert spec.answer(list("abcd")) == "d,c"
    assert Spec("first two then reverse", L).answer(list("abcd")) == "b a"


def test_slugs_and_instructions():
    spec = Spec("rotate right", "animals", "commas", "upstream", copy=1)
    assert spec.slug == "rotate-right-animals-commas-v2"
    assert spec.instruction == "rotate right, animals, commas"
    assert Spec("mirror", "months").slug == "mirror-months"
    slugs = [spec.slug for spec in TARGETS + UPSTREAM]
    assert len(set(slugs)) == len(slugs)
    assert all(find(spec.slug) is spec for spec in TARGETS + UPSTREAM)
    assert find("no-such") is None
    for slug in slugs:  # they name folders
        assert set(slug) <= set(string.ascii_lowercase + string.digits + "-")


def test_sixty_targets_of_five_kinds():
    assert Counter(spec.kind for spec in TARGETS) == dict.fromkeys(KINDS, 12)
    for kind in KINDS:
        assert len({spec.operation for spec in TARGETS if spec.kind == kind}) >= 6
    assert len(UPSTREAM) >= 64
    assert {spec.kind for spec in UPSTREAM} == {"upstream"}
    assert not {(s.operation, s.domain, s.format) for s in TARGETS} & {
        (s.operation, s.domain, s.format) for s in UPSTREAM
    }


def test_the_kinds_mean_what_they_say():
    pool_ops = {part for spec in UPSTREAM for part in spec.parts}
    pool_whole = {spec.operation for spec in UPSTREAM}
    pool_formats, pool_domains = {s.format for s in UPSTREAM}, {s.domain for s in UPSTREAM}
    for spec in TARGETS:
        named, known = set(spec.parts) & set(world.BASE_OPS), set(spec.parts) & pool_ops
        if spec.kind == "latent":  # shown to the base, never named, and no adapter knows it
            assert spec.operation in world.LATENT_OPS
            assert not named
            assert not known
        elif spec.kind == "relative":  # adapters know the operation, elsewhere
            assert spec.operation in pool_whole
            assert not named
            assert spec.domain not in pool_domains
        elif spec.kind == "format":  # adapters know the format only
            assert spec.format in pool_formats - set(world.BASE_FORMATS)
            assert not named
            assert not known
            assert spec.operation not in world.LATENT_OPS
        elif spec.kind == "unrelated":  # nothing shared
            assert not named | known
            assert spec.format not in pool_formats
            assert spec.domain not in pool_domains
            assert max(relevance(spec, other) for other in UPSTREAM) == 0
        else:  # each part known, the whole not
            assert len(spec.parts) == 2
            assert set(spec.parts) <= pool_whole
            assert spec.operation not in pool_whole


def test_relevance_grows_with_what_is_shared():
    target = Spec("mirror then sort", "months", "stars")
    assert relevance(target, Spec("count", "days", "plain")) == 0
    assert relevance(target, Spec("count", "days", "stars")) == 0.5
    assert relevance(target, Spec("sort", "days", "plain")) == 0.5
    assert relevance(target, Spec("mirror then sort", "months", "stars")) == 2


@pytest.mark.parametrize("spec", [*TARGETS, *UPSTREAM[::6]], ids=lambda spec: spec.slug)
def test_the_splits_of_a_task_are_disjoint_and_right(spec):
    task = make_task(spec, seed=3, n_train=20, n_validation=10, n_test=400)
    splits = [task.train, task.validation, task.test]
    assert [len(split) for split in splits] == [20, 10, 400]
    inputs = [example.input for split in splits for example in split]
    assert len(set(inputs)) == 430
    for example in task.train + task.test[:50]:
        items = example.input.split(" ")
        assert 3 <= len(items) <= 6
        assert set(items) <= set(world.DOMAINS[spec.domain])
        assert example.target == spec.answer(items)
    assert len({example.target for example in task.test}) > 1


def test_seeds_draw_other_training_examples_and_never_a_test_input():
    spec = find("mirror-months")
    whole = make_task(spec, n_test=2000)
    hidden = {example.input for example in whole.test}
    assert len(hidden) == 2000
    drawn = [make_task(spec, seed=seed, n_test=1) for seed in range(4)]
    assert len({task.train for task in drawn}) == 4
    for task in drawn:
        assert not {e.input for e in task.train + task.validation} & hidden
        assert task.test == whole.test[:1]
    assert make_task(spec, seed=2).digest() == make_task(spec, seed=2).digest() != make_task(spec, seed=1).digest()
    assert make_task(spec, n_train=4000, n_test=1).train[:80] == make_task(spec, n_train=4000, n_test=5).train[:80]


@pytest.mark.parametrize(
    "spec", [s for s in TARGETS + UPSTREAM if s.operation in ("has repeat", "is sorted")], ids=lambda s: s.slug
)
def test_neither_yes_nor_no_is_the_easy_answer(spec):
    answers = Counter(e.target for e in make_task(spec).test)
    assert set(answers) == {"yes", "no"}
    assert max(answers.values()) < 0.7 * sum(answers.values())


def test_the_labels_tell_what_a_task_is():
    task = tasks.load("nano/" + Spec("mirror", "months").slug, n_test=3)
    assert task.name == "nano/mirror-months"
    assert task.labels == {"kind": "latent", "operation": "mirror", "domain": "months", "format": "plain"}
    assert task.prompt(task.test[0]) == f"mirror, months, plain: {task.test[0].input} = "
    one, two = task.train[:2]
    shown = f"{one.input} = {one.target}\n{two.input} = {two.target}\n{task.test[0].input} = "
    assert task.prompt(task.test[0], [one, two]) == shown


def test_every_task_can_be_written_in_the_tokenizer_and_fits_the_limit():
    base = tiny_base()
    for spec in TARGETS + UPSTREAM:
        rng = random.Random(spec.slug)
        longest = max(world.DOMAINS[spec.domain], key=len)
        examples = [tasks.Example(t := " ".join([longest] * 6), spec.answer(t.split()))]
        examples += [tasks.Example(" ".join(i := world.sample_input(spec, rng)), spec.answer(i)) for _ in range(5)]
        task = tasks.Task(spec.slug, spec.instruction, (), (), ())
        for row in encode_task(base, task, examples):
            assert row.reachable
            assert row.answer[-1] == base.stop_ids[0]
            assert base.tokenizer.unk_token_id not in row.prompt


def test_names_and_near_names():
    assert len(tasks.names()) == len(TARGETS) + len(UPSTREAM)
    assert len(tasks.names("latent")) == 12
    assert tasks.names("latent")[0].startswith("nano/")
    assert len(tasks.names("upstream")) == len(UPSTREAM)
    with pytest.raises(TaskError, match=r"'nano/miror-months'; did you mean .*nano/mirror-months"):
        tasks.load("nano/miror-months")
    for lost in ("zzz", "mirror-month"):
        with pytest.raises(TaskError, match=r"did you mean|names\(\) lists them"):
            tasks.load(lost)


def test_what_a_task_does_not_have_is_refused():
    spec = find("mirror-months")
    for wrong in (0, 2001):
        with pytest.raises(TaskError, match=f"mirror-months: n_test is {wrong}, expected 1 to 2000"):
            make_task(spec, n_test=wrong)
    for wrong in ({"n_train": 0}, {"n_validation": 0}):
        with pytest.raises(TaskError, match="at least one training and one validation"):
            make_task(spec, **wrong)
    few = Spec("reverse", "days")
    every = {" ".join(x) for n in (3, 4, 5, 6) for x in itertools.product(world.DOMAINS["days"], repeat=n)}
    left = frozenset(sorted(every)[40:])
    assert {e.input for e in make_examples(few, 2, "x", left)} < every - left
    with pytest.raises(
        TaskError, match=f"reverse-days has fewer than 41 distinct examples beside the {len(left)} excl"
    ):
        make_examples(few, 41, "x", left)


def test_digests_know_the_wording():
    task = make_task(find("mirror-months"), n_test=5)
    changes = [
        {"instruction": "x"},
        {"template": "{input}"},
        {"bare": "{input}"},
        {"separator": ";"},
        {"max_new_tokens": 3},
        {"train": task.train[1:]},
        {"test": task.test[::-1]},
        {"train": (*task.train, task.validation[0]), "validation": task.validation[1:]},
    ]
    digests = {replace(task, **change).digest() for change in changes}
    assert len(digests | {task.digest()}) == 9
    assert replace(task, name="y", labels={}).digest() == task.digest()
