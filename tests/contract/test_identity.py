# SPDX-License-Identifier: Apache-2.0
"""Who a certificate says its holder is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity


def certificate(*names: tuple[str, str]) -> dict[str, Any]:
    return {"subject": ((("commonName", "ppec://orchestrator/main"),),), "subjectAltName": names}


@given(
    st.sampled_from(["orchestrator", "host", "operator"]),
    st.from_regex(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?", fullmatch=True),
)
def test_an_identity_is_read_as_it_was_written(role: Any, name: str) -> None:
    identity = Identity(role, name)
    assert Identity.from_uri(identity.uri) == identity
    assert Identity.from_peer_certificate(certificate(("DNS", "h1"), ("URI", identity.uri))) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "ppec://",
        "ppec://host",
        "ppec://host/",
        "ppec://Host/h1",
        "ppec://root/h1",
        "ppec://host/h1/",
        "ppec://host/h1\n",
        "ppec://host/h1?x",
        "ppec://host/H1",
        "ppec://host/.h1",
        "ppec://host/h1-",
        "ppec://host/../orchestrator/main",
        "ppec://host/" + "a" * 64,
        "PPEC://host/h1",
        " ppec://host/h1",
        "https://host/h1",
        "ppec://host/hé",
    ],
)
def test_anything_else_is_no_identity(uri: str) -> None:
    with pytest.raises(PpecError) as caught:
        Identity.from_uri(uri)
    assert caught.value.code == "auth.wrong_identity"


@pytest.mark.parametrize(
    "peer",
    [
        None,
        {},
        certificate(),
        certificate(("DNS", "ppec://host/h1")),
        certificate(("URI", "https://example.org")),
        certificate(("URI", "ppec://host/h1"), ("URI", "ppec://host/h2")),
        certificate(("URI", "ppec://host/h1"), ("URI", "ppec://host/h1")),
        certificate(("URI", "ppec://root/h1")),
    ],
    ids=["absent", "empty", "no-san", "dns", "foreign", "two", "twice", "unknown-role"],
)
def test_a_certificate_without_exactly_one_identity_is_refused(peer: Any) -> None:
    with pytest.raises(PpecError) as caught:
        Identity.from_peer_certificate(peer)
    assert caught.value.code == "auth.wrong_identity"


def test_a_uri_of_another_scheme_beside_ours_does_not_disturb() -> None:
    peer = certificate(("URI", "spiffe://x/y"), ("URI", "ppec://operator/alice"))
    assert Identity.from_peer_certificate(peer).uri == "ppec://operator/alice"
