"""Talking to the Hub: through its own client, patiently, and with every failure said in words that tell what to do.

The client is used wherever it does the job. What it does not do (huggingface_hub 2.4): it raises at once where a GET or
a question about a repository is answered by a 5xx, lets each thread find out for itself that the Hub is overloaded, and
does not know a Retry-After that is a date.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event, Lock

from workbench.screen import Refused

__all__ = ["Broken", "Interrupted", "Patience", "ask", "endpoint", "hub_api", "offline", "patiently", "said", "stream"]

TRIES, PAUSE = 5, 1.0  # tries of one request; seconds before the second, doubled before each that follows
LONGEST = 900.0  # seconds; a Hub that asks for more patience is taken at its word, and given up
STEP = 2**20  # bytes; a download that has moved on by so much since it last broke off has its tries back


class Interrupted(Exception):
    """Another thread has given up, so this one does."""


class Broken(Exception):
    """An answer that is not whole, or is another than the one asked for; asking again may help."""


class Patience:
    """Calls, and calls again after a pause where the server was overloaded or could not be reached.

    A pause that the server asks for (Retry-After) is kept by every thread that shares the object; `stopped` set wakes
    them all, and ends their calls with `Interrupted`. `offline`: nothing is asked at all.
    """

    def __init__(self, offline: bool = False):
        self.stopped, self.offline = Event(), offline
        self._lock, self._open = Lock(), 0.0

    def __call__(self, call: Callable, moved: Callable[[], int] = lambda: 0):
        """The call's answer. `moved`: how far a call that goes on where it broke off has got, in bytes."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        if self.offline:
            raise OfflineModeIsEnabled("nothing is asked of the Hub")
        again, tries, reached = (_http_error(), Broken), 0, moved()
        while True:
            self.wait()
            try:
                return call()
            except again as error:
                tries = 0 if moved() >= reached + STEP else tries
                reached, tries = max(reached, moved()), tries + 1
                asked = retry_after(error)
                if tries >= TRIES or not _passing(error) or (asked or 0) > LONGEST:
                    raise
            if asked is not None:
                self.close(asked)
            else:
                self._sleep(PAUSE * 2 ** (tries - 1) * random.uniform(0.75, 1.25))

    def close(self, seconds: float) -> None:
        """Let no thread ask anything for so long."""
        with self._lock:
            self._open = max(self._open, time.monotonic() + seconds)

    def wait(self) -> None:
        """Return when asking is allowed."""
        while (left := self._open - time.monotonic()) > 0:
            self._sleep(left)
        if self.stopped.is_set():
            raise Interrupted

    def _sleep(self, seconds: float) -> None:
        if self.stopped.wait(seconds):
            raise Interrupted


patiently = Patience()


def _http_error() -> type[Exception]:
    """The root of the errors of the client's HTTP library: httpx, now httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _passing(error: Exception) -> bool:
    """Whether it may be gone the next time: no connection, or the server's own trouble."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status >= 500 or status in (408, 429)


def retry_after(error: Exception) -> float | None:
    """The seconds that a server asks to be left alone for, said as a number or a date; None where it does not."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(value)) if value[:1].isdigit() else _until(value)
    except ValueError:
        limits = parse_ratelimit_headers(headers)
        return float(limits.reset_in_seconds) if limits and not limits.remaining else None


def _until(date: str) -> float:
    then = parsedate_to_datetime(date)
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def ask(repo_id: str, call: Callable, patience: Patience = patiently, moved: Callable[[], int] = lambda: 0):
    """The answer of a call about one repository.

    Raises:
        Refused: the call failed, for whatever reason; what fails for one repository must not stop the others.
    """
    from huggingface_hub import errors

    try:
        return patience(call, moved)
    except (Refused, Interrupted):
        raise
    except errors.GatedRepoError as error:
        page = f"{(endpoint() or 'https://huggingface.co').rstrip('/')}/{repo_id}"
        raise Refused(
            "gated",
            f"{repo_id}: access has to be granted by its author; accept the terms at {page}, then run `hf auth login`",
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise Refused("fetch", f"{repo_id}: not in the cache, and the Hub is not asked (offline)") from error
    except errors.EntryNotFoundError as error:
        raise Refused("fetch", f"{repo_id}: the Hub lists a file that it does not have; list it again") from error
    except errors.RevisionNotFoundError as error:
        raise Refused("fetch", f"{repo_id}: the Hub has no such revision any more; list it again") from error
    except errors.RepositoryNotFoundError as error:
        raise Refused(
            "fetch",
            f"{repo_id}: it does not exist any more, or is private: `hf auth login` with an account that may read it",
        ) from error
    except Exception as error:
        raise Refused("fetch", f"{repo_id}: {said(error)}") from error


@contextmanager
def stream(url: str, headers: dict[str, str] | None = None) -> Iterator:
    """A response whose body is still to be read, in the Hub's errors where it failed; redirects are followed.

    The token goes to the Hub alone: the HTTP library drops it where a redirect leads to another host.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    wanted = build_hf_headers() | {"Accept-Encoding": "identity"} | (headers or {})
    waiting = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
    with get_session().stream("GET", url, headers=wanted, **waiting) as response:
        hf_raise_for_status(response)
        yield response


def hub_api(token: str | None = None):
    """The Hub's client, at the endpoint of the moment; without a token it takes the one stored on this machine."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token)


def endpoint() -> str | None:
    """The address of the Hub, None for the client's own."""
    return os.environ.get("HF_ENDPOINT") or None


def offline() -> bool:
    """Whether the client was told to ask nothing of the Hub (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def said(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
