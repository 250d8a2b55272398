# SPDX-License-Identifier: Apache-2.0
"""Who may call a host's agent: the orchestrator, and operators with a client certificate of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity, Role

ALLOWED_ROLES: Final[frozenset[Role]] = frozenset(("orchestrator", "operator"))


def require_caller(certificate: Mapping[str, Any] | None) -> Identity:
    """The caller named by a verified client certificate. Raises PpecError `auth.wrong_identity`.

    A host's certificate is from the same CA and is refused: one compromised host must not reach the next one's agent.
    """
    caller = Identity.from_peer_certificate(certificate)
    if caller.role not in ALLOWED_ROLES:
        raise PpecError(
            "auth.wrong_identity",
            f"{caller.uri} may not call a host's agent, wanted one of: {', '.join(sorted(ALLOWED_ROLES))}",
            hint="Use the orchestrator's or an operator's client certificate.",
            subject="certificate",
        )
    return caller
