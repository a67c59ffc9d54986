"""A Hub on this machine: serves a folder of repositories (author/name/files) to the real client, over HTTP.

with HubServer(folder) as hub:
    hub.url                                     # for HF_ENDPOINT
    hub.trouble["author/name"] = "gated"        # or "corrupt", "corrupt-once", "busy-once", "gone"
    hub.requests                                # what was asked: "GET /author/name/resolve/…"
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

LFS_FROM = 4096  # files of this size and larger have an LFS entry, as on the Hub (weights do, configurations do not)


class HubServer:
    """Every repository is an adapter of `base` unless `bases` says otherwise; listings come `page` at a time."""

    def __init__(self, folder: Path, base: str = "org/base", page: int = 3):
        self.folder, self.base, self.page = Path(folder), base, page
        self.bases: dict[str, str] = {}
        self.trouble: dict[str, str] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def repos(self) -> list[str]:
        """Ids, in an order that is not the alphabet's."""
        found = [path.relative_to(self.folder).as_posix() for path in self.folder.glob("*/*") if path.is_dir()]
        return sorted(found, key=lambda repo: hashlib.sha256(repo.encode()).hexdigest())

    def files(self, repo: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.folder / repo).iterdir()) if path.is_file()}

    def commit(self, repo: str) -> str:
        """A repository's one commit, a hash of its content."""
        total = hashlib.sha1(repo.encode())
        for name, data in self.files(repo).items():
            total.update(name.encode() + data)
        return total.hexdigest()

    def info(self, repo: str) -> dict:
        """What `/api/models/{repo}` says."""
        siblings = []
        for name, data in self.files(repo).items():
            entry = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if len(data) >= LFS_FROM:
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
            siblings.append(entry)
        base = self.bases.get(repo, self.base)
        return {
            "id": repo,
            "modelId": repo,
            "sha": self.commit(repo),
            "private": False,
            "gated": "manual" if self.trouble.get(repo) == "gated" else False,
            "downloads": len(repo),
            "likes": 0,
            "tags": ["peft", f"base_model:adapter:{base}"],
            "siblings": siblings,
        }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self._api(parts[2:], parse_qs(url.query))
        elif len(parts) == 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[4], body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _api(self, parts: list[str], query: dict[str, list[str]]) -> None:
        if not parts:
            self._listing(query)
            return
        repo = "/".join(parts[:2])
        if repo not in self.hub.repos() or self.hub.trouble.get(repo) == "gone":
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif self.hub.trouble.get(repo) == "busy-once":
            del self.hub.trouble[repo]
            self._send(503, b"{}")
        else:
            self._json(self.hub.info(repo))

    def _listing(self, query: dict[str, list[str]]) -> None:
        wanted = query.get("filter", [])
        infos = [info for info in map(self.hub.info, self.hub.repos()) if set(wanted) <= set(info["tags"])]
        start = int(query.get("cursor", ["0"])[0])
        size = min(self.hub.page, int(query.get("limit", ["1000"])[0]))
        headers = {}
        if start + size < len(infos):
            following = urlencode({**query, "cursor": start + size}, doseq=True)
            headers["Link"] = f'<{self.hub.url}/api/models?{following}>; rel="next"'
        self._json(infos[start : start + size], headers)

    def _file(self, repo: str, name: str, body: bool) -> None:
        trouble = self.hub.trouble.get(repo)
        files = self.hub.files(repo) if repo in self.hub.repos() else {}
        if trouble == "gated":
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif name not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if files else "RepoNotFound"})
        else:
            data = files[name]
            etag = hashlib.sha256(data).hexdigest()
            if body and trouble in ("corrupt", "corrupt-once") and len(data) >= LFS_FROM:
                data = data[:-1] + bytes([data[-1] ^ 1])  # the same size, another value
                if trouble == "corrupt-once":
                    del self.hub.trouble[repo]
            headers = {"X-Repo-Commit": self.hub.commit(repo), "ETag": f'"{etag}"', "Accept-Ranges": "none"}
            self._send(200, data, headers, body=body)

    def _json(self, value, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, body: bool = True) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)
