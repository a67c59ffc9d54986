"""A Hub on this machine: serves a folder of repositories (author/name/files) to the real client, over HTTP.

with HubServer(folder) as hub:
    hub.url                                     # for HF_ENDPOINT
    hub.trouble["author/name"] = "gated"        # or "corrupt", "corrupt-once", "busy-once", "gone"
    hub.requests                                # what was asked: "GET /author/name/resolve/…"
    hub.writers["hf_secret"] = {"me"}           # a token, and the owners that it may write to; uploads need one
    hub.commits                                 # what was pushed: repository, message, parent, files added and deleted
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tempfile
import threading
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
LFS_FROM = 4096  # files of this size and larger have an LFS entry, as on the Hub (weights do, configurations do not)


class HubServer:
    """Every repository is an adapter of `base` unless `bases` says otherwise; listings come `page` at a time."""

    def __init__(self, folder: Path, base: str = "org/base", page: int = 3):
        self.folder, self.base, self.page = Path(folder), base, page
        self.bases: dict[str, str] = {}
        self.trouble: dict[str, str] = {}
        self.requests: list[str] = []
        self.writers: dict[str, set[str]] = {}
        self.private: set[str] = set()
        self.commits: list[dict] = []
        self.stored: dict[str, bytes] = {}  # sha256 → a large file that was uploaded, whether or not a commit names it
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
            "private": repo in self.private,
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

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def _answer(self, *, body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if self._token() and self._token() not in self.hub.writers:
            self._refuse(401, "Invalid credentials in Authorization header")
        elif parts[:2] == ["api", "models"]:
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
        hidden = repo in self.hub.private and not self._may_write(repo)
        if repo not in self.hub.repos() or hidden or self.hub.trouble.get(repo) == "gone":
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
        self.hub.requests.append(f"{self.command} {self.path}")
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
