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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import pandas as pd

from workbench.adapters import CONFIG, Adapter
from workbench.errors import AdapterError, BaseError, SelectionError
from workbench.folders import find_adapters, named_base, screen_all, weight
from workbench.inventory import Inventory, kept_shapes, place, settings
from workbench.rules import Rule
from workbench.screen import Candidate, Checked, Verdict, base_shapes, explain, read_header, screen
from workbench.source import Source
from workbench.stack import Stack

__all__ = ["Pool", "Shown"]

KEPT_IN_MEMORY = 2**30  # bytes of factors; what does not fit is read again when asked for
STACKED_IN_MEMORY = 2**33  # bytes of factors; a larger stack reads each module when asked for
WORTH_AN_INVENTORY = 2**30  # bytes of weights; to screen fewer takes seconds
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
    "author": "str",
    "created": "str",
    "downloads": "Int64",
    "likes": "Int64",
    "licence": "str",
    "datasets": "str",
    "tags": "str",
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
        ordered = sorted(verdicts, key=lambda v: (v.name, v.accepted))  # of two names that look alike the good one's
        self._verdicts = {v.name: v for v in ordered}
        self._folders, self._base_names = folders, None
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
        rules: Sequence[str | Rule] | None = None,
        inventory: bool | None = None,
        **hub_options,
    ) -> Pool:
        """Open the bundled pool ("nano"), a folder of adapter folders, or a base model's adapters on the Hub ("hub:ID").

        Args:
            base: the base model's folder or id; by default what the adapters' configurations name most often. Its layers
                are compared with the adapters' where its configuration is on this machine (`checked` says so).
            cache: where Hub files and inventories are kept (default: the Hub client's own cache).
            rules: names of screening rules, and `Rule`s of one's own (None: `screen.DEFAULT`; `screen.STUDY` is the
                recycling study's set).
            inventory: whether what the screening of a folder finds is kept in the cache (`workbench.inventory`), so that
                adapters whose files have not changed since are not read again; None: where they are large (1 GiB).
            hub_options: for adapters on the Hub, those of `hub.survey`: aliases, quantised, limit, budget, progress, offline.

        Raises:
            AdapterError: nothing to open: no such folder, or no adapter in it.
        """
        if isinstance(source, str) and source.startswith("hub:"):
            from workbench import hub

            name = source.removeprefix("hub:")
            seen = hub.survey(name, base=base, cache=cache, rules=rules, **hub_options)
            return cls(source, str(base or name), seen.verdicts, seen.folders, seen.shapes)
        if hub_options:
            raise SelectionError(f"{', '.join(hub_options)}: for adapters on the Hub only; {source} is none of them")
        if isinstance(source, str) and source == "nano":
            return cls._nano(rules)
        folders = find_adapters(Path(source))
        said = Counter(named_base(folder) for folder in folders.values())
        said.pop("", None)
        common = min(said, key=lambda b: (-said[b], b), default="")
        if Path(common).resolve().is_relative_to(Path(source).resolve()):
            common = ""  # what lies among the adapters is a stranger's, the configuration of a base too
        home = str(base or common)
        if inventory is None:
            inventory = sum(map(weight, folders.values())) > WORTH_AN_INVENTORY
        try:
            shapes = (kept_shapes(home, cache) if inventory else base_shapes(home)) if home else None
        except BaseError:
            if base is not None and Path(base).exists():
                raise
            shapes = None
        names = [home] if home in said or shapes is None else [common]
        names, kept = [n for n in names if n] or None, None
        if inventory and (told := settings(rules, shapes, names)):
            kept = Inventory(place(str(Path(source).resolve()), cache), told)
        return cls._screened(str(Path(source).name), home, folders, shapes, names, rules, kept)

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
    def _screened(cls, name, base, folders, shapes, names: Collection[str] | None, rules, kept=None) -> Pool:
        keep = sum(map(weight, folders.values())) <= KEPT_IN_MEMORY
        found = screen_all(folders, lambda key, folder: screen(folder, shapes, names, rules, name=key, keep=keep), kept)
        pool = cls(name, base, found, folders, shapes)
        pool._base_names = names
        return pool

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        fit = "" if self.checked else "; not compared with the base's layers, whose configuration is not at hand"
        return f"Pool({self.name!r}: {len(self)} of {len(self._verdicts)} adapters accepted, base {self.base!r}{fit})"

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per adapter found, sorted by name; what is not known of a refused one is missing."""
        rows = [
            {"name": v.name, "accepted": v.accepted, "rule": v.rule, "reason": v.reason}
            | {fact: value for fact, value in v.facts.items() if value is not None}
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
        """The table for a notebook, without empty columns, and with everything that strangers wrote escaped."""
        refused = len(self._verdicts) - len(self)
        base = (
            Path(self.base).name if Path(self.base).is_absolute() else self.base
        )  # no folder of this machine in a notebook
        title = f"{self.name}: {len(self)} adapters accepted, {refused} refused; base {base or 'unknown'}"
        table = self.table.loc[:, ~(self.table.isna() | (self.table == "").fillna(False)).all()]
        return Shown(table if n is None else table.head(n), title)

    def adapter(self, name: str) -> Adapter:
        """An accepted adapter by name.

        Raises:
            SelectionError: no such name (near ones are given).
            AdapterError: it was refused (the reason is given), or its files have changed since.
        """
        folder = self._folder(name)
        if name not in self._kept:
            return self._keep(Adapter.load(folder, name, shapes=self.shapes))
        return self._kept[name]

    def source(self, name: str) -> Source:
        """An accepted adapter to be read module by module; raises as `adapter`."""
        source = Source(self._folder(name), name, shapes=self.shapes)
        source.base = self._written
        return source

    @property
    def held(self) -> bool:
        """Whether all accepted adapters fit into memory together, so that each is read once."""
        return self._bytes(self.names) <= KEPT_IN_MEMORY

    def _folder(self, name: str) -> Path:
        if name not in self._verdicts:
            raise self._unknown(name)
        verdict = self._verdicts[name]
        if not verdict.accepted:
            raise AdapterError(f"{name} was refused by the rule {verdict.rule!r}: {verdict.reason}")
        return self._folders[name]

    def _bytes(self, names: Iterable[str]) -> int:
        """What the factors of accepted adapters take in memory, fp32."""
        return sum(4 * self._verdicts[name].facts.get("parameters", 0) for name in names if name in self._verdicts)

    def refused(self) -> dict[str, str]:
        """Name → reason, of the adapters that were found and may not be used."""
        return {name: v.reason for name, v in self._verdicts.items() if not v.accepted}

    def explain(self, name: str, rules: Sequence[str | Rule] | None = None) -> list[Checked]:
        """What each screening rule says of one adapter, in the order in which they are asked (`screen.explain`).

        Raises:
            SelectionError: no such name.
            AdapterError: its files are not here.
        """
        if name not in self._folders:
            raise (
                AdapterError(f"{name}: {self._verdicts[name].reason}")
                if name in self._verdicts
                else self._unknown(name)
            )
        candidate = Candidate(self._folders[name], name, self.shapes, self._base_names)
        return explain(candidate, rules=rules)

    def _unknown(self, name: str) -> SelectionError:
        near = difflib.get_close_matches(str(name), self._verdicts, 3, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "pool.names lists them"
        return SelectionError(f"no adapter {name!r} in pool {self.name!r}; {hint}")

    def _keep(self, adapter: Adapter) -> Adapter:
        adapter = replace(adapter, base=self._written)
        size = sum(4 * (f.A.numel() + f.B.numel()) for f in adapter.modules.values())
        if size <= self._room:
            self._kept[adapter.name] = adapter
            self._room -= size
        return adapter

    def stack(self, names: Sequence[str] | None = None, *, lazy: bool | None = None) -> Stack:
        """The named adapters, in the order given, as a stack; None takes all that were accepted.

        Args:
            lazy: True leaves the factors in the files, where each module is read whenever it is asked for; None does so
                for more than 8 GiB of them.

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
        if lazy is None:
            lazy = self._bytes(chosen) > STACKED_IN_MEMORY
        return Stack.of([self.source(name) if lazy else self.adapter(name) for name in chosen])

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
        found = [self._verdicts[name].facts.get("digest") or self.adapter(name).digest() for name in self.names]
        return hashlib.sha256("".join(found).encode()).hexdigest()


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


def _stored_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """The bundled base's projections (d_out, d_in), from its weights' header: spares the import of transformers (2 s)."""
    header = read_header(base / "model.safetensors")
    return {key.removesuffix(".weight"): tuple(e["shape"]) for key, e in header.items() if key.endswith("_proj.weight")}
