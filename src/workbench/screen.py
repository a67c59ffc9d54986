"""Screening: which of the adapters found may be used, and for each other one the rule that it broke and why.

    verdict = screen(folder, base_shapes=base_shapes("path/to/base"), base_names=["meta-llama/Llama-3.1-8B-Instruct"])
    verdict.accepted, verdict.rule, verdict.reason, verdict.facts

The files are strangers': sizes are checked before anything is read, the header before the weights, nothing is executed,
and no pickle is ever opened. The rules are in `workbench.rules`; the first that objects decides.
"""

from __future__ import annotations

import json
import math
import struct
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
from workbench.keys import Layout, layout, locate
from workbench.plain import CONFIG, WEIGHTS, scaling, show
from workbench.rules import DEFAULT, RULES, STUDY, WIDTH

__all__ = [
    "DEFAULT",
    "REMOTE",
    "RULES",
    "STUDY",
    "Candidate",
    "Verdict",
    "base_shapes",
    "counts",
    "read_header",
    "screen",
]

MAX_HEADER = 2**24  # bytes
TARGET_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REMOTE = {
    "gated": "Its author lets anyone download it",
    "fetch": "The Hub delivers it",
    "checksum": "The file is the one whose sha256 the Hub states",
}


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
    """One adapter folder under inspection; each file is read when first asked for."""

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
    def norm(self) -> float:
        """‖ΔW‖_F over all modules."""
        return self.adapter.norm()


_STAGES = ("config", "header", "values")


def screen(
    folder: str | Path,
    base_shapes: Mapping[str, tuple[int, int]] | None = None,
    base_names: Collection[str] | None = None,
    rules: Sequence[str] | None = None,
    *,
    name: str | None = None,
    until: str = "values",
) -> Verdict:
    """Screen one adapter folder; never raises for what is in it.

    Args:
        base_shapes: module → (d_out, d_in) of the base's layers (`base_shapes`); None leaves the fit to the base unchecked.
        base_names: names that the configuration may give its base; None leaves them unchecked.
        rules: names of the rules to apply (None: `DEFAULT`; `STUDY` is the recycling study's set). Rules that the
            reader needs run anyway.
        until: the last stage to run ("config" judges a folder whose weights were not fetched yet).

    Raises:
        SelectionError: an unknown rule.
    """
    chosen = DEFAULT if rules is None else tuple(rules)
    if unknown := [r for r in chosen if r not in RULES]:
        raise SelectionError(f"no screening rule {unknown[0]!r}; the rules are {', '.join(RULES)}")
    candidate = Candidate(folder, name, base_shapes, base_names)
    broken, reason = "", ""
    for each in RULES.values():
        if (each.required or each.name in chosen) and _STAGES.index(each.stage) <= _STAGES.index(until):
            try:
                reason = each.check(candidate)
            except Exception as error:  # a stranger's file can be wrong in any way; it must not stop the others
                reason = f"could not be checked ({type(error).__name__}: {str(error)[:100]})"
            if reason:
                broken = each.name
                break
    sound = broken not in ("name", "symlink", "config-file", "config-json")
    facts = _facts(candidate, until) if sound else {}
    kept = candidate.adapter if not broken and until == "values" else None
    return Verdict(candidate.name, not broken, broken, printable(reason), facts, kept)


def _facts(c: Candidate, until: str) -> dict:
    """The table's columns, as far as the files tell them."""
    facts: dict = {
        "rslora": bool(c.config.get("use_rslora")),
        "base": str(c.config.get("base_model_name_or_path") or ""),
    }
    path = c.folder / WEIGHTS
    if until == "config" or not path.is_file():
        return facts
    facts["size"] = path.stat().st_size
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
    if "adapter" in c.__dict__:
        root = {m: math.sqrt(r) if facts["rslora"] else 1.0 for m, r in ranks.items()}
        ratios = Counter(round(scaling(c.config, m, r) / root[m], 6) for m, r in ranks.items())
        facts |= {"norm": c.norm, "alpha_over_r": ratios.most_common(1)[0][0]}
    return facts


def read_header(path: str | Path) -> dict[str, dict]:
    """The header of a safetensors file: tensor name → dtype, shape, data_offsets; checked against the file's size.

    Raises:
        AdapterError: the header is too large, is not JSON, or does not describe the file.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise AdapterError(
                f"{path.name} has {size:,} bytes and claims a header of {length:,}; "
                f"expected at most {MAX_HEADER:,}, within the file"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{path.name}: the header is not JSON ({str(error)[:100]})") from error
    if not isinstance(header, dict):
        raise AdapterError(f"{path.name}: the header holds a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    end = 0
    for key, entry in header.items():
        try:
            (start, stop), shape = entry["data_offsets"], entry["shape"]
            plain = all(isinstance(n, int) and n >= 0 for n in (start, stop, *shape)) and start <= stop
            width = WIDTH.get(entry["dtype"])
        except (KeyError, TypeError, ValueError):
            plain, width = False, None
        if not plain or (width and stop - start != width * math.prod(shape)):
            raise AdapterError(f"{path.name}: the header's entry for {show(key)} is not sound: {show(entry)}")
        end = max(end, stop)
    if end != size - 8 - length:
        raise AdapterError(
            f"{path.name} is damaged: it has {size:,} bytes, its header says {end + 8 + length:,}; fetch it again"
        )
    return header


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many adapters each rule refused: rule, count, why (what the rule asks); most frequent first."""
    refused = table.loc[~table["accepted"], "rule"]
    found = Counter(refused)
    why = {name: each.why for name, each in RULES.items()} | REMOTE
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise BaseError(f"no layer shapes could be had for the base {base}: {str(error)[:300]}") from error
    found = {module: layer_shape(layer) for module, layer in model.named_modules()}
    return {module: shape for module, shape in found.items() if shape}
