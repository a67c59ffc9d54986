"""What screening found, kept on disk, so that a pool of a thousand adapters is not read again to be opened again.

    kept = Inventory(place("hub:org/name"), settings(rules, shapes, names))
    verdict = kept.get("ann/adapter", revision) or screen(…)
    kept.add([(verdict, revision)])

One Parquet file a source. A row is of one adapter, at one revision (a commit, or the sizes and times of its files),
under one set of settings: what was found under others is kept beside it and never answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from workbench.results import write_parquet
from workbench.screen import DEFAULT, Verdict, base_shapes

__all__ = ["VERSION", "Inventory", "kept_shapes", "place", "settings"]

VERSION = 1  # to be raised whenever a rule's verdict or a fact's meaning changes
_COLUMNS = ("settings", "name", "revision", "accepted", "rule", "reason", "facts")
_KEY = list(_COLUMNS[:3])


class Inventory:
    """Verdicts in one Parquet file; `note` says what was wrong with the file, '' for nothing.

    Any number of processes may share the file: each addition is merged with what is there by then. A file that cannot be
    read is set aside under another name, and one that cannot be written costs a later process the screening, no more.
    """

    def __init__(self, path: Path, settings: str):
        """Read what is there.

        Args:
            path: the file, which need not exist (`place` says where the file of a source lies).
            settings: a hash of all that verdicts depend on besides the adapters (`settings`).
        """
        self.path, self.settings, self.note = Path(path), settings, ""
        self._found: dict[tuple[str, str], tuple] = {}
        self._take(self._read(aside=False))

    def __len__(self) -> int:
        return len(self._found)

    def get(self, name: str, revision: str) -> Verdict | None:
        """The verdict on an adapter at a revision, without the adapter itself; None where it was never screened."""
        row = self._found.get((_text(name), _text(revision)))
        return None if row is None else Verdict(name, bool(row[0]), row[1], row[2], json.loads(row[3]))

    def add(self, found: Iterable[tuple[Verdict, str]]) -> None:
        """Store verdicts, each with its revision; one of the same name and revision is replaced.

        Args:
            found: (verdict, revision); facts are plain JSON values (numbers that are not finite too).
        """
        new = pd.DataFrame([self._row(verdict, revision) for verdict, revision in found], columns=list(_COLUMNS))
        if new.empty:
            return
        self._take(new)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(self.path):
                there = self._read(aside=True)
                self._take(there, keep=True)
                rows = new if there.empty else pd.concat([there, new])
                write_parquet(rows.drop_duplicates(_KEY, keep="last").sort_values(_KEY), self.path)
        except OSError as error:
            self.note = f"{self.path} could not be written ({type(error).__name__}: {error}); nothing is kept there"

    def _row(self, verdict: Verdict, revision: str) -> tuple:
        facts = json.dumps(verdict.facts)  # ASCII, whatever characters are in it
        said = verdict.accepted, _text(verdict.rule), _text(verdict.reason)
        return self.settings, _text(verdict.name), _text(revision), *said, facts

    def _take(self, rows: pd.DataFrame, keep: bool = False) -> None:
        """Have these rows at hand, as far as they are of these settings; `keep` prefers those at hand already."""
        own = rows[rows["settings"] == self.settings].itertuples(index=False, name=None)
        found = {(name, revision): tuple(rest) for _, name, revision, *rest in own}
        self._found.update({key: row for key, row in found.items() if not (keep and key in self._found)})

    def _read(self, aside: bool) -> pd.DataFrame:
        """The rows in the file; none where it does not exist or is damaged, in which case it is moved `aside`."""
        nothing = pd.DataFrame({column: [] for column in _COLUMNS})
        try:
            whole = io.BytesIO(
                self.path.read_bytes()
            )  # at once: another process may replace the file between two reads
            rows = pd.read_parquet(whole, columns=list(_COLUMNS))
            text = rows.drop(columns="accepted").map(lambda value: isinstance(value, str))
            if not (text.all(axis=None) and rows["accepted"].isin([True, False]).all()):
                raise ValueError("its columns hold other things than an inventory's")
            if not all(isinstance(json.loads(facts), dict) for facts in rows["facts"]):
                raise ValueError("its facts are no facts")
            return rows
        except FileNotFoundError:
            return nothing
        except Exception as error:  # whatever the reader raises for a file of any content
            said = f"{type(error).__name__}: {str(error)[:200]}"
        self.note = f"{self.path} cannot be read as an inventory ({said}); adapters are screened again"
        if aside and self.path.exists():
            damaged = self.path.with_name(f"{self.path.name}.damaged-{uuid.uuid4().hex[:8]}")
            self.path.rename(damaged)
            self.note += f", and the file was set aside as {damaged.name}"
        return nothing


def place(source: str, cache: str | Path | None = None) -> Path:
    """Where the inventory of a source lies: in the folder `workbench` of the Hub client's cache, or of another.

    Args:
        source: a name that is the source's own: "hub:org/name", or a folder's absolute path.
        cache: the cache; None is the Hub client's (`HF_HUB_CACHE`).
    """
    if cache is None:
        from huggingface_hub import constants

        cache = constants.HF_HUB_CACHE
    readable = re.sub(r"[^\w.-]+", "--", source, flags=re.ASCII).strip("-.")[-60:]
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return Path(cache).expanduser() / "workbench" / f"{readable}-{digest}.parquet"


def settings(
    rules: Sequence | None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    names: Collection[str] | None = None,
) -> str | None:
    """A hash of what `screen` is told besides the adapter: rules (None is `DEFAULT`), the base's layers and names.

    None where a rule is one of one's own, a function: its verdicts cannot be kept, since nobody sees that it has changed.
    """
    chosen = sorted(set(DEFAULT if rules is None else rules), key=str)
    if not all(isinstance(rule, str) for rule in chosen):
        return None
    layers = None if shapes is None else sorted((module, *shape) for module, shape in shapes.items())
    facts = [VERSION, chosen, layers, None if names is None else sorted(names)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def kept_shapes(base: str, cache: str | Path | None = None) -> dict[str, tuple[int, int]]:
    """`screen.base_shapes`, kept beside the inventories: an 8B base's layers take seconds to build, transformers to import.

    They are known again by the content of the base's configuration and the version of transformers.

    Raises:
        BaseError: as `base_shapes`.
    """
    from importlib.metadata import version

    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = Path(base) / "config.json"
    try:
        path = path if path.is_file() else Path(try_to_load_from_cache(base, "config.json") or path)
        config = path.read_bytes()
    except (OSError, TypeError, ValueError, HFValidationError):
        return base_shapes(base)  # which says what is wrong
    digest = hashlib.sha256(config).hexdigest()[:24]
    kept = place(f"layers {digest} {version('transformers')}", cache)
    try:
        rows = pd.read_parquet(kept).itertuples(index=False, name=None)
        return {str(module): (int(d_out), int(d_in)) for module, d_out, d_in in rows}
    except Exception:  # absent, or damaged in any way
        shapes = base_shapes(base)
    rows = [(module, *shape) for module, shape in shapes.items()]
    with contextlib.suppress(OSError):
        write_parquet(pd.DataFrame(rows, columns=["module", "d_out", "d_in"]), kept)
    return shapes


def _lock(path: Path):
    """Only one process at a time merges and writes; the lock is the system's, so that a process that dies frees it."""
    from huggingface_hub.utils import WeakFileLock

    return WeakFileLock(path.with_name(f".{path.name}.lock"))


def _text(value: str) -> str:
    """A stranger's name may hold surrogates, which no Parquet file can."""
    return value.encode("utf-8", "backslashreplace").decode()
