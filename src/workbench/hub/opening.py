"""All adapters of a base on the Hub: listed, screened, fetched and judged, in that order and side by side.

What was found is kept (`workbench.inventory`), keyed by the commit: the next time the Hub is asked for the listing only,
and offline for nothing. Interrupted at any point, the next run goes on from there.
"""

from __future__ import annotations

import difflib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock

from workbench.card import printable
from workbench.errors import AdapterError, BaseError, SelectionError
from workbench.hub.bar import Bar
from workbench.hub.client import Patience, ask, endpoint
from workbench.hub.client import offline as told_offline
from workbench.hub.distant import Distant
from workbench.hub.files import CARD, Snapshot, bring
from workbench.hub.listing import Repo, discover, discovered, names_of, remember
from workbench.inventory import Inventory, kept_shapes, place, settings
from workbench.plain import WEIGHTS
from workbench.rules import Rule
from workbench.screen import REMOTE, Candidate, Checked, Refused, Verdict, applied, explain, screen

__all__ = ["Survey", "explain_one", "survey"]

THREADS = 8
SAVE_EVERY = 1.0  # seconds between two writings of the inventory
SPARE = 2**28  # bytes of the disk that are left free


@dataclass(frozen=True)
class Survey:
    """What there is on the Hub for a base: repositories and verdicts by name, folders of the accepted, the base's layers."""

    base: str
    repos: dict[str, Repo]
    verdicts: list[Verdict]
    folders: dict[str, Path]
    shapes: dict[str, tuple[int, int]] | None


def survey(
    base_id: str,
    *,
    base: str | Path | None = None,
    cache: str | Path | None = None,
    rules: Sequence[str | Rule] | None = None,
    aliases: Sequence[str] = (),
    quantised: bool = False,
    limit: int | None = None,
    until: str = "values",
    budget: int | None = None,
    progress: bool | None = None,
    offline: bool | None = None,
) -> Survey:
    """Discover, screen and fetch every adapter of a base; what fails is a refused row and stops nothing.

    Each is screened by its configuration and its weights' header first; then the weights of those that pass are fetched,
    the most downloaded first, and judged. The configurations' own base names are not compared (they are often a
    quantised copy or someone's folder): what an adapter is of, its card says, and its shapes show.

    Args:
        base: the base's folder, where its configuration is not to be taken from the Hub.
        cache: where files are kept (None: the Hub client's own cache).
        rules: as in `screen.applied`. With rules of one's own nothing is taken from the inventory.
        aliases, quantised, limit: as in `discover`.
        until: "header" fetches no weights; what it accepts, the weights may still refuse.
        budget: bytes that the adapters of this base may take up on the disk, those in the cache already counted; what
            does not fit is refused by "budget". The disk itself is never filled to the brim.
        progress: show bars with the time left; None does where a terminal is watched.
        offline: work from the cache and the inventory alone; None does as HF_HUB_OFFLINE says.

    Raises:
        AdapterError: the Hub cannot be reached, or lists no adapter of this base.
        SelectionError: an unknown rule.
    """
    where = {"aliases": aliases, "quantised": quantised, "limit": limit, "offline": offline}
    run, repos = _prepared(base_id, base=base, cache=cache, rules=rules, progress=progress, **where)
    verdicts = {repo.id: verdict for repo in repos if (verdict := run.known(repo)) is not None}
    new = [repo for repo in repos if repo.id not in verdicts]
    with run.saving():
        verdicts |= run.each(run.sift, new, "screened")
        if until == "values":
            missing = [r for r in repos if verdicts[r.id].accepted and not run.done(r, verdicts[r.id])]
            wanted, late = run.afford(repos, missing, verdicts, budget)
            verdicts |= late | run.each(run.take, wanted, "fetched", sum(run.left(r, verdicts[r.id]) for r in wanted))
    told = [replace(verdicts[r.id], facts=verdicts[r.id].facts | r.facts) for r in repos]
    folders = {r.id: run.held(r).folder for r in repos if verdicts[r.id].accepted and until == "values"}
    return Survey(base_id, {repo.id: repo for repo in repos}, told, folders, run.shapes)


def explain_one(base_id: str, name: str, *, rules: Sequence[str | Rule] | None = None, **where) -> list[Checked]:
    """What each rule says of one adapter on the Hub, as far as its configuration, its header and what is in the cache tell.

    Args:
        where: base, cache, aliases, quantised, limit and offline, as in `survey`.

    Raises:
        SelectionError: it is not among those that the Hub lists for the base.
        AdapterError: as `survey`.
    """
    run, repos = _prepared(base_id, rules=rules, **where)
    found = {repo.id: repo for repo in repos}
    if name not in found:
        near = ", ".join(difflib.get_close_matches(name, found, 3, 0.5))
        raise SelectionError(f"the Hub lists no {name!r} for {base_id}" + (f"; did you mean {near}?" if near else ""))
    candidate = Distant(found[name], run.cache, run.shapes, run.patience)
    return explain(candidate, rules=rules, until="values" if candidate.here else "header")


def _prepared(
    base_id: str,
    *,
    base=None,
    cache=None,
    rules=None,
    aliases=(),
    quantised=False,
    limit=None,
    progress: bool | None = False,
    offline=None,
) -> tuple[_Run, list[Repo]]:
    """A run with the base's shapes and the inventory of earlier ones, and what there is to be looked at."""
    applied(rules)  # a wrong one is said before anything is asked
    run = _Run(cache, rules, Patience(told_offline() if offline is None else offline), progress)
    names = names_of(base_id, aliases, quantised)
    repos = _listing(base_id, names, partial(discover, base_id, aliases=aliases, quantised=quantised), limit, run)
    run.shapes = _shapes(names_of(base_id, aliases), base, cache, run.patience)
    if told := settings(rules, run.shapes, None):
        run.inventory = Inventory(place(f"hub:{base_id}", cache), told)
    return run, repos


class _Run:
    """One survey at work."""

    def __init__(self, cache, rules, patience: Patience, progress: bool | None):
        self.cache, self.rules, self.patience = cache, rules, patience
        self.visible = sys.stderr.isatty() if progress is None else progress
        self.shapes: dict[str, tuple[int, int]] | None = None
        self.inventory: Inventory | None = None
        self._found: list[tuple[Verdict, str]] = []
        self._saved, self._lock, self._judging = time.monotonic(), Lock(), Lock()
        self._bar: Callable[[int], None] = lambda n: None

    def held(self, repo: Repo) -> Snapshot:
        return Snapshot(repo.id, repo.revision, self.cache)

    def known(self, repo: Repo) -> Verdict | None:
        """What was found of this commit before."""
        return None if self.inventory is None else self.inventory.get(repo.id, repo.revision or "")

    def done(self, repo: Repo, verdict: Verdict) -> bool:
        """Whether it was judged by its weights, and these are still there."""
        return "norm" in verdict.facts and self.left(repo, verdict) == 0

    def left(self, repo: Repo, verdict: Verdict) -> int:
        """Bytes of its weights that are not in the cache."""
        path = self.held(repo).folder / WEIGHTS
        size = verdict.facts.get("size", 0)
        return 0 if path.is_file() and path.stat().st_size == size else size

    def sift(self, repo: Repo) -> Verdict:
        """Judge by configuration and header."""
        candidate = Distant(repo, self.cache, self.shapes, self.patience)
        verdict = screen(candidate, rules=self.rules, until="header")
        if not verdict.accepted:
            self._keep(repo, verdict)
        return verdict

    def take(self, repo: Repo) -> Verdict:
        """Fetch, and judge by all that is there."""
        held = self.held(repo)
        bring(held, CARD in repo.files, self.patience, self._told)
        held.refer()
        with self._judging:  # weights are large, and one after the other is as fast
            verdict = screen(Candidate(held.folder, repo.id, self.shapes), rules=self.rules, keep=False)
        self._keep(repo, verdict)
        return verdict

    def each(
        self, call: Callable[[Repo], Verdict], repos: Sequence[Repo], what: str, size: int = 0
    ) -> dict[str, Verdict]:
        """Name → verdict, side by side; what cannot be had is a verdict too."""

        def one(repo: Repo) -> Verdict:
            try:
                verdict = call(repo)
            except Refused as error:
                verdict = _refusal(repo, error.rule, str(error))
            except OSError as error:  # of the disk
                verdict = _refusal(repo, "fetch", f"{type(error).__name__}: {error}")
            bar.step()
            return replace(verdict, reason=verdict.reason.removeprefix(f"{repo.id}: "))

        with Bar(what, len(repos), size, self.visible and bool(repos)) as bar, ThreadPoolExecutor(THREADS) as executor:
            self._told = bar.told
            futures = {repo.id: executor.submit(one, repo) for repo in repos}
            try:
                return {name: future.result() for name, future in futures.items()}
            except BaseException:  # such as Ctrl-C: whatever is under way stops, and what was finished is kept
                self.patience.stopped.set()
                executor.shutdown(wait=False, cancel_futures=True)
                raise

    def afford(
        self, repos: Iterable[Repo], missing: list[Repo], verdicts: dict[str, Verdict], budget: int | None
    ) -> tuple[list[Repo], dict[str, Verdict]]:
        """Those that there is room for, the most downloaded first, and verdicts on the others."""
        root = Path(place("", self.cache)).parent
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free - SPARE
        here = (
            self.held(repo).folder / WEIGHTS
            for repo in repos
            if repo not in missing or not self.left(repo, verdicts[repo.id])
        )
        room = None if budget is None else budget - sum(path.stat().st_size for path in here if path.is_file())
        wanted, late = [], {}
        for repo in sorted(missing, key=lambda r: (-r.downloads, r.id)):
            size = self.left(repo, verdicts[repo.id])
            if size > (free if room is None else min(free, room)):
                whose = f"the budget of {budget:,}" if room is not None and size > room else "the disk"
                left = max(0, room if room is not None and size > room else free)
                reason = f"its weights have {size:,} bytes, and {left:,} of {whose} are left"
                late[repo.id] = replace(_refusal(repo, "budget", reason), facts=verdicts[repo.id].facts)
                continue
            wanted.append(repo)
            free -= size
            room = None if room is None else room - size
        return wanted, late

    def _keep(self, repo: Repo, verdict: Verdict) -> None:
        """Put a verdict aside for the inventory, unless another day may bring another."""
        if verdict.rule in REMOTE or verdict.reason.startswith("could not be checked"):
            return
        with self._lock:
            self._found.append((verdict, repo.revision or ""))
            if time.monotonic() - self._saved >= SAVE_EVERY:
                self._save()

    def _save(self) -> None:
        if self.inventory is not None and self._found:
            self.inventory.add(self._found)
        self._found, self._saved = [], time.monotonic()

    @contextmanager
    def saving(self):
        """Keep what was found, however it ends."""
        try:
            yield
        finally:
            with self._lock:
                self._save()


def _refusal(repo: Repo, rule: str, reason: str) -> Verdict:
    return Verdict(repo.id, False, rule, printable(reason.removeprefix(f"{repo.id}: ")), {})


def _listing(base_id: str, names: list[str], find: Callable, limit: int | None, run: _Run) -> list[Repo]:
    path = place(f"hub:{base_id}", run.cache).with_suffix(".json")
    if run.patience.offline:
        repos = discovered(path, names, limit)
        if not repos:
            raise AdapterError(
                f"no adapter of {base_id!r} was listed before, and the Hub is not asked (offline); open the pool once "
                "with HF_HUB_OFFLINE unset"
            )
        return repos
    repos = find(limit=limit)
    if not repos:
        raise AdapterError(
            f"the Hub lists no adapter of {base_id!r}; expected the id of a base model, such as org/name"
        )
    remember(path, repos, names, whole=limit is None)
    return repos


def _shapes(names: Sequence[str], base, cache, patience: Patience) -> dict[str, tuple[int, int]] | None:
    """The base's layer shapes, from a folder given or from the first of its names whose configuration can be had."""
    if base is not None:
        return kept_shapes(str(base), cache)
    from huggingface_hub import hf_hub_download

    for cached in (True, False)[: 1 if patience.offline else 2]:
        for name in names:
            find = partial(hf_hub_download, name, "config.json", cache_dir=cache, endpoint=endpoint())
            find = partial(find, local_files_only=cached, tqdm_class=_quiet())
            try:
                path = ask(name, find) if cached else ask(name, find, patience)
                return kept_shapes(str(Path(path).parent), cache)
            except (Refused, BaseError):
                continue
    return None


def _quiet():
    """A progress bar that does not show."""
    from huggingface_hub.utils import tqdm

    return partial(tqdm, disable=True)
