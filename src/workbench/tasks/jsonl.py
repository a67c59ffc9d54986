"""LoraHub's layout (github.com/sail-sg/lorahub): a folder for each task, with one JSON object on each line of

example.jsonl      what is learned from: {"context": the prompt, "completion": the answer}
zero_shot.jsonl    the test set, its prompts bare
few_shot.jsonl     the test set again, each prompt behind demonstrations
"""

from __future__ import annotations

import random
from pathlib import Path

from workbench.errors import TaskError
from workbench.metrics import check_examples
from workbench.tasks import Example, Task
from workbench.tasks.readers import read_rows

__all__ = ["make"]


def make(
    folder: str | Path,
    *,
    seed: int = 42,
    n_train: int | None = None,
    n_validation: int | str | None = None,
    n_test: int | None = None,
    metric: str | None = None,
    shots: bool = False,
) -> Task:
    """See `workbench.tasks.lorahub`. Of inputs that occur twice the first stands, and none of example.jsonl is tested on.

    Raises:
        TaskError: a file or a field is missing, or there are fewer examples than asked for.
    """
    folder = Path(folder)
    n_train, n_validation = 5 if n_train is None else n_train, "same" if n_validation is None else n_validation
    same = n_validation == "same"
    known, bare = (_read(folder, name) for name in ("example.jsonl", "zero_shot.jsonl"))
    asked = _read(folder, "few_shot.jsonl") if shots else bare
    if len(asked) != len(bare):
        raise TaskError(f"{folder}: few_shot.jsonl has {len(asked)} lines, zero_shot.jsonl {len(bare)}")
    test: dict[str, Example] = {}
    for plain, example in zip(bare, asked, strict=True):
        if plain.input not in {one.input for one in known}:
            test.setdefault(plain.input, example)
    random.Random(seed).shuffle(known)
    learnt: dict[str, Example] = {}
    for example in known:
        learnt.setdefault(example.input, example)
    few = list(learnt.values())
    wanted = n_train + (0 if same else n_validation)
    for what, n, have in (("training and validation", wanted, len(few)), ("test", n_test or 1, len(test))):
        if n > have:
            raise TaskError(f"{folder}: {n} {what} examples asked for, but there are {have} different ones")
    train = tuple(few[:n_train])
    task = Task(
        f"lorahub/{folder.name}",
        "",
        train,
        train if same else tuple(few[n_train:wanted]),
        tuple(test.values())[:n_test],
        template="{input}",
        bare="{input} ",
        separator="\n\n",
        max_new_tokens=256,
        labels={"kind": "lorahub", "operation": folder.name},
        metric=metric or "lorahub match",
    )
    check_examples(task, (*task.train, *task.validation, *task.test))
    return task


def _read(folder: Path, name: str) -> list[Example]:
    out = []
    for number, row in enumerate(read_rows(folder / name), 1):
        lost = [field for field in ("context", "completion") if not isinstance(row.get(field), str)]
        if lost:
            raise TaskError(
                f"{folder / name}, line {number}: no text under {lost[0]!r}, got the fields {', '.join(row)}"
            )
        out.append(Example(row["context"], row["completion"]))
    if not out:
        raise TaskError(f"{folder / name} has no lines")
    return out
