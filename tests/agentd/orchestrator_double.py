# SPDX-License-Identifier: Apache-2.0
"""An orchestrator to report to and fetch images from."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from .fleet_certificates import FleetCa


class Orchestrator:
    """An HTTPS server that keeps what it is sent and serves `files`. `answers` are what requests get, by method: deltas
    none that an agent takes for one, unless a test says that they are taken.

    `troubles` befall GETs, one each: a status to answer, or "cut" to hang up in mid-body, "silent" to say nothing more.
    """

    def __init__(self, folder: Path, identity: str = "ppec://orchestrator/main") -> None:
        folder.mkdir(exist_ok=True)
        self.ca = FleetCa(folder)
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.peers: list[str] = []
        self.files: dict[str, bytes] = {}
        self.troubles: list[int | Literal["cut", "silent"]] = []
        self.answers: dict[str, tuple[int, Any]] = {
            "PUT": (204, None),
            "PATCH": (405, None),
            "POST": (200, {"send_report": False, "heartbeat_interval_s": 0.5, "report_interval_s": 60.0}),
        }
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._note({})
                content = outer.files.get(self.path)
                trouble = outer.troubles.pop(0) if outer.troubles else 404 if content is None else 200
                if isinstance(trouble, int):
                    self._answer(trouble, content or b"" if trouble == 200 else b"")
                    return
                self._answer(200, content or b"", sent=len(content or b"") // 2)
                if trouble == "silent":
                    outer.closed.wait(60)
                self.close_connection = True

            def do_PUT(self) -> None:
                self._note(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, body = outer.answers[self.command]
                self._answer(status, b"" if body is None else json.dumps(body).encode())

            def do_POST(self) -> None:
                self.do_PUT()

            def do_PATCH(self) -> None:
                self.do_PUT()

            def _note(self, body: dict[str, Any]) -> None:
                certificate = self.connection.getpeercert()  # type: ignore[attr-defined]
                outer.peers += [value for kind, value in certificate["subjectAltName"] if kind == "URI"]
                outer.requests.append((self.command, self.path, body))

            def _answer(self, status: int, content: bytes, sent: int | None = None) -> None:
                self.send_response(status)
                if status != 204:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:sent])

            def log_message(self, *_: Any) -> None:
                pass

        self._handler = Handler
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*self.ca.issue(identity))
        self._context.load_verify_locations(self.ca.path)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self.closed = threading.Event()
        # Bound from now on, so that while nobody listens nobody else gets the port.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self._port: int = self._held.getsockname()[1]
        self.open()
        self.url = f"https://127.0.0.1:{self._port}"
        certificate, key = self.ca.issue("ppec://host/h1")
        self.tls = {"ca_path": str(self.ca.path), "certificate_path": str(certificate), "key_path": str(key)}

    def open(self) -> None:
        """Listens; after `close`, on the same port again."""
        self.closed.clear()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._server.daemon_threads = True
        self._server.socket = self._context.wrap_socket(self._server.socket, server_side=True)
        # It is asked so often whether it is to end, and `close` waits for that.
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Connections are refused from now on."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def end(self) -> None:
        """For good: the port is given back."""
        self.close()
        self._held.close()

    def sent(self, method: str) -> list[dict[str, Any]]:
        return [body for seen, _, body in self.requests if seen == method]


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[Callable[..., Orchestrator]]:
    made: list[Orchestrator] = []

    def make(identity: str = "ppec://orchestrator/main") -> Orchestrator:
        made.append(Orchestrator(tmp_path / f"orchestrator-{len(made)}", identity))
        return made[-1]

    yield make
    for server in made:
        server.end()
