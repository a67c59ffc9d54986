"""Tables into tasks: files, data frames and `datasets` tables, worded by a spec and drawn into splits."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from workbench import metrics
from workbench.errors import TaskError
from workbench.tasks import Example, Task, templates
from workbench.tasks.fields import ROLES
from workbench.tasks.readers import read_rows
from workbench.tasks.spec import BUILDERS, Spec
from workbench.tasks.splits import split

__all__ = ["listed", "make"]

_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


def make(
    spec: Spec,
    *,
    seed: int = 0,
    n_train: int | None = None,
    n_validation: int | str | None = None,
    n_test: int | None = None,
    metric: str | None = None,
    table=None,
    folder: str | Path | None = None,
) -> Task:
    """The task of a spec; arguments as for `workbench.tasks.load`.

    Raises:
        TaskError: the table cannot be had or read, lacks a column, or has too few rows; a metric that does not fit.
    """
    spec = spec.judged_by(metric) if metric else spec
    sources = _sources(spec, table, Path(folder) if folder is not None else None)
    examples = {role: _examples(spec, role, sources[role]) for role in ROLES if role in sources}
    try:
        train, validation, test = split(
            examples,
            n_train=spec.train if n_train is None else n_train,
            n_validation=spec.validation if n_validation is None else n_validation,
            n_test=n_test,
            most=spec.test,
            seed=seed,
            draw=f"{spec.name}|{spec.seed}",
        )
    except TaskError as error:
        raise TaskError(f"{spec.name}: {error}") from error
    facts = {"dataset": spec.dataset, "licence": spec.licence, "homepage": spec.homepage}
    labels = {"kind": spec.kind, "operation": spec.name.rpartition("/")[2]} | {k: v for k, v in facts.items() if v}
    wording = {"template": spec.template, "bare": spec.bare, "separator": spec.separator}
    task = Task(
        spec.name,
        spec.said,
        train,
        validation,
        test,
        **wording,
        max_new_tokens=spec.max_new_tokens,
        labels=labels,
        metric=spec.metric,
        choices=spec.options,
    )
    metrics.check_examples(task, (*train, *validation, *test))
    return task


def _examples(spec: Spec, role: str, rows: Sequence) -> dict[str, Example]:
    """Input → example, of a source split's rows; the first of those with the same input stands."""
    columns = list(
        rows.column_names if hasattr(rows, "column_names") else dict.fromkeys(k for row in rows for k in row)
    )
    place = f"{spec.name}, split {spec.splits.get(role, role)}"
    if not len(rows):
        raise TaskError(f"{place}: no rows")
    for path in spec.paths:
        try:
            templates.check(f"{{{path}}}", columns)
        except TaskError as error:
            raise TaskError(f"{place}: {error}") from error
    order = range(len(rows))
    if spec.rows and spec.rows < len(rows):
        order = random.Random(f"{spec.name}|{spec.seed}|{role}").sample(order, spec.rows)
    found: dict[str, Example] = {}
    kept = 0
    for i in order:
        one = rows[i]
        row = {column: one.get(column) for column in columns}
        if any(not _kept(row, column, values) for column, values in spec.where.items()):
            continue
        kept += 1
        try:
            example = _example(spec, row)
        except TaskError as error:
            raise TaskError(f"{place}, row {i + 1}: {error}") from error
        if example is not None:
            found.setdefault(example.input, example)
    if not found:
        why = (
            f"something is missing, or the choices do not fit, in all {kept} rows"
            if kept
            else f"none of {len(order)} rows has {dict(spec.where)}"
        )
        raise TaskError(f"{place}: no examples; {why}")
    return found


def _kept(row: Mapping, column: str, values: Sequence[str]) -> bool:
    value = templates.look_up(column, row)
    return not templates.is_missing(value) and templates.word(value) in values


def _example(spec: Spec, row: Mapping) -> Example | None:
    """One row's example; None where it is to be left out."""
    if spec.skip_missing and any(templates.is_missing(templates.look_up(path, row)) for path in spec.paths):
        return None
    target = templates.fill(spec.target_template, row)
    if templates.is_missing(target):
        raise TaskError(f"the target {spec.target!r} is empty; skip_missing: true leaves such rows out")
    if spec.words:
        if target not in spec.words:
            raise TaskError(f"{spec.target} is {target!r}, which is none of words: {', '.join(spec.words)}")
        target = spec.words[target]
    given, choices = templates.fill(spec.input, row), ()
    if isinstance(spec.choices, str):
        choices = _words(spec.choices, row)
    elif isinstance(spec.choices, Mapping):
        choices = listed(templates.fill(f"{{{spec.choices['listed']}}}", row))
        sound = target in choices and 1 < len(set(choices)) == len(choices)
        if not sound and metrics.find(spec.metric).judges == "choices":
            return None  # in BIG-Bench Hard some options were torn apart, at a comma or a full stop
    references = _words(spec.references, row) if spec.references else ()
    if references and target not in references:
        references = (target, *references)
    return Example(given, target, references, choices)


def _words(path: str, row: Mapping) -> tuple[str, ...]:
    value = templates.look_up(path, row)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TaskError(f"{path} is {str(value)[:60]!r}, expected a list")
    return tuple(templates.word(item, path) for item in value)


def listed(text: str) -> tuple[str, ...]:
    """The options that a text lists on lines of their own: "(A)", "(B)", … where it has such, else what follows "- "."""
    letters = re.findall(r"^\(([A-Z])\)", text, re.MULTILINE)
    return tuple(f"({c})" for c in letters) or tuple(re.findall(r"^- *(.*?) *$", text, re.MULTILINE))


def _sources(spec: Spec, table, folder: Path | None) -> dict[str, Sequence]:
    """Role → rows. A `table` given stands for the spec's own source."""
    if table is not None:
        found = table if isinstance(table, Mapping) else {"train": table}
        return _by_role(spec, {name: read_rows(one) for name, one in found.items()})
    if spec.dataset and not (spec.file and folder and spec.dataset not in BUILDERS):
        return _by_role(spec, _from_datasets(spec, folder))
    if not spec.file:
        raise TaskError(f"{spec.name}: the spec names no dataset and no file; give the data as table=")
    place = folder or (Path(spec.folder) if spec.folder else None)
    if place is None and spec.kind != "table":
        raise TaskError(
            f"{spec.name} is read from {spec.file}, which does not come with the package: {spec.note} Give folder="
        )
    files = spec.file if isinstance(spec.file, Mapping) else {"train": spec.file}
    return {role: read_rows(_found(place or Path(), name)) for role, name in files.items()}


def _found(folder: Path, name: str) -> Path:
    """The file in a folder; also where the folder is the one inside a clone that holds it."""
    places = (folder / name, folder / Path(name).name)
    return next((path for path in places if path.exists()), places[0])


def _by_role(spec: Spec, found: Mapping[str, Sequence]) -> dict[str, Sequence]:
    """Splits of a source under their names → those of a task."""
    if spec.splits and not (len(found) == 1 and "train" in found):
        lost = [name for name in spec.splits.values() if name not in found]
        if lost:
            raise TaskError(f"{spec.name}: no split {lost[0]!r}; there are {', '.join(found)}")
        return {role: found[name] for role, name in spec.splits.items()}
    roles = {role: next((found[name] for name in names if name in found), None) for role, names in _NAMES.items()}
    if roles["train"] is None:
        raise TaskError(f"{spec.name}: no split is called train; there are {', '.join(found)}: say which with splits:")
    return {role: rows for role, rows in roles.items() if rows is not None}


def _from_datasets(spec: Spec, folder: Path | None) -> dict[str, Sequence]:
    """The source's splits, through the library `datasets`."""
    datasets = metrics.library("datasets", f"{spec.name} (from the Hub)")
    options: dict = {"name": spec.config or None, "revision": spec.revision or None}
    if spec.dataset in BUILDERS:
        files = spec.file if isinstance(spec.file, Mapping) else {"train": spec.file}
        place = folder or Path(spec.folder)
        options["data_files"] = {role: n if "://" in n else str(_found(place, n)) for role, n in files.items()}
    shown = " ".join(part for part in (spec.dataset, spec.config) if part)
    try:
        found = datasets.load_dataset(spec.dataset, **options)
    except Exception as error:  # of many kinds: offline, not found, gated, a script, a broken file
        script = (
            "; a dataset of scripts can be had with revision: refs/convert/parquet" if "script" in str(error) else ""
        )
        raise TaskError(
            f"{spec.name}: {shown} could not be loaded: {' '.join(str(error).split())[:300]}{script}"
        ) from error
    return dict(found) if isinstance(found, Mapping) else {"train": found}
