"""A stand-in for the Hub's HTTP interface, as much of it as huggingface_hub calls: make a repository, upload, read."""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as constants

if TYPE_CHECKING:
    import pytest

TOKEN = "hf_of_a_test"
ACCOUNT = "ann"
Files = dict[str, bytes]


@dataclass
class Repository:
    """`commits`: files by the hash of their commit, in order; `branches`: hashes by name."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Add a commit with these files, and those of the branch before."""
        whole = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        name = hashlib.sha1(repr((len(self.commits), sorted(whole))).encode()).hexdigest()
        self.commits[name], self.branches[branch] = whole, name
        return name

    def resolve(self, revision: str) -> str | None:
        """The hash of a branch or commit, None where there is none."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> Files:
        """Those of the main branch."""
        return self.commits[self.branches["main"]]


@dataclass
class Hub:
    """The repositories by name, large objects by hash, and the requests that came."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer(self._read)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._write)

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._send(200, {})

    def _answer(self, work: Any) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        work(path)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._known):
            self._refuse(404 if self._known else 401, "RepoNotFound")
            return None
        return repository

    def _read(self, path: str) -> None:
        if path == "/api/whoami-v2":
            self._send(200, {"name": ACCOUNT, "type": "user", "orgs": []}) if self._known else self._refuse(401, "Auth")
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, kind, revision = match[1], match[2], match[3] or "main"
            rest = ""
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, kind, revision, rest = match[1], "file", match[2], match[3]
        else:
            return self._refuse(404, "EntryNotFound")
        if (repository := self._repository(name)) is None:
            return None
        if (commit := repository.resolve(revision)) is None:
            return self._refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if kind == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return self._send(200, entries)
        if kind != "file":
            siblings = [{"rfilename": path} for path in files]
            about = {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings}
            return self._send(200, about)
        if rest not in files:
            return self._refuse(404, "EntryNotFound")
        etag = hashlib.sha1(files[rest]).hexdigest()
        return self._send(200, files[rest], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _write(self, path: str) -> None:
        body = self._body()
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if not self._known:
            return self._refuse(401, "Auth")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or ACCOUNT}/{asked['name']}"
            there = name in self.hub.repositories
            if not there:
                repository = self.hub.repositories[name] = Repository(
                    private=bool(asked.get("private")) or asked.get("visibility") == "private"
                )
                repository.commit({".gitattributes": b""})
            return self._send(409 if there else 200, {"url": f"{self.hub.url}/{name}", "name": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            modes = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": each["path"],
                    "uploadMode": modes[each["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            return self._commit(match[1], match[2], body)
        return self._refuse(404, "EntryNotFound")

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        files: Files = {}
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.repositories[name].commit(files, branch)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def use_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Make huggingface_hub speak to the stand-in, with the token that it knows and this cache."""
    for name, value in {
        "ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub on this machine, until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
