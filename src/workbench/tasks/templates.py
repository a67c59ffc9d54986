"""Templates over a table's columns: "{question}" is the column's text, "{answers[text][0]}" what lies inside it.

    fill("Question: {question}\\n{options:letters}", row)

A list is written as the name behind the colon says (`LISTS`); text stays as it is. No attribute is looked up, no method
called and no format other than these known, so that a stranger's template can do nothing but quote the row.
"""

from __future__ import annotations

import difflib
import math
import re
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from numbers import Integral, Real

from workbench.errors import TaskError

__all__ = ["LISTS", "check", "fill", "is_missing", "look_up", "quoted", "word"]

LISTS = {
    "letters": lambda items: "\n".join(f"({string.ascii_uppercase[i]}) {item}" for i, item in enumerate(items)),
    "numbers": lambda items: "\n".join(f"{i}: {item}" for i, item in enumerate(items)),
    "lines": "\n".join,
    "commas": ", ".join,
}
PAIRS = "pairs"  # a mapping of labels and texts, such as {"label": ["A", "B"], "text": ["ant", "bee"]}
_PATH = re.compile(r"([^\[\]{}]+)((?:\[[^\[\]{}]+\])*)")


def _parts(template: str) -> Iterator[tuple[str, str | None, str]]:
    """Literal text, the field behind it (None: none) and how it is written.

    Raises:
        TaskError: unbalanced braces, an empty field, a conversion such as !r, or an unknown way to write a list.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise TaskError(
            f"the template {template!r} cannot be read: {error}; a brace itself is written {{{{ or }}}}"
        ) from error
    for literal, field, form, conversion in parts:
        if field == "" or conversion:
            raise TaskError(
                f"the template {template!r} has {{{field}{'!' + conversion if conversion else ''}}}; write {{column}}"
            )
        if form and form not in (*LISTS, PAIRS):
            raise TaskError(
                f"the template {template!r}: {form!r} is no way to write a list; there are {', '.join((*LISTS, PAIRS))}"
            )
        yield literal, field, form or ""


def _split(path: str, columns: Collection[str]) -> tuple[str, list[str]]:
    """The column of a path and the keys behind it, such as ("answers", ["text", "0"])."""
    if path in columns:
        return path, []
    found = _PATH.fullmatch(path)
    if found is None or found[1] not in columns:
        near = difflib.get_close_matches(found[1] if found else path, columns, 1)
        hint = f"did you mean {near[0]!r}? There are" if near else "there are"
        raise TaskError(f"no column {path!r}; {hint} {', '.join(map(str, columns)) or 'none'}")
    return found[1], re.findall(r"\[([^\[\]]+)\]", found[2])


def quoted(template: str) -> list[str]:
    """The paths that a template quotes."""
    return [field for _, field, _ in _parts(template) if field is not None]


def check(template: str, columns: Collection[str]) -> None:
    """Raises:
    TaskError: a template that cannot be read, or quotes a column that is not among these.
    """
    for path in quoted(template):
        _split(path, columns)


def look_up(path: str, row: Mapping):
    """What lies at a path of a row; None where the row has nothing there.

    Raises:
        TaskError: no such column, or no such key in it.
    """
    column, keys = _split(path, row.keys())
    value = row[column]
    for key in keys:
        if value is None:
            return None
        try:
            value = value[key] if isinstance(value, Mapping) else value[int(key)]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise TaskError(f"{path}: nothing lies at [{key}] of {str(value)[:60]!r}") from error
    return value


def fill(template: str, row: Mapping) -> str:
    """A template with a row's values.

    Raises:
        TaskError: what `_parts`, `look_up` and `word` refuse.
    """
    out = []
    for literal, field, form in _parts(template):
        out.append(literal)
        if field is not None:
            out.append(_written(field, look_up(field, row), form))
    return "".join(out)


def _written(path: str, value, form: str) -> str:
    if form == PAIRS:
        if not isinstance(value, Mapping) or not {"label", "text"} <= value.keys():
            raise TaskError(f"{path}:{PAIRS} wants a mapping of label and text, got {str(value)[:60]!r}")
        return "\n".join(
            f"({word(k, path)}) {word(v, path)}" for k, v in zip(value["label"], value["text"], strict=True)
        )
    if form and not isinstance(value, str):  # text stays as it is
        if not isinstance(value, Sequence):
            raise TaskError(f"{path}:{form} wants a list, got {str(value)[:60]!r}")
        return LISTS[form]([word(item, path) for item in value])
    return word(value, path)


def is_missing(value) -> bool:
    """Nothing there: None, not a number, or text without a character in it."""
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


def word(value, path: str = "") -> str:
    """A value as text; whole numbers without a decimal point, whatever their type.

    Raises:
        TaskError: nothing there, or a list or a mapping.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise TaskError(f"{path} has no value in a row; skip_missing: true leaves such rows out")
    if isinstance(value, Mapping | list | tuple):
        ways = ", ".join(f"{{{path}:{form}}}" for form in (*LISTS, PAIRS))
        raise TaskError(f"{path} is a {type(value).__name__}, not text; write one of {ways}, or {{{path}[…]}}")
    if isinstance(value, Real) and not isinstance(value, bool | Integral) and float(value).is_integer():
        value = int(value)
    return str(value)
