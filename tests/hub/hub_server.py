"""A Hub in a thread: enough of its protocol for `huggingface_hub` and Transformers to push to it and load from it.

Repositories with branches and commits, users with tokens, private repositories, preupload, LFS uploads with their
verification, commits as JSON lines, trees, and files served with etags, redirects to another host for LFS, and ranges.
What it cannot do (xet, pull requests, data sets) it answers with 404; clients must have `HF_HUB_DISABLE_XET=1`.
"""

import base64
import contextlib
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# Of the fixture: one who owns `user/...`, the same with a token that only reads, and somebody else.
TOKEN, READER, STRANGER = "hf_tokenOfTheUser", "hf_tokenThatReads", "hf_tokenOfAnother"


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    size: int
    oid: str
    """As git names the content of a regular file, or SHA-256 of one that lies in LFS."""
    content: bytes | None
    """`None` where it lies in LFS."""

    @classmethod
    def regular(cls, content: bytes) -> "Blob":
        header = f"blob {len(content)}\0".encode()
        return cls(len(content), hashlib.sha1(header + content).hexdigest(), content)

    @property
    def is_lfs(self) -> bool:
        return self.content is None


@dataclass
class Repo:
    """A repository: its branches, and the files of every commit."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        sha = secrets.token_hex(20)
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        """Of a branch or a commit."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """A line of the server's log."""

    method: str
    path: str
    status: int
    token: str | None


class HubServer:
    """The state of a Hub, and the server that answers for it.

    ```python
    with HubServer(users={"hf_secret": "user"}) as hub:
        hub.url  # for HF_ENDPOINT
    ```

    Args:
        users: token -> who it belongs to; each may write to the repositories under their own name.
        readers: tokens among these that may read and not write.
    """

    def __init__(self, users: dict[str, str], readers: tuple[str, ...] = ()) -> None:
        self.users, self.readers = users, readers
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        """SHA-256 -> content of what was uploaded whole."""
        self.requests: list[Request] = []
        self.puts: list[str] = []
        """SHA-256 of each upload that began, in order."""
        self.before_upload: Callable[[str, int], bool] = lambda oid, received: True
        """Called with each upload's SHA-256 when half of it has been received; false cuts the connection."""
        self.down = False
        """While true, every connection is closed without an answer."""
        self.echo = False
        """Whether errors repeat the Authorization header, as a careless proxy might."""
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # Another host, as far as clients can tell: they must not send it their token.
        self.storage_url = f"http://localhost:{port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Any, token: str | None = None) -> dict[str, str]:
        """What a process needs in its environment to take this for the Hub; `home` is its own, empty HF_HOME."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token or "",
        }

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds: path -> content."""
        found = self.repos[repo]
        sha = found.sha(revision)
        assert sha is not None
        return {
            path: self.lfs[blob.oid] if blob.content is None else blob.content
            for path, blob in found.commits[sha].items()
        }

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The requests whose path matches."""
        return [request for request in self.requests if request.method == method and re.search(pattern, request.path)]


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.answer_request()

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

        def answer_request(self) -> None:
            if hub.down:
                self.close_connection = True
                return
            self.status = 0
            url = urlsplit(self.path)
            self.query = parse_qs(url.query)
            self.body = b"" if self.command == "PUT" else self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                for methods, pattern, answer in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and self.command in methods.split():
                        answer(self, *map(unquote, match.groups()))
                        break
                else:
                    raise _Refusal(404, f"nothing at {url.path}")
            except _Refusal as refusal:
                message = str(refusal)
                if hub.echo:
                    message += f" (you sent Authorization: {self.headers.get('Authorization')})"
                headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
                self.send_json({"error": message, **refusal.more}, refusal.status, headers)
            with hub.lock:
                hub.requests.append(Request(self.command, self.path, self.status, self.token))

        # --- answers ---

        def send(self, status: int, headers: dict[str, Any], content: bytes = b"") -> None:
            self.status = status
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, str(value))
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send(status, {"Content-Type": "application/json"} | (headers or {}), json.dumps(value).encode())

        # --- who asks ---

        @property
        def token(self) -> str | None:
            return (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip() or None

        @property
        def user(self) -> str | None:
            """None for a stranger; a token that nobody has is refused, whatever is asked."""
            if self.token is not None and self.token not in hub.users:
                raise _Refusal(401, "Invalid credentials in Authorization header")
            return hub.users.get(self.token or "")

        def readable(self, name: str) -> Repo:
            user = self.user
            repo = hub.repos.get(name)
            if repo is None or (repo.private and user != name.split("/")[0]):
                # The Hub tells strangers nothing about private repositories, not even that they are there.
                raise _Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
            return repo

        def writable(self, name: str) -> Repo:
            repo = self.readable(name)
            if self.user is None:
                raise _Refusal(401, "Invalid username or password.")
            if self.user != name.split("/")[0] or self.token in hub.readers:
                raise _Refusal(403, "You have no write access")
            return repo

        def commit_of(self, repo: Repo, revision: str) -> str:
            sha = repo.sha(revision)
            if sha is None:
                raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return sha

        # --- repositories ---

        def who_am_i(self) -> None:
            if self.user is None:
                raise _Refusal(401, "Invalid username or password.")
            self.send_json({"type": "user", "name": self.user, "orgs": []})

        def create_repo(self) -> None:
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or self.user}/{asked['name']}"
            if self.user is None:
                raise _Refusal(401, "Invalid username or password.")
            if self.user != name.split("/")[0] or self.token in hub.readers:
                raise _Refusal(403, f"You don't have the rights to create a model under {name.split('/')[0]}")
            with hub.lock:
                if name in hub.repos:
                    raise _Refusal(409, "You already created this model repo", url=f"{hub.url}/{name}")
                repo = hub.repos[name] = Repo(bool(asked.get("private")) or asked.get("visibility") == "private")
                attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
                repo.commit("main", {".gitattributes": Blob.regular(attributes)})
            self.send_json({"url": f"{hub.url}/{name}", "name": name})

        def create_branch(self, name: str, branch: str) -> None:
            repo = self.writable(name)
            if branch.startswith("refs/"):
                raise _Refusal(400, f"Invalid reference for a branch: {branch}")
            start = self.commit_of(repo, json.loads(self.body or b"{}").get("startingPoint") or "main")
            with hub.lock:
                if branch in repo.branches:
                    raise _Refusal(409, "Reference already exists")
                repo.branches[branch] = start
            self.send_json({})

        def info(self, name: str, revision: str = "main") -> None:
            repo = self.readable(name)
            sha = self.commit_of(repo, revision)
            files = [{"rfilename": path} for path in repo.commits[sha]]
            self.send_json(
                {"_id": name, "id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": []}
                | {"downloads": 0, "likes": 0, "siblings": files, "library_name": "transformers"}
            )

        def refs(self, name: str) -> None:
            repo = self.readable(name)
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
                for branch, sha in repo.branches.items()
            ]
            self.send_json({"branches": branches, "converts": [], "tags": []})

        def tree(self, name: str, revision: str, folder: str = "") -> None:
            repo = self.readable(name)
            files = repo.commits[self.commit_of(repo, revision)]
            prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
            inside = {path: blob for path, blob in files.items() if path.startswith(prefix)}
            if prefix and not inside:
                raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
            entries: dict[str, Any] = {}
            for path, blob in inside.items():
                parts = path.removeprefix(prefix).split("/")
                for depth in range(1, len(parts)):
                    parent = prefix + "/".join(parts[:depth])
                    entries[parent] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": parent}
                entries[path] = _entry(path, blob)
            if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
                entries = {path: entry for path, entry in entries.items() if "/" not in path.removeprefix(prefix)}
            self.send_json([entries[path] for path in sorted(entries)])

        def paths_info(self, name: str, revision: str) -> None:
            repo = self.readable(name)
            files = repo.commits[self.commit_of(repo, revision)]
            body = self.body.decode()
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            self.send_json([_entry(path, files[path]) for path in asked if path in files])

        # --- uploads ---

        def validate_yaml(self) -> None:
            content = json.loads(self.body)["content"]
            match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
            metadata = yaml.safe_load(match.group(1)) if match else {}
            wrong = [
                {"message": f'"{name}" must be a string or a list of strings'}
                for name in ("license", "language", "tags", "datasets")
                if not all(isinstance(value, str) for value in _listed(metadata.get(name)))
            ]
            # The Hub knows many more; a name it does not know is refused.
            if metadata.get("license") not in (None, "apache-2.0", "mit", "other"):
                wrong.append({"message": '"license" must be one of [apache-2.0, mit, other]'})
            for index in metadata.get("model-index", []):
                if not index.get("name") or not all(
                    isinstance(result["dataset"]["name"], str) and isinstance(result["dataset"]["type"], str)
                    for result in index["results"]
                ):
                    wrong.append({"message": '"model-index[0].results[0].dataset" must have name and type'})
            self.send_json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

        def preupload(self, name: str, revision: str) -> None:
            repo = self.writable(name)
            there = repo.commits[self.commit_of(repo, revision)]
            files = []
            for file in json.loads(self.body)["files"]:
                binary = b"\0" in base64.b64decode(file["sample"]) or file["size"] > 10_000_000
                answer = {"path": file["path"], "shouldIgnore": False}
                answer["uploadMode"] = "lfs" if binary or file["path"].endswith(".safetensors") else "regular"
                if file["path"] in there:
                    answer["oid"] = there[file["path"]].oid
                files.append(answer)
            self.send_json({"files": files})

        def lfs_batch(self, name: str) -> None:
            self.writable(name)
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                answer = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in hub.lfs:
                    answer["authenticated"] = True
                    answer["actions"] = {
                        "upload": {"href": f"{hub.storage_url}/storage/{wanted['oid']}?signature=x"},
                        "verify": {"href": f"{hub.url}/{name}.git/info/lfs/verify"},
                    }
                objects.append(answer)
            self.send_json({"transfer": "basic", "objects": objects})

        def store(self, oid: str) -> None:
            with hub.lock:
                hub.puts.append(oid)
            size = int(self.headers["Content-Length"])
            content = self.rfile.read(size // 2)
            if not hub.before_upload(oid, len(content)):
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(2)
                return
            content += self.rfile.read(size - len(content))
            if len(content) != size:
                self.close_connection = True  # the client is gone
                return
            if hashlib.sha256(content).hexdigest() != oid:
                raise _Refusal(400, "the content is not what was announced")
            with hub.lock:
                hub.lfs[oid] = content
            self.send(200, {})

        def verify(self, name: str) -> None:
            self.writable(name)
            wanted = json.loads(self.body)
            if len(hub.lfs.get(wanted["oid"], b"")) != wanted["size"]:
                raise _Refusal(404, "Object not found")
            self.send_json({"message": "verified"})

        def commit(self, name: str, revision: str) -> None:
            repo = self.writable(name)
            with hub.lock:
                if revision not in repo.branches:
                    raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
                files = dict(repo.commits[repo.branches[revision]])
                for line in self.body.splitlines():
                    operation = json.loads(line)
                    kind, value = operation["key"], operation["value"]
                    if kind == "file":
                        files[value["path"]] = Blob.regular(base64.b64decode(value["content"]))
                    elif kind == "lfsFile":
                        if value["oid"] not in hub.lfs:
                            raise _Refusal(422, f"LFS object {value['oid']} was never uploaded")
                        files[value["path"]] = Blob(len(hub.lfs[value["oid"]]), value["oid"], None)
                    elif kind == "deletedFile":
                        del files[value["path"]]
                    elif kind == "deletedFolder":
                        files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
                    elif kind == "header" and value.get("parentCommit") not in (None, repo.branches[revision]):
                        raise _Refusal(412, "A commit has happened since")
                sha = repo.commit(revision, files)
            self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"})

        # --- downloads ---

        def resolve(self, name: str, revision: str, path: str) -> None:
            repo = self.readable(name)
            sha = self.commit_of(repo, revision)
            blob = repo.commits[sha].get(path)
            headers: dict[str, Any] = {"X-Repo-Commit": sha}
            if blob is None:
                raise _Refusal(404, "Entry not found", "EntryNotFound")
            if blob.content is not None:
                self.send_range(blob.content, headers | {"ETag": f'"{blob.oid}"'})
                return
            headers |= {"X-Linked-Size": blob.size, "X-Linked-Etag": f'"{blob.oid}"'}
            self.send(302, headers | {"Location": f"{hub.storage_url}/storage/{blob.oid}?signature=x"})

        def fetch(self, oid: str) -> None:
            if oid not in hub.lfs:
                raise _Refusal(404, "no such object")
            self.send_range(hub.lfs[oid], {"ETag": f'"{oid}"'})

        def send_range(self, content: bytes, headers: dict[str, Any]) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None:
                headers = headers | {"Accept-Ranges": "bytes", "Content-Length": len(content)}
                self.send(200, headers, content)
                return
            start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
            part = content[start:stop]
            self.send(206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}, part)

    repo = r"/api/models/([^/]+/[^/]+)"
    ROUTES: list[tuple[str, str, Callable[..., None]]] = [
        ("GET", r"/api/whoami-v2", Handler.who_am_i),
        ("POST", r"/api/repos/create", Handler.create_repo),
        ("POST", r"/api/validate-yaml", Handler.validate_yaml),
        ("POST", repo + r"/branch/([^/]+)", Handler.create_branch),
        ("POST", repo + r"/preupload/([^/]+)", Handler.preupload),
        ("POST", repo + r"/commit/([^/]+)", Handler.commit),
        ("POST", repo + r"/paths-info/([^/]+)", Handler.paths_info),
        ("GET", repo, Handler.info),
        ("GET", repo + r"/revision/([^/]+)", Handler.info),
        ("GET", repo + r"/refs", Handler.refs),
        ("GET", repo + r"/tree/([^/]+)", Handler.tree),
        ("GET", repo + r"/tree/([^/]+)/(.+)", Handler.tree),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/verify", Handler.verify),
        ("PUT", r"/storage/([0-9a-f]{64})", Handler.store),
        ("GET HEAD", r"/storage/([0-9a-f]{64})", Handler.fetch),
        ("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
    ]
    return Handler


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid[:40], "size": blob.size, "path": path}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.oid, "size": blob.size, "pointerSize": 130}
    return entry


def _listed(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        yield from value
    elif value is not None:
        yield value
