"""Model cards: every adapter that leaves the workbench says what it was made of."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from workbench.licences import KINDS, Combined, of_sources

if TYPE_CHECKING:
    from workbench.adapters import Adapter

__all__ = ["hub_id", "model_card", "printable"]

OPEN_ROWS = 20  # a longer table of sources is folded
CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
# arXiv id → first author, title; what is not here is cited by its link alone.
PAPERS = {
    "2111.09832": ("Matena, Michael", "Merging Models with Fisher-Weighted Averaging"),
    "2203.05482": (
        "Wortsman, Mitchell",
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
    ),
    "2212.04089": ("Ilharco, Gabriel", "Editing Models with Task Arithmetic"),
    "2212.09849": ("Jin, Xisen", "Dataless Knowledge Fusion by Merging Weights of Language Models"),
    "2306.01708": ("Yadav, Prateek", "TIES-Merging: Resolving Interference When Merging Models"),
    "2307.13269": (
        "Huang, Chengsong",
        "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition",
    ),
    "2311.03099": (
        "Yu, Le",
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    ),
    "2312.06795": (
        "Davari, MohammadReza",
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    ),
    "2406.11617": (
        "Deep, Pala Tej",
        "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    ),
    "2409.16167": (
        "Zhao, Ziyu",
        "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise Clustering",
    ),
    "2410.19735": ("Stoica, George", "Model merging with SVD to tie the Knots"),
    "2412.00081": (
        "Gargiulo, Antonio Andrea",
        "Task Singular Vectors: Reducing Task Interference in Model Merging",
    ),
    "2502.04959": (
        "Marczak, Daniel",
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    ),
    "2509.17786": ("Panariello, Aniello", "Accurate and Efficient Low-Rank Model Merging in Core Space"),
    "2602.12323": ("", "The Appeal and Reality of Recycling LoRAs with Adaptive Merging"),
}
_MARKUP = re.compile(r"[#$&*:<>@\[\\\]`|~]|(?<![^\W_])_+|(?<=www)\.", re.IGNORECASE)
_LINK = re.compile(r"https?://[\w.~/?=&%#+:()-]{1,300}", re.ASCII)


def printable(text: str, limit: int = 500) -> str:
    """A stranger's text on one line: what does not print is written as an escape, and the rest is cut off."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown + "…" * (len(text) > limit)


def model_card(adapter: Adapter, repo_id: str = "") -> str:
    """A Hub model card (YAML header and text) for an adapter; what strangers wrote in it is escaped.

    Args:
        repo_id: where the adapter is going to be, for the lines that load it.
    """
    info = adapter.info
    licence = of_sources(info) if info.get("sources") else _own_licence(info)
    sections = [
        _head(adapter),
        _making(info),
        _sources(info),
        _licence(info, licence),
        _loading(adapter, repo_id),
        _citation(info),
    ]
    return _header(adapter, licence) + "\n" + "\n".join(line for section in sections for line in section)


def hub_id(name: str) -> bool:
    """Whether a base's name can be an id on the Hub; a folder's path cannot."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _header(adapter: Adapter, licence: Combined) -> str:
    from huggingface_hub import ModelCardData

    info = adapter.info
    known = hub_id(adapter.base)
    own = licence.licence == "other"
    data = ModelCardData(
        base_model=adapter.base if known else None,
        base_model_relation="adapter" if known else None,
        library_name="peft",
        pipeline_tag="text-generation" if _kind(adapter) == "CAUSAL_LM" else None,
        license=licence.licence or None,
        license_name=(licence.name or None) if own else None,
        license_link=info.get("licence_links", {}).get(licence.token, info.get("licence_link")) if own else None,
        tags=["merge"] * bool(info.get("sources")) + ["lora", "workbench"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _head(adapter: Adapter) -> list[str]:
    info = adapter.info
    base = adapter.base if hub_id(adapter.base) else re.split(r"[/\\]", adapter.base.rstrip("/\\"))[-1]
    ranks = Counter(factors.rank for factors in adapter.modules.values())
    spread = ", ".join(f"{rank} in {count}" for rank, count in sorted(ranks.items())) if len(ranks) > 1 else ""
    lines = [
        f"# {_shown(adapter.name)}",
        "",
        f"A LoRA adapter for {_shown(base) or 'an unnamed base'}, written by workbench. {len(adapter.modules)} modules, "
        f"rank up to {adapter.rank}{f' ({spread})' if spread else ''}, ‖ΔW‖ = {adapter.norm():.4g}.",
        "",
    ]
    for key, title in (("task", "Task"), ("training", "Training"), ("result", "Result")):
        if key in info:
            value = info[key] if isinstance(info[key], str) else json.dumps(info[key], default=str)
            lines += [f"**{title}.** {_shown(value, 2000)}", ""]
    return lines


def _making(info: Mapping) -> list[str]:
    if not info.get("method"):
        return []
    sources = info.get("sources", {})
    used = sum(bool(weight) for weight in sources.values())
    options = {key: value for key, value in info.get("options", {}).items() if key != "scale"}
    made = f"Made by `{printable(str(info['method'])).replace('`', '')}`"
    made += f" from {used} of {len(sources)} adapters" if used < len(sources) else f" from {len(sources)} adapters"
    if "scale" in info.get("options", {}):
        made += f", the whole multiplied by λ = {info['options']['scale']:.6g}"
    lines = ["## How it was made", "", f"{made}.", ""]
    if options:
        said = "; ".join(f"{_shown(key)} = {_shown(json.dumps(value, default=str))}" for key, value in options.items())
        lines += [f"Options: {said}.", ""]
    lines += [f"- {_shown(note, 1000)}" for note in info.get("notes", ())] + [""] * bool(info.get("notes"))
    error = info.get("error") or {}
    if error:
        worst = max(error, key=error.get)
        lines += [
            f"Relative error of the truncation to this rank, ‖ΔW − BA‖ / ‖ΔW‖, per module: at most {error[worst]:.3g} "
            f"({_shown(worst)}).",
            "",
        ]
        rows = [[_shown(module), f"{value:.3g}"] for module, value in error.items()]
        lines += _table(["module", "relative error"], rows, f"The relative error of all {len(rows)} modules")
    return lines


def _sources(info: Mapping) -> list[str]:
    sources, licences, report = info.get("sources"), info.get("licences", {}), info.get("report")
    if not sources:
        return []
    titles, counts = ["source", "weight", "licence"], {}
    if report is not None:
        counts = report.groupby(["adapter", "status"]).size().to_dict()
        titles += ["modules used", "modules absent"]
    rows = []
    for name, weight in sorted(sources.items(), key=lambda pair: -abs(pair[1])):
        row = [_shown(name), f"{float(weight):.4g}", _shown(licences.get(name) or "not stated")]
        rows.append(row + [str(counts.get((name, status), 0)) for status in ("used", "absent")] * (report is not None))
    lines = ["## Sources", ""]
    lines += _table(titles, rows, f"{len(rows):,} sources, largest weight first" if len(rows) > OPEN_ROWS else "")
    if report is None:
        return lines
    told = report[~report["status"].isin(["used", "absent", "weight 0"])]
    grouped = told.groupby(["adapter", "status", "reason"], sort=False)["module"].agg(["size", "first"])
    rows = [
        [_shown(name), _shown(status), str(row.size) if row.first else "all", _shown(reason, 500)]
        for (name, status, reason), row in zip(grouped.index, grouped.itertuples(index=False, name="Row"), strict=True)
    ]
    if rows:
        lines += ["Left out:", ""]
        titles = ["adapter", "status", "modules", "reason"]
        lines += _table(
            titles, rows, f"{len(rows):,} rows: what was left out, and why" if len(rows) > OPEN_ROWS else ""
        )
    return lines


def _own_licence(info: Mapping) -> Combined:
    token = info.get("licence", "")
    known = not token or any(token in licences for licences in KINDS.values())
    return Combined(token) if known else Combined("other", token)


def _licence(info: Mapping, licence: Combined) -> list[str]:
    if not info.get("sources"):
        return []
    carried = ", ".join(map(_shown, licence.carried))
    said = f"{carried}: the strictest among the sources'."
    if not carried:
        said = "No source has a weight other than 0."
    elif licence.licence == "unknown":
        said = "Some of the sources state no licence, so none can be given for this adapter."
    elif licence.licence == "other":
        said = f"{carried} apply at once." if len(licence.carried) > 1 else f"{carried}, which the Hub does not list."
    lines = ["## Licence", "", said, ""]
    for title, remarks in (("Conflicts", licence.conflicts), ("Besides", licence.notes)):
        if remarks:
            lines += [f"{title}:", "", *(f"- {_shown(remark, 1000)}" for remark in remarks), ""]
    return [
        *lines,
        "The base model's own licence applies too. All this follows from what the cards of the sources state, and is no "
        "legal advice.",
        "",
    ]


def _loading(adapter: Adapter, repo_id: str) -> list[str]:
    loader = CLASSES.get(_kind(adapter), "AutoModel")
    base = adapter.base if hub_id(adapter.base) else "path/to/the/base"
    return [
        "## How to load it",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f"base = {loader}.from_pretrained({json.dumps(base)})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(repo_id or 'path/to/this/folder')})",
        "```",
        "",
    ]


def _citation(info: Mapping) -> list[str]:
    paper, entries = info.get("paper", ""), []
    if isinstance(paper, str) and _LINK.fullmatch(paper):
        found = re.search(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", paper)
        doi = re.search(r"doi\.org/(10\..+)", paper)
        author, title = PAPERS.get(found[1], ("", "")) if found else ("", "")
        fields = {
            "title": f"{{{title}}}" if title else "",
            "author": f"{author} and others" if author else "",
            "year": f"20{found[1][:2]}" if found else "",
            "eprint": found[1] if found else "",
            "archivePrefix": "arXiv" if found else "",
            "doi": doi[1] if doi else "",
            "url": paper,
        }
        entries.append(_bibtex("method", fields))
    entries.append(_bibtex("workbench", {"title": "workbench", "note": f"version {_version()}"}))
    return ["## Citation", "", "```bibtex", "\n\n".join(entries), "```", ""]


def _bibtex(key: str, fields: Mapping[str, str]) -> str:
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{key},\n{lines}\n}}"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("workbench")
    except PackageNotFoundError:
        return "unknown"


def _kind(adapter: Adapter) -> str:
    """What the adapter's configuration will call its task, such as CAUSAL_LM."""
    kind = adapter.peft_config().get("task_type") if adapter.modules else ""
    return kind if isinstance(kind, str) else ""


def _shown(text: str, limit: int = 200) -> str:
    """A stranger's text as plain text of Markdown: one line, and no character that could be markup, HTML or a link."""
    line = printable(" ".join(str(text).split()), limit)
    return _MARKUP.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), line)


def _table(titles: Iterable[str], rows: list[list[str]], folded: str = "") -> list[str]:
    """A Markdown table of cells that are escaped already; `folded` is the title of one that opens on a click."""
    cells = [list(titles), ["---"] * len(list(titles)), *rows]
    lines = [f"| {' | '.join(row)} |" for row in cells] + [""]
    return [f"<details><summary>{folded}</summary>", "", *lines, "</details>", ""] if folded else lines
