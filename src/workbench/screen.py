"""Screening: which of the adapters found may be used, and for each other one the rule that it broke and why.

    verdict = screen(folder, base_shapes=base_shapes("path/to/base"), base_names=["meta-llama/Llama-3.1-8B-Instruct"])
    verdict.accepted, verdict.rule, verdict.reason, verdict.facts

The files are strangers': sizes are checked before anything is read, the header before the weights, nothing is executed,
and no pickle is ever opened. The rules are in `workbench.rules`; the first that objects decides.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import pandas as pd
import torch

from workbench.adapters import Adapter
from workbench.card import printable
from workbench.compose import layer_shape
from workbench.errors import AdapterError, BaseError, SelectionError
from workbench.header import read_header
from workbench.keys import Layout, layout, locate
from workbench.plain import CONFIG, WEIGHTS, scaling
from workbench.rules import DEFAULT, RULES, STUDY, Rule
from workbench.source import Source

__all__ = [
    "DEFAULT",
    "REMOTE",
    "RULES",
    "STAGES",
    "STUDY",
    "Candidate",
    "Checked",
    "Refused",
    "Verdict",
    "applied",
    "base_shapes",
    "counts",
    "explain",
    "read_header",
    "screen",
]

STAGES = ("config", "header", "values")
TARGET_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REMOTE = {
    "gated": "Its author lets anyone download it",
    "fetch": "The Hub delivers it",
    "checksum": "The file is the one whose sha256 the Hub states",
    "budget": "There is room for it on the disk, within the budget",
}


class Refused(AdapterError):
    """An adapter that cannot be had, with the rule of `REMOTE` that it broke."""

    def __init__(self, rule: str, message: str):
        super().__init__(message)
        self.rule = rule


@dataclass(frozen=True)
class Verdict:
    """What became of one adapter: the rule that refused it and the reason in words ('' where accepted), and facts.

    `adapter` is what was read, where it was accepted; facts are the columns of a pool's table, as far as known.
    """

    name: str
    accepted: bool
    rule: str
    reason: str
    facts: dict
    adapter: Adapter | None = field(default=None, repr=False, compare=False)


class Candidate:
    """One adapter under inspection; each file is read when first asked for.

    Rules ask it what there is and never the folder, so that they judge an adapter on the Hub by the same words
    (`hub.distant.Distant`); `here` says that the folder holds the files, `refusal` why one could not be had.
    """

    here = True
    refusal: Refused | None = None

    def __init__(
        self,
        folder: str | Path,
        name: str | None = None,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        names: Collection[str] | None = None,
    ):
        self.folder = Path(folder)
        self.name = name or self.folder.name
        self.shapes, self.names = shapes, names

    @property
    def home(self) -> Path:
        """Where every file must really lie: the folder, or in the Hub's cache the repository's, which holds the blobs."""
        folder = self.folder.resolve()
        return folder.parent.parent if folder.parent.name == "snapshots" else folder

    @cached_property
    def files(self) -> frozenset[str]:
        """Names of the ordinary files directly in the folder."""
        return frozenset(path.name for path in self.folder.iterdir() if path.is_file())

    def size(self, name: str) -> int:
        """A file's size in bytes."""
        return (self.folder / name).stat().st_size

    @cached_property
    def config(self) -> dict:
        """The parsed `adapter_config.json`."""
        return json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))

    @cached_property
    def header(self) -> dict[str, dict]:
        """Tensor name → dtype, shape, data_offsets; from the file's header alone."""
        return read_header(self.folder / WEIGHTS)

    @cached_property
    def layout(self) -> Layout:
        """Which tensor is whose factor."""
        return layout(self.header)

    @cached_property
    def pairs(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Module, by the file's name for it → side ("A", "B") → shape."""
        named = self.layout.pairs.items()
        return {m: {side: tuple(self.header[key]["shape"]) for side, key in pair.items()} for m, pair in named}

    @cached_property
    def places(self) -> dict[str, str]:
        """Module → the base's name for it; where the base's layers are not known, its own."""
        return {module: module for module in self.pairs} if self.shapes is None else locate(self.pairs, self.shapes)

    @cached_property
    def adapter(self) -> Adapter:
        """The weights, read and checked by `Adapter.load`."""
        return Adapter.load(self.folder, self.name, shapes=self.shapes)

    @cached_property
    def source(self) -> Source:
        """The weights, to be read module by module."""
        return Source(self.folder, self.name, shapes=self.shapes)

    @cached_property
    def measured(self) -> tuple[float, str]:
        """‖ΔW‖_F and the adapter's digest, from one pass over the weights, of which one module is held at a time."""
        return self.source.measure()

    @property
    def norm(self) -> float:
        """‖ΔW‖_F over all modules."""
        return self.measured[0]


def applied(rules: Sequence[str | Rule] | None = None) -> list[Rule]:
    """The rules that screening runs, in their order: built-in ones, and at each stage one's own after them.

    Args:
        rules: names of rules and `Rule` objects of one's own (None: `DEFAULT`; `STUDY` is the recycling study's set).
            Rules that the reader needs run anyway.

    Raises:
        SelectionError: an unknown rule or stage, or a rule of one's own with a built-in one's name.
    """
    chosen = DEFAULT if rules is None else tuple(rules)
    own = [r for r in chosen if isinstance(r, Rule)]
    if unknown := [r for r in chosen if not isinstance(r, Rule) and r not in RULES]:
        raise SelectionError(f"no screening rule {unknown[0]!r}; the rules are {', '.join(RULES)}")
    for each in own:
        if each.stage not in STAGES:
            raise SelectionError(
                f"rule {each.name!r} has the stage {each.stage!r}; expected one of {', '.join(STAGES)}"
            )
        if each.name in RULES and each is not RULES[each.name]:
            raise SelectionError(f"there is a rule {each.name!r} already; give yours another name")
    built_in = [r for r in RULES.values() if r.required or r.name in chosen or r in own]
    return sorted(built_in + [r for r in own if r.name not in RULES], key=lambda r: STAGES.index(r.stage))


def screen(
    folder: str | Path | Candidate,
    base_shapes: Mapping[str, tuple[int, int]] | None = None,
    base_names: Collection[str] | None = None,
    rules: Sequence[str | Rule] | None = None,
    *,
    name: str | None = None,
    until: str = "values",
    keep: bool = True,
) -> Verdict:
    """Screen one adapter; never raises for what is in it.

    Args:
        folder: where it lies, or a `Candidate`, which knows shapes, names and its own name.
        base_shapes: module → (d_out, d_in) of the base's layers (`base_shapes`); None leaves the fit to the base unchecked.
        base_names: names that the configuration may give its base; None leaves them unchecked.
        rules: which rules to apply (`applied`).
        until: the last stage to run ("header" judges an adapter whose weights were not fetched yet).
        keep: whether the verdict of an accepted adapter brings it along.

    Raises:
        SelectionError: an unknown rule.
    """
    candidate = folder if isinstance(folder, Candidate) else Candidate(folder, name, base_shapes, base_names)
    broken, reason = "", ""
    for each in applied(rules):
        if STAGES.index(each.stage) <= STAGES.index(until):
            broken, reason = _checked(each, candidate)
            if broken:
                break
    facts = _facts(candidate, until) if isinstance(candidate.__dict__.get("config"), dict) else {}
    kept = candidate.adapter if keep and not broken and until == "values" else None
    return Verdict(printable(candidate.name), not broken, broken, printable(reason), facts, kept)


def _checked(rule: Rule, candidate: Candidate) -> tuple[str, str]:
    """The rule that a candidate broke, which is another where it could not be had, and why; ('', '') if it passes."""
    try:
        reason = rule.check(candidate)
    except Exception as error:  # a stranger's file can be wrong in any way; it must not stop the others
        reason = f"could not be checked ({type(error).__name__}: {str(error)[:100]})"
    if candidate.refusal:  # which a rule may have taken for what it was looking for
        return candidate.refusal.rule, str(candidate.refusal)
    return (rule.name, reason) if reason else ("", "")


@dataclass(frozen=True)
class Checked:
    """What one rule says of one adapter: "passed", "refused" with the reason, "off" or "not checked"."""

    rule: Rule
    state: str
    reason: str = ""


def explain(
    folder: str | Path | Candidate,
    base_shapes: Mapping[str, tuple[int, int]] | None = None,
    base_names: Collection[str] | None = None,
    rules: Sequence[str | Rule] | None = None,
    *,
    until: str = "values",
) -> list[Checked]:
    """What each rule says of one adapter, those that are not applied too ("off"). Arguments as in `screen`.

    After the first that refuses, those that can be switched off are still asked; what a required one refused is not
    looked at any further.
    """
    candidate = folder if isinstance(folder, Candidate) else Candidate(folder, None, base_shapes, base_names)
    chosen = applied(rules)
    every = sorted({r.name: r for r in (*RULES.values(), *chosen)}.values(), key=lambda r: STAGES.index(r.stage))
    found, stopped = [], False
    for each in every:
        if each not in chosen:
            found.append(Checked(each, "off"))
        elif stopped or STAGES.index(each.stage) > STAGES.index(until):
            found.append(Checked(each, "not checked"))
        else:
            broken, reason = _checked(each, candidate)
            found.append(Checked(each, "refused" if broken else "passed", printable(reason)))
            stopped = bool(broken) and (each.required or broken != each.name)
    return found


def _facts(c: Candidate, until: str) -> dict:
    """The table's columns, as far as the files tell them."""
    facts: dict = {
        "rslora": bool(c.config.get("use_rslora")),
        "base": printable(str(c.config.get("base_model_name_or_path") or "")),
    }
    unread = not c.here and "header" not in c.__dict__  # for a table nothing more is asked of the Hub
    if until == "config" or unread or WEIGHTS not in c.files:
        return facts
    facts["size"] = c.size(WEIGHTS)
    try:
        ranks = {m: pair["A"][0] for m, pair in c.pairs.items()}
        short = {module.rsplit(".", 1)[-1] for module in c.pairs}
        facts["parameters"] = sum(math.prod(shape) for pair in c.pairs.values() for shape in pair.values())
    except (AdapterError, KeyError, IndexError, TypeError):
        return facts
    if not ranks:
        return facts
    facts |= {
        "rank": max(ranks.values()),
        "mean_rank": sum(ranks.values()) / len(ranks),
        "modules": len(ranks),
        "targets": printable(",".join([t for t in TARGET_ORDER if t in short] + sorted(short - set(TARGET_ORDER)))),
    }
    if "measured" in c.__dict__:
        root = {m: math.sqrt(r) if facts["rslora"] else 1.0 for m, r in ranks.items()}
        ratios = Counter(round(scaling(c.config, m, r) / root[m], 6) for m, r in ranks.items())
        facts |= {"norm": c.norm, "digest": c.measured[1], "alpha_over_r": ratios.most_common(1)[0][0]}
    return facts


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many adapters each rule refused: rule, count, why (what the rule asks); most frequent first."""
    refused = table.loc[~table["accepted"], "rule"]
    found = Counter(refused)
    why = {name: each.why for name, each in RULES.items()} | REMOTE
    why |= {name: "A rule of one's own" for name in sorted(set(found) - set(why))}
    rows = [(name, found[name], why[name]) for name in why if found[name]]
    return pd.DataFrame(rows, columns=["rule", "count", "why"]).sort_values(
        "count", ascending=False, kind="stable", ignore_index=True
    )


@cache
def base_shapes(base: str, *, local_only: bool = True) -> dict[str, tuple[int, int]]:
    """Module → (d_out, d_in) of a base's linear layers and embeddings (width, vocabulary), as `Base.layers` has them.

    From its configuration alone: no weights are read.

    Raises:
        BaseError: the configuration cannot be found or built (with `local_only`, nothing is fetched from the Hub).
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=local_only)
        with torch.device("meta"):
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = kind.from_config(config, trust_remote_code=False)
    except Exception as error:  # a configuration can be wrong in any way
        raise BaseError(f"no layer shapes could be had for the base {base}: {str(error)[:300]}") from error
    found = {module: layer_shape(layer) for module, layer in model.named_modules()}
    return {module: shape for module, shape in found.items() if shape}
