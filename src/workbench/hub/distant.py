"""An adapter on the Hub as a candidate for screening: of its weights' file only the header is read."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from workbench.errors import AdapterError
from workbench.header import header_length, parse_header
from workbench.hub.client import Broken, Patience, ask, patiently, stream
from workbench.hub.files import Snapshot, about, address, begins, download
from workbench.hub.listing import Repo
from workbench.plain import CONFIG, WEIGHTS
from workbench.screen import Candidate, Refused

__all__ = ["Distant"]

FIRST = 2**17  # bytes asked for at once: most headers fit in (448 tensors of an 8B Llama: 60 kB)


class Distant(Candidate):
    """An adapter as the Hub lists it. Configuration and header are fetched when a rule first asks for them.

    Raises (also on reading):
        Refused: it cannot be had.
    """

    def __init__(self, repo: Repo, cache: str | Path | None = None, shapes=None, patience: Patience = patiently):
        self.repo, self.patience = repo, patience
        self.held = Snapshot(repo.id, repo.revision, cache)
        super().__init__(self.held.folder, repo.id, shapes)
        self._stated: dict = {}

    @property
    def here(self) -> bool:  # type: ignore[override]
        """Whether its weights are in the cache."""
        return (self.folder / WEIGHTS).is_file()

    @cached_property
    def files(self) -> frozenset[str]:
        """Names of the files at the top of the repository."""
        return frozenset(name for name in self.repo.files if "/" not in name)

    def size(self, name: str) -> int:
        """A file's size in bytes, from the cache or the Hub."""
        return super().size(name) if (self.folder / name).is_file() else self.stated(name).size

    def stated(self, name: str):
        """What the Hub states of a file (`files.about`)."""
        if name not in self._stated:
            self._stated[name] = self._had(about, self.held, name, self.patience)
        return self._stated[name]

    def _had(self, call, *given, **options):
        """What a call brings, or a note that the adapter cannot be had."""
        try:
            return call(*given, **options)
        except Refused as error:
            self.refusal = error
            raise

    @cached_property
    def config(self) -> dict:
        """The parsed `adapter_config.json`."""
        self._had(download, self.held, CONFIG, self._stated.get(CONFIG), patience=self.patience)
        return Candidate.config.func(self)

    @cached_property
    def header(self) -> dict[str, dict]:
        """Tensor name → dtype, shape, data_offsets; what looks damaged is asked for once more."""
        if self.here:
            return Candidate.header.func(self)
        try:
            return self._distant_header()
        except Refused:
            raise
        except AdapterError:
            return self._distant_header()

    def _distant_header(self) -> dict[str, dict]:
        size, read = self.size(WEIGHTS), bytearray()
        self._read(read, min(FIRST, size))
        length = header_length(bytes(read[:8]), size, WEIGHTS)  # which bounds it, before anything is made room for
        self._read(read, 8 + length)
        return parse_header(bytes(read[8 : 8 + length]), size, WEIGHTS)

    def _read(self, read: bytearray, count: int) -> None:
        """Read on until the first `count` bytes of the weights' file are there, and no further."""
        if len(read) < count:
            self._had(ask, self.name, lambda: self._once(read, count), self.patience)

    def _once(self, read: bytearray, count: int) -> None:
        with stream(address(self.held, WEIGHTS), {"Range": f"bytes={len(read)}-{count - 1}"}) as response:
            del read[begins(response, len(read), self.size(WEIGHTS)) :]
            for chunk in response.iter_bytes():
                read += chunk[: count - len(read)]
                if len(read) == count:
                    return
        raise Broken(f"{len(read):,} of {count:,} bytes came")
