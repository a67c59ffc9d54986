"""What the controls share: strangers' texts made harmless, figures as PNG, and a column that reports its own errors."""

from __future__ import annotations

import html
import io
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import ipywidgets
import traitlets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from workbench.base import Base
from workbench.errors import BaseError
from workbench.screen import printable

__all__ = ["DPI", "MEMORY", "PLAIN", "SPACED", "Panel", "Picture", "label", "png", "sentence", "turn"]

DPI = 100
# (class name, key) → the settings of the last control made with that key in this kernel; the next one takes them up.
MEMORY: dict[tuple[str, str], dict] = {}
PLAIN = "class='tex2jax_ignore mathjax_ignore'"  # an element whose text is not read as mathematics
SPACED = "border-collapse:separate;border-spacing:1em 0"  # a table's gaps, whatever the page's own tables have

_NO_MATHS = str.maketrans({"$": "[dollar]", "\\": "∖"})


def label(text: str, limit: int = 60) -> str:
    """A stranger's text as a control's description, which ipywidgets shows as text, but for mathematics: free of that."""
    return printable(text, limit).translate(_NO_MATHS)


def sentence(text: str, tag: str = "span", role: str = "status") -> str:
    """Escaped text as an HTML element that screen readers announce when it changes."""
    return f'<{tag} role="{role}" {PLAIN}>{html.escape(text)}</{tag}>'


_TURNS: WeakKeyDictionary = WeakKeyDictionary()  # a base's model → whose turn it is among the controls
_MAKING = threading.Lock()


@contextmanager
def turn(base: Base, *, stop: Callable[[], bool] | None = None) -> Iterator[None]:
    """Have a base to oneself among the controls, which take turns by whole jobs instead of waiting within them.

    A cell that uses the base meanwhile waits only for the job's present pass (`workbench.compose.alone`).

    Args:
        stop: asked now and then while waiting, true gives up; None does not wait.

    Raises:
        BaseError: somebody else has it, and waiting is not allowed, or no longer.
    """
    with _MAKING:
        lock = _TURNS.setdefault(base.model, threading.RLock())
    had = lock.acquire(blocking=False)
    while not had and stop is not None and not stop():
        had = lock.acquire(timeout=0.1)
    if not had:
        raise BaseError(f"{base.name or 'the base'} is busy with a job of this notebook; try again when that has ended")
    try:
        yield
    finally:
        lock.release()


def png(figure: Figure, *, cut: bool = True) -> bytes:
    """A figure as PNG, without pyplot; characters that the font lacks are drawn as boxes.

    Args:
        cut: cut to what is drawn, for which it is drawn twice; False keeps the figure's own size.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        if cut:
            figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
        else:
            FigureCanvasAgg(figure).print_png(buffer)  # savefig would ask matplotlib's settings whether to cut
    return buffer.getvalue()


class Picture(ipywidgets.Image):
    """A figure, hidden while there is none; its tooltip is the text in its place."""

    description = traitlets.Unicode("").tag(sync=True)  # ipywidgets 8 sets no title on what lacks one, but fails

    def __init__(self):
        layout = {"display": "none", "max_width": "100%", "object_fit": "contain", "align_self": "flex-start"}
        super().__init__(format="png", layout=layout)

    def show(self, figure: Figure | None, says: str = "", *, cut: bool = True) -> None:
        """Draw a figure, cut to what is on it, or hide."""
        self.value, self.tooltip = (png(figure, cut=cut), says) if figure else (b"", None)
        self.layout.display = "block" if figure else "none"


class Panel(ipywidgets.VBox):
    """A column of controls. An update that fails is told in it as a sentence and kept as `error` (None: all is well).

    One that has a `key` can `remember` settings, which the next of its class and key in this kernel may `recall`.
    """

    key: str | None = None

    def __init__(self, children: Sequence[ipywidgets.Widget]):
        self.error: Exception | None = None
        self._message = ipywidgets.HTML()
        super().__init__([*children, self._message], layout={"max_width": "60em"})

    def attempt(self, update: Callable[[], None], blank: Callable[[], None]) -> None:
        """Run an update; where it fails, blank what it would have shown, which is no longer true."""
        self._message.value = sentence("working …")
        try:
            update()
        except Exception as error:
            blank()
            self.told(error)
        else:
            self.told(None)

    def told(self, error: Exception | None) -> None:
        """Show how an update ended: what went wrong as a sentence, and in full when that is opened; None: all is well."""
        self.error = error
        if error is None:
            self._message.value = ""
            return
        reason = str(error) or type(error).__name__
        whole = "".join(traceback.format_exception(error))
        self._message.value = (
            sentence(f"This could not be computed: {reason}", "strong", "alert")
            + "<details><summary>In full</summary>"
            + f"<pre {PLAIN}>{html.escape(whole)}</pre></details>"
        )

    def remember(self, settings: dict) -> None:
        """Keep the settings under the key; nothing where there is none."""
        if self.key is not None:
            MEMORY[type(self).__name__, self.key] = settings

    def recall(self) -> dict:
        """What was last remembered under the key; empty where nothing was."""
        return dict(MEMORY.get((type(self).__name__, self.key), {})) if self.key is not None else {}

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """As ipywidgets', but with the whole text: it is all that a stored notebook keeps."""
        return {**super()._repr_mimebundle_(**kwargs), "text/plain": repr(self)}
