# SPDX-License-Identifier: Apache-2.0
"""HTTPS towards the orchestrator with the host's certificate: stdlib only, blocking, for use in threads.

The server must show a certificate of the fleet CA for its address *and* the orchestrator's identity: any host of the
fleet holds a certificate of the same CA, and none of them may play orchestrator.
"""

from __future__ import annotations

import errno
import http.client
import json
import socket
import ssl
from typing import Any
from urllib.parse import urlsplit

from ppec_agentd.settings import TlsSettings
from ppec_contract.errors import PpecError
from ppec_contract.frames import decode_json_object
from ppec_contract.identity import Identity

MAX_ANSWER_BYTES = 1024 * 1024
_NO_WAY_THERE = frozenset({errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN})


def is_away(error: Exception) -> bool:
    """Whether `request`, or a read of its response, failed because the other end is not there or has just gone.

    That passes, say with its restart. A certificate that one side refuses does not, nor does a file that can't be read.
    """
    if isinstance(error, ssl.SSLError):
        # Killed in mid-handshake. The other kinds are refusals, ours or theirs.
        return isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, ConnectionError | TimeoutError | http.client.IncompleteRead):
        return True
    return isinstance(error, OSError) and error.errno in _NO_WAY_THERE


class OrchestratorLink:
    """One connection, kept alive between requests and opened again when it was lost. Not thread-safe.

    Every method raises `host.unreachable` (try again) when the other end can't be reached, and `auth.wrong_identity`
    when it is somebody else.
    """

    def __init__(self, url: str, tls: TlsSettings, timeout_s: float) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._subject = f"{self._host}:{self._port}"
        self._tls = tls
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPSConnection | None = None
        self._socket: ssl.SSLSocket | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = self._socket = None

    def limit_waits(self, timeout_s: float) -> None:
        """From now on no single wait for the other end takes longer. For who reads a long response piece by piece."""
        if self._socket is not None:
            self._socket.settimeout(timeout_s)

    def send_json(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        """Sends a JSON body, returns the JSON answer ({} for none). Raises the answer's own problem."""
        for attempt in (1, 2):
            reused = self._connection is not None
            try:
                answer = self.request(method, path, body)
                text = answer.read(MAX_ANSWER_BYTES)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A kept-alive connection may have been closed meanwhile: that is worth one fresh try.
                if not reused or attempt == 2:
                    raise self._unreachable(error) from error
                continue
            if answer.will_close:
                self.close()
            if answer.status >= 400:
                raise self._refusal(answer.status, text)
            return decode_json_object(text) if text else {}
        raise AssertionError("unreachable")

    def request(self, method: str, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
        """Sends one request and returns the response unread. Raises OSError and HTTPException as they come."""
        connection = self._connection or self._connect()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def _connect(self) -> http.client.HTTPSConnection:
        # A fresh context each time: the files may have been renewed.
        context = ssl.create_default_context(cafile=str(self._tls.ca_path))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._tls.certificate_path, self._tls.key_path)
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=context)
        connection.connect()
        found = Identity.from_peer_certificate(connection.sock.getpeercert())
        if found.uri != self._tls.server_identity:
            connection.close()
            raise PpecError(
                "auth.wrong_identity",
                f"{self._subject} is {found.uri}, wanted {self._tls.server_identity}",
                subject=self._subject,
            )
        # Kept apart: http.client forgets it as soon as the last response on it has begun, and reads on from it.
        self._connection, self._socket = connection, connection.sock
        return connection

    def _unreachable(self, error: Exception) -> PpecError:
        return PpecError("host.unreachable", f"{self._subject} can't be reached: {error}", subject=self._subject)

    def _refusal(self, status: int, text: bytes) -> PpecError:
        try:
            problem = json.loads(text)
            code, detail = str(problem["code"]), str(problem["detail"])[:500]
        except (ValueError, KeyError, TypeError):
            code, detail = "", ""
        return PpecError(
            "internal.error",
            f"{self._subject} answered {status} {code} {detail}".rstrip(),
            subject=self._subject,
            details={"status": status, "code": code},
        )
