# SPDX-License-Identifier: Apache-2.0
"""Subject alternative names: the one URI that is the identity, and the addresses a peer is reached by."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address

from cryptography import x509

from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity

_DNS = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)


def alternative_names(identity: Identity, reached_by: Iterable[str] = ()) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    names += [_general_name(name) for name in dict.fromkeys(reached_by)]
    return x509.SubjectAlternativeName(names)


def check_name(name: str) -> None:
    """Raises `request.invalid` unless `name` is a DNS name or an IP address."""
    _general_name(name)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        if not _DNS.fullmatch(name):
            raise PpecError(
                "request.invalid", f"{name[:80]!r} is neither a DNS name nor an IP address", subject="address"
            ) from None
        return x509.DNSName(name)
