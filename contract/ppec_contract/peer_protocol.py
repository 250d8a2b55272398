# SPDX-License-Identifier: Apache-2.0
"""A uvicorn protocol that tells the application who the verified TLS peer is.

uvicorn verifies client certificates but doesn't hand them to the application. This subclass reads the certificate once
per connection and puts it into every request's `scope["state"]["peer_certificate"]` (None without one). Both HTTPS
listeners, the proxy's and the orchestrator's, need it; nothing else may import this file.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class PeerCertificateProtocol(HttpToolsProtocol):
    """Pin it with `uvicorn.Config(http=PeerCertificateProtocol)`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        certificate = cast("dict[str, Any] | None", tls.getpeercert() if tls is not None else None)
        # uvicorn copies app_state into each request's scope; a copy per connection keeps peers apart.
        self.app_state = {**self.app_state, "peer_certificate": certificate or None}
