"""Tasks: a few training examples, a validation split, a test set, and how they are worded."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workbench.errors import TaskError

__all__ = ["Example", "Task", "load", "names", "upstream"]


@dataclass(frozen=True)
class Example:
    """One example: what is given, and the answer expected."""

    input: str
    target: str


@dataclass(frozen=True)
class Task:
    """Examples in three splits and their wording.

    `template` words a question ({instruction}, {input}); `bare` words one among demonstrations, where the instruction
    is not said; `separator` ends each demonstration. `labels` are facts about the task (kind, operation, domain, format).
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

    def prompt(self, example: Example, demonstrations: Sequence[Example] = ()) -> str:
        """The text before the answer; with demonstrations, those first and no instruction."""
        if not demonstrations:
            return self.template.format(instruction=self.instruction, input=example.input)
        shown = "".join(
            self.bare.format(instruction=self.instruction, input=d.input) + d.target + self.separator
            for d in demonstrations
        )
        return shown + self.bare.format(instruction=self.instruction, input=example.input)

    def digest(self) -> str:
        """Content hash of wording and examples."""
        parts = [self.instruction, self.template, self.bare, self.separator, str(self.max_new_tokens)]
        for split in (self.train, self.validation, self.test):
            parts += [f"{example.input}\x00{example.target}" for example in split] + ["\x01"]
        return hashlib.sha256("\x02".join(parts).encode()).hexdigest()


def names(kind: str | None = None) -> list[str]:
    """Names of the bundled tasks; `kind` keeps those of one kind (see `workbench.nano.world.KINDS`, or 'upstream')."""
    from workbench.nano import world

    return [f"nano/{spec.slug}" for spec in world.TARGETS + world.UPSTREAM if kind in (None, spec.kind)]


def load(name: str, *, seed: int = 0, n_train: int = 80, n_validation: int = 20, n_test: int = 2000) -> Task:
    """Load a task by name, such as "nano/mirror-months".

    The test set is the same for every seed; `seed` draws the training and validation examples, which never occur in it.

    Raises:
        TaskError: no such task (near names are given), or more examples than the task has.
    """
    from workbench.nano import world

    spec = world.find(name.removeprefix("nano/")) if name.startswith("nano/") else None
    if spec is None:
        near = difflib.get_close_matches(name, names(), 3, 0.5)
        raise TaskError(
            f"no task {name!r}; {'did you mean ' + ', '.join(near) + '?' if near else 'workbench.tasks.names() lists them'}"
        )
    return world.make_task(spec, seed=seed, n_train=n_train, n_validation=n_validation, n_test=n_test)


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
