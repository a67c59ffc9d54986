"""Which adapters the Hub lists for a base model, its re-uploads and its quantised forms, and what their cards say."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from workbench.card import printable
from workbench.errors import AdapterError
from workbench.hub.client import LONGEST, Patience, hub_api, retry_after, said

__all__ = ["ALIASES", "Repo", "discover", "discovered", "names_of", "remember"]

# Other names of the same weights: a base's former name, and re-uploads by others.
ALIASES = {
    "meta-llama/Llama-3.1-8B-Instruct": (
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "unsloth/Meta-Llama-3.1-8B-Instruct",
        "NousResearch/Meta-Llama-3.1-8B-Instruct",
    ),
    "meta-llama/Llama-3.1-8B": (
        "meta-llama/Meta-Llama-3.1-8B",
        "unsloth/Meta-Llama-3.1-8B",
        "NousResearch/Meta-Llama-3.1-8B",
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        "unsloth/llama-3-8b-Instruct",
        "NousResearch/Meta-Llama-3-8B-Instruct",
    ),
    "meta-llama/Meta-Llama-3-8B": ("unsloth/llama-3-8b", "NousResearch/Meta-Llama-3-8B"),
}
QUANTISED = ("-bnb-4bit", "-unsloth-bnb-4bit")  # how re-uploads of 4-bit weights are named


@dataclass(frozen=True)
class Repo:
    """An adapter's repository as the Hub lists it; `base` is the name of the base that it is listed under.

    `revision` is the commit, `files` the names of its files, `created` and `modified` are ISO dates.
    """

    id: str
    revision: str | None = None
    base: str = ""
    author: str = ""
    created: str = ""
    modified: str = ""
    downloads: int = 0
    likes: int = 0
    licence: str = ""
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    gated: bool = False
    files: tuple[str, ...] = ()

    @property
    def facts(self) -> dict:
        """The columns of a pool's table that the card tells."""
        told = {key: printable(getattr(self, key)) for key in ("author", "created", "licence")}
        joined = {key: printable(",".join(getattr(self, key))) for key in ("datasets", "tags")}
        return told | joined | {"downloads": self.downloads, "likes": self.likes}


def names_of(base_id: str, aliases: Sequence[str] = (), quantised: bool = False) -> list[str]:
    """A base's own name first, then all others that its adapters may be listed under."""
    plain = dict.fromkeys((base_id, *aliases, *ALIASES.get(base_id, ())))
    if not quantised:
        return list(plain)
    stems = dict.fromkeys((*plain, f"unsloth/{base_id.rsplit('/', 1)[-1]}"))
    return list(dict.fromkeys((*plain, *(stem + ending for stem in stems for ending in QUANTISED))))


def discover(
    base_id: str, *, aliases: Sequence[str] = (), quantised: bool = False, limit: int | None = None
) -> list[Repo]:
    """The repositories that the Hub lists as adapters of a base, sorted by id, each once.

    Args:
        aliases: further names of the same weights, beside those in `ALIASES`.
        quantised: also what is listed under the 4-bit forms of any of the names.
        limit: keeps the most downloaded.

    Raises:
        AdapterError: the Hub cannot be reached, or refuses.
    """
    found: dict[str, Repo] = {}
    for name in names_of(base_id, aliases, quantised):
        for repo in _listed(name, limit):
            found.setdefault(repo.id, repo)
    return _most_downloaded(found.values(), limit)


def _most_downloaded(repos: Iterable[Repo], limit: int | None) -> list[Repo]:
    return sorted(sorted(repos, key=lambda r: (-r.downloads, r.id))[:limit], key=lambda r: r.id)


def _listed(base_id: str, limit: int | None) -> list[Repo]:
    """What is listed under one name. The client follows the pages and asks for each several times, as it is told to wait
    in seconds; where it was told so by a date, the whole is asked for once more."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    patience = Patience()
    for last in (False, True):
        try:
            patience.wait()
            listed = hub_api().list_models(
                filter=f"base_model:adapter:{base_id}", sort="downloads", limit=limit, full=True
            )
            return [_repo(model, base_id) for model in listed]
        except OfflineModeIsEnabled as error:
            raise AdapterError(f"the adapters of {base_id} cannot be listed offline; unset HF_HUB_OFFLINE") from error
        except Exception as error:
            asked = retry_after(error)
            if last or asked is None or asked > LONGEST:
                raise AdapterError(
                    f"the adapters of {base_id} could not be listed on the Hub: {said(error)}"
                ) from error
            patience.close(asked)
    raise AssertionError("not reached")


def _repo(model, base_id: str) -> Repo:
    tags = tuple(str(tag) for tag in model.tags or ())

    def tagged(kind: str) -> tuple[str, ...]:
        return tuple(tag.removeprefix(kind) for tag in tags if tag.startswith(kind))

    return Repo(
        id=str(model.id),
        revision=model.sha,
        base=base_id,
        author=str(model.author or model.id.partition("/")[0]),
        created=model.created_at.date().isoformat() if model.created_at else "",
        modified=model.last_modified.date().isoformat() if model.last_modified else "",
        downloads=int(model.downloads or 0),
        likes=int(model.likes or 0),
        licence=next(iter(tagged("license:")), ""),
        tags=tags,
        datasets=tagged("dataset:"),
        gated=bool(model.gated),
        files=tuple(str(entry.rfilename) for entry in model.siblings or ()),
    )


def remember(path: Path, repos: Iterable[Repo], names: Iterable[str], whole: bool) -> None:
    """Keep what was listed under these names, for when the Hub is not asked; `whole` replaces what was known of them."""
    names = set(names)
    known = {r.id: r for r in _remembered(path) if not (whole and r.base in names)} | {r.id: r for r in repos}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    fresh.write_text(json.dumps([asdict(repo) for repo in known.values()]), encoding="ascii")
    fresh.replace(path)


def discovered(path: Path, names: Iterable[str], limit: int | None) -> list[Repo]:
    """What `discover` found the last time, under these names."""
    names = set(names)
    return _most_downloaded((repo for repo in _remembered(path) if repo.base in names), limit)


def _remembered(path: Path) -> list[Repo]:
    try:
        rows = json.loads(path.read_text(encoding="ascii"))
        return [Repo(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}) for row in rows]
    except (OSError, ValueError, TypeError, AttributeError):
        return []  # nothing was kept, or not in this form
