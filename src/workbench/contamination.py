"""What a pool's authors may have trained on already: test examples of a task among an adapter's training examples.

found = overlap(workbench.tasks.upstream(pool, n=4000), targets)     # one row per target and adapter
check(workbench.tasks.upstream(pool, n=4000), targets)               # one row per target, or an error
"""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial

import pandas as pd

from workbench.errors import TaskError
from workbench.tasks import Example, Task

__all__ = ["check", "normal", "overlap", "seen_by_base", "splits"]

Keys = Callable[[Task, Example], Iterable]


def overlap(
    upstream: Mapping[str, Task] | Iterable[Task],
    targets: Iterable[Task],
    *,
    normalised: bool = False,
    words: int = 0,
    share: str = "same_prompt",
) -> pd.DataFrame:
    """How many of each target's test examples occur among each adapter's training examples; all pairs, hashed.

    same_prompt: the prompt as the template words it, instruction and input, whatever the answer. same_pair: the same
    input and the same answer under any instruction; less same_prompt, it is those through another task that happens to
    agree, where each prompt has one answer. same_input: the same input, whatever is asked of it. same_words, with `words`
    = n: a run of n words in common (n-gram overlap; 13 for GPT-3, Brown et al. 2020, appendix C), anywhere in input and
    answer, in `normal` spelling; a text of fewer words has none.

    Args:
        upstream: adapter's name → its task; or tasks, called by their own names. `train` is what counts.
        targets: `test` is what counts.
        normalised: compare by `normal` spelling, for text from elsewhere; leave it off where punctuation matters.
        words: length of a run of words; 0 leaves that measure out.
        share: the measure of which `share` is the part of the test examples.

    Returns:
        Columns target, upstream, test (how many examples), the measures (how many of them), share.

    Raises:
        TaskError: no tasks, one without examples, or two of one name.
    """
    return _counts(upstream, targets, normalised, words, share)[0]


def check(
    upstream: Mapping[str, Task] | Iterable[Task],
    targets: Iterable[Task],
    *,
    limit: float = 0.0,
    normalised: bool = False,
    words: int = 0,
    share: str = "same_prompt",
) -> pd.DataFrame:
    """Refuse targets whose test examples the pool's authors may have trained on; the measures are those of `overlap`.

    Args:
        limit: largest share of a target's test examples that may occur in the whole pool; 1 refuses none.

    Returns:
        One row per target: target, test, the measures and share over all adapters together (an example that several
        know counts once), worst (the adapter that knows most of them by `share`'s measure, "" where none does).

    Raises:
        TaskError: a target's share is above `limit`; or as for `overlap`.
    """
    if not 0 <= limit <= 1:
        raise TaskError(f"limit is {limit}, expected a share between 0 and 1")
    found, union = _counts(upstream, targets, normalised, words, share)
    rows = []
    for target, part in found.groupby("target", sort=False):
        top = part.loc[part[share].idxmax()]
        known = {measure: counts[target] for measure, counts in union.items()}
        worst = top["upstream"] if top[share] else ""
        rows.append(
            {"target": target, "test": top["test"], **known, "share": known[share] / top["test"], "worst": worst}
        )
    out = pd.DataFrame(rows)
    above = out[out["share"] > limit].sort_values("share", ascending=False, kind="stable")
    if len(above):
        one = above.iloc[0]
        raise TaskError(
            f"{len(above)} of {len(out)} targets share more than {limit:.1%} of their test examples with the pool ({share}): "
            f"{one['target']} {one['share']:.1%}, most with {one['worst']}; leave out those adapters or those targets, or "
            "call with limit=1 for the table"
        )
    return out


def splits(task: Task, *, normalised: bool = False) -> pd.DataFrame:
    """Repetitions within and between the splits of a task.

    Returns:
        Columns first, second, examples (of the second), same_pair and same_input: how many of the second split's
        examples occur in the first; for first = second, how many repeat an earlier one.
    """
    keys, names, rows = _keys(normalised, 0), ("train", "validation", "test"), []
    for i, first in enumerate(names):
        for second in names[i:]:
            row = {"first": first, "second": second, "examples": len(getattr(task, second))}
            for measure in ("same_pair", "same_input"):
                there, here = ([next(iter(keys[measure](task, e))) for e in getattr(task, n)] for n in (first, second))
                known = set(there)
                row[measure] = len(here) - len(known) if first == second else sum(key in known for key in here)
            rows.append(row)
    return pd.DataFrame(rows)


def seen_by_base(targets: Iterable[Task], preset: str = "nano") -> pd.DataFrame:
    """Whether the bundled base was itself trained on a target's operation, domain and format (`workbench.nano.corpus`).

    Returns:
        Columns target, by_name (with its instruction, as single lines), in_context (as unnamed demonstrations).

    Raises:
        TaskError: a target that says no operation, domain and format.
    """
    from workbench.nano import world
    from workbench.nano.corpus import seen_by_name
    from workbench.nano.forge import PRESETS

    made = PRESETS[preset]
    named = {(spec.operation, spec.domain, spec.format) for spec in seen_by_name(made.operations, made.seed)[0]}
    rows = []
    for task in _listed(targets, "target").values():
        try:
            operation, domain, form = (task.labels[name] for name in ("operation", "domain", "format"))
        except KeyError as error:
            raise TaskError(
                f"{task.name} has no label {error}; this is for bundled tasks (workbench.tasks.load)"
            ) from None
        shown = operation in (*made.operations, *made.latent) and form in world.BASE_FORMATS
        by_name = (operation, domain, form) in named
        rows.append({"target": task.name, "by_name": by_name, "in_context": shown and domain in world.DOMAINS})
    return pd.DataFrame(rows)


def normal(text: str) -> str:
    """Text without differences of case, spacing, punctuation and compatibility forms (NFKC); bare punctuation stays.

    "Don't  panic!" and "don’t panic" are alike, and so are "[cow] [bat]" and "cow, bat"; + and = are no punctuation.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return " ".join(folded.translate(_punctuation()).split()) or folded


@cache
def _punctuation() -> dict[int, str]:
    return {i: " " for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "P"}


def _runs(n: int, task: Task, example: Example) -> set[tuple[str, ...]]:
    found = normal(f"{example.input} {example.target}").split()
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def _keys(normalised: bool, words: int) -> dict[str, Keys]:
    """Measure → the keys of an example, of which one must be in common."""
    spell = normal if normalised else str

    def bare(example: Example) -> tuple[str, ...]:  # an input of brackets alone is lost within a prompt, not by itself
        return (normal(example.input),) if normalised else ()

    keys: dict[str, Keys] = {
        "same_prompt": lambda task, example: ((spell(task.prompt(example)), *bare(example)),),
        "same_pair": lambda task, example: ((spell(example.input), spell(example.target)),),
        "same_input": lambda task, example: (spell(example.input),),
    }
    return keys | ({"same_words": partial(_runs, words)} if words else {})


def _counts(
    upstream: Mapping[str, Task] | Iterable[Task],
    targets: Iterable[Task],
    normalised: bool,
    words: int,
    share: str,
) -> tuple[pd.DataFrame, dict[str, Counter]]:
    """The table of `overlap`, and measure → how many examples of each target occur in any adapter's.

    The index is of the targets' examples, often the fewer; every adapter's examples are gone through once.
    """
    if words < 0:
        raise TaskError(f"words is {words}, expected the length of a run of words, or 0")
    keys = _keys(normalised, words)
    if share not in keys:
        raise TaskError(
            f"share is {share!r}, expected one of {', '.join(keys)}{'' if words else ' (same_words: with words=13)'}"
        )
    upstream, targets = _listed(upstream, "upstream task"), _listed(targets, "target")
    for split, tasks in (("test", targets), ("train", upstream)):
        for name, task in tasks.items():
            if not getattr(task, split):
                raise TaskError(f"{name} has no {split} examples to compare")
    index: dict[str, dict] = {measure: {} for measure in keys}
    for name, task in targets.items():
        for place, example in enumerate(task.test):
            for measure, of in keys.items():
                for key in of(task, example):
                    index[measure].setdefault(key, []).append((name, place))
    union: dict[str, set] = {measure: set() for measure in keys}
    known: dict[tuple[str, str], Counter] = {}
    for source, task in upstream.items():
        for measure, of in keys.items():
            there = index[measure]
            hits = {hit for example in task.train for key in of(task, example) for hit in there.get(key, ())}
            union[measure] |= hits
            known[source, measure] = Counter(name for name, _ in hits)
    rows = []
    for name, task in targets.items():
        for source in upstream:
            row = {measure: known[source, measure][name] for measure in keys}
            rows.append({"target": name, "upstream": source, "test": len(task.test), **row})
            rows[-1]["share"] = row[share] / len(task.test)
    return pd.DataFrame(rows), {measure: Counter(name for name, _ in hits) for measure, hits in union.items()}


def _listed(tasks: Mapping[str, Task] | Iterable[Task], what: str) -> dict[str, Task]:
    if isinstance(tasks, Task | str):
        raise TaskError(f"expected several tasks as {what}s, got one: {tasks!r:.60}; write [it]")
    pairs = list(
        tasks.items() if isinstance(tasks, Mapping) else ((getattr(task, "name", task), task) for task in tasks)
    )
    for _, task in pairs:
        if not isinstance(task, Task):
            raise TaskError(f"expected a task as {what}, got {task!r:.60}; load it with workbench.tasks.load")
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice or not pairs:
        raise TaskError(f"two {what}s are called {twice[0]!r}: give a mapping" if twice else f"there is no {what}")
    return dict(pairs)
