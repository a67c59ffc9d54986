"""Folders of adapter folders: what is in them, whether it is still what it was, and the screening of all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workbench.errors import AdapterError
from workbench.inventory import Inventory
from workbench.plain import CONFIG, WEIGHTS
from workbench.screen import Verdict, screen

__all__ = ["find_adapters", "named_base", "revision", "screen_all", "weight"]

THREADS, BATCH = 8, 50  # adapters screened at once; verdicts written at once


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


def revision(folder: Path) -> str:
    """A hash of the names, sizes, times (ns) and link targets of a folder's files: another one means they have changed."""
    facts = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                link = os.readlink(entry.path) if entry.is_symlink() else ""
                stat = entry.stat(follow_symlinks=os.path.exists(entry.path))
                facts.append((entry.name, link, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(sorted(facts)).encode()).hexdigest()[:24]


def named_base(folder: Path) -> str:
    """The base that an adapter's configuration names, '' where it cannot be read."""
    return screen(folder, rules=(), until="config").facts.get("base", "")


def screen_all(
    folders: Mapping[str, Path], judge: Callable[[str, Path], Verdict], kept: Inventory | None = None
) -> list[Verdict]:
    """The verdicts on adapters (name → folder), in parallel; those in the inventory, whose files are as they were, from there.

    Whatever interrupts it, what was found by then is in the inventory.
    """
    if kept is None:
        with ThreadPoolExecutor(THREADS) as executor:
            return list(executor.map(judge, folders, folders.values()))
    revisions = {name: revision(folder) for name, folder in folders.items()}
    known = {name: verdict for name, which in revisions.items() if (verdict := kept.get(name, which))}
    unknown, fresh = [name for name in folders if name not in known], []
    with ThreadPoolExecutor(THREADS) as executor:
        try:
            judged = executor.map(judge, unknown, [folders[name] for name in unknown])
            for name, verdict in zip(unknown, judged, strict=True):
                known[name] = verdict
                fresh.append((verdict, revisions[name]))
                if len(fresh) == BATCH:
                    kept.add(fresh)
                    fresh = []
        finally:
            kept.add(fresh)
    return list(known.values())


def weight(folder: Path) -> int:
    """Bytes of an adapter's weights; 0 where it has none."""
    try:
        return (folder / WEIGHTS).stat().st_size
    except OSError:
        return 0


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _encodable(name: str) -> str:
    """A file system's name may hold bytes that are no text."""
    return name.encode("utf-8", "backslashreplace").decode()


def _looks_like_adapter(folder: Path) -> bool:
    return any(child.name == CONFIG or child.name.startswith("adapter_model.") for child in folder.iterdir())
