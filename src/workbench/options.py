"""Options of methods: the hints that values are held to, in the signature and in words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

__all__ = ["Count", "Option", "Range", "Share", "accepts", "near", "words"]


@dataclass(frozen=True)
class Range:
    """Limits of a number, both included; None is no limit."""

    low: float | None = None
    high: float | None = None

    def __contains__(self, value) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"≥ {self.low}"
        return f"≤ {self.high}" if self.low is None else f"in [{self.low}, {self.high}]"


Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]


@dataclass(frozen=True)
class Option:
    """One option of a method: its default, and the type hint that values are held to."""

    default: object
    hint: object = object

    def accepts(self, value) -> bool:
        return accepts(self.hint, value)

    def __str__(self) -> str:
        return words(self.hint)


def near(name: str, names: Iterable[str]) -> str:
    """ " (did you mean 'ties'?)", or nothing where no name is close."""
    found = difflib.get_close_matches(str(name), list(names), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def accepts(hint, value) -> bool:
    """Whether a value is what a type hint allows; a bool is no number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return accepts(arguments[0], value) and value in arguments[1]
    if origin in (Union, UnionType):
        return any(accepts(argument, value) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return isinstance(value, tuple) and all(accepts(arguments[0], one) for one in value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def words(hint) -> str:
    """A hint as an error says it, such as "a finite number in [0, 1]"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{words(arguments[0])} {arguments[1]}"
    if origin in (Union, UnionType):
        return " or ".join(words(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"several, each {words(arguments[0])}"
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text", NoneType: "None"}
    return names.get(hint, "any value")
