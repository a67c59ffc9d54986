"""Licences of the sources: read from their cards, and what follows for a merge of them. Facts only, no legal advice.

    stated(folder)                                  # {"licence": "apache-2.0"}, as the folder's README.md says
    combined({"a": "mit", "b": "llama3.1"})         # the licence for the merged adapter's card, notes and conflicts

A licence is a short token: the Hub's identifier, or with `license: other` the author's own `license_name`; '' where none
is stated. Several that apply at once are joined by `-and-`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KINDS", "Combined", "combined", "gathered", "kind", "stated"]

CARD = "README.md"
MAX_CARD, MAX_FIELDS, MAX_TOKEN = 2**16, 2**11, 96  # bytes of a card, its licence lines, characters of one licence
UNSTATED, JOIN = "unknown", "-and-"

# The Hub's identifiers (huggingface.co/docs/hub/repositories-licenses) by kind; the kinds, and within a kind the
# licences, from the least demanding to the most.
KINDS: dict[str, tuple[str, ...]] = {
    name: tuple(licences.split())
    for name, licences in {
        "public domain": "cc0-1.0 pddl unlicense",
        "permissive": "wtfpl zlib bsl-1.0 postgresql isc mit ncsa bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear "
        "apple-ascl cdla-permissive-1.0 cdla-permissive-2.0 openmdw-1.0 openmdw-1.1 odc-by etalab-2.0 cc-by-2.0 "
        "cc-by-2.5 cc-by-3.0 cc-by-4.0 artistic-2.0 lppl-1.3c afl-3.0 ecl-2.0 apache-2.0",
        "weak copyleft": "ofl-1.1 ms-pl epl-1.0 epl-2.0 mpl-2.0 lgpl-lr lgpl lgpl-2.1 lgpl-3.0",
        "share-alike": "cdla-sharing-1.0 odbl cc-by-sa-3.0 cc-by-sa-4.0 gfdl gpl gpl-2.0 gpl-3.0",
        "network copyleft": "eupl-1.1 eupl-1.2 osl-3.0 agpl-3.0",
        "terms of its own": "cc c-uda openrail openrail++ bigscience-openrail-m creativeml-openrail-m "
        "bigcode-openrail-m bigscience-bloom-rail-1.0 gemma llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
        "grok2-community other",
        "non-commercial or research": "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 "
        "cc-by-nc-sa-4.0 h-research intel-research apple-amlr deepfloyd-if-license "
        "fair-noncommercial-research-license",
        "no derivatives": "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0",
        "not stated": UNSTATED,
    }.items()
}
_KIND = {licence: name for name, licences in KINDS.items() for licence in licences}
_RANK = {licence: i for i, licence in enumerate(_KIND)}
_FREE = ("public domain", "permissive")
_NC, _NC_SA = (tuple(f"cc-by-nc-{sa}{v}.0" for v in (2, 3, 4)) for sa in ("", "sa-"))
_GPL = ("gpl-2.0", "gpl-3.0", "agpl-3.0")
# licence → licences under which what is made from it may be passed on together with material that is under them.
_UNDER: dict[str, tuple[str, ...]] = {
    "gpl": _GPL,  # no version named: any may be chosen (GPL-3.0 §14)
    "gpl-3.0": ("agpl-3.0",),  # its §13
    "lgpl": ("lgpl-2.1", "lgpl-3.0", *_GPL),
    "lgpl-2.1": _GPL,  # its §3: the GPL from version 2 on
    "lgpl-3.0": ("gpl-3.0", "agpl-3.0"),
    "mpl-2.0": ("lgpl-2.1", "lgpl-3.0", *_GPL),  # its §1.12 and §3.3
    "epl-1.0": ("epl-2.0",),  # its §7
    "eupl-1.1": ("eupl-1.2", "gpl-2.0", "osl-3.0", "epl-1.0"),  # its appendix
    "eupl-1.2": (*_GPL, "osl-3.0", "epl-1.0", "mpl-2.0", "lgpl-2.1", "lgpl-3.0"),  # its appendix
    "cc-by-sa-3.0": ("cc-by-sa-4.0",),  # its §4(b): a later version
    "cc-by-sa-4.0": ("gpl-3.0",),  # creativecommons.org/compatiblelicenses, 2015
    **{licence: (*_NC[i + 1 :], *_NC_SA) for i, licence in enumerate(_NC)},
    **{licence: _NC_SA[i + 1 :] for i, licence in enumerate(_NC_SA)},
}
_CLASHES = (("apache-2.0", "gpl-2.0"), ("ecl-2.0", "gpl-2.0"))  # gnu.org/licenses/license-list

_SPELT = ("openrail++", "openrail-plus-plus")  # a `license_name` holds a-z, 0-9, "-" and "."

_FIELD = re.compile(r"""["']?license(?:_name|_link)?["']?[ \t]*:""")
# Anchors, aliases, tags and merge keys of YAML, and lists in lists: 2 kB of `[` keep the parser busy for seconds.
_RISKY = re.compile(r"(?:^|[\s\[,])[&*!]|<<|\{|\[[^\]]*\[", re.MULTILINE)
_OWN = re.compile(rf"[a-z0-9][a-z0-9.-]{{0,{MAX_TOKEN - 1}}}")
_LINK = re.compile(r"https?://[\w.~/?=&%#+:-]{1,300}", re.ASCII)


@dataclass(frozen=True)
class Combined:
    """What the sources' licences come to: the card's `license` and, where that is "other", its `license_name`.

    `carried` are the sources' licences that this stands for. Notes say what applies besides; conflicts name what cannot be
    had together, or forbids a merge. All are empty where there are no sources.
    """

    licence: str = ""
    name: str = ""
    carried: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()

    @property
    def token(self) -> str:
        """The licence as a source of another merge states it."""
        return self.name or self.licence


def kind(licence: str) -> str:
    """The kind of a licence, one of `KINDS`; a name that the Hub does not list has terms of its own."""
    return _KIND.get(licence, "terms of its own")


def stated(folder: str | Path) -> dict[str, str]:
    """The licence that an adapter's card states, from the YAML at the head of its README.md.

    The card is a stranger's: what is too large, malformed or unusual counts as not stated, and never raises.

    Returns:
        licence: the Hub's identifier, or the name of another one; '' where none is stated. licence_link: where that is
        not one of the Hub's, the address of its text, if the card gives one.
    """
    fields, path = {}, Path(folder) / CARD
    try:
        if path.is_file():  # a pipe would wait for ever
            with path.open("rb") as file:
                fields = _fields(file.read(MAX_CARD).decode("utf-8-sig", "replace"))
    except Exception:  # a stranger's card can be wrong in any way
        fields = {}
    given = fields.get("license")
    tokens = [_token(one) for one in (given if isinstance(given, list) else [given])]
    if tokens == ["other"]:
        tokens = [_token(fields.get("license_name")) or "other"]
    licence = _joined(tokens) if all(tokens) else ""
    link = fields.get("license_link")
    own = licence == "other" or (licence and licence not in _KIND)
    linked = own and isinstance(link, str) and _LINK.fullmatch(link)
    return {"licence": licence, "licence_link": link} if linked else {"licence": licence}


def _fields(text: str) -> dict:
    """The licence fields alone of a card's YAML: parsing more would give a stranger time and memory to spend."""
    if "license" not in text or not text.lstrip().startswith("---"):
        return {}
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, ModelCard

    block = REGEX_YAML_BLOCK.search(text)
    lines, keep = [], False
    for line in re.split(r"\r\n|\r|\n", block.group(2)) if block else ():
        if line[:1] not in ("", " ", "\t", "-", "#"):
            keep = bool(_FIELD.match(line))
        lines += [line] * keep
    fields = "\n".join(lines)
    if not fields or len(fields) > MAX_FIELDS or _RISKY.search(fields):
        return {}
    return ModelCard(f"---\n{fields}\n---\n").data.to_dict()


def _token(value) -> str:
    """A licence as this module writes it, '' for what is none."""
    if not isinstance(value, str) or len(value) > MAX_TOKEN:
        return ""
    token = re.sub(r"[\s_]+", "-", value.strip().lower())
    return token if token in _KIND or _OWN.fullmatch(token) else ""


def _parts(text: str) -> list[str]:
    """The licences in a token; a name that only happens to hold "-and-" stays whole."""
    parts = text.replace(*reversed(_SPELT)).split(JOIN)
    return [_token(part) or UNSTATED for part in (parts if any(part in _KIND for part in parts) else [text])]


def _joined(tokens: list[str]) -> str:
    """Licences that apply at once as one token."""
    if len(tokens) == 1:
        return tokens[0]
    joined = JOIN.join(tokens).replace(*_SPELT)
    return joined if len(joined) <= MAX_TOKEN else f"{len(tokens)}-licences"


def gathered(names: Iterable[str], infos: Iterable[Mapping]) -> dict[str, dict[str, str]]:
    """What a merge keeps in its `info` of its sources' licences: name → licence, and the links of those not the Hub's.

    A source that is itself a merge has the licence that its own sources come to.
    """
    licences, links = {}, {}
    for name, info in zip(names, infos, strict=False):
        licences[name] = info.get("licence", "")
        if "licence" not in info and info.get("sources"):
            licences[name] = of_sources(info).token
        if link := info.get("licence_link"):
            links.setdefault(licences[name], link)
        links |= {licence: link for licence, link in info.get("licence_links", {}).items() if licence not in links}
    return {"licences": licences} | ({"licence_links": links} if links else {})


def of_sources(info: Mapping) -> Combined:
    """`combined` over the sources in an `info`; those of weight 0 do not count."""
    licences = info.get("licences", {})
    return combined({name: licences.get(name, "") for name, weight in info.get("sources", {}).items() if weight})


def combined(licences: Mapping[str, str]) -> Combined:
    """What the licences of a merge's sources come to.

    The strictest is carried over. Where one may be passed on under another (`gpl-3.0` under `agpl-3.0`), that other one
    stands for both; where several apply at once, the card's licence is "other" and its name lists them.

    Args:
        licences: source → what it states, '' for nothing.
    """
    holders: dict[str, list[str]] = {}
    for source, text in licences.items():
        for part in _parts(text):
            holders.setdefault(part, []).append(source)
    found = sorted(holders, key=_strictness)
    binding = [one for one in found if kind(one) not in (*_FREE, "not stated")]
    covered = {one: next((o for o in _UNDER.get(one, ()) if o in binding), "") for one in binding}
    carried = [one for one in binding if not covered[one]]

    def of(licence: str) -> str:
        return f"{licence} ({_some(holders[licence])})"

    conflicts, notes = [], []
    if UNSTATED in holders:
        none = holders[UNSTATED]
        one = len(none) == 1
        conflicts.append(
            f"{_some(none)} {'states' if one else 'state'} no licence: all rights are reserved until "
            f"{'its author says' if one else 'their authors say'} otherwise"
        )
    conflicts += [
        f"{of(one)} forbids to share what is made from it, a merge included"
        for one in carried
        if kind(one) == "no derivatives"
    ]
    open_ones = [one for one in carried if kind(one) != "no derivatives"]
    for i, one in enumerate(open_ones):
        for other in open_ones[i + 1 :]:
            if _copyleft(one) and _copyleft(other):
                conflicts.append(
                    f"{of(one)} and {of(other)} each ask that what is made from them be passed on under their own terms"
                )
            elif _copyleft(one) or _copyleft(other):
                first, second = (one, other) if _copyleft(one) else (other, one)
                conflicts.append(
                    f"{of(first)} asks that what is made from it be passed on under it, without further restrictions; "
                    f"{of(second)} has such ({kind(second)})"
                )
    conflicts += [
        f"{of(strict)} allows no further restrictions, and {of(free)} has such"
        for free, strict in _CLASHES
        if free in holders and strict in carried
    ]
    notes += [f"{of(one)} may be passed on under {other}" for one, other in covered.items() if other]
    notes += [f"{of(one)}: its terms are its own; read them" for one in carried if kind(one) == "terms of its own"]
    credit = [of(one) for one in found if kind(one) == "permissive"]
    if credit:
        notes.append(
            f"what {', '.join(credit)} {'asks' if len(credit) == 1 else 'ask'} for (notices, credit) stays due"
        )
    carried = [UNSTATED, *carried] if UNSTATED in holders else carried or found[-1:]
    token = UNSTATED if UNSTATED in holders else _joined(carried)
    listed = not token or token in _KIND
    return Combined(
        token if listed else "other", "" if listed else token, tuple(carried), tuple(notes), tuple(conflicts)
    )


def _strictness(licence: str) -> tuple[int, str]:
    return _RANK.get(licence, _RANK["other"]), licence


def _copyleft(licence: str) -> bool:
    return "copyleft" in kind(licence) or kind(licence) == "share-alike" or licence in _NC_SA


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
