"""The kinds of value that a spec's fields take, as YAML has them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from workbench.errors import TaskError

__all__ = ["ROLES", "checked"]

ROLES = ("train", "validation", "test")


def _texts(value) -> tuple[str, ...]:
    """A list of texts; YAML's numbers as they are written."""
    if not isinstance(value, list | tuple) or any(isinstance(v, bool) or not isinstance(v, str | int) for v in value):
        raise TypeError
    return tuple(map(str, value))


def _mapping(inner):
    def check(value):
        if not isinstance(value, Mapping) or any(isinstance(key, bool) for key in value):
            raise TypeError
        return MappingProxyType({str(key): inner(one) for key, one in value.items()})

    return check


def _text(value) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    return str(value)


def _string(value) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _whole(least: int):
    def check(value):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise TypeError
        return value

    return check


def _truth(value) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _any_of(*checks):
    def check(value):
        for one in checks:
            try:
                return one(value)
            except TypeError:
                continue
        raise TypeError

    return check


def _word_of(*words):
    def check(value):
        if value not in words:
            raise TypeError
        return value

    return check


def _roles(inner):
    def check(value):
        if not isinstance(value, Mapping) or not set(value) <= set(ROLES) or "train" not in value:
            raise TypeError
        return _mapping(inner)(value)

    return check


_CHECKS = {
    "words": (
        _mapping(_text),
        'a mapping of values to words (quote "yes" and "no", which YAML reads as true and false)',
    ),
    "classes": (_texts, 'a list of names (quote "yes" and "no")'),
    "choices": (
        _any_of(_texts, _string, _mapping(_string)),
        'a list of words (quote "yes" and "no"), the path of a list, or {listed: column}',
    ),
    "max_new_tokens": (_whole(1), "a whole number, at least 1"),
    "file": (_any_of(_string, _roles(_string)), "a path, or {train: …, validation: …, test: …}"),
    "splits": (_roles(_string), "{train: …, validation: …, test: …}, train at least"),
    "where": (
        _mapping(_any_of(_texts, lambda value: (_text(value),))),
        "columns and the values kept, such as {kind: [a, b]}",
    ),
    "skip_missing": (_truth, "true or false"),
    "verified": (_truth, "true or false"),
    "rows": (_whole(1), "a whole number, at least 1"),
    "columns": (_texts, "a list of names"),
    "train": (_whole(1), "a whole number, at least 1"),
    "validation": (_any_of(_word_of("same"), _whole(1)), 'a whole number, at least 1, or "same"'),
    "test": (_whole(1), "a whole number, at least 1"),
    "seed": (_whole(0), "a whole number, at least 0"),
}


def checked(key: str, value, place: str):
    """A field's value, in the form that `Spec` holds it in; what `_CHECKS` does not name is text.

    Raises:
        TaskError: a value of the wrong kind.
    """
    check, wanted = _CHECKS.get(key, (_string, "text"))
    try:
        found = check(value)
        if key == "choices" and isinstance(found, Mapping) and list(found) != ["listed"]:
            raise TypeError
        return found
    except TypeError:
        raise TaskError(f"{place}: {key} is {value!r:.100}, expected {wanted}") from None
