"""Metrics: goldens worked by hand, SQuAD's own examples, the libraries themselves, and the two papers' normalisations."""

import builtins
import string
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench import metrics
from workbench.errors import TaskError
from workbench.metrics import METRICS, check_examples, find, lorahub_form, squad_form, study_form
from workbench.tasks import Example, Task

TEXT = [name for name, metric in METRICS.items() if metric.judges == "text"]
LATIN = st.text(string.ascii_letters + string.digits + " ", min_size=1).filter(lambda text: text.strip())


def score(name, answer, *references):
    return find(name).score(answer, references)


@pytest.mark.parametrize(
    ("said", "form"),
    [
        ("Entailment.", "entailment"),
        (" A B\tC ", "ab\tc"),  # spaces go everywhere, other white space at the ends only
        ("so 6 * 7 is\n#### 42.\n", "42"),
        ("#### 1 #### 2", "2"),
        ("..3.5..", "3.5"),
        ("a\n.", "a\n"),  # white space first, then dots
        ("New York", "newyork"),
        ("####", ""),
    ],
)
def test_the_study_compares_without_spaces_case_and_dots_at_the_ends(said, form):
    assert study_form(said) == form


@pytest.mark.parametrize(
    ("said", "form"),
    [
        (" (A).\n", "(a)"),
        ("3.5", "35"),
        ("New York", "new york"),
        ("A  B", "a  b"),
        ("x #### y", "x #### y"),
        (".. a", " a"),
    ],
)
def test_lorahub_compares_without_dots_anywhere(said, form):
    assert lorahub_form(said) == form


def test_the_two_papers_differ():
    assert score("normalised match", "3.5", "35") == 0
    assert score("lorahub match", "3.5", "35") == 1
    assert score("normalised match", "new york", "NewYork") == 1
    assert score("lorahub match", "new york", "NewYork") == 0
    assert score("normalised match", "b", "a", "B.") == 1


@pytest.mark.parametrize(
    ("said", "form"),
    [
        ("The Denver Broncos!", "denver broncos"),
        ("  a   cat, an owl; the THE theme ", "cat owl theme"),
        ("$1.5-million", "15million"),
        ("Saint Bernadette Soubirous", "saint bernadette soubirous"),
        ("the", ""),
        ("“a”", "“ ”"),  # only ASCII's punctuation goes
    ],
)
def test_squad_s_normalisation(said, form):
    assert squad_form(said) == form


@pytest.mark.parametrize(
    ("said", "references", "f1", "em"),
    [
        ("Denver Broncos", ["Denver Broncos", "Denver Broncos", "Denver Broncos"], 1, 1),
        ("the Denver Broncos", ["Denver Broncos"], 1, 1),
        ("Denver Broncos won", ["Denver Broncos"], 0.8, 0),  # precision 2/3, recall 1
        ("Carolina Panthers", ["Denver Broncos"], 0, 0),
        ("Santa Clara", ["Santa Clara, California", "Levi's Stadium", "Levi's Stadium in Santa Clara"], 0.8, 0),
        ("gold gold", ["gold"], 2 / 3, 0),  # a word counts as often as it occurs
        ("gold", ["gold gold gold"], 0.5, 0),
        ("gold gold", ["gold gold red"], 0.8, 0),
        ("", ["gold"], 0, 0),
        ("", ["the"], 1, 1),  # nothing and nothing, as in SQuAD 2.0
        ("1976", ["1976."], 1, 1),
    ],
)
def test_squad_by_hand(said, references, f1, em):
    assert score("squad f1", said, *references) == pytest.approx(f1)
    assert score("squad em", said, *references) == em


@given(LATIN, LATIN)
def test_squad_f1_is_symmetric_and_one_where_em_is(one, other):
    assert score("squad f1", one, other) == pytest.approx(score("squad f1", other, one))
    assert score("squad em", one, other) <= score("squad f1", one, other) <= 1


def test_bleu_and_chrf_are_sacrebleu_s():
    import sacrebleu

    pairs = [
        ("the cat sat on the mat", ["the cat is on the mat", "there is a cat on the mat"]),
        ("the cat", ["the cat sat on the mat"]),
        ("nothing alike", ["a cat"]),
    ]
    for said, references in pairs:
        want = sacrebleu.sentence_bleu(said, references, use_effective_order=True).score / 100
        assert score("bleu", said, *references) == pytest.approx(want)
        assert score("chrf", said, *references) == pytest.approx(sacrebleu.sentence_chrf(said, references).score / 100)


def test_bleu_by_hand():
    """Precisions 5/6, 3/5, 1/4 and, smoothed, 1/6 of 3 four-grams' places: a length of 6 against 6, no penalty."""
    said, reference = "the cat sat on the mat", "the cat is on the mat"
    want = (5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25
    assert score("bleu", said, reference) == pytest.approx(want)
    assert score("bleu", "the cat", "the cat sat on") == pytest.approx(2.718281828 ** (1 - 4 / 2))  # brevity alone


def test_rouge_by_hand_and_by_its_library():
    from rouge_score.rouge_scorer import RougeScorer

    said, reference = "the cat sat on the mat", "the cat was on a mat"
    # words in common: the cat on mat = 4 of 6 and 6; pairs: "the cat" = 1 of 5; in order: the cat on mat = 4
    assert score("rouge-1", said, reference) == pytest.approx(4 / 6)
    assert score("rouge-2", said, reference) == pytest.approx(1 / 5)
    assert score("rouge-l", said, reference) == pytest.approx(4 / 6)
    assert score("rouge-l", "mat the on", "on the mat") == pytest.approx(1 / 3)
    assert score("rouge-1", "cats", "cat") == 0  # no stemming
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"]).score_multi(["x", reference], said)
    for ours, name in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        assert score(ours, said, "x", reference) == pytest.approx(theirs[name].fmeasure)


@pytest.mark.parametrize("name", TEXT)
@given(text=LATIN, other=LATIN)
def test_the_target_is_right_and_scores_lie_between_0_and_1(name, text, other):
    text = text + " gold"  # not an article alone
    assert score(name, text, text) == pytest.approx(1)
    assert score(name, text, other, text) >= score(name, text, other) - 1e-12 or name == "bleu"
    assert 0 <= score(name, text, other) <= 1
    assert METRICS[name].graded or score(name, text, other) in (0, 1)


def test_names_and_near_names():
    for name, metric in METRICS.items():
        assert find(name) is metric
        assert metric.name == name
    with pytest.raises(TaskError, match="no metric 'normalized match'; did you mean 'normalised match'"):
        find("normalized match")
    with pytest.raises(TaskError, match="no metric 'zzz'; there are exact match, normalised"):
        find("zzz")
    with pytest.raises(TaskError, match="'exact match' judges tokens, not text"):
        find("exact match").score("a", ["a"])
    with pytest.raises(TaskError, match="no metric 'blue'; did you mean 'bleu'"):
        Task("t", "", (), (), (), metric="blue")


@pytest.mark.parametrize(("name", "module"), [("bleu", "sacrebleu"), ("chrf", "sacrebleu"), ("rouge-l", "rouge_score")])
def test_a_library_that_is_not_installed_is_named_with_its_extra(name, module, monkeypatch):
    real = builtins.__import__

    def without(wanted, *rest, **more):
        if wanted.split(".")[0] == module:
            raise ImportError(f"No module named {wanted!r}")
        return real(wanted, *rest, **more)

    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setattr(builtins, "__import__", without)
    metrics._sacrebleu.cache_clear()
    metrics._rouge.cache_clear()
    with pytest.raises(TaskError, match=rf"needs the library {module}.*: pip install 'workbench\[tasks\]'"):
        score(name, "a", "a")


def task(metric, **more):
    return Task("t", "say", (), (), (), metric=metric, **more)


def test_a_metric_that_does_not_fit_the_target_is_refused():
    fine = [Example("q", "yes"), Example("r", "no")]
    for name in METRICS:
        if name != "rouge-2":
            check_examples(task(name, choices=("yes", "no")), fine)
    with pytest.raises(TaskError, match=r"'rouge-2' does not fit .* the target itself"):  # one word has no pairs
        check_examples(task("rouge-2"), fine)
    over = "accuracy over choices"
    for choices, why in [
        ((), "needs at least two choices"),
        (("yes",), "needs at least two choices"),
        (("yes", "yes", "no"), "all different"),
        (("Yes", "No"), "not among the choices"),
    ]:
        with pytest.raises(TaskError, match=f"'{over}' does not fit the target 'yes' of 'q': .*{why}"):
            check_examples(task(over, choices=choices), fine)
    own = replace(fine[0], choices=("yes", "maybe"))
    check_examples(task(over), [own])
    check_examples(task(over, choices=("a", "b")), [own])  # an example's own choices come first
    for name, target in [
        ("normalised match", "#### ."),
        ("lorahub match", " .."),
        ("squad f1", "The"),
        ("squad em", "?!"),
    ]:
        with pytest.raises(TaskError, match=f"'{name}' does not fit .* an empty answer would count as right"):
            check_examples(task(name), [Example("q", target)])
    with pytest.raises(TaskError, match=r"'rouge-l' does not fit .* the target itself would not count as right"):
        check_examples(task("rouge-l"), [Example("q", "кот")])
    with pytest.raises(TaskError, match=r"'squad f1' does not fit .* the target itself"):
        check_examples(task("squad f1"), [Example("q", "cat", references=("dog",))])
    check_examples(task("squad f1"), [Example("q", "cat", references=("dog", "the cat"))])
