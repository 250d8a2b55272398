# SPDX-License-Identifier: Apache-2.0
"""The proxy's TLS: client certificates from the fleet CA are required, and the files can be read anew while it runs.

One live SSLContext serves every handshake, so reloading changes what *new* connections see and leaves the established
ones alone. A new certificate is tried in memory before it touches the live context: a half-written pair of files, a
certificate of another CA or an expired one must not take a working proxy down.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity

# TLS 1.2 suites with forward secrecy and authenticated encryption only; 1.3 has no others.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths (PEM) of the host's certificate with its chain, its key, and the fleet CA."""

    certificate: Path
    key: Path
    ca: Path

    def server_context(self, verify_client: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(_CIPHERS)
        context.load_cert_chain(self.certificate, self.key)
        context.load_verify_locations(self.ca)
        context.verify_mode = ssl.CERT_REQUIRED if verify_client else ssl.CERT_NONE
        return context

    def check(self) -> Identity:
        """Who these files make us. Raises PpecError `auth.wrong_identity` when no client would believe it."""
        try:
            certificate = _handshake_with_ourselves(self)
        except (OSError, ssl.SSLError) as error:
            raise PpecError(
                "auth.wrong_identity",
                f"the certificate {self.certificate} can't be used: {error}",
                hint="Enrol the host again, or put back the previous certificate, key and CA files.",
                subject="certificate",
            ) from error
        identity = Identity.from_peer_certificate(certificate)
        if identity.role != "host":
            raise PpecError(
                "auth.wrong_identity",
                f"the certificate {self.certificate} is {identity.uri}, wanted ppec://host/<name>",
                hint="A proxy speaks for its host: give it the host's own certificate.",
                subject="certificate",
            )
        return identity


def _handshake_with_ourselves(files: TlsFiles) -> dict[str, object]:
    """A handshake in memory against a client that trusts the fleet CA; returns the verified certificate.

    This is the one check that covers the key, the chain and the dates at once, by the code that will judge them later.
    """
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False  # peers are known by URI, not by host name
    trusting.load_verify_locations(files.ca)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = files.server_context(verify_client=False).wrap_bio(to_server, to_client, server_side=True)
    client = trusting.wrap_bio(to_client, to_server)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return dict(client.getpeercert() or {})


class LiveTls:
    """The context every listener uses, and the identity it shows."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self.identity = files.check()
        self.context = files.server_context(verify_client=True)

    def reload(self) -> Identity:
        """Takes the files as they are now, or raises PpecError and keeps what it had.

        A CA that was *removed* from the file stays trusted until a restart: OpenSSL only adds to a live context.
        """
        identity = self._files.check()
        self.context.load_cert_chain(self._files.certificate, self._files.key)
        self.context.load_verify_locations(self._files.ca)
        self.identity = identity
        return identity
