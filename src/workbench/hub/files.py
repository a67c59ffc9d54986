"""An adapter's files, verified, in the Hub client's own cache, where transformers and peft find them too.

The client's `hf_hub_download` (huggingface_hub 2.4) would do but for four things: what it has of a file is thrown away
when it breaks off, a GET answered by a 5xx is not tried again, the content is not compared with its hash, and a file may
be of any size. So the bytes are fetched here, and put where the client would: blobs, snapshots, refs, under its lock.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from workbench.hub.client import Broken, Interrupted, Patience, ask, endpoint, hub_api, offline, patiently, stream
from workbench.plain import CONFIG, WEIGHTS, show
from workbench.rules import MAX_CONFIG, MAX_WEIGHTS
from workbench.screen import Refused

__all__ = ["CARD", "Snapshot", "about", "address", "download", "fetch"]

CARD = "README.md"
LIMITS = {CONFIG: MAX_CONFIG, WEIGHTS: MAX_WEIGHTS, CARD: MAX_CONFIG}  # bytes
_ETAG = re.compile(r"[0-9A-Za-z][\w.-]{0,127}", re.ASCII)


class Snapshot:
    """Where the files of one repository at one commit lie in the Hub client's cache; nothing outside it is named.

    Raises:
        Refused: the id or the commit is none.
    """

    def __init__(self, repo_id: str, revision: str | None, cache: str | Path | None = None):
        from huggingface_hub import constants
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.file_download import repo_folder_name

        self.id, self.revision = repo_id, revision or ""
        root = Path(constants.HF_HUB_CACHE if cache is None else cache).expanduser()
        try:
            name = repo_folder_name(repo_id=repo_id, repo_type="model")
        except HFValidationError as error:
            raise Refused("fetch", f"{show(repo_id)} is no id of a repository on the Hub") from error
        if not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise Refused("fetch", f"{repo_id}: {show(revision)} is no commit")
        self.home, self.locks = root / name, root / ".locks" / name
        self.folder = self.home / "snapshots" / self.revision

    def blob(self, etag: str) -> Path:
        """The file of a content."""
        return self.home / "blobs" / etag

    @contextmanager
    def lock(self, etag: str, patience: Patience) -> Iterator[None]:
        """One thread of one process at a time; the system frees the lock of a process that dies."""
        from filelock import Timeout
        from huggingface_hub.utils import WeakFileLock

        self.locks.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(WeakFileLock(self.locks / f"{etag}.lock", timeout=1.0))
                    break
                except Timeout:
                    patience.wait()
            yield

    def link(self, name: str, blob: Path) -> None:
        """Have the snapshot's file be that content: a relative link, or a copy where there are none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / f".{name}.{uuid.uuid4().hex[:8]}"
        try:
            fresh.symlink_to(os.path.relpath(blob, self.folder))
        except OSError:
            shutil.copyfile(blob, fresh)
        fresh.replace(self.folder / name)

    def refer(self, ref: str = "main") -> None:
        """Note that this commit is the one that a branch or tag means."""
        path = self.home / "refs" / ref
        if not (path.is_file() and path.read_text() == self.revision):
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{ref}.{uuid.uuid4().hex[:8]}")
            fresh.write_text(self.revision)
            fresh.replace(path)

    def holds(self, name: str) -> bool:
        """Whether the file is there, and is what its blob's name says where that is a hash."""
        path = self.folder / name
        if not path.is_file():
            return False
        return _intact(path, Path(os.readlink(path)).name if path.is_symlink() else "")


def fetch(repo_id: str, revision: str | None = None, *, cache: str | Path | None = None) -> Path:
    """Fetch an adapter's files and return the folder they lie in, in the Hub client's cache.

    What is there is verified and not fetched again, and what was begun is continued.

    Raises:
        AdapterError: no such repository or revision, a gated one, no safetensors weights, too large a file, or one
            whose content is not what the Hub states.
    """
    if offline():
        return _cached(repo_id, revision, cache)
    info = ask(repo_id, lambda: hub_api().model_info(repo_id, revision=revision))
    held, listed = Snapshot(repo_id, info.sha, cache), {entry.rfilename for entry in info.siblings or ()}
    pickles = sorted(name for name in listed if "/" not in name and name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if CONFIG not in listed:
        raise Refused("config-file", f"{repo_id}: no {CONFIG} in the repository")
    if WEIGHTS not in listed:
        if pickles:
            raise Refused("pickle", f"{repo_id}: its weights are a pickle ({pickles[0]}), which can run code")
        raise Refused("weights-file", f"{repo_id}: no {WEIGHTS} in the repository")
    bring(held, CARD in listed)
    if revision is None or _ETAG.fullmatch(revision):
        held.refer(revision or "main")
    return held.folder


def _cached(repo_id: str, revision: str | None, cache) -> Path:
    from huggingface_hub import hf_hub_download

    def find(name: str) -> Path:
        return Path(hf_hub_download(repo_id, name, revision=revision, cache_dir=cache, local_files_only=True))

    ask(repo_id, lambda: find(WEIGHTS))
    return ask(repo_id, lambda: find(CONFIG)).parent


def bring(held: Snapshot, card: bool, patience: Patience = patiently, told: Callable[[int], None] = lambda n: None):
    """Have configuration, weights and, where there is one, the card in a snapshot; a card beyond all measure is left."""
    download(held, CONFIG, patience=patience)
    if card:
        stated = None if held.holds(CARD) else about(held, CARD, patience)
        if stated is None or stated.size <= LIMITS[CARD]:
            download(held, CARD, stated, patience=patience)
    download(held, WEIGHTS, patience=patience, told=told)


def address(held: Snapshot, name: str) -> str:
    """Where a file is asked for."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(held.id, name, revision=held.revision, endpoint=endpoint())


def about(held: Snapshot, name: str, patience: Patience = patiently):
    """What the Hub states of a file: `size`, `etag` (the sha256 of large files, git's hash of others), `location`."""
    from huggingface_hub import get_hf_file_metadata

    def state():
        stated = get_hf_file_metadata(address(held, name), endpoint=endpoint())
        if stated.size is None or not _ETAG.fullmatch(stated.etag or ""):
            raise Broken(f"the Hub states no size or no hash of {name} ({show(stated.etag)})")
        return stated

    return ask(held.id, state, patience)


def download(
    held: Snapshot,
    name: str,
    stated=None,
    *,
    patience: Patience = patiently,
    told: Callable[[int], None] = lambda n: None,
) -> Path:
    """Have one file in the cache, verified, and return where it lies; what is there already is not fetched.

    Args:
        stated: what `about` said of it, where it was asked.
        told: is called with the number of bytes each time that some have arrived.

    Raises:
        Refused: it cannot be had, is too large, or is not what the Hub states, twice.
    """
    if held.holds(name):
        return held.folder / name
    for _ in range(2):
        stated = stated or about(held, name, patience)
        if stated.size > LIMITS[name]:
            rule = {WEIGHTS: "weights-file", CONFIG: "config-json"}.get(name, "fetch")
            raise Refused(rule, f"{held.id}: {name} has {stated.size:,} bytes, expected at most {LIMITS[name]:,}")
        blob = held.blob(stated.etag)
        with held.lock(stated.etag, patience):
            if (blob.is_file() and _intact(blob, stated.etag)) or _complete(held, name, stated, blob, patience, told):
                held.link(name, blob)
                return held.folder / name
        etag, stated = stated.etag, None  # and so it is asked for once more
    kind = "sha256" if len(etag) == 64 else "hash"
    raise Refused("checksum", f"{held.id}: {name} is damaged: its {kind} is not the {etag[:12]}… that the Hub states")


def _complete(held: Snapshot, name: str, stated, blob: Path, patience: Patience, told) -> bool:
    """Fetch what is missing of a blob; False where it turns out to be damaged, and nothing of it is kept."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    part, url = blob.with_name(f"{stated.etag}.incomplete"), address(held, name)
    ask(held.id, lambda: _go_on(url, part, stated, patience, told), patience, lambda: _size(part))
    if _intact(part, stated.etag):
        part.replace(blob)
        return True
    told(-_size(part))
    part.unlink()
    return False


def _go_on(url: str, part: Path, stated, patience: Patience, told) -> None:
    """Continue a file where it broke off, once. Bytes go to their own place, so that even where the system's locks do not
    work two processes write the same."""
    from huggingface_hub.errors import HfHubHTTPError

    have = _size(part)
    if have and (have > stated.size or not _verifiable(stated.etag)):
        part.unlink()
        have = 0
    if have == stated.size and part.is_file():
        return
    wanted = {"Range": f"bytes={have}-"} if have else {}
    if have and urlsplit(stated.location)[:2] == urlsplit(url)[:2]:  # elsewhere a file has another ETag
        wanted["If-Range"] = f'"{stated.etag}"'
    try:
        with stream(url, wanted) as response, part.open("r+b" if part.is_file() else "w+b") as file:
            start = begins(response, have, stated.size)
            told(start - have)
            file.seek(start)
            file.truncate()
            for chunk in response.iter_bytes():
                if patience.stopped.is_set():
                    raise Interrupted
                if file.tell() + len(chunk) > stated.size:
                    raise Broken(f"more came than the {stated.size:,} bytes that the Hub states")
                file.write(chunk)
                told(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    except HfHubHTTPError as error:
        if have and error.response.status_code == 416:  # what is there is not the beginning of it
            part.unlink()
            raise Broken("the server has no such part of the file") from error
        raise
    if _size(part) < stated.size:
        raise Broken(f"{_size(part):,} of {stated.size:,} bytes came")


def begins(response, wanted: int, size: int) -> int:
    """At which byte of the file the body of a response begins; 0 where the server does not know ranges.

    Raises:
        Broken: elsewhere than was asked for, or in another file.
    """
    if response.status_code != 206:
        return 0
    said = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", said)
    if not match or int(match[1]) != wanted or match[2] not in ("*", str(size)):
        raise Broken(f"bytes from {wanted:,} of {size:,} were asked for, and {show(said)} came")
    return wanted


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _verifiable(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", etag) is not None


def _intact(path: Path, etag: str) -> bool:
    """Whether a file's content is the one of an ETag: its sha256, or git's hash of a blob; True of any other kind."""
    if not _verifiable(etag):
        return True
    with path.open("rb") as file:
        if len(etag) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest() == etag
        begun = hashlib.sha1(b"blob %d\0" % _size(path))
        return hashlib.file_digest(file, begun.copy).hexdigest() == etag
