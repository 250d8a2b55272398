# SPDX-License-Identifier: Apache-2.0
"""The least that an agent can report to: it takes every report and heartbeat, and asks for nothing."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.fleet_ca import FleetCa

# As the orchestrator's own settings have it.
INTERVALS = {"send_report": False, "heartbeat_interval_s": 10.0, "report_interval_s": 60.0}


@dataclass
class SilentOrchestrator:
    """`seen` counts requests by method: PUT is a report, POST a heartbeat."""

    url: str
    seen: Counter[str] = field(default_factory=Counter)


@contextmanager
def silent_orchestrator(ca: FleetCa) -> Iterator[SilentOrchestrator]:
    seen: Counter[str] = Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen[self.command] += 1
            self.send_response(204)
            self.end_headers()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen[self.command] += 1
            answer = json.dumps(INTERVALS).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    credential = ca.issue("ppec://orchestrator/main")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(credential.certificate, credential.key)
    context.load_verify_locations(ca.path)
    context.verify_mode = ssl.CERT_REQUIRED
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield SilentOrchestrator(f"https://127.0.0.1:{server.server_address[1]}", seen)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
