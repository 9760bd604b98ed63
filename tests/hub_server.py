"""A stand-in of the Hugging Face Hub: the files of folders, as `/OWNER/NAME/resolve/REVISION/FILE` serves them."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Hub:
    """`repos`: by id, the folder of each revision. `gated` ids are refused, `broken` files answer with an error, and
    of `cut` ones only the first bytes are sent. `sent`: the paths of all files that were sent, in order."""

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    sent: list[str] = field(default_factory=list)
    url: str = ""


def commit_of(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            if self.path == "/":
                self._refuse(404, "")
                return
            owner, name, *rest = self.path.strip("/").split("/")
            revisions = hub.repos.get(repo := f"{owner}/{name}", {})
            folders = revisions | {commit_of(folder): folder for folder in revisions.values()}
            folder = folders.get(rest[1]) if rest[:1] == ["resolve"] else None
            if not revisions or rest[:1] != ["resolve"]:
                self._refuse(404, "RepoNotFound")
            elif repo in hub.gated:
                self._refuse(403, "GatedRepo")
            elif folder is None:
                self._refuse(404, "RevisionNotFound")
            else:
                self._send(folder, "/".join(rest[2:]), body)

        def _send(self, folder: Path, name: str, body: bool) -> None:
            if not (folder / name).is_file():
                self._refuse(404, "EntryNotFound")
                return
            if body and name in hub.broken:
                self._refuse(403, "")
                return
            content = (folder / name).read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit_of(folder))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                hub.sent.append(name)
                self.wfile.write(content[:100] if name in hub.cut else content)

        def _refuse(self, code: int, reason: str) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", reason)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
