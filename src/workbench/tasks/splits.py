"""Examples drawn into training, validation and test sets that share no input."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Mapping

from workbench.errors import TaskError
from workbench.tasks import Example

__all__ = ["split"]


def split(
    examples: Mapping[str, Mapping[str, Example]],
    *,
    n_train: int,
    n_validation: int | str,
    n_test: int | None,
    most: int,
    seed: int,
    draw: str,
) -> tuple[tuple[Example, ...], tuple[Example, ...], tuple[Example, ...]]:
    """Training, validation and test examples, no input in two of them (but where the validation ones are the same).

    The order of the rows does not matter: examples are sorted by a hash of their input. The test set is of the source's
    own test split where it has one, and no training or validation example occurs anywhere in that split; else it is
    drawn, at most half of what there is, whatever the seed.

    Args:
        examples: train and perhaps validation and test → input → example.
        n_test: None: as many as there are, `most` of them.
        draw: what the drawing depends on besides `seed`.

    Raises:
        TaskError: fewer examples than asked for.
    """
    same = n_validation == "same"
    for name, n, also in (("n_train", n_train, ""), ("n_validation", n_validation, "same"), ("n_test", n_test, None)):
        if n != also and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise TaskError(f"{name} is {n!r}, expected a whole number, at least 1{f' or {also!r}' if also else ''}")
    asked, own = examples.get("test", {}), examples.get("validation", {})
    rest = [e for given, e in examples["train"].items() if given not in asked and given not in own]
    checked = [e for given, e in own.items() if given not in asked]
    apart = "validation" in examples and not same
    spare = n_train + (0 if same or apart else n_validation)
    drawn = "training" if same or apart else "training and validation"
    test = _sorted(asked.values(), draw)
    if "test" not in examples:
        order = _sorted(rest, draw)
        _enough(f"{drawn.replace(' and', ',')} and test", spare + (n_test or 1), order)
        size = n_test or min(most, len(order) // 2, len(order) - spare)
        test, rest = order[:size], order[size:]
    _enough("test", n_test or 1, test)
    _enough(drawn, spare, rest)
    few = _shuffled(rest, draw, seed)
    if apart:
        _enough("validation", n_validation, checked)
        checked = _shuffled(checked, draw, seed)
    train = few[:n_train]
    validation = train if same else (checked if apart else few[n_train:])[:n_validation]
    return tuple(train), tuple(validation), tuple(test[: n_test or most])


def _enough(what: str, wanted: int, there: Collection) -> None:
    if wanted > len(there):
        raise TaskError(f"{wanted} {what} examples asked for, but there are {len(there)} different ones")


def _sorted(examples: Iterable[Example], draw: str) -> list[Example]:
    return sorted(examples, key=lambda example: hashlib.sha256(f"{draw}|{example.input}".encode()).digest())


def _shuffled(examples: Iterable[Example], draw: str, seed: int) -> list[Example]:
    order = _sorted(examples, draw)
    random.Random(f"{draw}|few|{seed}").shuffle(order)
    return order
