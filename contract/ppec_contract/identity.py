# SPDX-License-Identifier: Apache-2.0
"""Who a TLS peer is: one URI subject alternative name per certificate, `ppec://<role>/<name>`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from ppec_contract.errors import PpecError

Role = Literal["orchestrator", "host", "operator"]
_URI = re.compile(r"ppec://(orchestrator|host|operator)/([a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?)")


@dataclass(frozen=True, slots=True)
class Identity:
    """`orchestrator/main` may change VMs on every host; `host/h1` speaks for that host alone; an `operator` is a
    person's or playbook's client certificate for direct use of the proxies."""

    role: Role
    name: str

    @property
    def uri(self) -> str:
        return f"ppec://{self.role}/{self.name}"

    @classmethod
    def from_uri(cls, uri: str) -> Identity:
        match = _URI.fullmatch(uri)
        if not match:
            raise PpecError("auth.wrong_identity", f"{uri[:120]!r} is not a PPEC identity", subject="certificate")
        return cls(cast("Role", match[1]), match[2])

    @classmethod
    def from_peer_certificate(cls, certificate: Mapping[str, Any] | None) -> Identity:
        """From `ssl.SSLSocket.getpeercert()` of a *verified* peer. Exactly one ppec:// URI is accepted."""
        names = (certificate or {}).get("subjectAltName", ())
        uris = [value for kind, value in names if kind == "URI" and value.startswith("ppec://")]
        if len(uris) != 1:
            raise PpecError(
                "auth.wrong_identity",
                f"the certificate names {len(uris)} PPEC identities, wanted exactly one",
                hint="Use a certificate issued by the fleet CA.",
                subject="certificate",
            )
        return cls.from_uri(uris[0])
