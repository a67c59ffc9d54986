"""Specs: how a table becomes a task, as YAML.

    name: capitals
    file: capitals.csv                      # or {train: a.csv, test: b.csv}; or dataset: an id of the Hub
    instruction: Name the capital of the country.
    input: "Country: {country}"             # a template over the table's columns (`workbench.tasks.templates`)
    target: capital                         # a column or a template
    metric: normalised match
    max_new_tokens: 8
    train: 40                               # sizes; "validation: same" is the training examples once more
    validation: 10
    test: 200

Every field is one of `Spec`. The specs that come with the package lie beside this module: `shipped("bbh")` has BIG-Bench
Hard's 27 tasks, `shipped("study")` those of the recycling study (arXiv 2602.12323).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

from workbench import metrics
from workbench.errors import TaskError
from workbench.tasks import templates
from workbench.tasks.fields import checked

__all__ = ["Spec", "is_file", "read", "shipped"]

BUILDERS = ("json", "csv", "parquet", "text")


@dataclass(frozen=True)
class Spec:
    """How a table becomes a task.

    Wording: `instruction` ({classes} in it is the list of `classes`, numbered from 0; their numbers are the choices where
    no others are given), `input` (a template), `template`, `bare` and `separator` as in `Task`.
    Answers: `target` is a column, or a template; `words` says how its values are written ({0: "no", 1: "yes"});
    `references` is the path of a list of all right answers; `choices` are words, or the path of a list, or
    {listed: column} where the column's text lists them ("(A) …" or "- …", each on a line).
    Source: `dataset` is an id on the Hub (with `config` and `revision`), for which `file` stands in where a folder is
    given; or what `datasets` calls a builder (`BUILDERS`) for `file`. Without it, `file` is read directly. `splits` says
    which of the source's splits are train, validation and test (default: those of these names); what is missing is drawn
    from train. `where` keeps rows whose column has one of these values; `skip_missing` leaves out rows in which something
    used is missing; `rows` draws at most so many of each split before anything else. `columns` are those that the table
    has.
    Sizes: `train`, `validation` ("same": the training examples), `test` at most; `seed` draws the test set.
    Facts: `licence`, `homepage`, `note`, and whether id and columns were `verified` against a published source.
    """

    name: str
    instruction: str
    input: str
    target: str
    words: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    choices: tuple[str, ...] | str | Mapping = ()
    references: str = ""
    metric: str = metrics.DEFAULT
    max_new_tokens: int = 64
    template: str = "{instruction}\n\n{input}\nAnswer:\n"
    bare: str = "{input}\nAnswer:\n"
    separator: str = "\n\n"
    dataset: str = ""
    config: str = ""
    revision: str = ""
    file: str | Mapping = ""
    splits: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skip_missing: bool = False
    rows: int = 0
    columns: tuple[str, ...] = ()
    train: int = 80
    validation: int | str = 20
    test: int = 2000
    seed: int = 0
    licence: str = ""
    homepage: str = ""
    note: str = ""
    verified: bool = False
    kind: str = "table"
    folder: str = ""

    @classmethod
    def of(cls, given: Mapping, name: str = "", place: str = "", **more) -> Spec:
        """A spec from a mapping; `place` says in errors where it was read, `more` are fields that no file sets.

        Raises:
            TaskError: a field that does not exist (near names are given) or is missing, or a value of the wrong kind.
        """
        known = [f.name for f in fields(cls) if f.name not in ("kind", "folder")]
        if not isinstance(given, Mapping):
            raise TaskError(f"{place or 'the spec'}: expected fields and values, got {str(given)[:60]!r}")
        place = place or f"the spec {name or given.get('name', '')!s}".strip()
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise TaskError(f"{place}: no field {key!r}; {hint}")
        values = {"name": name} | {key: checked(key, value, place) for key, value in given.items()}
        absent = [key for key in ("name", "instruction", "input", "target") if not values.get(key)]
        if absent:
            raise TaskError(f"{place}: {', '.join(absent)} missing")
        try:
            return cls(**values, **more)._sound()
        except TaskError as error:
            raise TaskError(f"{place}: {error}") from error

    @property
    def target_template(self) -> str:
        """The target as a template, a bare column's name included."""
        return self.target if "{" in self.target else f"{{{self.target}}}"

    @property
    def paths(self) -> list[str]:
        """All paths of columns that are used."""
        own = [path for path in (self.references, self.choices) if path and isinstance(path, str)]
        listed = [self.choices["listed"]] if isinstance(self.choices, Mapping) else []
        return [*templates.quoted(self.input), *templates.quoted(self.target_template), *own, *listed, *self.where]

    @property
    def options(self) -> tuple[str, ...]:
        """The choices of the whole task; () where examples have their own, or none."""
        given = self.choices if isinstance(self.choices, tuple) else ()
        return given or (tuple(map(str, range(len(self.classes)))) if self.choices == () else ())

    @property
    def said(self) -> str:
        """The instruction with its classes."""
        numbered = "\n".join(f"{i} {name}" for i, name in enumerate(self.classes))
        return self.instruction.strip().replace("{classes}", numbered)

    def judged_by(self, metric: str) -> Spec:
        """The same spec under another metric.

        Raises:
            TaskError: no such metric, or one that does not suit the spec.
        """
        try:
            return replace(self, metric=metric)._sound()
        except TaskError as error:
            raise TaskError(f"{self.name}: {error}") from error

    def _sound(self) -> Spec:
        metric = metrics.find(self.metric)
        for path in self.paths if self.columns else []:
            templates.check(f"{{{path}}}", self.columns)
        templates.quoted(self.input)
        for wording in (self.template, self.bare):
            for said in templates.quoted(wording):
                if said not in ("instruction", "input"):
                    raise TaskError(f"{{{said}}} in {wording!r}: only {{instruction}} and {{input}} can be there")
        if self.words and "{" in self.target:
            raise TaskError(f"words are for the values of a column, and the target {self.target!r} is a template")
        if metric.judges == "choices" and not (self.choices or self.options):
            raise TaskError(f"the metric {self.metric!r} needs choices")
        lost = [text for text in self.words.values() if self.options and text not in self.options]
        if lost:
            raise TaskError(f"the word {lost[0]!r} is not among the choices {list(self.options)}")
        if ("{classes}" in self.instruction) != bool(self.classes):
            raise TaskError("classes are listed where the instruction says {classes}: give both or neither")
        if self.splits and "train" not in self.splits:
            raise TaskError(f"splits must say where the training examples are, got {dict(self.splits)}")
        return self


def is_file(source: str | os.PathLike) -> bool:
    """Does this name a YAML file, perhaps with #name behind it?"""
    return Path(str(source).partition("#")[0]).suffix in (".yaml", ".yml")


def read(source: str | os.PathLike) -> Spec:
    """A spec from a YAML file: its only one, or that of a name ("tasks.yaml#capitals").

    Raises:
        TaskError: the file cannot be read, has no such name, or what `Spec.of` refuses.
    """
    path, _, name = str(source).partition("#")
    found = _loaded(Path(path))
    if (
        isinstance(found, Mapping)
        and "instruction" not in found
        and all(isinstance(v, Mapping) for v in found.values())
    ):
        every = [key for key in found if not str(key).startswith(".")]
        if name not in every:
            near = difflib.get_close_matches(name, every, 3, 0.3) or every[:8]
            raise TaskError(
                f"{path} holds {len(every)} specs; name one of them, such as {path}#{near[0] if near else '…'}"
            )
        found = found[name]
    return Spec.of(found, name or Path(path).stem, str(source), folder=str(Path(path).parent))


def _loaded(path: Path):
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise TaskError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


@cache
def shipped(kind: str) -> dict[str, Spec]:
    """The package's own specs by name, such as "bbh/navigate"; what `.all` says holds for every spec of the file."""
    found = _loaded(Path(__file__).parent / "specs" / f"{kind}.yaml")
    specs = {}
    for name, own in found.items():
        if not name.startswith("."):
            both = found[".all"] | own
            both |= {key: both[key].replace("{name}", name) for key in ("config", "file") if key in both}
            specs[f"{kind}/{name}"] = replace(Spec.of(both, f"{kind}/{name}"), kind=kind)
    return specs
