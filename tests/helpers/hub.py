"""A model hub on this machine: enough of huggingface.co's API to create models, to upload and to download files."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN, READ_TOKEN = "hf_of_a_test", "hf_that_only_reads"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Files are in `folder`/OWNER/NAME; `models`: id -> private; `requests`: (method, path) of all that was asked."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.models, self.requests, self.refuses = folder, {}, [], ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """whoami, what a model is, files."""
        server, path = self._asked(), self.path.split("?")[0].strip("/").split("/")
        if self.path == "/api/whoami-v2":
            token = {"role": "read" if READ_TOKEN in self.headers.get("Authorization", "") else "write"}
            me = {"name": "someone", "type": "user", "orgs": [{"name": "lab"}], "auth": {"accessToken": token}}
            return self._answer(me) if self._knows() else self._refuse(401, "")
        if path[:2] == ["api", "models"] and "/".join(path[2:]) in server.models:
            name = "/".join(path[2:])
            return self._answer({"id": name, "private": server.models[name], "sha": COMMIT, "siblings": []})
        file = server.folder / Path(*path[:2], *path[4:])
        if path[2:3] == ["resolve"] and file.is_file():
            return self._send(200, file.read_bytes())
        known = {"/".join(path[:2]), "/".join(path[2:4])} & server.models.keys()
        return self._refuse(404, "EntryNotFound" if known else "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Creates a model, says that all files are small, takes a commit."""
        server, path = self._asked(), self.path.split("?")[0].strip("/").split("/")
        size = self.headers.get("Content-Length")
        body = self.rfile.read(int(size)) if size else b"".join(iter(self._chunk, b""))
        if not self._knows():
            return self._refuse(401, "")
        if server.refuses and server.refuses in self.path:
            return self._refuse(403, "")
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization', 'someone')}/{wanted['name']}"
            code = 409 if name in server.models else 200
            server.models.setdefault(name, wanted.get("visibility") == "private")
            return self._send(code, json.dumps({"url": f"{server.address}/{name}", "id": name}).encode())
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path[4] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer({"files": modes})
        for row in map(json.loads, body.splitlines()):
            if row["key"] == "file":
                file = server.folder / "/".join(path[2:4]) / row["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(row["value"]["content"]))
        url = f"{server.address}/{'/'.join(path[2:4])}/commit/{COMMIT}"
        return self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _asked(self) -> Hub:
        self.server.requests.append((self.command, self.path))
        return self.server

    def _knows(self) -> bool:
        return self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}")

    def _chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def _answer(self, content: dict) -> None:
        self._send(200, json.dumps(content).encode())

    def _refuse(self, code: int, reason: str) -> None:
        self._send(code, b'{"error": "refused"}', {"X-Error-Code": reason})

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        own = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        for name, value in (own | {"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *words) -> None:
        """Prints nothing."""


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    with Hub(folder) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
