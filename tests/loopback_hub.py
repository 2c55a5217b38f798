"""A small Hub on the loopback interface, on the standard library: enough of the Hub's routes to push and to download.

Clients must see it in their environment before they import huggingface_hub: `LoopbackHub.environment(home)` gives the
variables, so tests run the client in a subprocess. It keeps everything in memory and logs what was asked for.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


class Repository:
    """Files by path, for each commit; branches point to commits."""

    def __init__(self, private=False):
        self.private = private
        self.commits = {}
        self.branches = {}
        self.messages = []
        self.commit({}, "main")

    def commit(self, files, branch, message="initial commit"):
        """Add a commit that holds exactly these files; return its id."""
        oid = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision):
        """The commit of a branch or commit id; None if there is none."""
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None

    def files(self, revision="main"):
        """Files by path at a revision."""
        return self.commits[self.resolve(revision)]


class LoopbackHub:
    """A context manager: serves while it is open."""

    def __init__(self):
        self.lock = threading.Lock()
        self.clear()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def clear(self):
        """Forget all repositories, requests and settings."""
        self.repositories = {}
        self.gated = set()
        self.requests = []
        self.uploads = {}  # LFS objects by their SHA-256
        self.failing = None  # a status to answer everything with

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token=TOKEN):
        """What a client needs in its environment to talk to this Hub and to no other."""
        variables = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def add(self, repo_id, files, revision="main"):
        """Put a commit with these files (bytes by path) into a repository, making it if needed; return its id."""
        repository = self.repositories.setdefault(repo_id, Repository())
        return repository.commit(files, revision)

    def asked(self, pattern):
        """The logged requests ("GET /path") that match a regular expression."""
        return [request for request in self.requests if re.search(pattern, request)]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Stay quiet."""

    # ---- dispatch

    def do_HEAD(self):
        self._serve()

    def do_GET(self):
        self._serve()

    def do_PUT(self):
        self._serve()

    def do_POST(self):
        self._serve()

    def _serve(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        else:
            self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            if self.hub.failing:
                return self._error(self.hub.failing, None, "failing on purpose")
            for method, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    if self.command in ("PUT", "POST") and not self._may_write():
                        return self._error(401, None, "Invalid username or password.")
                    return action(self, **match.groupdict())
        return self._error(404, None, "not a route of this Hub")

    def _chunks(self):
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _may_write(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/upload/")

    # ---- answers

    def _send(self, status, data=b"", headers=None, kind="application/octet-stream"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if not any(name.lower() == "content-length" for name in headers or {}):
            self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), kind="application/json")

    def _error(self, status, code, message):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers, "application/json")

    def _find(self, repo, revision=None):
        """The repository and the commit; answers with the error and returns None where there is none."""
        repository = self.hub.repositories.get(repo)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not allowed):
            return self._error(404, "RepoNotFound", "Repository not found")
        if repo in self.hub.gated:
            return self._error(403, "GatedRepo", f"Access to model {repo} is restricted")
        oid = repository.resolve(revision or "main")
        if oid is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, oid

    # ---- routes

    def _file(self, repo, revision, path):
        if not (found := self._find(repo, revision)):
            return None
        repository, oid = found
        if path not in repository.commits[oid]:
            return self._error(404, "EntryNotFound", f"Entry not found: {path}")
        data = repository.commits[oid][path]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": oid}
        return self._send(200, data, headers | {"Content-Length": str(len(data))})

    def _info(self, repo, revision=None):
        if not (found := self._find(repo, revision)):
            return None
        repository, oid = found
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        facts = {"_id": repo, "id": repo, "modelId": repo, "sha": oid, "siblings": siblings}
        return self._json(facts | {"private": repository.private, "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, repo, revision):
        if not (found := self._find(repo, revision)):
            return None
        repository, oid = found
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in repository.commits[oid].items()
        ]
        return self._json(entries)

    def _create(self):
        request = json.loads(self.body)
        repo = "/".join(part for part in (request.get("organization") or "loopback", request["name"]) if part)
        existed = repo in self.hub.repositories
        if not existed:
            self.hub.repositories[repo] = Repository(
                private=bool(request.get("private")) or request.get("visibility") == "private"  # 0.x and 2.x clients
            )
        return self._json({"url": f"{self.hub.address}/{repo}", "name": repo}, 409 if existed else 200)

    def _branch(self, repo, branch):
        if found := self._find(repo):
            repository, oid = found
            if branch in repository.branches:
                return self._error(409, None, "Reference already exists")
            repository.branches[branch] = oid
            return self._json({})
        return None

    def _preupload(self, repo, revision):
        files = json.loads(self.body)["files"]
        mode = {True: "lfs", False: "regular"}
        answer = [
            {"path": file["path"], "uploadMode": mode[file["path"].endswith(".safetensors")], "shouldIgnore": False}
            for file in files
        ]
        return self._json({"files": answer})

    def _lfs_batch(self, repo):
        objects = json.loads(self.body)["objects"]
        answer = [
            {"oid": entry["oid"], "size": entry["size"]}
            | {"actions": {"upload": {"href": f"{self.hub.address}/upload/{entry['oid']}", "header": {}}}}
            for entry in objects
        ]
        return self._json({"transfer": "basic", "objects": answer})

    def _upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploads[oid] = self.body
        return self._send(200)

    def _commit(self, repo, revision):
        if not (found := self._find(repo, revision)):
            return None
        repository, oid = found
        files = dict(repository.commits[oid])
        message = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        new = repository.commit(files, revision, message)
        url = f"{self.hub.address}/{repo}/commit/{new}"
        return self._json({"success": True, "commitOid": new, "commitUrl": url, "hookOutput": ""})

    def _yaml(self):
        return self._json({"errors": [], "warnings": []})

    def _whoami(self):
        return self._json({"type": "user", "name": "loopback", "auth": {"type": "access_token"}})


_REPO = r"(?P<repo>[^/]+(/[^/]+)?)"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler._whoami),
    (("POST",), r"/api/repos/create", _Handler._create),
    (("POST",), r"/api/validate-yaml", _Handler._yaml),
    (("GET",), rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler._info),
    (("GET",), rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/.*)?", _Handler._tree),
    (("POST",), rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler._preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler._commit),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _Handler._branch),
    (("GET",), rf"/api/models/{_REPO}", _Handler._info),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (("PUT",), r"/upload/(?P<oid>[0-9a-f]{64})", _Handler._upload),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._file),
]
