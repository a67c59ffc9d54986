"""The kinds of value that a sweep's file holds; what is wrong is said with its path, such as `recipes[1].grid.selct`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from workbench.errors import WorkbenchError
from workbench.options import near
from workbench.plain import show
from workbench.sweep.settings import Settings

__all__ = ["Loader", "axis", "check_names", "listed", "settings", "text", "told", "whole"]


class Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise WorkbenchError(f"line {key.start_mark.line + 1}: {key.value!r} stands twice in one mapping")
                seen[key.value] = key
        return super().construct_mapping(node, deep)


def told(place: str, function, *given, **more):
    """A call whose error says where in the file it came from."""
    try:
        return function(*given, **more)
    except (WorkbenchError, TypeError) as error:
        raise WorkbenchError(f"{place.rstrip('.') or 'the sweep'}: {error}") from error


def check_names(place: str, given, known: Sequence[str] | Mapping) -> None:
    """Are these the fields that there may be?"""
    if not isinstance(given, Mapping):
        raise WorkbenchError(f"{place.rstrip('.')}: expected fields with values, got {show(given)}")
    for name in given:
        if name not in known:
            hint = near(str(name), known) or f"; there are {', '.join(known)}"
            raise WorkbenchError(f"{place}{name}: no such field{hint}")


def settings(place: str, given, known: Sequence[str] | None = None) -> Settings:
    """A mapping of plain values, of these names where they are known; None is empty."""
    if given is None:
        return Settings()
    check_names(f"{place}.", given, list(given) if known is None and isinstance(given, Mapping) else known or [])
    return told(place, Settings, given)


def listed(place: str, given, least: int = 1) -> list:
    """A list of at least so many entries."""
    if not isinstance(given, list) or len(given) < least:
        raise WorkbenchError(f"{place}: expected a list{' with at least one entry' * least}, got {show(given)}")
    return given


def axis(place: str, given) -> list:
    """A list, or a single value as one."""
    return listed(place, given) if isinstance(given, list) else [given]


def text(place: str, value, empty: bool = False) -> str:
    """A text, which may be empty where that means something."""
    if not isinstance(value, str) or not (value or empty):
        hint = (
            " (YAML reads yes, no, on and off as true and false: put it in quotes)" if isinstance(value, bool) else ""
        )
        raise WorkbenchError(f"{place}: expected a text, got {show(value)}{hint}")
    return value


def whole(place: str, value, least: int) -> int:
    """A whole number of at least this."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise WorkbenchError(f"{place}: expected a whole number, at least {least}, got {show(value)}")
    return value
