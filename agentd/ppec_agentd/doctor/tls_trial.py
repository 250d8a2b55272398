# SPDX-License-Identifier: Apache-2.0
"""The host's certificate, tried by a TLS handshake with itself in memory: chain, dates, key and purpose all count.

The standard library reads certificates in handshakes alone; and what a handshake says, the orchestrator will say.
"""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Any

from ppec_agentd.doctor.snapshot import CertificateFacts
from ppec_agentd.settings import TlsSettings

_DAY_S = 86400.0
# Far more turns than any handshake takes.
_TURNS = 20


def try_certificate(tls: TlsSettings, root: Path = Path("/")) -> CertificateFacts:
    """As a client, towards a server that believes the fleet's CA. Never raises for what is wrong with the files."""
    ca, certificate, key = (root / path.relative_to("/") for path in (tls.ca_path, tls.certificate_path, tls.key_path))
    for path in (ca, certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            return CertificateFacts(problem=f"{path}: {error.strerror}")
    try:
        shown = _handshake(ca, certificate, key)
    except ssl.SSLCertVerificationError as error:
        return CertificateFacts(problem=error.verify_message)
    except (ssl.SSLError, OSError) as error:
        return CertificateFacts(problem=f"certificate, key and CA don't go together: {error.strerror or error}")
    names = shown.get("subjectAltName", ())
    return CertificateFacts(
        identities=tuple(value for kind, value in names if kind == "URI" and value.startswith("ppec://")),
        days_left=(ssl.cert_time_to_seconds(shown["notAfter"]) - time.time()) / _DAY_S,
    )


def _handshake(ca: Path, certificate: Path, key: Path) -> dict[str, Any]:
    """What the server is shown of the client. The server's own part is played with the same certificate, unverified."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.verify_mode = ssl.CERT_REQUIRED
    server_context.load_verify_locations(ca)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_mode = ssl.CERT_NONE
    for context in (server_context, client_context):
        context.load_cert_chain(certificate, key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server)
    for _ in range(_TURNS):
        waiting = 0
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting += 1
        if not waiting:
            break
    return server.getpeercert() or {}
