# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A session with a host's proxy: HTTPS with a client certificate, and a server that must be the host it should be.

The proxy's certificate is verified against the fleet CA and must name `ppec://host/<name>`. Addresses are not
compared: hosts are known by identity, wherever they listen.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl

from ansible_collections.ppec.cloud.plugins.module_utils.contract_table import MAX_FRAME_BYTES, METHODS, NDJSON
from ansible_collections.ppec.cloud.plugins.module_utils.messages import decode_object, encode_object, read_reply
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError

# For reaching the host and, again, for the TLS handshake.
CONNECT_TIMEOUT_S = 10.0
_UNAVAILABLE_STATUS = (502, 503, 504)


class ProxyAddress:
    """Where a host's proxy listens, who must answer, and the files that say who we are."""

    def __init__(self, host, address, port, ca_path, certificate_path, key_path):
        self.host = host
        self.address = address
        self.port = port
        self.ca_path = ca_path
        self.certificate_path = certificate_path
        self.key_path = key_path


class _DeadlineSocket(ssl.SSLSocket):
    """Gives every read and write only the time the call has left, so that a peer can't stretch it byte by byte."""

    deadline = None

    def recv_into(self, *args, **kwargs):
        if self.deadline is not None:
            self.settimeout(self.deadline.left_s())
        return super().recv_into(*args, **kwargs)

    def send(self, *args, **kwargs):
        if self.deadline is not None:
            self.settimeout(self.deadline.left_s())
        return super().send(*args, **kwargs)


def tls_context(ca_path, certificate_path=None, key_path=None):
    """A client's context that trusts the fleet CA alone; identity is checked by `peer_identities`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=ca_path)
        if certificate_path:
            context.load_cert_chain(certificate_path, key_path)
    except (OSError, ssl.SSLError) as error:
        raise ProblemError(
            "auth.required",
            f"the certificates can't be loaded: {error} (CA {ca_path}, certificate {certificate_path}, key {key_path})",
            hint="Give PEM files that this user may read.",
        ) from error
    return context


def peer_identities(certificate):
    """The ppec:// URIs among a verified certificate's subject alternative names."""
    names = (certificate or {}).get("subjectAltName", ())
    return [value for kind, value in names if kind == "URI" and value.startswith("ppec://")]


class ProxySession:
    """One connection to one proxy; calls go over it one after the other."""

    def __init__(self, where, deadline):
        self._where = where
        self._deadline = deadline
        self._subject = f"host {where.host}"
        self._connection = http.client.HTTPConnection(where.address, where.port)
        # Without this, http.client would open a connection of its own, in clear, when this one is gone.
        self._connection.auto_open = 0
        self._connection.sock = self._connect()
        # A stream whose last reply is read, but not yet its end: waiting for that could only delay the answer.
        self._ended_stream = None

    def _connect(self):
        where = self._where
        context = tls_context(where.ca_path, where.certificate_path, where.key_path)
        context.sslsocket_class = _DeadlineSocket
        try:
            raw = socket.create_connection(
                (where.address, where.port), timeout=min(CONNECT_TIMEOUT_S, self._deadline.left_s())
            )
        except OSError as error:
            raise self._unreachable(error) from error
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = context.wrap_socket(raw)
        except OSError as error:
            raw.close()
            raise self._tls_problem(error) from error
        self._require_identity(tls)
        tls.deadline = self._deadline
        return tls

    def _require_identity(self, tls):
        wanted = f"ppec://host/{self._where.host}"
        found = peer_identities(tls.getpeercert())
        if found != [wanted]:
            tls.close()
            shown = ", ".join(uri[:120] for uri in found) or "no PPEC identity"
            raise ProblemError(
                "auth.wrong_identity",
                f"{self._where.address}:{self._where.port} should be {wanted}, its certificate says {shown}",
                hint="Correct the host's address, or enrol the host again.",
                subject=self._subject,
            )

    def call(self, method, parameters, on_reply=None):
        """The last reply's parameters; `on_reply(parameters)` sees every reply as it arrives. Raises ProblemError."""
        streams = METHODS[method][1]
        body = encode_object(parameters)
        headers = {"Content-Type": "application/json", "Accept": NDJSON if streams else "application/json"}
        try:
            if self._ended_stream is not None and self._ended_stream.read(1):
                raise self._unreachable("it sent more after its last reply")
            self._ended_stream = None
            self._connection.request("POST", f"/v1/agent/{method}", body, headers)
            response = self._connection.getresponse()
            if response.status != 200:
                raise self._refusal(response)
            if streams:
                return self._read_stream(response, on_reply)
            reply = decode_object(self._read_body(response), self._subject)
        except (OSError, http.client.HTTPException) as error:
            self._deadline.left_s()
            raise self._tls_problem(error) from error
        if on_reply:
            on_reply(reply)
        return reply

    def _read_stream(self, response, on_reply):
        while True:
            line = response.readline(MAX_FRAME_BYTES + 1)
            if len(line) > MAX_FRAME_BYTES:
                raise self._too_large()
            if not line.endswith(b"\n"):
                raise self._unreachable("the answer broke off before its end")
            parameters, continues = read_reply(decode_object(line, self._subject), self._subject)
            if on_reply:
                on_reply(parameters)
            if not continues:
                self._ended_stream = response
                return parameters

    def _read_body(self, response):
        body = response.read(MAX_FRAME_BYTES + 1)
        if len(body) > MAX_FRAME_BYTES:
            raise self._too_large()
        return body

    def _refusal(self, response):
        try:
            body = json.loads(self._read_body(response).decode("utf-8"))
        except ValueError:
            body = None
        problem = ProblemError.from_body(body)
        if problem is None:
            code = "agent.unavailable" if response.status in _UNAVAILABLE_STATUS else "internal.error"
            detail = f"the proxy of {self._subject} answered HTTP {response.status} without a problem"
            problem = ProblemError(code, detail, subject=self._subject)
        return problem

    def _too_large(self):
        return ProblemError(
            "internal.error",
            f"{self._subject} sent an answer longer than {MAX_FRAME_BYTES} bytes",
            subject=self._subject,
        )

    def _unreachable(self, why):
        return ProblemError(
            "host.unreachable",
            f"{self._subject} at {self._where.address}:{self._where.port}: {why or 'the connection was closed'}",
            hint="Check that its proxy runs and that this machine is on the proxy's allow-list.",
            subject=self._subject,
        )

    def _tls_problem(self, error):
        """With TLS 1.3 a server's refusal of our certificate shows up at the first read, not in the handshake."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return ProblemError(
                "auth.wrong_identity",
                f"{self._subject}: its certificate was not accepted: {error.verify_message}",
                hint="It must be issued by the fleet CA and be in date.",
                subject=self._subject,
            )
        if isinstance(error, ssl.SSLError) and "alert" in str(error.reason or "").lower():
            return ProblemError(
                "auth.required",
                f"{self._subject} refused our certificate: {error.reason}",
                hint="Use a client certificate issued by the fleet CA that is in date.",
                subject=self._subject,
            )
        return self._unreachable(error)

    def close(self):
        self._connection.close()
