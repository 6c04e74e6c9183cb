"""A Hugging Face hub on loopback: the requests that `snapshot_download` makes, answered from folders.

GET /api/models/ID/revision/REV names the commit, GET /api/models/ID/tree/COMMIT lists the files, HEAD and GET
/ID/resolve/COMMIT/FILE give them. Every request is kept, so that a test can say what was asked for.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


@dataclass
class Hub:
    """What the server has, and what it was asked.

    Attributes:
        revisions: folder of each (hub id, commit).
        branches: commit of each (hub id, branch).
        token: what a request for a model in `gated` must bear.
        gated: hub ids that need the token.
        truncated: names of files of which there is only the first half.
        cut: names of files of which only the first half is sent, without the second.
        requests: (method, path, token) of every request.
        url: HF_ENDPOINT.
    """

    revisions: dict[tuple[str, str], Path] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    token: str = "hf_secret"
    gated: set[str] = field(default_factory=set)
    truncated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def add(self, hub_id: str, folder: Path, commit: str = COMMIT, branch: str = "main") -> None:
        """Publish `folder` as a commit at the tip of a branch."""
        self.revisions[hub_id, commit] = folder
        self.branches[hub_id, branch] = commit

    def fetched(self) -> set[str]:
        """Names of the files that were sent."""
        return {
            path.rpartition("/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        bearer = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, path, bearer))
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        match = match or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        if match is None:
            return self.refuse(404, "EntryNotFound")
        hub_id, what, revision = match[1], match[2], match[3]
        if hub_id not in {known for known, _ in self.hub.revisions}:
            return self.refuse(401, "RepoNotFound")  # as the real one, which hides private models
        commit = self.hub.branches.get((hub_id, revision), revision)
        folder = self.hub.revisions.get((hub_id, commit))
        if folder is None:
            return self.refuse(404, "RevisionNotFound")
        if what == "revision":  # a gated model can be seen by everyone
            return self.send_json({"id": hub_id, "sha": commit, "siblings": []})
        if what == "tree":
            return self.send_json([entry(folder, file) for file in files_of(folder)])
        if hub_id in self.hub.gated and bearer != self.hub.token:
            return self.refuse(401 if bearer is None else 403, "GatedRepo")
        return self.send_file(folder / match[4], commit)

    def send_file(self, file: Path, commit: str) -> None:
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        data = file.read_bytes()
        if file.name in self.hub.truncated:
            data = data[: len(data) // 2]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(file)}"'}
        if file.suffix == ".safetensors":  # LFS
            headers |= {"X-Linked-Etag": f'"{sha256(file)}"', "X-Linked-Size": str(len(data))}
        if file.name in self.hub.cut and self.command == "GET":
            data = data[: len(data) // 2]
        return self.send_data(200, data, "application/octet-stream", headers)

    def send_json(self, content: object) -> None:
        self.send_data(200, json.dumps(content).encode(), "application/json", {})

    def refuse(self, code: int, name: str) -> None:
        headers = {"X-Error-Code": name, "X-Error-Message": f"{name} (test server)"}
        self.send_data(code, b"{}", "application/json", headers)

    def send_data(self, code: int, data: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items() | {("Content-Type", kind)}:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def entry(folder: Path, name: str) -> dict[str, object]:
    """A file in the tree's listing."""
    file = folder / name
    size = file.stat().st_size
    fields = {"type": "file", "path": name, "size": size, "oid": git_hash(file)}
    if file.suffix == ".safetensors":
        fields["lfs"] = {"oid": sha256(file), "size": size, "pointerSize": 134}
    return fields


def git_hash(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub without models on a free port of loopback."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def environment(hub: Hub, home: Path, **variables: str) -> dict[str, str]:
    """Variables of a process that uses this hub, with a cache of its own under `home`."""
    left_out = ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    return inherited | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **variables,
    }
