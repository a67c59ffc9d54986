"""Kinds of parameters: what a value may be, in words, and how one that came as text is read.

papermill and a command line hand over some values as text: 1e-3 (to YAML no number), a list or mapping written as JSON. A
kind reads these as what they say, takes 1.0 for 1, and refuses everything else; a bool is no number.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import NoneType

from workbench.errors import ParameterError
from workbench.options import near

__all__ = [
    "Kind",
    "entries",
    "mapping",
    "named",
    "number",
    "optional",
    "path",
    "place",
    "pool",
    "task",
    "text",
    "whole",
]

PLAIN = (NoneType, bool, int, float, str, list, tuple, dict)
Read = Callable[[object, Path], object]


@dataclass(frozen=True)
class Kind:
    """What a parameter may be: `expected` in words, and `read`, of a value and the folder that paths start from.

    `is_path` says that a value is a path, which depends on where the notebook runs.
    """

    expected: str
    read: Read
    is_path: bool = False


class _Unfit(Exception):
    """A value that a kind does not take; its text goes behind what was expected."""


def read(name: str, kind: Kind, value: object, folder: Path) -> object:
    """A value of a parameter as its kind reads it.

    Raises:
        ParameterError: a value that the kind does not take.
    """
    try:
        return kind.read(value, folder)
    except _Unfit as error:
        raise ParameterError(f"parameter {name}: expected {kind.expected}, got {error}") from None


def shown(value: object) -> str:
    """A value in at most 80 characters; of what is no plain value, its type."""
    if not isinstance(value, PLAIN):
        return f"a {type(value).__name__}, which is no plain value: run the parameters cell again first"
    return said if len(said := repr(value)) <= 80 else f"{said[:77]}…"


def _real(value: object) -> float | int:
    """A finite number, also one that came as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _Unfit(shown(value)) from None
    if not isinstance(value, Real) or isinstance(value, bool) or not -math.inf < value < math.inf:
        raise _Unfit(shown(value))
    return value


def whole(least: int = 1) -> Kind:
    """A whole number of at least `least`; 1.0 is one."""

    def reads(value, folder):
        found = _real(value)
        if found != int(found) or found < least:
            raise _Unfit(shown(value))
        return int(found)

    return Kind(f"a whole number of at least {least}", reads)


def number(low: float, high: float | None = None) -> Kind:
    """A finite number from `low` to `high`, both included, or above `low` where there is no `high`."""

    def reads(value, folder):
        found = _real(value)
        if not (low < found <= sys.float_info.max if high is None else low <= found <= high):
            raise _Unfit(shown(value))
        return float(found)

    return Kind(f"a number above {low:g}" if high is None else f"a number from {low:g} to {high:g}", reads)


def _word(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _Unfit(shown(value))
    return value


def text(what: str) -> Kind:
    """A text that is not empty, such as the name of an adapter: `what`."""
    return Kind(what, lambda value, folder: _word(value))


def named(what: str, names: Callable[[], Iterable[object]]) -> Kind:
    """One of some names, of which near ones are told; `names` is called when a value is read."""

    def reads(value, folder):
        known = list(names())
        if any(type(value) is type(one) and value == one for one in known):
            return value
        listed = f"; there are {', '.join(map(repr, known))}" if isinstance(value, PLAIN) else ""
        meant = near(value, map(str, known)) if isinstance(value, str) else ""
        raise _Unfit(shown(value) + (meant or listed))

    return Kind(what, reads)


def optional(kind: Kind) -> Kind:
    """None, or what another kind takes."""

    def reads(value, folder):
        return None if value is None else kind.read(value, folder)

    return Kind(f"None or {kind.expected}", reads, kind.is_path)


def _from_json(value: object, form: type, example: str) -> object:
    """A list or mapping, also one that came as a JSON text."""
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = None
        if not isinstance(found, form):
            raise _Unfit(f"{shown(value)}; as text it has to be JSON, such as {example}")
        return found
    if not isinstance(value, form):
        raise _Unfit(f"{shown(value)}; write it as {example}" if isinstance(value, PLAIN) else shown(value))
    return value


def entries(kind: Kind) -> Kind:
    """A list with at least one entry, each of another kind; a tuple, or a JSON text, is read as a list."""

    def reads(value, folder):
        found = _from_json(list(value) if isinstance(value, tuple) else value, list, '["first", "second"] or [0, 1]')
        if not found:
            raise _Unfit("[]")
        read_ones = []
        for i, one in enumerate(found, 1):
            try:
                read_ones.append(kind.read(one, folder))
            except _Unfit as error:
                raise _Unfit(f"{error} (entry {i})") from None
        return read_ones

    return Kind(f"a list, each entry {kind.expected}", reads)


def mapping(fields: Mapping[str, Kind]) -> Kind:
    """A mapping of some of these keys, the value of each of its kind; a JSON text is read as one."""

    def reads(value, folder):
        found = _from_json(value, dict, '{"k": [3, 5]}')
        if not found:
            raise _Unfit("{}")
        read_ones = {}
        for key, one in found.items():
            if key not in fields:
                raise _Unfit(f"the key {key!r}{near(str(key), fields)}")
            try:
                read_ones[key] = fields[key].read(one, folder)
            except _Unfit as error:
                raise _Unfit(f"{error} at {key!r}, where {fields[key].expected} belongs") from None
        return read_ones

    return Kind(f"a mapping with keys among {', '.join(fields)}", reads)


def path(what: str) -> Kind:
    """The path of a file or folder that exists, `what`."""

    def reads(value, folder):
        if not isinstance(value, str | os.PathLike) or not str(value):
            raise _Unfit(shown(value))
        if not (folder / value).exists():
            raise _Unfit(f"{str(value)!r}, which does not exist{_from(value, folder)}")
        return str(value)

    return Kind(f"the path of {what}", reads, is_path=True)


def _from(value: str | os.PathLike, folder: Path) -> str:
    """Where a relative path was looked for, and how that is changed; nothing of an absolute one."""
    if Path(value).is_absolute():
        return ""
    return f" seen from {folder.resolve()} (papermill runs a notebook where it is called itself, or in --cwd notebooks)"


def place(what: str) -> Kind:
    """The path of a folder, `what`, that may still have to be made."""

    def reads(value, folder):
        if not isinstance(value, str | os.PathLike) or not str(value):
            raise _Unfit(shown(value))
        if (folder / value).exists() and not (folder / value).is_dir():
            raise _Unfit(f"{str(value)!r}, which is a file")
        return str(value)

    return Kind(f"the path of {what}", reads, is_path=True)


def pool() -> Kind:
    """A pool's source, as `Pool.open` takes it; nothing is opened."""

    def reads(value, folder):
        if isinstance(value, os.PathLike):
            value = str(value)
        kept = _word(value) == "nano" or (value.startswith("hub:") and value != "hub:") or (folder / value).is_dir()
        if not kept:
            raise _Unfit(f"{value!r}{near(value, ['nano']) or ', which is no folder' + _from(value, folder)}")
        return value

    return Kind('"nano", a folder of adapters that exists, or "hub:<base model id>"', reads)


def task() -> Kind:
    """A task's name or file, as `tasks.load` takes it; nothing is loaded."""

    def reads(value, folder):
        from workbench import tasks
        from workbench.nano import world
        from workbench.tasks import spec

        if _word(value).startswith("nano/") and world.find(value.removeprefix("nano/")):
            return value
        described = spec.is_file(value) and (folder / value.partition("#")[0]).is_file()
        every = [*tasks.names(), *tasks.names("bbh"), *tasks.names("study")]
        if described or value in every or (folder / value).is_dir():
            return value
        raise _Unfit(f"{value!r}{near(value, every) or '; workbench.tasks.names() lists them'}")

    return Kind("the name of a task that is known, or the path of its file or folder", reads)
