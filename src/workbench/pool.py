"""A pool of adapters for one base: what was found, what of it may be used and why the rest may not, and selection.

pool = Pool.open("nano")                       # the bundled laboratory; or a folder, or "hub:<base model id>"
pool.table                                     # one row per adapter found, refused ones with their reason
stack = pool.select("evaluation", k=10, task=task, base=base)
"""

from __future__ import annotations

import difflib
import hashlib
import html
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import pandas as pd

from workbench.adapters import CONFIG, WEIGHTS, Adapter
from workbench.errors import AdapterError, BaseError, SelectionError
from workbench.screen import Verdict, base_shapes, read_header, screen
from workbench.stack import Stack

__all__ = ["Pool", "Shown"]

KEPT_IN_MEMORY = 2**30  # bytes of factors; what does not fit is read again when asked for
COLUMNS = {
    "name": "str",
    "accepted": "bool",
    "rule": "str",
    "reason": "str",
    "rank": "Int64",
    "mean_rank": "float64",
    "alpha_over_r": "float64",
    "rslora": "boolean",
    "targets": "str",
    "modules": "Int64",
    "parameters": "Int64",
    "norm": "float64",
    "size": "Int64",
    "operation": "str",
    "domain": "str",
    "format": "str",
}


class Pool:
    """Adapters of one base, screened; `table` has all that were found, everything else only the accepted ones."""

    def __init__(
        self,
        name: str,
        base: str,
        verdicts: Sequence[Verdict],
        folders: dict[str, Path],
        shapes: Mapping[str, tuple[int, int]] | None,
    ):
        self.name, self.base, self.shapes, self.checked = name, base, shapes, shapes is not None
        self._verdicts = {v.name: v for v in sorted(verdicts, key=lambda v: v.name)}
        self._folders = folders
        self.names: tuple[str, ...] = tuple(n for n, v in self._verdicts.items() if v.accepted)
        said = {self._verdicts[n].facts.get("base", "") for n in self.names} - {""}
        self._written = said.pop() if len(said) == 1 else base  # aliases of one base would not stack
        self._kept: dict[str, Adapter] = {}
        self._room = KEPT_IN_MEMORY
        self.rankings: WeakKeyDictionary = WeakKeyDictionary()  # base → what `select` found and trained before
        for n in self.names:
            if self._verdicts[n].adapter is not None:
                self._keep(self._verdicts[n].adapter)
                self._verdicts[n] = replace(self._verdicts[n], adapter=None)

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        base: str | Path | None = None,
        cache: str | Path | None = None,
        rules: Sequence[str] | None = None,
    ) -> Pool:
        """Open the bundled pool ("nano"), a folder of adapter folders, or a base model's adapters on the Hub ("hub:ID").

        Args:
            base: the base model's folder or id; by default what the adapters' configurations name most often. Its layers
                are compared with the adapters' where its configuration is on this machine (`checked` says so).
            cache: where Hub files are kept (default: the Hub client's own cache).
            rules: names of screening rules (None: `screen.DEFAULT`; `screen.STUDY` is the recycling study's set).

        Raises:
            AdapterError: nothing to open: no such folder, or no adapter in it.
        """
        if isinstance(source, str) and source.startswith("hub:"):
            from workbench import hub

            name, found = source, hub.open_all(source.removeprefix("hub:"), base=base, cache=cache, rules=rules)
            return cls(name, str(base or source.removeprefix("hub:")), *found)
        if isinstance(source, str) and source == "nano":
            return cls._nano(rules)
        folders = find_adapters(Path(source))
        said = Counter(_named_base(folder) for folder in folders.values())
        said.pop("", None)
        common = min(said, key=lambda b: (-said[b], b), default="")
        home = str(base or common)
        try:
            shapes = base_shapes(home) if home else None
        except BaseError:
            if base is not None and Path(base).exists():
                raise
            shapes = None
        names = [home] if home in said or shapes is None else [common]
        return cls._screened(str(Path(source).name), home, folders, shapes, [n for n in names if n] or None, rules)

    @classmethod
    def _nano(cls, rules) -> Pool:
        from workbench.nano import shelf, world

        if not (shelf.BASE / CONFIG.replace("adapter_", "")).is_file():
            raise AdapterError(
                f"the bundled pool is not in this installation ({shelf.DATA}); "
                "`python -m workbench.nano.forge --preset nano --out FOLDER` makes it"
            )
        folders = find_adapters(shelf.ADAPTERS)
        pool = cls._screened("nano", str(shelf.BASE), folders, _stored_shapes(shelf.BASE), None, rules)
        for name, verdict in pool._verdicts.items():
            if spec := world.find(name):
                verdict.facts.update(operation=spec.operation, domain=spec.domain, format=spec.format)
        return pool

    @classmethod
    def _screened(cls, name, base, folders, shapes, names: Collection[str] | None, rules) -> Pool:
        verdicts, room = [], KEPT_IN_MEMORY
        for key, folder in folders.items():
            verdict = screen(folder, shapes, names, rules, name=key)
            room -= 4 * verdict.facts.get("parameters", 0) if verdict.accepted else 0
            verdicts.append(verdict if room > 0 else replace(verdict, adapter=None))
        return cls(name, base, verdicts, folders, shapes)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        fit = "" if self.checked else "; not compared with the base's layers, whose configuration is not at hand"
        return f"Pool({self.name!r}: {len(self)} of {len(self._verdicts)} adapters accepted, base {self.base!r}{fit})"

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per adapter found, sorted by name; what is not known of a refused one is missing."""
        rows = [
            {"name": v.name, "accepted": v.accepted, "rule": v.rule, "reason": v.reason, **v.facts}
            for v in self._verdicts.values()
        ]
        unknown = {"str": "", "float64": float("nan")}
        return pd.DataFrame(
            {
                column: pd.Series([row.get(column, unknown.get(kind)) for row in rows], dtype=kind)
                for column, kind in COLUMNS.items()
            }
        )

    def show(self, n: int | None = None) -> Shown:
        """The table for a notebook, with everything that strangers wrote escaped."""
        refused = len(self._verdicts) - len(self)
        base = (
            Path(self.base).name if Path(self.base).is_absolute() else self.base
        )  # no folder of this machine in a notebook
        title = f"{self.name}: {len(self)} adapters accepted, {refused} refused; base {base or 'unknown'}"
        return Shown(self.table if n is None else self.table.head(n), title)

    def adapter(self, name: str) -> Adapter:
        """An accepted adapter by name.

        Raises:
            SelectionError: no such name (near ones are given).
            AdapterError: it was refused (the reason is given), or its files have changed since.
        """
        if name not in self._verdicts:
            near = difflib.get_close_matches(str(name), self._verdicts, 3, 0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "pool.names lists them"
            raise SelectionError(f"no adapter {name!r} in pool {self.name!r}; {hint}")
        verdict = self._verdicts[name]
        if not verdict.accepted:
            raise AdapterError(f"{name} was refused by the rule {verdict.rule!r}: {verdict.reason}")
        if name not in self._kept:
            return self._keep(Adapter.load(self._folders[name], name, shapes=self.shapes))
        return self._kept[name]

    def refused(self) -> dict[str, str]:
        """Name → reason, of the adapters that were found and may not be used."""
        return {name: v.reason for name, v in self._verdicts.items() if not v.accepted}

    def _keep(self, adapter: Adapter) -> Adapter:
        adapter = replace(adapter, base=self._written)
        size = sum(4 * (f.A.numel() + f.B.numel()) for f in adapter.modules.values())
        if size <= self._room:
            self._kept[adapter.name] = adapter
            self._room -= size
        return adapter

    def stack(self, names: Sequence[str] | None = None) -> Stack:
        """The named adapters, in the order given, as a stack; None takes all that were accepted.

        Raises:
            SelectionError: nothing to stack, an unknown name, or one given twice.
            AdapterError: a refused adapter.
        """
        if isinstance(names, str):
            raise SelectionError(f"expected a sequence of names, got the single name {names!r}; write [{names!r}]")
        chosen = self.names if names is None else tuple(names)
        if not chosen:
            none = f"all {len(self._verdicts)} adapters of pool {self.name!r} were refused; pool.table says why"
            raise SelectionError(none if names is None else "the selection is empty: name at least one adapter")
        return Stack.of([self.adapter(name) for name in chosen])

    def select(self, how: str, k: int, *, task=None, base=None, seed: int = 0, skip: int = 0, target=None) -> Stack:
        """k adapters chosen by a method of `select.SELECTIONS`, best first, as a stack.

        Args:
            how: "random" (under `seed`), "evaluation" (by accuracy on the task's training examples; needs `task` and
                the `Base` as `base`), or another of `select`, such as "cosine" to the `target` trained on the task.
            skip: leave out the first `skip` of the ranking (recycling study, relevance: windows of it).

        Raises:
            SelectionError: an unknown method, or more adapters than there are.
            TaskError: evaluation on a task without training examples.
        """
        from workbench.select import choose

        return self.stack(choose(self, how, k, task=task, base=base, seed=seed, skip=skip, target=target))

    @cached_property
    def digest(self) -> str:
        """Content hash (sha256, hex) over the accepted adapters in the order of their names."""
        return hashlib.sha256("".join(self.adapter(name).digest() for name in self.names).encode()).hexdigest()


@dataclass(frozen=True)
class Shown:
    """A table as HTML for notebooks: every cell escaped, and kept from being read as mathematics."""

    table: pd.DataFrame
    title: str = ""

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            body = self.table.to_html(escape=True, index=False, na_rep="", float_format="{:.4g}".format)
        return f'<div class="tex2jax_ignore mathjax_ignore"><p>{html.escape(self.title)}</p>{body}</div>'

    def __repr__(self) -> str:
        return f"{self.title}\n{self.table.to_string(index=False)}"


def find_adapters(folder: Path) -> dict[str, Path]:
    """Name → folder of every adapter directly in a folder, or one level deeper as author/name; sorted by name.

    Raises:
        AdapterError: no such folder, no adapter in it, or it is one adapter itself.
    """
    if not folder.is_dir():
        raise AdapterError(
            f"{folder}: expected a folder of adapter folders, found {'a file' if folder.exists() else 'nothing'}"
        )
    if _looks_like_adapter(folder):
        raise AdapterError(f"{folder} is itself one adapter; open the folder above it, or read it with Adapter.load")
    found = {}
    for child in _folders(folder):
        if _looks_like_adapter(child):
            found[_encodable(child.name)] = child
        else:
            deeper = [deep for deep in _folders(child) if _looks_like_adapter(deep)]
            found |= {_encodable(f"{child.name}/{deep.name}"): deep for deep in deeper}
    if not found:
        raise AdapterError(f"{folder} holds no adapter: expected folders with {CONFIG} and {WEIGHTS} in them")
    return dict(sorted(found.items()))


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _encodable(name: str) -> str:
    """A file system's name may hold bytes that are no text."""
    return name.encode("utf-8", "backslashreplace").decode()


def _looks_like_adapter(folder: Path) -> bool:
    return any(child.name == CONFIG or child.name.startswith("adapter_model.") for child in folder.iterdir())


def _named_base(folder: Path) -> str:
    """The base that an adapter's configuration names, '' where it cannot be read."""
    return screen(folder, rules=(), until="config").facts.get("base", "")


def _stored_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """The bundled base's projections (d_out, d_in), from its weights' header: spares the import of transformers (2 s)."""
    header = read_header(base / "model.safetensors")
    return {key.removesuffix(".weight"): tuple(e["shape"]) for key, e in header.items() if key.endswith("_proj.weight")}
