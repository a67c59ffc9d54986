"""Other people's adapters on the Hugging Face Hub: which there are for a base, and their files, verified.

The endpoint is read from HF_ENDPOINT at every call. Only a configuration, safetensors weights and a card are ever
fetched; a configuration that is refused spares the weights.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from workbench.adapters import CONFIG, WEIGHTS
from workbench.errors import AdapterError, BaseError
from workbench.rules import MAX_CONFIG, MAX_WEIGHTS
from workbench.screen import Verdict, base_shapes, printable, screen

__all__ = ["Repo", "discover", "fetch", "open_all"]

FILES = (CONFIG, WEIGHTS, "README.md")
TRIES, PAUSE = 3, 1.0  # recycling study: three tries a download; seconds before the second, doubled before the third
_LIMITS = {CONFIG: MAX_CONFIG, WEIGHTS: MAX_WEIGHTS, "README.md": MAX_CONFIG}


@dataclass(frozen=True)
class Repo:
    """An adapter's repository as the Hub lists it."""

    id: str
    revision: str | None = None
    gated: bool = False
    downloads: int = 0
    likes: int = 0


class Refused(AdapterError):
    """A repository that cannot be had, with the name of the rule in `screen.REMOTE` (or `screen.RULES`)."""

    def __init__(self, rule: str, message: str):
        super().__init__(message)
        self.rule = rule


def discover(base_id: str, limit: int | None = None) -> list[Repo]:
    """The repositories that the Hub lists as adapters of a base, sorted by id; `limit` keeps the most downloaded.

    Raises:
        AdapterError: the Hub cannot be reached, or refuses.
    """
    try:
        listed = hub_api().list_models(filter=f"base_model:adapter:{base_id}", sort="downloads", limit=limit, full=True)
        found = list(listed)  # the client itself tries several times
    except Exception as error:
        raise AdapterError(f"the adapters of {base_id} could not be listed on the Hub: {said(error)}") from error
    repos = {m.id: Repo(m.id, getattr(m, "sha", None), bool(m.gated), m.downloads or 0, m.likes or 0) for m in found}
    return [repos[key] for key in sorted(repos)]


def fetch(
    repo_id: str,
    revision: str | None = None,
    *,
    cache: str | Path | None = None,
    files: Sequence[str] = FILES,
) -> Path:
    """Fetch an adapter's files and return the folder they lie in, in the Hub client's cache.

    Sizes are judged before anything is downloaded. The client accepts whatever the server sends, so the sha256 that the
    Hub states for large files is verified here; a file that fails is removed and fetched once more.

    Raises:
        AdapterError: no such repository or revision, a gated one, no safetensors weights, too large a file, or one
            whose content is not what the Hub states.
    """
    info = _ask(repo_id, lambda: hub_api().model_info(repo_id, revision=revision, files_metadata=True))
    listed = {entry.rfilename: entry for entry in info.siblings or ()}
    pickles = sorted(name for name in listed if "/" not in name and name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if CONFIG not in listed:
        raise Refused("config-file", f"{repo_id}: no {CONFIG} in the repository")
    if WEIGHTS not in listed and pickles:
        raise Refused("pickle", f"{repo_id}: its weights are a pickle ({pickles[0]}), which can run code")
    if WEIGHTS not in listed:
        raise Refused("weights-file", f"{repo_id}: no {WEIGHTS} in the repository")
    for name in files:
        if name in listed and (listed[name].size or 0) > _LIMITS[name]:
            rule = "weights-file" if name == WEIGHTS else "config-json" if name == CONFIG else "fetch"
            raise Refused(
                rule, f"{repo_id}: {name} has {listed[name].size:,} bytes, expected at most {_LIMITS[name]:,}"
            )
    folder = Path()
    for name in files:
        if name in listed:
            lfs = listed[name].lfs
            folder = _fetch_file(repo_id, name, info.sha, lfs.sha256 if lfs else None, cache).parent
    return folder


def _fetch_file(repo_id: str, name: str, revision: str, sha256: str | None, cache) -> Path:
    from huggingface_hub import hf_hub_download

    for attempt in range(2):
        download = partial(
            hf_hub_download,
            repo_id,
            name,
            revision=revision,
            cache_dir=cache,
            endpoint=_endpoint(),
            tqdm_class=_quiet(),
        )
        path = Path(_ask(repo_id, partial(download, force_download=attempt > 0)))
        if sha256 is None or _sha256(path) == sha256:
            return path
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    raise Refused("checksum", f"{repo_id}: {name} is damaged: its sha256 is not the {sha256[:12]}… that the Hub states")


def open_all(
    base_id: str, *, base: str | Path | None = None, cache: str | Path | None = None, rules: Sequence[str] | None = None
) -> tuple[list[Verdict], dict[str, Path], dict[str, tuple[int, int]] | None]:
    """Discover, fetch and screen every adapter of a base; what fails is a refused row and stops nothing.

    The configurations' own base names are not compared (they are often a quantised copy or someone's folder): what an
    adapter is of, its card says, and its shapes show.

    Returns:
        Verdicts, name → folder, and the base's layers (None where they could not be had).

    Raises:
        AdapterError: the Hub cannot be reached, or lists no adapter of this base.
    """
    repos = discover(base_id)
    if not repos:
        raise AdapterError(
            f"the Hub lists no adapter of {base_id!r}; expected the id of a base model, such as org/name"
        )
    shapes = _shapes(base_id, base, cache)
    folders: dict[str, Path] = {}

    def judge(repo: Repo) -> Verdict:
        def screened(folder: Path, until: str) -> Verdict:
            return screen(folder, shapes, None, rules, name=repo.id, until=until)

        try:
            verdict = screened(fetch(repo.id, repo.revision, cache=cache, files=(CONFIG,)), "config")
            if verdict.accepted:
                folders[repo.id] = fetch(repo.id, repo.revision, cache=cache)
                verdict = screened(folders[repo.id], "values")
        except Refused as error:
            return Verdict(repo.id, False, error.rule, printable(str(error).removeprefix(f"{repo.id}: ")), {})
        return replace(verdict, adapter=None)  # a thousand of them need not fit into memory

    with ThreadPoolExecutor(8) as executor:
        return list(executor.map(judge, repos)), folders, shapes


def _shapes(base_id: str, base, cache) -> dict[str, tuple[int, int]] | None:
    """The base's layer shapes, from a folder given or the Hub's configuration; None where neither can be had."""
    if base is not None:
        return base_shapes(str(base))
    from huggingface_hub import hf_hub_download

    try:
        path = _ask(
            base_id,
            lambda: hf_hub_download(base_id, "config.json", cache_dir=cache, endpoint=_endpoint(), tqdm_class=_quiet()),
        )
        return base_shapes(str(Path(path).parent))
    except (Refused, BaseError):
        return None


def hub_api(token: str | None = None):
    """The Hub's client, at the endpoint of the moment; without a token it takes the one stored on this machine."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint(), token=token)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _quiet():
    """A progress bar that does not show: a pool has hundreds of files."""
    from huggingface_hub.utils import tqdm

    return partial(tqdm, disable=True)


def _ask(repo_id: str, call: Callable):
    """The answer of a call about one repository, its failures turned into `Refused`."""
    from huggingface_hub.errors import GatedRepoError

    try:
        return patiently(call)
    except GatedRepoError as error:
        raise Refused("gated", f"{repo_id}: access has to be granted by its author on the Hub") from error
    except Exception as error:  # whatever the client raises for one repository must not stop the others
        raise Refused("fetch", f"{repo_id}: {said(error)}") from error


def patiently(call: Callable):
    """Call, and again after a pause where the server was overloaded or could not be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__bases__[0]  # the root of the errors of the client's HTTP library: httpx, now httpx2
    for attempt in range(TRIES):
        try:
            return call()
        except http_error as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if attempt + 1 == TRIES or (status is not None and status < 500 and status != 429):
                raise
            time.sleep(PAUSE * 2**attempt)


def said(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
