"""A form made from a method's signature: one control per option, its type hint the judge of what is typed."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Annotated, Literal, get_args, get_origin

import ipywidgets

from workbench.errors import MergeError
from workbench.options import Option
from workbench.widgets.parts import label

__all__ = ["Form", "read"]


def read(name: str, option: Option, text: str):
    """The value that a text means under an option's hint: a Python literal where the hint allows it, else the text itself.

        read("density", Option(0.2, Share), "0.5")            # 0.5
        read("k", Option(None, Count | None), "")             # None
        read("lengths", Option((), tuple[float, ...]), "1, 0.5")

    Raises:
        MergeError: the hint allows neither.
    """
    bare = text.strip()
    if bare:
        try:
            found = ast.literal_eval(bare)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            tried = [bare, text]
        else:
            found = tuple(found) if isinstance(found, list) else found
            tried = [found, (found,), bare, text]
    else:
        tried = [None, (), text]
    for value in tried:
        if _fits(option, value):
            return value
    raise MergeError(f"{name} is {text!r}, expected {option}")


def _fits(option: Option, value) -> bool:
    try:
        return option.accepts(value)
    except TypeError:  # a hint that isinstance does not take, of a method's own
        return isinstance(value, get_origin(option.hint) or object)


class Form(ipywidgets.Box):
    """Controls for options: a box to tick, a list to choose from, or a line to type a value in.

    form = Form(methods()["ties"].options)
    form.fields["density"].value = "0.5"
    form.options()                                # {"density": 0.5}: what differs from the defaults
    """

    def __init__(self, options: Mapping[str, Option], changed: Callable[[], None] = lambda: None):
        """`changed` is called after every change."""
        self._options = dict(options)
        self.fields = {name: _field(name, option) for name, option in options.items()}
        for field in self.fields.values():
            field.observe(lambda _: changed(), "value")
        children = list(self.fields.values()) or [ipywidgets.Label("This method has no options.")]
        super().__init__(children, layout={"flex_flow": "row wrap", "width": "100%"})

    def options(self) -> dict:
        """Name → value, of those that are not at their default.

        Raises:
            MergeError: a value that its hint does not allow.
        """
        found = {}
        for name, option in self._options.items():
            field, value = self.fields[name], self.fields[name].value
            if value == _first(option, field) and option.default is not Parameter.empty:
                continue
            value = read(name, option, value) if isinstance(field, ipywidgets.Text) else value
            if value != option.default or isinstance(value, bool) != isinstance(option.default, bool):
                found[name] = value
        return found

    def text(self, name: str, value):
        """A value as its control holds it."""
        return _shown(value) if isinstance(self.fields[name], ipywidgets.Text) else value

    @property
    def texts(self) -> dict:
        """Name → what its control holds, of those that are not as they were at first: for `take`."""
        return {name: one.value for name, one in self.fields.items() if one.value != _first(self._options[name], one)}

    def take(self, texts: Mapping) -> list[str]:
        """Set controls to these; the names of those that there are none for, or that do not take the value."""
        lost = []
        for name, text in texts.items():
            try:
                self.fields[name].value = text
            except Exception:
                lost.append(name)
        return lost


def _field(name: str, option: Option) -> ipywidgets.DOMWidget:
    plain = get_args(option.hint)[0] if get_origin(option.hint) is Annotated else option.hint
    about = {
        "description": label(name),
        "tooltip": f"{name}: {option}; {_shown(option.default)} unless set"[:300],
        "style": {"description_width": "8.5em"},
        "layout": {"width": "19em"},
    }
    if plain is bool and isinstance(option.default, bool):
        return ipywidgets.Checkbox(option.default, indent=True, **about)
    if get_origin(plain) is Literal and option.default in get_args(plain):
        choices = [(label(str(value)), value) for value in get_args(plain)]
        return ipywidgets.Dropdown(options=choices, value=option.default, **about)
    return ipywidgets.Text(_shown(option.default), placeholder=str(option), continuous_update=False, **about)


def _first(option: Option, field: ipywidgets.DOMWidget):
    return _shown(option.default) if isinstance(field, ipywidgets.Text) else option.default


def _shown(default) -> str:
    """A default as it is typed."""
    if default is Parameter.empty:
        return ""
    if isinstance(default, tuple):
        return ", ".join(f"{one:.6g}" if isinstance(one, float) else repr(one) for one in default)
    return default if isinstance(default, str) else repr(default)
