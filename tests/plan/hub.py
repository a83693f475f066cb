"""A hub on this machine: what huggingface_hub asks of the real one, range requests included."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Serves ``root/<organisation>/<name>/<file>`` as repositories.

    Attributes:
        sent: file name -> bytes that were sent of it.
        gated: repositories that refuse.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.sent: dict[str, int] = {}
        self.gated: set[str] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Not on stderr."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
        if match is None:
            return self._refuse(404, "")
        repository, revision, name = match.groups()
        if repository in self.server.gated:
            return self._refuse(403, "GatedRepo")
        if not (self.server.root / repository).is_dir():
            return self._refuse(404, "RepoNotFound")
        if revision not in ("main", _COMMIT):
            return self._refuse(404, "RevisionNotFound")
        path = self.server.root / repository / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        self._send(path, with_body)
        return None

    def _send(self, path: Path, with_body: bool) -> None:
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        begin = int(wanted[1]) if wanted else 0
        end = min(size, int(wanted[2]) + 1) if wanted and wanted[2] else size
        self.send_response(206 if wanted else 200)
        for key, value in (
            ("Content-Length", str(end - begin)),
            ("Content-Range", f"bytes {begin}-{end - 1}/{size}"),
            ("ETag", f'"{path.name}-{size}"'),
            ("X-Repo-Commit", _COMMIT),
        ):
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.server.sent[path.name] = self.server.sent.get(path.name, 0) + end - begin
            with path.open("rb") as file:
                file.seek(begin)
                self.wfile.write(file.read(end - begin))

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
