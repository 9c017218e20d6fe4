"""As much of the Hugging Face Hub as an upload and a download need, over HTTP on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = r"([^/]+/[^/]+)"


class Hub(ThreadingHTTPServer):
    """Repositories as a list of commits per branch, each a dict of path to bytes.

    Attributes:
        calls: method, path and token of every request.
        private: the repositories that were made private.
        broken: answer every commit with this status, if not 0.
        slow: seconds that a commit takes.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.commits: dict[tuple[str, str], list[dict[str, bytes]]] = {}
        self.stored: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.calls: list[tuple[str, str, str | None]] = []
        self.private: set[str] = set()
        self.broken, self.slow = 0, 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The newest of a branch; a commit's own name stands for the main one."""
        return self.commits.get((repo, branch), self.commits[repo, "main"])[-1]


def _id(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length") or 0)
        body = (
            self._chunks()
            if self.headers.get("Transfer-Encoding") == "chunked"
            else self.rfile.read(length)
        )
        self.server.calls.append((self.command, path, self.headers.get("Authorization")))
        for pattern, answer in _ROUTES.items():
            if found := re.fullmatch(pattern, path):
                return self._send(*answer(self, body, *found.groups()))
        return self._send({"error": f"no {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo}
        if (repo, "main") in self.server.commits:
            return {"error": "You already created this model repo", **url}, 409
        self.server.commits[repo, "main"] = [{}]
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(repo)
        return (url,)

    def branch(self, body: bytes, repo: str, branch: str) -> Any:
        if (repo, branch) in self.server.commits:
            return {"error": "there already"}, 409
        self.server.commits[repo, branch] = self.server.commits[repo, "main"][-1:]
        return ({},)

    def preupload(self, body: bytes, repo: str, branch: str) -> Any:
        large = (".safetensors", ".bin")
        return (
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(body)["files"]
                ]
            },
        )

    def batch(self, body: bytes, repo: str) -> Any:
        return (
            {
                "transfer": "basic",
                "objects": [
                    {
                        "oid": o["oid"],
                        "size": o["size"],
                        "actions": {
                            "upload": {"href": f"{self.server.url}/lfs/{o['oid']}", "header": {}}
                        },
                    }
                    for o in json.loads(body)["objects"]
                ],
            },
        )

    def store(self, body: bytes, oid: str) -> Any:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        return ({},)

    def commit(self, body: bytes, repo: str, branch: str) -> Any:
        time.sleep(self.server.slow)
        if self.server.broken:
            return {"error": "the hub is ill"}, self.server.broken
        commits = self.server.commits[repo, branch]
        tree = dict(commits[-1])
        for line in body.decode().splitlines():
            said = json.loads(line)
            value = said["value"]
            if said["key"] == "header":
                self.server.messages.append(value["summary"])
            elif said["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif said["key"] == "lfsFile":
                tree[value["path"]] = self.server.stored[value["oid"]]
            elif said["key"] == "deletedFile":
                tree.pop(value["path"], None)
        commits.append(tree)
        sha = _id(len(commits))
        return (
            {
                "success": True,
                "commitUrl": f"{self.server.url}/{repo}/commit/{sha}",
                "commitOid": sha,
                "hookOutput": "",
            },
        )

    def info(self, body: bytes, repo: str, branch: str | None = None) -> Any:
        if (repo, branch or "main") not in self.server.commits:
            return {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}
        commits = self.server.commits[repo, branch or "main"]
        files = [{"rfilename": name} for name in commits[-1]]
        return (
            {
                "id": repo,
                "modelId": repo,
                "sha": _id(len(commits)),
                "private": False,
                "tags": [],
                "siblings": files,
            },
        )

    def tree(self, body: bytes, repo: str, branch: str) -> Any:
        return (
            [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in self.server.files(repo, branch).items()
            ],
        )

    def resolve(self, body: bytes, repo: str, branch: str, name: str) -> Any:
        sha = {"X-Repo-Commit": _id(len(self.server.commits[repo, "main"]))}
        data = self.server.files(repo, branch).get(name)
        if data is None:
            return {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", **sha}
        return data, 200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', **sha}


_ROUTES = {
    "/api/repos/create": _Answers.create,
    "/api/validate-yaml": lambda self, body: ({"errors": [], "warnings": []},),
    f"/api/models/{MODEL}/branch/(.+)": _Answers.branch,
    f"/api/models/{MODEL}/preupload/(.+)": _Answers.preupload,
    f"/{MODEL}.git/info/lfs/objects/batch": _Answers.batch,
    "/lfs/(.+)": _Answers.store,
    f"/api/models/{MODEL}/commit/(.+)": _Answers.commit,
    f"/api/models/{MODEL}": _Answers.info,
    f"/api/models/{MODEL}/revision/(.+)": _Answers.info,
    f"/api/models/{MODEL}/tree/([^/]+)": _Answers.tree,
    f"/{MODEL}/resolve/([^/]+)/(.+)": _Answers.resolve,
}
