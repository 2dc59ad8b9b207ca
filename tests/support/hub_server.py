"""A server on loopback that speaks as much of Hugging Face's API as downloads need, with the faults that tests ask for."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves the files of a folder as the model `model`, at one commit, under the branch main.

    `requests` lists (method, path of a file, first byte), in order. `gated`: files answer 403 as those of a restricted model.
    `break_at`: the first download of a file of at least twice that many bytes breaks off after so many; if `halfway` is set,
    it is called there instead.
    """

    def __init__(self, folder: Path, model: str = "maker/tiny") -> None:
        self.model, self.folder = model, folder
        self.gated, self.break_at = False, 0
        self.halfway: Callable[[], None] | None = None
        self.requests: list[tuple[str, str, int]] = []
        self.breaks = 0
        self.connections: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """The value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def downloads(self) -> set[str]:
        """The files that were downloaded, in part or as a whole."""
        return {file for method, file, _ in self.requests if method == "GET"}

    def stop(self) -> None:
        """Closes the port and all connections."""
        self._server.shutdown()
        self._thread.join()
        for connection in tuple(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def files(self) -> dict[str, bytes]:
        """The model's files by name."""
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def pointed_at(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> Iterator[None]:
    """Makes huggingface_hub in this process use `endpoint` and `cache`: it read its environment when it was imported."""
    with monkeypatch.context() as patch:
        constants = huggingface_hub.constants
        patch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # what is kept of a broken connection
        yield


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            hub.connections.add(self.connection)

        def finish(self) -> None:
            hub.connections.discard(self.connection)
            super().finish()

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._file("HEAD")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            api = f"/api/models/{hub.model}"
            if not path.startswith("/api/"):
                self._file("GET")
            elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": name, **_entry(content)} for name, content in hub.files().items()]
                self._json({"id": hub.model, "modelId": hub.model, "sha": COMMIT, "siblings": siblings})
            elif path == f"{api}/tree/{COMMIT}":
                self._json([{"type": "file", "path": name, **_entry(content)} for name, content in hub.files().items()])
            elif path.startswith(f"{api}/revision/"):
                self._refuse(404, "RevisionNotFound")
            else:
                self._refuse(401, "RepoNotFound")

        def _file(self, method: str) -> None:
            """Answers with a file, from the first byte that the client asks for."""
            name = unquote(urlsplit(self.path).path).partition("/resolve/")[2].partition("/")[2]
            content = hub.files()[name]
            first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            hub.requests.append((method, name, first))
            if hub.gated:
                self._refuse(403, "GatedRepo")
                return
            body = content[first:]
            self.send_response(206 if first else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{_entry(content)["blobId"]}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if method == "HEAD":
                return
            if hub.break_at and len(content) >= 2 * hub.break_at and hub.breaks == 0:
                hub.breaks += 1
                self.wfile.write(body[: hub.break_at])
                if hub.halfway is None:
                    self.close_connection = True
                    return
                hub.halfway()
                body = body[hub.break_at :]
            with suppress(ConnectionError):
                self.wfile.write(body)

        def _json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _entry(content: bytes) -> dict[str, Any]:
    """Returns what the API says of a file."""
    digest = hashlib.sha1(content).hexdigest()
    return {"size": len(content), "blobId": digest, "oid": digest}
