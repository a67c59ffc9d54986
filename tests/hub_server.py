"""A Hub on this machine: serves a folder of repositories (author/name/files) to the real client, over HTTP.

with HubServer(folder) as hub:
    hub.url                                     # for HF_ENDPOINT
    hub.trouble["author/name"] = "gated"        # or "corrupt", "corrupt-once", "busy-once", "gone"
    hub.fail("author/name", "get", "cut")       # one answer of a kind goes wrong in one of the ways in FAULTS
    hub.ranges, hub.elsewhere = False, True     # ranges are ignored; large files lie on another host
    hub.requests                                # what was asked: "GET /author/name/resolve/…"
    hub.log                                     # the same with time, range and the bytes of content that were sent
    hub.writers["hf_secret"] = {"me"}           # a token, and the owners that it may write to; uploads need one
    hub.commits                                 # what was pushed: repository, message, parent, files added and deleted
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

LICENCES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other"""  # those that the Hub accepts, as its own error message lists them
KINDS = ("list", "info", "revision", "tree", "head", "get", "whole")  # whole: a GET, but not of a bounded range
FAULTS = (
    "429",  # with Retry-After, of `after` seconds or at that date
    "416",  # the part asked for is beyond the end
    "500",
    "503",
    "cut",  # the connection, after a third of the body
    "short",  # a third of the body is missing, and Content-Length agrees
    "long",  # more than the whole
    "corrupt",  # another last byte, the same size
    "garbage",  # other content altogether, the same size
    "slow",  # in pieces, with pauses
    "etag",  # another one
    "no-etag",
    "evil-etag",  # a path
    "other-range",  # a part that was not asked for
    "missing",  # 404 for a file that was listed
    "vanished",  # 404 for the repository
)
LFS_FROM = 4096  # files of this size and larger have an LFS entry, as on the Hub (weights do, configurations do not)


@dataclass
class Fault:
    """What goes wrong, the next `times` times that something of this kind is asked of a repository ("*": of any)."""

    repo: str
    kind: str
    how: str
    times: float = 1
    name: str = ""  # of the file, '' for any
    after: object = None  # Retry-After


@dataclass
class Request:
    """One request: method, path, Range header, when it came, and how many bytes of content were sent."""

    method: str
    path: str
    range: str = ""
    time: float = field(default_factory=time.monotonic)
    sent: int = 0
    status: int = 0


class HubServer:
    """Every repository is an adapter of `base` unless `bases` says otherwise; listings come `page` at a time."""

    def __init__(self, folder: Path, base: str = "org/base", page: int = 3):
        self.folder, self.base, self.page = Path(folder), base, page
        self.bases: dict[str, str] = {}
        self.trouble: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.ranges, self.elsewhere, self.slowness = True, False, 0.02  # seconds between the pieces of what is slow
        self.facts: dict[str, dict] = {}  # repository → more of what its listing says
        self._lock = threading.Lock()
        self.writers: dict[str, set[str]] = {}
        self.private: set[str] = set()
        self.commits: list[dict] = []
        self.stored: dict[str, bytes] = {}  # sha256 → a large file that was uploaded, whether or not a commit names it
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
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

    @property
    def requests(self) -> list[str]:
        return [f"{request.method} {request.path}" for request in self.log]

    def asked(self, *words: str, method: str = "GET") -> list[Request]:
        """The requests so far whose paths contain all the words."""
        return [r for r in self.log if r.method == method and all(word in r.path for word in words)]

    def fail(self, repo: str, kind: str, how: str, times: float = 1, name: str = "", after=None) -> None:
        assert kind in KINDS
        assert how in FAULTS
        self.faults.append(Fault(repo, kind, how, times, name, after))

    def fault(self, repo: str, kind: str, name: str = "") -> Fault | None:
        """The next fault for such a request, which is then used up."""
        with self._lock:
            for each in self.faults:
                if each.repo in ("*", repo) and each.kind == kind and each.name in ("", name) and each.times > 0:
                    each.times -= 1
                    return each
        return None

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
            entry = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
            if len(data) >= LFS_FROM:
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
            siblings.append(entry)
        base = self.bases.get(repo, self.base)
        return {
            "id": repo,
            "modelId": repo,
            "sha": self.commit(repo),
            "private": repo in self.private,
            "gated": "manual" if self.trouble.get(repo) == "gated" else False,
            "downloads": len(repo),
            "likes": 0,
            "tags": ["peft", f"base_model:adapter:{base}"],
            "siblings": siblings,
            **self.facts.get(repo, {}),
        }


def git_hash(data: bytes) -> str:
    """The hash of a file's content in git, which is its ETag on the Hub where it is small."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients come and go
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    request_log: Request
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def _note(self) -> None:
        self.request_log = Request(self.command, self.path, self.headers.get("Range", ""))
        self.hub.log.append(self.request_log)

    def _answer(self, *, body: bool) -> None:
        self._note()
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if self._token() and self._token() not in self.hub.writers:
            self._refuse(401, "Invalid credentials in Authorization header")
        elif parts[:2] == ["api", "models"]:
            self._api(parts[2:], parse_qs(url.query))
        elif len(parts) == 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[4], body)
        elif len(parts) == 4 and parts[0] == "elsewhere":
            self._content("/".join(parts[1:3]), parts[3], {"ETag": '"of-another-host"'})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _fails(self, fault: Fault | None) -> bool:
        """Answer with a fault that leaves nothing to be sent."""
        if fault is None or fault.how not in ("416", "429", "500", "503", "missing", "vanished"):
            return False
        codes = {"missing": "EntryNotFound", "vanished": "RepoNotFound"}
        if fault.how in codes:
            self._send(404, b"", {"X-Error-Code": codes[fault.how]})
        else:
            self._send(int(fault.how), b"{}", {"Retry-After": str(fault.after)} if fault.after is not None else {})
        return True

    def _api(self, parts: list[str], query: dict[str, list[str]]) -> None:
        if not parts:
            if not self._fails(self.hub.fault("*", "list")):
                self._listing(query)
            return
        repo = "/".join(parts[:2])
        hidden = repo in self.hub.private and not self._may_write(repo)
        if self._fails(self.hub.fault(repo, parts[2] if parts[2:] else "info")):
            return
        if repo not in self.hub.repos() or hidden or self.hub.trouble.get(repo) == "gone":
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[2:3] == ["revision"] and parts[3] not in ("main", self.hub.commit(repo)):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif self.hub.trouble.get(repo) == "busy-once":
            del self.hub.trouble[repo]
            self._send(503, b"{}")
        elif parts[2:3] == ["tree"]:
            self._json([self._tree_entry(entry) for entry in self.hub.info(repo)["siblings"]])
        else:
            self._json(self.hub.info(repo))

    @staticmethod
    def _tree_entry(entry: dict) -> dict:
        found = {"type": "file", "oid": entry["blobId"], "size": entry["size"], "path": entry["rfilename"]}
        if "lfs" in entry:
            lfs = entry["lfs"]
            found["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        return found

    def _listing(self, query: dict[str, list[str]]) -> None:
        wanted = query.get("filter", [])
        infos = [info for info in map(self.hub.info, self.hub.repos()) if set(wanted) <= set(info["tags"])]
        infos.sort(key=lambda info: -info["downloads"] if "sort" in query else 0)
        start = int(query.get("cursor", ["0"])[0])
        size = min(self.hub.page, int(query.get("limit", ["1000"])[0]))
        headers = {}
        if start + size < len(infos):
            following = urlencode({**query, "cursor": start + size}, doseq=True)
            headers["Link"] = f'<{self.hub.url}/api/models?{following}>; rel="next"'
        self._json(infos[start : start + size], headers)

    def _file(self, repo: str, name: str, body: bool) -> None:
        trouble = self.hub.trouble.get(repo)
        files = self.hub.files(repo) if repo in self.hub.repos() and trouble != "gone" else {}
        hidden = repo in self.hub.private and not self._may_write(repo)
        if trouble == "gated":
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif name not in files or hidden:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if files and not hidden else "RepoNotFound"})
        else:
            data = files[name]
            large = len(data) >= LFS_FROM
            etag = hashlib.sha256(data).hexdigest() if large else git_hash(data)
            headers = {"X-Repo-Commit": self.hub.commit(repo)}
            if not (large and self.hub.elsewhere):
                self._content(repo, name, headers | {"ETag": f'"{etag}"'})
                return
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            if not self._fails(self.hub.fault(repo, "head", name) if not body else None):
                where = self.hub.url.replace("127.0.0.1", "localhost")  # another host, to the client
                self._send(302, b"", headers | {"Location": f"{where}/elsewhere/{repo}/{name}"})

    def _content(self, repo: str, name: str, headers: dict[str, str]) -> None:
        """A file's bytes, or a part of them, or what a fault makes of them."""
        fault = self.hub.fault(repo, "get" if self.command == "GET" else "head", name)
        if self.command == "GET" and not re.fullmatch(r"bytes=\d+-\d+", self.headers.get("Range", "")):
            fault = fault or self.hub.fault(repo, "whole", name)
        if self._fails(fault):
            return
        how, data = fault.how if fault else "", self.hub.files(repo)[name]
        trouble = self.hub.trouble.get(repo) if self.command == "GET" and len(data) >= LFS_FROM else None
        if how == "corrupt" or trouble in ("corrupt", "corrupt-once"):
            data = data[:-1] + bytes([data[-1] ^ 1])  # the same size, another value
            if trouble == "corrupt-once":
                del self.hub.trouble[repo]
        elif how == "garbage":
            data = b"x" * len(data)
        elif how == "long":
            data += b"more"
        if how == "etag":
            headers["ETag"] = f'"{hashlib.sha256(b"other").hexdigest()}"'
        elif how == "no-etag":
            del headers["ETag"]
        elif how == "evil-etag":
            headers["ETag"] = '"../../../../evil"'
        status, size = 200, len(data)
        headers["Accept-Ranges"] = "bytes" if self.hub.ranges else "none"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.hub.ranges and self.headers.get("If-Range", headers.get("ETag")) == headers.get("ETag"):
            start, stop = int(wanted[1]), min(int(wanted[2] or size - 1) + 1, size)
            if start >= size:
                self._send(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            if how == "other-range":
                start, stop = start + 1, stop
            status, data = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send(status, data, headers, how=how)

    def _json(self, value, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, how: str = "") -> None:
        self.request_log.status = status
        shown = data[: len(data) * 2 // 3] if how == "short" else data
        self.send_response(status)
        for key, value in {"Content-Length": str(len(shown)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        pieces = [shown[: len(shown) // 3]] if how == "cut" else [shown]
        if how == "slow":
            step = max(1, len(shown) // 10)
            pieces = [shown[i : i + step] for i in range(0, len(shown), step)]
        for piece in pieces:
            try:
                self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):  # the client has read enough
                self.close_connection = True
                return
            self.request_log.sent += len(piece)
            if how == "slow":
                self.wfile.flush()
                time.sleep(self.hub.slowness)
        self.close_connection = self.close_connection or how == "cut"

    # Uploads: create a repository, ask how each file is to be sent, send the large ones, commit -------------------

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self, repo: str) -> bool:
        return repo.split("/")[0] in self.hub.writers.get(self._token(), ())

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Message": message})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _take(self) -> None:
        self._note()
        data = self._body()
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.command == "PUT" and parts[0] == "large":
            self._store("/".join(parts[1:3]), parts[3], data)  # a signed address: it needs no token
        elif parts == ["api", "validate-yaml"]:
            self._validate(json.loads(data)["content"])
        elif self._token() not in self.hub.writers:
            self._refuse(401, "Invalid username or password.")
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(data))
        else:
            self._write(parts, data)

    def _write(self, parts: list[str], data: bytes) -> None:
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        if not self._may_write(repo):
            self._refuse(403, "You do not have the required permissions")
        elif repo not in self.hub.repos():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[4:5] == ["preupload"]:
            said = [
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if entry["size"] >= LFS_FROM else "regular",
                    "shouldIgnore": False,
                }
                for entry in json.loads(data)["files"]
            ]
            self._json({"files": said})
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            objects = [dict(entry) for entry in json.loads(data)["objects"]]
            for entry in objects:
                if entry["oid"] not in self.hub.stored:
                    entry["actions"] = {"upload": {"href": f"{self.hub.url}/large/{repo}/{entry['oid']}"}}
            self._json({"transfer": "basic", "objects": objects})
        elif parts[4:5] == ["commit"]:
            self._commit(repo, [json.loads(line) for line in data.splitlines()])
        else:
            self._send(404, b"{}")

    def _create(self, asked: dict) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(repo):
            self._refuse(
                403, f"You don't have the rights to create a model under the namespace {asked['organization']}"
            )
        elif repo in self.hub.repos():
            self._refuse(409, "You already created this model repo")
        else:
            (self.hub.folder / repo).mkdir(parents=True)
            (self.hub.folder / repo / ".gitattributes").write_text(
                "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            )
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.add(repo)
            self._json({"url": f"{self.hub.url}/{repo}", "name": repo})

    def _validate(self, card: str) -> None:
        """What the Hub checks of a card, as far as its error messages tell."""
        import yaml

        block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        said = yaml.safe_load(block[1]) if block else {}
        wrong = []
        if said.get("license", "mit") not in LICENCES.split():
            wrong.append(f'"license" must be one of {LICENCES.split()}')
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", said.get("base_model", "base")):
            wrong.append(f'"base_model" with value "{said["base_model"]}" is not valid')
        if not re.fullmatch(r"[a-z0-9.-]+", said.get("license_name", "a")):
            wrong.append('"license_name" fails to match the required pattern')
        body = {"errors": [{"message": message} for message in wrong], "warnings": []}
        self._send(400 if wrong else 200, json.dumps(body).encode())

    def _store(self, repo: str, oid: str, data: bytes) -> None:
        trouble = self.hub.trouble.get(repo)
        if trouble == "broken-transfer":
            self._refuse(400, "your socket was not written to within the timeout")
        elif trouble == "cut-transfer":
            self.close_connection = True  # no answer at all
        elif hashlib.sha256(data).hexdigest() != oid:
            self._refuse(400, "the content is not what was announced")
        else:
            self.hub.stored[oid] = data
            self._send(200, b"")

    def _commit(self, repo: str, lines: list[dict]) -> None:
        """All of a commit or nothing: the repository's folder is replaced in one step."""
        header, changes = lines[0]["value"], lines[1:]
        trouble, parent = self.hub.trouble.get(repo), self.hub.commit(repo)
        if trouble == "broken-commit":
            self._send(500, b"{}")
            return
        if trouble == "raced" or header.get("parentCommit", parent) != parent:
            self._refuse(412, "A commit has happened since. Please refresh and try again.")
            return
        files, added, deleted = self.hub.files(repo), [], []
        for change in changes:
            value = change["value"]
            if change["key"] == "deletedFile":
                del files[value["path"]]
                deleted.append(value["path"])
                continue
            if change["key"] == "lfsFile" and value["oid"] not in self.hub.stored:
                self._refuse(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                return
            large = change["key"] == "lfsFile"
            files[value["path"]] = self.hub.stored[value["oid"]] if large else base64.b64decode(value["content"])
            added.append(value["path"])
        place = self.hub.folder / repo
        fresh = Path(tempfile.mkdtemp(dir=self.hub.folder))  # one level up from where repositories are looked for
        for name, content in files.items():
            (fresh / name).write_bytes(content)
        shutil.rmtree(place)
        fresh.rename(place)
        made = {"repo": repo, "message": header["summary"], "parent": header.get("parentCommit")}
        self.hub.commits.append({**made, "added": added, "deleted": deleted})
        oid = self.hub.commit(repo)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "hookOutput": ""})
