"""A small Hugging Face Hub on 127.0.0.1: tests talk to it with the true `huggingface_hub` client, nothing is mocked.

    with LocalHub() as hub:
        subprocess.run([...], env=hub.environment(cache_dir))
        hub.files("user/model")["README.md"]

It holds model, dataset and Space repositories in memory: commits, branches, tags, pull requests, LFS files, private
and gated repositories. Two people have a token: "user" (`hub.token`), who also writes to the organisation "org", and
"guest" (`hub.guest_token`), who may read what is public and open pull requests. As on the true Hub, a new repository
starts with a commit that holds `.gitattributes`. Xet is not served: without HF_HUB_DISABLE_XET=1 the client insists
on it and never falls back to LFS.
"""

import base64
import hashlib
import itertools
import json
import os
import re
import socket
import struct
import sys
import threading
import traceback
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

ACCOUNTS = {"user": ("user", "org"), "guest": ("guest",)}  # who -> the namespaces they write to
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".zip", ".png", ".jpg", ".jpeg", ".webp")
MAX_REGULAR_SIZE = 10 * 2**20
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class Exchange(NamedTuple):
    method: str
    path: str  # as it was sent: percent-encoded, with its query
    status: int  # 0: the connection was reset


class HubError(Exception):
    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status, self.message = status, message
        one_line = " ".join(message.split()).encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": one_line} | ({"X-Error-Code": code} if code else {}) | headers


@dataclass
class Request:
    method: str
    path: str
    query: dict
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    def flag(self, name):
        return self.query.get(name, [""])[-1].lower() in ("1", "true")


@dataclass
class Response:
    body: object = b""  # bytes, or anything that JSON can hold
    status: int = 200
    headers: dict = field(default_factory=dict)


@dataclass
class Fault:
    pattern: re.Pattern
    how: int | str
    left: int
    seconds: float


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    message: str
    author: str
    date: str
    parent: "Commit | None"
    files: dict

    def history(self):
        commit = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass(frozen=True)
class File:
    data: bytes
    is_lfs: bool

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self):
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.is_lfs else self.git_oid


class Repo:
    def __init__(self, kind, repo_id, private):
        self.kind, self.id, self.private, self.gated = kind, repo_id, private, False
        self.url_path = ("" if kind == "models" else kind + "/") + repo_id
        self.lfs = {}  # sha256 -> bytes, uploaded but not necessarily committed
        self.commits = {}
        self.branches, self.tags, self.pull_requests = {}, {}, {}
        self.commit(self.branches, "main", None, {".gitattributes": File(GITATTRIBUTES, False)}, "initial commit")

    def commit(self, refs, name, parent, files, title, message="", author="user"):
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        contents = [(path, file.etag) for path, file in sorted(files.items())]
        identity = repr((self.kind, self.id, len(self.commits), parent and parent.sha, contents, title, date))
        sha = hashlib.sha1(identity.encode()).hexdigest()
        refs[name] = self.commits[sha] = Commit(sha, title, message, author, date, parent, files)
        return refs[name]

    def at(self, revision):
        for refs in (self.branches, self.tags, self.pull_requests):
            if revision in refs:
                return refs[revision]
        if len(revision) >= 7:
            for sha, commit in self.commits.items():
                if sha.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class LocalHub:
    """The server; the methods here are for tests, the functions below answer the client."""

    token, guest_token = "hf_token_of_user", "hf_token_of_guest"
    page_size = 1000  # entries of a tree listing; lower it to see the client follow pages

    def __init__(self):
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self.repos, self.faults, self.requests = {}, [], []
        self._numbers = itertools.count()

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._thread.join()

    def files(self, repo_id, repo_type="model", revision="main"):
        """What the repository holds, path -> bytes; KeyError where there is no such repository."""
        with self.lock:
            files = self.repos[repo_type + "s", repo_id].at(revision).files
            return {path: file.data for path, file in sorted(files.items())}

    def new_repo_id(self, stem="repo"):
        """A name no test has used: clients cache by name, in memory and on disk."""
        return f"user/{stem}-{next(self._numbers)}"

    def fail_next(self, pattern, how=500, times=1, seconds=0.0):
        """Disturbs the next `times` requests whose "METHOD /path?query" the regular expression `pattern` is found in.

        `how`: a status, answered in place of doing the work; "reset", the connection is reset and nothing is done;
        "lost", the work is done and the connection reset before the answer; "cut", the connection closes after half
        of the body; "slow", headers and body trickle over `seconds`. The fault that is returned counts down `.left`.
        """
        if not isinstance(how, int) and how not in ("reset", "lost", "cut", "slow"):
            raise ValueError(f"how: {how!r} is neither a status nor 'reset', 'lost', 'cut', 'slow'")
        fault = Fault(re.compile(pattern), how, times, seconds)
        with self.lock:
            self.faults.append(fault)
        return fault

    def clear(self):
        """Forgets repositories, pending faults and the log of requests."""
        with self.lock:
            self.repos.clear()
            self.faults.clear()
            self.requests.clear()

    def environment(self, cache_dir):
        """The whole environment of a process that uses this hub and keeps all its caches below `cache_dir`.

        A person's own caches, tokens and offline modes are dropped, and so are proxies, which would see the requests.
        """
        dropped = re.compile("HF_|HUGGING|TRANSFORMERS_(OFFLINE|CACHE)|.*_proxy$", re.IGNORECASE)
        return {name: value for name, value in os.environ.items() if not dropped.match(name)} | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(cache_dir),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts its downloads on a host outside
            "DO_NOT_TRACK": "1",
        }

    def take_fault(self, request_line):
        with self.lock:
            for fault in self.faults:
                if fault.left > 0 and fault.pattern.search(request_line):
                    fault.left -= 1
                    return fault
        return None

    def answer(self, request):
        """Authenticates, finds the repository, and hands over to the function of the route."""
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(request.path)
            if match is None or method != ("GET" if request.method == "HEAD" else request.method):
                continue
            named = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            with self.lock:
                user = self._user(request)
                if "repo_id" in named:
                    named["repo"] = self._repo(named.pop("kind", "models"), named.pop("repo_id"), user)
                return function(self, request, user, **named)
        raise HubError(404, f"no such endpoint: {request.method} {request.path}")

    def _user(self, request):
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None
        for user, token in (("user", self.token), ("guest", self.guest_token)):
            if authorization == f"Bearer {token}":
                return user
        raise HubError(401, "Invalid credentials in Authorization header")

    def _repo(self, kind, repo_id, user):
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not may_write(user, repo_id)):
            # The client takes a bare 401 for a missing repository over https only; the code says so over http as well.
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo


ROUTES = []
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
REPO_PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>refs/[^/]+/[^/]+|[^/]+)"


def route(method, pattern):
    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


def may_write(user, repo_id):
    return repo_id.split("/")[0] in ACCOUNTS.get(user, ())


def require_write(user, repo_id):
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if not may_write(user, repo_id):
        raise HubError(403, f"You don't have the required permissions to write to {repo_id}")


@route("GET", "/api/whoami-v2")
def whoami(hub, request, user):
    if user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in ACCOUNTS[user] if name != user]
    access_token = {"displayName": "test", "role": "write"}
    auth = {"type": "access_token", "accessToken": access_token}
    return Response({"type": "user", "id": user, "name": user, "fullname": user, "orgs": orgs, "auth": auth})


@route("POST", "/api/repos/create")
def create_repo(hub, request, user):
    asked = request.json
    kind = asked.get("type", "model") + "s"
    repo_id = f"{asked.get('organization') or user}/{asked['name']}"
    require_write(user, repo_id)
    repo = hub.repos.get((kind, repo_id))
    if repo is not None:
        url = f"{hub.endpoint}/{repo.url_path}"
        return Response({"error": f"You already created this {kind[:-1]} repo", "url": url}, 409)
    repo = hub.repos[kind, repo_id] = Repo(kind, repo_id, asked.get("visibility") == "private")
    return Response({"url": f"{hub.endpoint}/{repo.url_path}", "name": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(hub, request, user):
    asked = request.json
    repo = hub._repo(asked.get("type", "model") + "s", f"{asked.get('organization') or user}/{asked['name']}", user)
    require_write(user, repo.id)
    del hub.repos[repo.kind, repo.id]
    return Response()


@route("PUT", REPO + "/settings")
def update_settings(hub, request, user, repo):
    require_write(user, repo.id)
    asked = request.json
    if "visibility" in asked:
        repo.private = asked["visibility"] == "private"
    repo.gated = asked.get("gated", repo.gated)
    return Response({"private": repo.private, "gated": repo.gated})


@route("GET", REPO + "/auth-check(?P<write>/write)?")
def auth_check(hub, request, user, repo, write=None):
    if write:
        require_write(user, repo.id)
    require_gate(repo, user)
    return Response()


def read_card(content):
    """The YAML between the first two lines `---` of a README.md, the way the Hub complains about it."""
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        return {}, [f"invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return {}, ['"metadata" must be of type object'], []
    errors = []
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "license", "language", "datasets", "metrics", "base_model"):
        values = data.get(key, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{key}" must be a string or a list of strings')
    try:
        results = [result for model in data.get("model-index") or [] for result in model["results"]]
        for result in results:
            result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]
            [(metric["type"], metric["value"]) for metric in result["metrics"]]
    except (KeyError, TypeError) as error:
        errors.append(f'"model-index" is malformed: {error!r}')
    return data, errors, []


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request, user):
    _, errors, warnings = read_card(request.json["content"])
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Response(found, 400 if errors else 200)


@route("GET", REPO + f"(?:/revision/{REVISION})?")
def repo_info(hub, request, user, repo, revision="main"):
    commit = repo.at(revision)
    siblings = []
    for path, file in sorted(commit.files.items()):
        sibling = {"rfilename": path}
        if request.flag("blobs"):
            sibling |= {"size": len(file.data), "blobId": file.git_oid}
            if file.is_lfs:
                sibling["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": 134}
        siblings.append(sibling)
    readme = commit.files.get("README.md")
    card = read_card(readme.data.decode())[0] if readme else {}
    first = list(repo.at("main").history())[-1]
    return Response(
        {
            "_id": repo.id,
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.sha,
            "createdAt": first.date,
            "lastModified": commit.date,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "cardData": card,
            "siblings": siblings,
        }
        | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    )


def describe(commit, path, expand):
    """One entry of a tree, file or folder; None where `path` is neither."""
    file = commit.files.get(path)
    if file is not None:
        entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.git_oid}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
    elif any(other.startswith(path + "/") for other in commit.files):
        entry = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    else:
        return None
    if expand:
        last = commit
        while last.parent is not None and last.parent.files.get(path) == file:
            last = last.parent
        entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
    return entry


@route("GET", REPO + f"/tree/{REVISION}(?:/(?P<path>.+))?")
def tree(hub, request, user, repo, revision, path=""):
    commit = repo.at(revision)
    prefix = path.strip("/") + "/" if path else ""
    below = [other for other in commit.files if other.startswith(prefix)]
    if prefix and not below:
        raise HubError(404, f'"{path}" does not exist on "{revision}"', "EntryNotFound")
    paths = set()
    for other in below:
        parts = other[len(prefix) :].split("/")
        depths = range(1, len(parts) + 1) if request.flag("recursive") else [1]
        paths |= {prefix + "/".join(parts[:depth]) for depth in depths}
    start = int(request.query.get("cursor", ["0"])[0])
    end = start + hub.page_size
    entries = [describe(commit, each, request.flag("expand")) for each in sorted(paths)[start:end]]
    headers = {}
    if end < len(paths):
        query = "".join(f"{name}={values[-1]}&" for name, values in request.query.items() if name != "cursor")
        headers["Link"] = f'<{hub.endpoint}{request.path}?{query}cursor={end}>; rel="next"'
    return Response(entries, headers=headers)


@route("POST", REPO + f"/paths-info/{REVISION}")
def paths_info(hub, request, user, repo, revision):
    commit = repo.at(revision)
    form = parse_qs(request.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    entries = [describe(commit, path.strip("/"), expand) for path in form.get("paths", [])]
    return Response([entry for entry in entries if entry is not None])


@route("GET", REPO + "/refs")
def list_refs(hub, request, user, repo):
    def listed(refs, prefix):
        return [{"name": name, "ref": prefix + name, "targetCommit": refs[name].sha} for name in sorted(refs)]

    refs = {"branches": listed(repo.branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
    return Response(refs | {"pullRequests": listed(repo.pull_requests, "")})


@route("GET", REPO + f"/commits/{REVISION}")
def list_commits(hub, request, user, repo, revision):
    return Response(
        [
            {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in repo.at(revision).history()
        ]
    )


@route("POST", REPO + "/branch/(?P<name>[^/]+)")
def create_branch(hub, request, user, repo, name):
    require_write(user, repo.id)
    if name.startswith("refs/"):
        raise HubError(400, f"Invalid branch name: {name}")
    if name in repo.branches:
        raise HubError(409, f"Reference already exists: {name}")
    repo.branches[name] = repo.at(request.json.get("startingPoint", "main"))
    return Response()


@route("POST", REPO + f"/tag/{REVISION}")
def create_tag(hub, request, user, repo, revision):
    require_write(user, repo.id)
    name = request.json["tag"]
    if name in repo.tags:
        raise HubError(409, f"Tag reference exists already: {name}")
    repo.tags[name] = repo.at(revision)
    return Response()


@route("GET", REPO + "/xet-(?:read|write)-token/.+")
def xet_token(hub, request, user, repo):
    raise HubError(501, "LocalHub does not serve Xet; set HF_HUB_DISABLE_XET=1")


@route("POST", REPO + f"/preupload/{REVISION}")
def preupload(hub, request, user, repo, revision):
    if not request.flag("create_pr"):
        require_write(user, repo.id)
    commit = repo.at(revision)
    files = []
    for asked in request.json["files"]:
        is_binary = b"\0" in base64.b64decode(asked["sample"])
        is_lfs = is_binary or asked["size"] > MAX_REGULAR_SIZE or asked["path"].endswith(LFS_SUFFIXES)
        known = commit.files.get(asked["path"])
        mode = {"path": asked["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
        files.append(mode | {"oid": known.etag if known else None})
    return Response({"files": files})


@route("POST", REPO_PAGE + r"\.git/info/lfs/objects/batch")
def lfs_batch(hub, request, user, repo):
    # Without a "ref" the objects are for a pull request, which anyone with an account may open.
    if "ref" in request.json or user is None:
        require_write(user, repo.id)
    objects = []
    for asked in request.json["objects"]:
        each = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in repo.lfs:
            href = f"{hub.endpoint}/lfs/{repo.kind}/{repo.id}/{asked['oid']}"
            each["actions"] = {"upload": {"href": href}, "verify": {"href": href + "/verify"}}
        objects.append(each)
    return Response({"transfer": "basic", "objects": objects})


# The client uploads to storage without its token (the URL is signed on the true Hub), so no access check here.
@route("PUT", "/lfs/(?P<stored_kind>[^/]+)/(?P<stored_in>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})")
def lfs_upload(hub, request, user, stored_kind, stored_in, oid):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, f"The content has not the sha256 {oid}")
    hub.repos[stored_kind, stored_in].lfs[oid] = request.body
    return Response()


@route("POST", "/lfs/(?P<kind>[^/]+)/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/verify")
def lfs_verify(hub, request, user, repo, oid):
    if len(repo.lfs.get(oid, b"")) != request.json["size"]:
        raise HubError(404, f"No LFS object {oid} of {request.json['size']} bytes")
    return Response()


@route("POST", REPO + f"/commit/{REVISION}")
def create_commit(hub, request, user, repo, revision):
    is_pull_request = request.flag("create_pr")
    if user is None or not is_pull_request:
        require_write(user, repo.id)
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    header = header["value"]
    head = repo.at(revision)
    if header.get("parentCommit"):
        parent = repo.at(header["parentCommit"])
        if parent is not head and not is_pull_request:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        head = parent
    files = dict(head.files)
    for operation in operations:
        key, value = operation["key"], operation["value"]
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs:
                raise HubError(400, f"Your push was rejected because the LFS pointer of {path} points to no file.")
            files[path] = File(repo.lfs[value["oid"]], True)
        elif key in ("deletedFile", "deletedFolder"):
            prefix = path.rstrip("/") + "/" if key == "deletedFolder" else None
            gone = [other for other in files if other == path or (prefix and other.startswith(prefix))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for other in gone:
                del files[other]
        else:
            raise HubError(400, f"Unknown operation: {key}")
    page = f"{hub.endpoint}/{repo.url_path}"
    answer = {"success": True, "hookOutput": ""}
    refs, name = repo.branches, revision
    if is_pull_request:
        number = len(repo.pull_requests) + 1
        refs, name = repo.pull_requests, f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{page}/discussions/{number}"
    elif revision in repo.pull_requests:
        refs = repo.pull_requests
    elif revision not in repo.branches:
        raise HubError(400, f"{revision} is not a branch")
    commit = repo.commit(refs, name, head, files, header["summary"], header.get("description", ""), user)
    return Response(answer | {"commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"})


def require_gate(repo, user):
    if repo.gated and not may_write(user, repo.id):
        message = f"Access to {repo.kind[:-1]} {repo.id} is restricted and you are not in the authorized list."
        raise HubError(401 if user is None else 403, message, "GatedRepo")


@route("GET", REPO_PAGE + f"/resolve/{REVISION}/(?P<path>.+)")
def resolve(hub, request, user, repo, revision, path):
    require_gate(repo, user)
    commit = repo.at(revision)
    file = commit.files.get(path)
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
    size = len(file.data)
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if file.is_lfs:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked is None or request.method == "HEAD":
        return Response(file.data, 200, headers)
    start, end = asked.groups()
    if start:
        start, end = int(start), min(int(end or size), size - 1)
    else:
        start, end = max(size - int(end), 0), size - 1
    if start > end:
        raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
    return Response(file.data[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments):
        self.connections = set()
        super().__init__(*arguments)

    def process_request(self, connection, address):
        self.connections.add(connection)
        super().process_request(connection, address)

    def shutdown_request(self, connection):
        self.connections.discard(connection)
        super().shutdown_request(connection)

    def close_connections(self):
        # Clients keep connections alive; a hub that has stopped must not go on answering on them.
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def handle_error(self, connection, address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hung up is no news
            super().handle_error(connection, address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits for the client's delayed acknowledgement

    def log_message(self, *arguments):
        pass

    def _serve(self):
        hub = self.server.hub
        target = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, target.path, parse_qs(target.query), headers, self._read_body())
        fault = hub.take_fault(f"{self.command} {self.path}")
        how = fault.how if fault else None
        if how == "reset":
            return self._reset()
        try:
            if isinstance(how, int):
                raise HubError(how, "This failure was ordered by a test")
            response = hub.answer(request)
        except HubError as error:
            response = Response({"error": error.message}, error.status, error.headers)
        except Exception as error:
            # A defect of this file. Not 500: the client would try again, for half a minute.
            traceback.print_exc()
            response = Response({"error": repr(error)}, 501)
        if how == "lost":
            return self._reset()
        hub.requests.append(Exchange(self.command, self.path, response.status))
        self._send(response, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, response, fault):
        body, content_type = response.body, "application/octet-stream"
        if not isinstance(body, bytes):
            body, content_type = json.dumps(body).encode(), "application/json"
        is_slow, is_cut = fault and fault.how == "slow", fault and fault.how == "cut"
        pieces = [body]
        if is_slow:
            step = len(body) // 9 + 1
            pieces = [body[i : i + step] for i in range(0, len(body), step)]
            self.server.hub.stopping.wait(fault.seconds / 10)
        self.send_response(response.status)
        for name, value in ({"Content-Type": content_type, "Content-Length": len(body)} | response.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        for piece in pieces:
            self.wfile.write(piece)
            if is_slow:
                self.server.hub.stopping.wait(fault.seconds / 10)

    def _reset(self):
        self.server.hub.requests.append(Exchange(self.command, self.path, 0))
        # Lingering for 0 seconds turns the close into a TCP reset; it happens with the last reference to the socket.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        self.close_connection = True
