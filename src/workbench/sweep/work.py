"""What a worker does: looks which runs are stored, takes those that nobody holds, carries them out and stores their rows."""

from __future__ import annotations

import errno
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from workbench.base import Base
from workbench.errors import WorkbenchError
from workbench.experiment import case_of, key_of, rows_of
from workbench.pool import Pool
from workbench.results import Results, run_key
from workbench.runs import Case, Workplace
from workbench.sweep import merges
from workbench.sweep.claims import Claims
from workbench.sweep.notebook import notebook_key, notebook_row
from workbench.sweep.settings import Settings
from workbench.sweep.spec import Experiment, Multitask, Notebook, Run

__all__ = ["BUSY", "FAILED", "MISSING", "RAN", "STORED", "Outcome", "carry_out", "failure", "identity", "look"]

RAN, STORED, FAILED, BUSY, MISSING = "ran", "stored", "failed", "busy", "missing"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Outcome:
    """What became of a run: ran, stored (before, or by another), failed, busy (another holds it), or missing (yet to run).

    error: the last line of what failed. `fatal` says that no other run can do better: results cannot be written, or the pool
    or the base cannot be opened.
    """

    status: str
    error: str = ""
    fatal: bool = False


def look(runs: Sequence[Run], folder: Path) -> list[Outcome]:
    """Which runs are stored, by their keys; those that cannot be told (a task that does not load) are missing."""
    store = Results(folder)
    keys, outcomes = store.keys(), []
    for run in runs:
        try:
            outcomes.append(Outcome(STORED if keys.issuperset(_keys(run)) else MISSING))
        except _Unable as error:
            return [_fatal(error)] * len(runs)
        except Exception:  # said when it is run
            outcomes.append(Outcome(MISSING))
    return outcomes


def carry_out(runs: Sequence[Run], folder: Path, threads: int = 1) -> list[Outcome]:
    """Carry out runs of one recipe side by side, or a notebook, and store a row for each.

    A run that fails is stored as a failure, with its parameters and its error; where several run side by side and something
    fails, each runs alone.
    """
    torch.set_num_threads(threads)
    store = Results(folder)
    outcomes: dict[int, Outcome] = {}
    try:
        keys = [_keys(run) for run in runs]
    except _Unable as error:
        return [_fatal(error)] * len(runs)
    except Exception as error:
        return _each(runs, folder, threads) if len(runs) > 1 else [_failed(store, runs[0], error)]
    claims, taken = _claims(folder), []
    try:
        taken += (key for key in dict.fromkeys(own[0] for own in keys) if _writing(store, claims.take, key))
        known = store.keys()
        for i, own in enumerate(keys):
            if known.issuperset(own):
                outcomes[i] = Outcome(STORED)
            elif own[0] not in taken:
                outcomes[i] = Outcome(BUSY)
        todo = [i for i in range(len(runs)) if i not in outcomes]
        for row in _rows([runs[i] for i in todo], [keys[i] for i in todo], folder) if todo else ():
            _writing(store, store.write, row)
        outcomes |= {i: Outcome(RAN) for i in todo}
    except _Unable as error:
        return [_fatal(error)] * len(runs)
    except Exception as error:
        todo = [i for i in range(len(runs)) if i not in outcomes]
        if len(todo) == 1:
            outcomes[todo[0]] = _failed(store, runs[todo[0]], error)
    finally:
        for key in taken:
            claims.release(key)
    if alone := [i for i in range(len(runs)) if i not in outcomes]:
        outcomes |= zip(alone, _each([runs[i] for i in alone], folder, threads), strict=True)
    return [outcomes[i] for i in range(len(runs))]


class _Unable(WorkbenchError):
    """No other run can do better: the pool or the base cannot be opened, or results cannot be written."""


def _fatal(error: Exception) -> Outcome:
    return Outcome(FAILED, error=str(error), fatal=True)


def _writing(store: Results, write: Callable, what):
    """What `write` returns of something to be kept in the results' folder."""
    try:
        return write(what)
    except OSError as error:
        raise _Unable(f"results cannot be written to {store.folder}: {error}") from error


def _each(runs: Sequence, folder: Path, threads: int) -> list[Outcome]:
    return [carry_out([run], folder, threads)[0] for run in runs]


def _failed(store: Results, run: Run, error: Exception) -> Outcome:
    text = str(error).strip() or type(error).__name__
    line = next(filter(None, map(str.strip, reversed(text.splitlines()))), text)
    try:
        if _full(error):
            raise _Unable(f"results cannot be written to {store.folder}: {line}")
        facts = failure(run, line, "".join(traceback.format_exception(error)))
        _writing(store, lambda facts: store.fail(identity(run), facts), facts)
    except _Unable as unable:
        return _fatal(unable)
    return Outcome(FAILED, error=line)


def failure(run: Run, line: str, whole: str = "") -> dict:
    """The facts of a failure as they are stored."""
    return {"label": run.label, "error": line, "traceback": whole} | _said(run)


def _full(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, says that the disk takes no more."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


@lru_cache(maxsize=4)
def _claims(folder: Path) -> Claims:
    return Claims(folder)


def identity(run: Run) -> str:
    """A hash of what a run was asked to do, by which its failures are stored; its key also has the content of all it reads."""
    return run_key(run.parameters)


def _keys(run: Run) -> list[str]:
    """The keys of a run's rows: one, or one for each task of a merge for several; the first is what is claimed."""
    if isinstance(run, Notebook):
        return [notebook_key(run)]
    base, pool = _opened(run)
    if isinstance(run, Multitask):
        return merges.keys_of(base, pool, run)
    return [key_of(base, pool, _case(run), run.recipe)]


def _rows(runs: Sequence[Run], keys: Sequence[Sequence[str]], folder: Path) -> list[dict]:
    """The rows of runs of one recipe, or of a single run of another kind."""
    first = runs[0]
    if isinstance(first, Experiment):
        rows = rows_of(_place(runs), first.recipe, [_case(run) for run in runs])
        return [row | _said(run) for run, row in zip(runs, rows, strict=True)]
    if isinstance(first, Multitask):
        return [row | _said(first) for row in merges.rows_of(*_opened(first), first)]
    return [notebook_row(first, keys[0][0], folder) | _said(first)]


def _said(run: Run) -> dict:
    """What a row says of the run that made it."""
    return {"asked": identity(run), "run": _text(run)}


def _text(run: Run) -> str:
    """A run as `run_from` reads it back."""
    return json.dumps(run.parameters, ensure_ascii=False)


def _case(run: Experiment) -> Case:
    return _loaded(run.task, run.folder, run.seed, run.draw, run.n_train, run.n_validation, run.n_test)


@lru_cache(maxsize=256)
def _loaded(task: str, folder: str | None, seed: int, draw: int | None, *sizes) -> Case:
    given = zip(("n_train", "n_validation", "n_test"), sizes, strict=True)
    return case_of(task, seed, draw=draw, folder=folder, **{name: size for name, size in given if size is not None})


def _opened(run: Experiment | Multitask) -> tuple[Base, Pool]:
    return _open(run.pool, run.opening, run.base, run.load)


@lru_cache(maxsize=2)
def _open(pool: str, opening: Settings, base: str | None, load: Settings) -> tuple[Base, Pool]:
    try:
        found = Pool.open(pool, **opening)
        return Base.load(base or found.base, **load), found
    except (WorkbenchError, OSError) as error:
        raise _Unable(f"pool {pool!r} with {f'base {base!r}' if base else 'its own base'}: {error}") from error


_PLACES: dict = {}


def _place(runs: Sequence[Experiment]) -> Workplace:
    """A workplace; what runs over it share is kept while they are of the same tasks and seeds, and then let go."""
    base, pool = _opened(runs[0])
    kind = (id(base), id(pool), tuple(id(_case(run)) for run in runs))
    if kind not in _PLACES:
        _PLACES.clear()
        _PLACES[kind] = Workplace(base, pool)
    return _PLACES[kind]
