"""A Hugging Face Hub of one thread, for tests: repositories with revisions over the HTTP that huggingface_hub speaks.

Of a model card's metadata it asks what the hub does: a mapping, names of models that can be on the hub, tags that are
text. The rest (the list of licences, say) is of fields that our cards leave to the user.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import yaml
from huggingface_hub.utils import validate_repo_id

_METADATA = re.compile(r"^---\n(.*?)\n---\n", re.DOTALL)


class Repositories:
    """Files by revision: a branch is where commits go, a commit's id is a revision too."""

    def __init__(self):
        self.commits = {}  # (repository, commit): files by path
        self.branches = {}  # (repository, branch): commit
        self.cards = []  # every card that was checked

    def make(self, repo_id):
        if (repo_id, "main") in self.branches:
            return False
        self._store(repo_id, "main", {})
        return True

    def commit(self, repo_id, branch, added, deleted=()):
        files = {path: data for path, data in self.files(repo_id, branch).items() if path not in deleted}
        return self._store(repo_id, branch, files | added)

    def branch(self, repo_id, name):
        if (repo_id, name) in self.branches:
            return False
        self.branches[repo_id, name] = self.branches[repo_id, "main"]
        return True

    def commit_id(self, repo_id, revision):
        commit = self.branches.get((repo_id, revision), revision)
        return commit if (repo_id, commit) in self.commits else None

    def files(self, repo_id, revision="main"):
        return self.commits[repo_id, self.commit_id(repo_id, revision)]

    def put_folder(self, repo_id, folder, under=""):
        """Commit the files of a folder to main, as a user does who uploads it."""
        self.make(repo_id)
        prefix = f"{under}/" if under else ""
        added = {prefix + path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return self.commit(repo_id, "main", added)

    def _store(self, repo_id, branch, files):
        number = str(len(self.commits)).encode()
        commit = hashlib.sha1(number).hexdigest()
        self.commits[repo_id, commit] = files
        self.branches[repo_id, branch] = commit
        return commit


def problems_of_metadata(content):
    """What the hub would refuse a README.md for."""
    found = _METADATA.match(content)
    metadata = yaml.safe_load(found[1]) if found else None
    if not isinstance(metadata, dict):
        return ["the metadata are no mapping"]
    names = metadata.get("base_model", [])
    problems = [
        f'"{key}" must be text' for key in ("library_name", "pipeline_tag", "license") if not _is_text(metadata, key)
    ]
    tags = metadata.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        problems.append('"tags" must be a list of texts')
    for name in names if isinstance(names, list) else [names]:
        try:
            validate_repo_id(name)
            if not name:
                raise ValueError
        except ValueError:
            problems.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    return problems


def _is_text(metadata, key):
    return key not in metadata or (isinstance(metadata[key], str) and bool(metadata[key]))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            files = self.repositories.files(*found.groups())
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files.items()
            ]
            self._json(entries)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(found[1], found[2] or "main")
        else:
            self._json({"error": f"no such page: {path}"}, 404)

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
            is_new = self.repositories.make(repo_id)
            self._json({"url": f"{self._endpoint()}/{repo_id}", "name": repo_id}, 200 if is_new else 409)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            self._json({}, 200 if self.repositories.branch(*found.groups()) else 409)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(*found.groups(), [json.loads(line) for line in body.splitlines()])
        else:
            self._json({"error": f"no such page: {path}"}, 404)

    def log_message(self, *args):
        """Tests print nothing."""

    def _endpoint(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def _file(self, repo_id, revision, path):
        commit = self.repositories.commit_id(repo_id, revision)
        if commit is None:
            known = (repo_id, "main") in self.repositories.branches
            return self._error("RevisionNotFound" if known else "RepoNotFound", 404)
        data = self.repositories.files(repo_id, commit).get(path)
        if data is None:
            return self._error("EntryNotFound", 404)
        return self._send(data, 200, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit})

    def _info(self, repo_id, revision):
        commit = self.repositories.commit_id(repo_id, revision)
        if commit is None:
            return self._error("RepoNotFound", 404)
        siblings = [{"rfilename": path} for path in self.repositories.files(repo_id, commit)]
        return self._json({"id": repo_id, "sha": commit, "siblings": siblings})

    def _validate(self, content):
        self.repositories.cards.append(content)
        problems = [{"message": problem} for problem in problems_of_metadata(content)]
        self._json({"errors": problems, "warnings": []}, 400 if problems else 200)

    def _commit(self, repo_id, branch, lines):
        values = [(line["key"], line["value"]) for line in lines]
        added = {value["path"]: base64.b64decode(value["content"]) for key, value in values if key == "file"}
        deleted = {value["path"] for key, value in values if key == "deletedFile"}
        commit = self.repositories.commit(repo_id, branch, added, deleted)
        self._json({"commitUrl": f"{self._endpoint()}/{repo_id}/commit/{commit}", "commitOid": commit})

    def _error(self, code, status):
        self._send(b"", status, {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, content, status=200):
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _send(self, data, status, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _etag(data):
    return hashlib.sha1(data).hexdigest()


@contextmanager
def stand_in_hub(monkeypatch, cache):
    """Let this process take a server of its own for the hub, and an empty folder for its cache.

    Yields:
        The [`Repositories`] that it serves.
    """
    repositories = Repositories()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"repositories": repositories}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
