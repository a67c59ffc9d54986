"""Tasks: a few training examples, a validation split, a test set, and how they are worded."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workbench import metrics
from workbench.errors import TaskError

__all__ = ["Example", "Task", "bbh", "load", "lorahub", "names", "upstream"]


@dataclass(frozen=True)
class Example:
    """One example: what is given, and the answer expected.

    `references` are all answers that count as right, where there are several (the target is one of them); `choices` what
    is to be chosen from, where examples differ in it.
    """

    input: str
    target: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers that count as right."""
        return self.references or (self.target,)


@dataclass(frozen=True)
class Task:
    """Examples in three splits and their wording.

    `template` words a question ({instruction}, {input}); `bare` words one among demonstrations, where the instruction
    is not said; `separator` ends each demonstration. `metric` is how answers are judged (`workbench.metrics.METRICS`), and
    `choices` what is chosen from, where examples have none of their own. `labels` are facts about the task (kind,
    operation, domain, format).

    Raises:
        TaskError: a metric that does not exist.
    """

    name: str
    instruction: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    template: str = "{instruction}: {input} = "
    bare: str = "{input} = "
    separator: str = "\n"
    max_new_tokens: int = 64
    labels: dict[str, str] = field(default_factory=dict)
    metric: str = metrics.DEFAULT
    choices: tuple[str, ...] = ()

    def __post_init__(self):
        metrics.find(self.metric)

    def choices_of(self, example: Example) -> tuple[str, ...]:
        """What is chosen from in an example; () where nothing is said."""
        return example.choices or self.choices

    def prompt(self, example: Example, demonstrations: Sequence[Example] = ()) -> str:
        """The text before the answer; with demonstrations, those first and no instruction."""
        if not demonstrations:
            return self.template.format(instruction=self.instruction, input=example.input)
        shown = "".join(
            self.bare.format(instruction=self.instruction, input=d.input) + d.target + self.separator
            for d in demonstrations
        )
        return shown + self.bare.format(instruction=self.instruction, input=example.input)

    def turns(self, example: Example, demonstrations: Sequence[Example] = ()) -> list[dict[str, str]]:
        """The same as a chat's turns: demonstrations are earlier questions, answered; each question has its whole prompt."""
        shown = [((d, "user"), (d, "assistant")) for d in demonstrations]
        every = [*(turn for pair in shown for turn in pair), (example, "user")]
        return [{"role": who, "content": self.prompt(e) if who == "user" else e.target} for e, who in every]

    def digest(self) -> str:
        """Content hash of wording, examples and metric."""
        parts = [self.instruction, self.template, self.bare, self.separator, str(self.max_new_tokens)]
        for split in (self.train, self.validation, self.test):
            parts += [_content(example) for example in split] + ["\x01"]
        if self.metric != metrics.DEFAULT or self.choices:  # what is as it always was keeps its hash
            parts += ["\x03", self.metric, *self.choices]
        return hashlib.sha256("\x02".join(parts).encode()).hexdigest()


def _content(example: Example) -> str:
    more = [f"\x04{kind}\x00{text}" for kind in ("references", "choices") for text in getattr(example, kind)]
    return f"{example.input}\x00{example.target}" + "".join(more)


def names(kind: str | None = None) -> list[str]:
    """Names of tasks: the bundled ones, or those of one kind of them (see `workbench.nano.world.KINDS`, or 'upstream');
    "bbh" for BIG-Bench Hard's and "study" for the recycling study's, whose examples are read from elsewhere.
    """
    from workbench.nano import world
    from workbench.tasks.spec import shipped

    if kind in ("bbh", "study"):
        return list(shipped(kind))
    return [f"nano/{spec.slug}" for spec in world.TARGETS + world.UPSTREAM if kind in (None, spec.kind)]


def load(
    source: str | Path | Mapping,
    *,
    seed: int = 0,
    n_train: int | None = None,
    n_validation: int | str | None = None,
    n_test: int | None = None,
    metric: str | None = None,
    table=None,
    folder: str | Path | None = None,
) -> Task:
    """Load a task.

    The test set is the same for every seed; `seed` draws the training and validation examples, which never occur in it.

    Args:
        source: a bundled task ("nano/mirror-months"); one of BIG-Bench Hard ("bbh/navigate", see `bbh`), of the recycling
            study ("study/arc_easy") or in LoraHub's layout ("lorahub/navigate", or the path of its folder, see `lorahub`);
            a spec of a table (see `workbench.tasks.spec`): the path of its YAML file, "file.yaml#name" where it holds
            several, or a mapping of the same fields.
        n_train, n_validation, n_test: how many examples; None: what the spec says, else 80, 20 and 2,000 (of a table's
            test set at most so many). n_validation="same": the training examples once more, as with few data.
        metric: how answers are judged, instead of the task's own metric.
        table: the data of a spec: a path, a pandas data frame, a `datasets` table, or split → one of these.
        folder: where files named by a spec lie (default: beside the YAML file), and those of BIG-Bench Hard or LoraHub.

    Raises:
        TaskError: no such task (near names are given), more examples than the task has, or a spec that does not fit its table.
    """
    sizes = {"n_train": n_train, "n_validation": n_validation, "n_test": n_test}
    head, _, name = str(source).partition("/") if isinstance(source, str) else ("", "", "")
    if head == "nano":
        if table is not None or folder is not None:
            raise TaskError(f"{source} is bundled: it takes no table and no folder")
        return _nano(source, seed, sizes, metric)
    if head == "lorahub" and folder is not None:
        return lorahub(Path(folder) / name, seed=seed, metric=metric, **sizes)
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        return lorahub(source, seed=seed, metric=metric, **sizes)
    from workbench.tasks import spec, tables

    if isinstance(source, Mapping):
        found = spec.Spec.of(source)
    elif head in ("bbh", "study"):
        found = spec.shipped(head).get(source)
    else:
        found = spec.read(source) if spec.is_file(source) else None
    if found is None:
        raise _unknown(source)
    return tables.make(found, seed=seed, metric=metric, table=table, folder=folder, **sizes)


def _nano(name: str, seed: int, sizes: Mapping, metric: str | None) -> Task:
    from workbench.nano import world

    spec = world.find(name.removeprefix("nano/"))
    if spec is None:
        raise _unknown(name)
    same = sizes["n_validation"] == "same"
    wanted = {"n_train": 80, "n_validation": 20, "n_test": 2000} | {k: n for k, n in sizes.items() if n is not None}
    task = world.make_task(spec, seed=seed, **wanted | ({"n_validation": 1} if same else {}))
    task = replace(task, metric=metric or task.metric, validation=task.train if same else task.validation)
    metrics.check_examples(task, (*task.train, *task.validation, *task.test))
    return task


def _unknown(name: object) -> TaskError:
    every = [*names(), *names("bbh"), *names("study")]
    near = difflib.get_close_matches(str(name), every, 3, 0.5)
    listed = "workbench.tasks.names() lists them; a spec's file ends in .yaml, and LoraHub's layout is a folder"
    return TaskError(f"no task {str(name)!r}; {'did you mean ' + ', '.join(near) + '?' if near else listed}")


def bbh(folder: str | Path | None, name: str, **more) -> Task:
    """A task of BIG-Bench Hard (Suzgun et al. 2022, arXiv 2210.09261), such as "navigate".

    Args:
        folder: a clone of its repository, or a folder with its JSON files; None: from the Hub.
        name: see `names("bbh")`.
        more: as for `load`. The options of a question, where it has them, are the choices of the example.

    Raises:
        TaskError: no such task, or no such file.
    """
    return load(f"bbh/{name.removeprefix('bbh/')}", folder=folder, **more)


def lorahub(
    folder: str | Path,
    *,
    seed: int = 42,
    n_train: int | None = 5,
    n_validation: int | str | None = "same",
    n_test: int | None = None,
    metric: str | None = None,
    shots: bool = False,
) -> Task:
    """A task in LoraHub's layout (see `workbench.tasks.jsonl`).

    Args:
        folder: a task's folder, with example.jsonl and zero_shot.jsonl.
        seed: draws the training examples; 42 gives those of LoraHub's reference code.
        n_train, n_validation, n_test: 5 examples, as in the paper, on which the fit is checked too, and all test examples.
        metric: how answers are judged; by default LoraHub's.
        shots: test on few_shot.jsonl, whose prompts hold demonstrations.

    Raises:
        TaskError: a file or a field is missing, or there are fewer examples than asked for.
    """
    from workbench.tasks import jsonl

    sizes = {"n_train": n_train, "n_validation": n_validation, "n_test": n_test}
    return jsonl.make(folder, seed=seed, metric=metric, shots=shots, **sizes)


def upstream(adapters: Iterable[str], n: int = 16, *, seed: int = 0) -> dict[str, Task]:
    """Adapter's name → the task that it was trained on, with n training examples; of bundled adapters.

    Args:
        adapters: names, or what has `names` (a pool, a stack).
        n: training examples, drawn under `seed`; under seed 0 they are the first of the 4,000 that the adapter was trained on.

    Raises:
        TaskError: an adapter that is not a bundled one; its examples are the user's to give.
    """
    from workbench.nano import world

    chosen = list(getattr(adapters, "names", adapters))
    unknown = [name for name in chosen if world.find(name) is None]
    if unknown:
        raise TaskError(
            f"{len(unknown)} of {len(chosen)} adapters are not bundled ones, such as {unknown[0]!r}, so their tasks are not "
            "known; give examples by name: {adapter's name: task}"
        )
    return {name: load(f"nano/{name}", seed=seed, n_train=n, n_validation=1, n_test=1) for name in chosen}
