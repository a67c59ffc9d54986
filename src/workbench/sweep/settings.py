"""Options as a mapping that hashes, so that runs can be compared and gathered in sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from workbench.errors import WorkbenchError
from workbench.plain import show

__all__ = ["Settings"]


class Settings(Mapping):
    """A mapping of names to plain JSON values that hashes: equal where the JSON is; what is read of it is a fresh copy.

    Raises:
        WorkbenchError: a name that is no text, or a value that JSON does not have.
    """

    def __init__(self, given: Mapping | None = None):
        given = dict(given or {})
        for name, value in given.items():
            if not isinstance(name, str):
                raise WorkbenchError(f"{show(name)}: expected a name, got {type(name).__name__}")
            if (wrong := _not_json(value)) is not None:
                raise WorkbenchError(
                    f"{name}: {show(wrong[0])} is no plain value (text, finite number, true, null, list)"
                )
        self._text = json.dumps(given, sort_keys=True, allow_nan=False)

    def __getitem__(self, name: str):
        return json.loads(self._text)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(json.loads(self._text))

    def __len__(self) -> int:
        return len(json.loads(self._text))

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other) -> bool:
        return self._text == other._text if isinstance(other, Settings) else NotImplemented

    def __repr__(self) -> str:
        return f"Settings({json.loads(self._text)})"


def _not_json(value) -> tuple | None:
    """(the first value inside that JSON does not have,), or None."""
    if isinstance(value, Mapping):
        found = [(key,) for key in value if not isinstance(key, str)] + [_not_json(one) for one in value.values()]
        return next((one for one in found if one), None)
    if isinstance(value, list | tuple):
        return next((one for one in map(_not_json, value) if one), None)
    if value is None or isinstance(value, bool | int | str):
        return None
    return None if isinstance(value, float) and abs(value) < float("inf") else (value,)
