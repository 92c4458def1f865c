"""The Hub's endpoints for files and commits, served on the loopback interface, with the ways in which they can fail."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from outlook_common.hub import HubError

COMMIT = "0123456789abcdef" * 2 + "01234567"

_COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>preupload|commit|tree|revision)/(?P<revision>[^/?]+)")
_LFS = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_PATH = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Repository:
    """What one repository holds, and how it behaves."""

    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    token: str | None = None  # a private one
    gated: bool = False
    etags: dict[str, str] = field(default_factory=dict)  # instead of the true hashes
    cuts: int = 0  # how many downloads break off in the middle
    broken: bool = False  # answers 500
    commits: list[str] = field(default_factory=list)  # messages of those that were pushed

    def etag(self, name: str) -> str:
        """SHA-256 for what the Hub keeps in LFS, Git's hash for the rest."""
        contents = self.files[name]
        git = hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()
        true = git if name.endswith(".json") else hashlib.sha256(contents).hexdigest()
        return self.etags.get(name, true)


@dataclass
class Server:
    """A running server: where it is, what it serves, and what it was asked."""

    url: str
    repositories: dict[str, Repository]
    requests: list[tuple[str, str]] = field(default_factory=list)  # ("GET", "owner/name/main/config.json")
    tokens: list[str | None] = field(default_factory=list)
    writers: set[str] | None = None  # tokens that may push; None for any
    objects: dict[str, bytes] = field(default_factory=dict)  # what was uploaded to LFS, by SHA-256

    def count(self, method: str, name: str) -> int:
        return sum(verb == method and path.endswith(f"/{name}") for verb, path in self.requests)


@contextmanager
def serve(**repositories: Repository) -> Iterator[Server]:
    """Serve repositories by name, all of the owner "org"."""
    named = {f"org/{name}": repository for name, repository in repositories.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_PUT(self) -> None:
            contents = self._body()
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(contents).hexdigest() == oid
            server.objects[oid] = contents
            self._reply({})

        def do_POST(self) -> None:
            body = self._body()
            if self.path == "/api/validate-yaml":
                self._reply({"errors": [], "warnings": []})
            elif server.writers is not None and self._token() not in server.writers:
                self._refuse(401, None)
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                is_new = name not in named
                named.setdefault(name, Repository({}))
                self._reply({"url": f"{server.url}/{name}", "name": name}, 200 if is_new else 409)
            elif lfs := _LFS.fullmatch(self.path):
                self._reply({"transfer": "basic", "objects": [self._lfs(one) for one in json.loads(body)["objects"]]})
                assert lfs["repo"] in named
            elif commit := _COMMIT.match(self.path):
                self._commit(named[commit["repo"]], commit["repo"], commit["what"], body)
            else:
                self._refuse(404, "EntryNotFound")

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _lfs(self, one: dict[str, Any]) -> dict[str, Any]:
            upload = {"upload": {"href": f"{server.url}/objects/{one['oid']}"}}
            return one if one["oid"] in server.objects else {**one, "actions": upload}

        def _commit(self, repository: Repository, name: str, what: str, body: bytes) -> None:
            if what == "preupload":
                modes = {True: "lfs", False: "regular"}
                files = [one["path"] for one in json.loads(body)["files"]]
                plan = [
                    {"path": path, "uploadMode": modes[path.endswith(".safetensors")], "shouldIgnore": False}
                    for path in files
                ]
                self._reply({"files": plan})
                return
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                match line["key"]:
                    case "header":
                        repository.commits.append(value["summary"])
                    case "file":
                        repository.files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        repository.files[value["path"]] = server.objects[value["oid"]]
                    case "deletedFile":
                        del repository.files[value["path"]]
            oid = hashlib.sha1(body).hexdigest()
            repository.revisions["main"] = oid
            self._reply({"success": True, "commitOid": oid, "commitUrl": f"{server.url}/{name}/commit/{oid}"})

        def _reply(self, answer: Any, status: int = 200) -> None:
            contents = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(contents)))
            self.end_headers()
            self.wfile.write(contents)

        def log_message(self, *arguments: object) -> None:
            """Keep silent."""

        def _answer(self, *, body: bool) -> None:
            match = _PATH.fullmatch(self.path)
            if (listing := _COMMIT.match(self.path)) and listing["what"] == "tree":
                files = named[listing["repo"]].files
                self._reply([
                    {"type": "file", "path": path, "size": len(contents), "oid": hashlib.sha1(contents).hexdigest()}
                    for path, contents in files.items()
                ])  # fmt: skip
            elif match is None:
                self._refuse(404, "EntryNotFound")
            else:
                self._answer_file(match, body=body)

        def _answer_file(self, match: re.Match[str], *, body: bool) -> None:
            server.requests.append((self.command, f"{match['repo']}/{match['revision']}/{match['file']}"))
            server.tokens.append(self.headers.get("Authorization"))
            repository = named.get(match["repo"])
            if repository is None or (repository.token and self._token() != repository.token):
                self._refuse(401, "RepoNotFound")
            elif repository.broken:
                self._refuse(500, None)
            elif repository.gated:
                self._refuse(403, "GatedRepo")
            elif match["revision"] not in {*repository.revisions, *repository.revisions.values()}:
                self._refuse(404, "RevisionNotFound")
            elif match["file"] not in repository.files:
                self._refuse(404, "EntryNotFound")
            else:
                commit = repository.revisions.get(match["revision"], match["revision"])
                self._send(repository, match["file"], commit, body=body)

        def _token(self) -> str:
            return self.headers.get("Authorization", "").removeprefix("Bearer ")

        def _refuse(self, status: int, code: str | None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, repository: Repository, name: str, commit: str, *, body: bool) -> None:
            contents = repository.files[name]
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(wanted[1]) if wanted else 0
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{repository.etag(name)}"')
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(contents) - 1}/{len(contents)}")
            self.send_header("Content-Length", str(len(contents) - start))
            self.end_headers()
            if not body:
                return
            if repository.cuts and name != "config.json":
                repository.cuts -= 1
                half = 0 if start else len(contents) // 2  # at the second attempt, nothing more arrives
                self.wfile.write(contents[start : start + half])
                self.close_connection = True
                return
            self.wfile.write(contents[start:])

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = Server(f"http://127.0.0.1:{httpd.server_address[1]}", named)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Do what HF_ENDPOINT and HF_HOME do when `huggingface_hub` is imported."""
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts


@contextmanager
def one_line(start: str) -> Iterator[list[str]]:
    """Expect a HubError whose message is one line that begins so, and keep it."""
    lines: list[str] = []
    with pytest.raises(HubError) as caught:
        yield lines
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(start), str(caught.value)
    lines.append(str(caught.value))
