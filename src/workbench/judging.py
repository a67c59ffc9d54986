"""Answers judged by their task's metric: choices by likelihood, text by what the model writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workbench.base import Base
from workbench.compose import LowRank, slice_groups
from workbench.evaluate import Encoded, Scores, encode_all, score
from workbench.generation import decode, generate
from workbench.metrics import check_examples, find
from workbench.tasks import Example, Task

__all__ = ["judged"]


def judged(
    base: Base,
    tasks: Sequence[Task],
    splits: Sequence[Sequence[Example]],
    groups: Sequence[Sequence[Encoded]],
    updates: Mapping[str, LowRank] | None = None,
) -> Scores:
    """As `score` of these groups, every group's matches judged by the metric of its task.

    Choices are compared by their likelihood. A text metric takes the target as written where it comes out token by token;
    for the other examples the model writes its answer.

    Args:
        tasks, splits, groups: for each of G groups its task, its N examples and these encoded.

    Raises:
        TaskError: a metric that does not fit the examples.
    """
    scores, metrics = score(base, groups, updates), [find(task.metric) for task in tasks]
    if all(metric.judges == "tokens" for metric in metrics):
        return scores
    for task, examples in {id(e): (t, e) for t, e in zip(tasks, splits, strict=True)}.values():
        check_examples(task, examples)
    match, tokens = scores.match.float(), scores.tokens
    for at, task, examples, rows, part in _alike(tasks, splits, groups, updates, "choices"):
        match[at], spent = _chosen(base, task, examples, rows, part, len(match[at]))
        tokens += spent
    text = [metric.judges == "text" for metric in metrics]
    todo = [
        [i for i, right in enumerate(row) if told and not right] for told, row in zip(text, scores.match, strict=True)
    ]
    limit = max(task.max_new_tokens for task in tasks)
    prompts = [[rows[i].prompt for i in some] for rows, some in zip(groups, todo, strict=True)]
    written = generate(base, prompts, limit, updates)
    for g, (task, examples, rows) in enumerate(zip(tasks, splits, groups, strict=True)):
        if not text[g]:
            continue
        found = dict(zip(todo[g], (ids[: task.max_new_tokens] for ids in written[g]), strict=True))
        for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
            match[g, i] = metrics[g].score(decode(base, found.get(i, row.answer)), example.answers)
        tokens += sum(len(rows[i].prompt) + len(ids) for i, ids in found.items())
    graded = any(metric.graded for metric in metrics)
    return Scores(scores.loss, match if graded else match > 0.5, tokens)


def _alike(tasks, splits, groups, updates, judges: str):
    """Groups whose metric judges this, with their place and share of the updates: all at once where they are the same."""
    same = all(g is groups[0] and t is tasks[0] for g, t in zip(groups, tasks, strict=True))
    for start in range(1 if same else len(groups)):
        if find(tasks[start].metric).judges == judges:
            stop = len(groups) if same else start + 1
            part = slice_groups(updates, start, stop, len(groups)) if updates else None
            yield slice(start, stop), tasks[start], splits[start], groups[start], part


def _chosen(base: Base, task: Task, examples, rows, updates, count: int) -> tuple[Tensor, int]:
    """(count, N) is the likeliest of an example's choices its target? The first of equally likely ones; and tokens fed."""
    choices = [task.choices_of(example) for example in examples]
    texts = list(dict.fromkeys(text for some in choices for text in some))
    encoded = encode_all(base, [task.prompt(examples[0])] * len(texts), texts, task.max_new_tokens)
    answers = {text: one.answer for text, one in zip(texts, encoded, strict=True)}
    tried = [Encoded(row.prompt, answers[text]) for row, some in zip(rows, choices, strict=True) for text in some]
    scores = score(base, [tried] * count, updates)
    lengths = torch.tensor([1 if find(task.metric).per_token else len(one.answer) for one in tried])
    costs = (scores.loss * lengths).split([len(some) for some in choices], 1)
    places = [some.index(example.target) for some, example in zip(choices, examples, strict=True)]
    right = [cost.argmin(1) == place for cost, place in zip(costs, places, strict=True)]
    return torch.stack(right, 1).float(), scores.tokens
