"""How an answer is judged: metrics by name, each 1 for a right answer and 0 for a wrong one, or a share in between.

A metric judges token ids (by teacher forcing, nothing is generated), choices (by their likelihood, nothing is generated
either) or text (what the model writes, see `workbench.generation`).

| name | what counts |
|---|---|
| exact match | the target's token ids, and a stop token behind them |
| normalised match | equal texts, as the recycling study compares them (`study_form`) |
| lorahub match | equal texts, as LoraHub compares them (`lorahub_form`) |
| accuracy over choices | the likeliest choice is the target: log-likelihood of all its tokens, the stop token too |
| accuracy over choices per token | the same, divided by the number of tokens |
| squad em, squad f1 | exact match and F1 of words as in SQuAD (`squad_form`) |
| bleu, chrf | sentence BLEU (13a tokens, exponential smoothing, effective order) and chrF2 of sacrebleu |
| rouge-1, rouge-2, rouge-l | F-measure of rouge-score, without stemming; it knows Latin letters and digits only |

Where an example has several references, the best one counts; sacrebleu's own metrics take all of them together.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from workbench.errors import TaskError

if TYPE_CHECKING:
    from workbench.tasks import Example, Task

__all__ = [
    "DEFAULT",
    "METRICS",
    "Metric",
    "check_examples",
    "find",
    "library",
    "lorahub_form",
    "squad_form",
    "study_form",
]

DEFAULT = "exact match"


@dataclass(frozen=True)
class Metric:
    """A metric: what it judges ("tokens", "choices" or "text"), and text how; `graded` ones give shares between 0 and 1."""

    name: str
    judges: str
    function: Callable[[str, Sequence[str]], float] | None = None
    graded: bool = False
    per_token: bool = False

    def score(self, answer: str, references: Sequence[str]) -> float:
        """How right a text is, 0 to 1.

        Raises:
            TaskError: a metric that does not judge text, or whose library is not installed.
        """
        if self.function is None:
            raise TaskError(f"{self.name!r} judges {self.judges}, not text; workbench.evaluate does it with the model")
        return float(self.function(answer, references))


def find(name: str) -> Metric:
    """The metric of that name.

    Raises:
        TaskError: there is none (near names are given).
    """
    if name not in METRICS:
        near = difflib.get_close_matches(str(name), METRICS, 2)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(METRICS)}"
        raise TaskError(f"no metric {name!r}; {hint}")
    return METRICS[name]


def library(name: str, what: str) -> ModuleType:
    """An optional library, imported now.

    Raises:
        TaskError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise TaskError(f"{what} needs the library {name}: pip install 'workbench[tasks]'") from error


def study_form(text: str) -> str:
    """What follows the last "####", without spaces, without white space and then dots at either end, lower case."""
    return text.rsplit("####", 1)[-1].replace(" ", "").strip().strip(".").lower()


def lorahub_form(text: str) -> str:
    """Without white space at either end, lower case, without any dot ("3.5" is "35")."""
    return text.strip().lower().replace(".", "")


_ARTICLES, _PUNCTUATION = re.compile(r"\b(a|an|the)\b"), str.maketrans("", "", string.punctuation)


def squad_form(text: str) -> str:
    """As SQuAD's script: lower case, no punctuation (ASCII), no a, an, the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _equal(form: Callable[[str], str], answer: str, references: Sequence[str]) -> bool:
    return form(answer) in {form(reference) for reference in references}


def _f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words, each counted as often as it occurs; of two empty texts 1, of one 0 (as in SQuAD 2.0)."""
    said, best = squad_form(answer).split(), 0.0
    for reference in references:
        words = squad_form(reference).split()
        common = sum((Counter(said) & Counter(words)).values())
        total = len(said) + len(words)
        best = max(best, 2 * common / total if total else 1.0)
    return best


@cache
def _sacrebleu(kind: str):
    options = {"effective_order": True} if kind == "BLEU" else {}
    return getattr(library("sacrebleu", kind).metrics, kind)(**options)


def _by_sacrebleu(kind: str, answer: str, references: Sequence[str]) -> float:
    return min(1.0, _sacrebleu(kind).sentence_score(answer, list(references)).score / 100)  # 100 to within rounding


@cache
def _rouge(kind: str):
    return library("rouge_score.rouge_scorer", "ROUGE").RougeScorer([kind], use_stemmer=False)


def _by_rouge(kind: str, answer: str, references: Sequence[str]) -> float:
    return max(_rouge(kind).score(reference, answer)[kind].fmeasure for reference in references)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(DEFAULT, "tokens"),
        Metric("normalised match", "text", partial(_equal, study_form)),
        Metric("lorahub match", "text", partial(_equal, lorahub_form)),
        Metric("accuracy over choices", "choices"),
        Metric("accuracy over choices per token", "choices", per_token=True),
        Metric("squad em", "text", partial(_equal, squad_form)),
        Metric("squad f1", "text", _f1, graded=True),
        Metric("bleu", "text", partial(_by_sacrebleu, "BLEU"), graded=True),
        Metric("chrf", "text", partial(_by_sacrebleu, "CHRF"), graded=True),
        *(Metric(f"rouge-{n.lower()}", "text", partial(_by_rouge, f"rouge{n}"), graded=True) for n in "12L"),
    )
}


def check_examples(task: Task, examples: Sequence[Example]) -> None:
    """Check that a task's metric can tell right from wrong on these examples.

    Raises:
        TaskError: an example without choices, with one twice or without its target among them, for a metric over choices;
            a target that the metric does not count as right, or that an empty answer would match, for one over text.
    """
    metric = find(task.metric)
    for example in examples:
        shown = f"{task.name}: the metric {metric.name!r} does not fit the target {example.target!r} of {example.input[:60]!r}"
        if metric.judges == "choices":
            choices = task.choices_of(example)
            if len(choices) < 2 or len(set(choices)) < len(choices):
                raise TaskError(f"{shown}: it needs at least two choices, all different, got {list(choices)}")
            if example.target not in choices:
                raise TaskError(f"{shown}: it is not among the choices {list(choices)}")
        elif metric.judges == "text":
            if metric.score(example.target, example.answers) < 1 - 1e-9:
                raise TaskError(f"{shown}: the target itself would not count as right")
            if metric.score("", example.answers) > 0:
                raise TaskError(f"{shown}: an empty answer would count as right, since nothing of it is compared")
