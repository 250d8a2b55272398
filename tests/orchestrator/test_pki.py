# SPDX-License-Identifier: Apache-2.0
"""The fleet CA and enrolment: who gets which certificate, and that real TLS takes it."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select

from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.pki.ca import LIFETIME, RENEW_BEFORE, FleetCa
from ppec_orchestrator.pki.keys import key_pem, new_key
from ppec_orchestrator.store import tables

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
HOST = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}


def csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None) -> str:
    """A request that asks for names it has no right to."""
    key = key or new_key()
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "main")])
    )
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("ppec://orchestrator/main")])
    signed = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    return signed.public_bytes(Encoding.PEM).decode()


def names_of(pem: str) -> list[str]:
    certificate = x509.load_pem_x509_certificate(pem.encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def test_the_ca_is_made_once_and_its_key_is_private(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: FleetCa.open(tmp_path / "pki", now=NOW), range(4)))
    assert len({ca.ca_pem for ca in opened}) == 1
    assert (tmp_path / "pki" / "ca.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "pki").stat().st_mode & 0o777 == 0o700


def test_a_damaged_ca_is_said_and_not_replaced(tmp_path: Path) -> None:
    FleetCa.open(tmp_path, now=NOW)
    (tmp_path / "ca.key").write_bytes(key_pem(new_key()))
    with pytest.raises(PpecError, match="don't match"):
        FleetCa.open(tmp_path, now=NOW)


def test_a_hosts_names_come_from_the_record(tmp_path: Path) -> None:
    ca = FleetCa.open(tmp_path, now=NOW)
    issued = ca.issue_host(csr(), "h1", "h1.example.net", now=NOW)
    assert names_of(issued.pem) == ["ppec://host/h1", "h1.example.net"]
    assert issued.not_before < NOW - timedelta(minutes=30)
    assert issued.not_after == NOW + LIFETIME


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "h1.example.net"])
def test_the_chain_verifies_by_the_rules_of_rfc_5280(tmp_path: Path, address: str) -> None:
    ca = FleetCa.open(tmp_path, now=NOW)
    issued = ca.issue_host(csr(), "h1", address, now=NOW)
    store = Store([x509.load_pem_x509_certificate(ca.ca_pem.encode())])
    verifier = PolicyBuilder().store(store).time(NOW).build_client_verifier()
    verified = verifier.verify(x509.load_pem_x509_certificate(issued.pem.encode()), [])
    assert verified.subjects is not None
    assert len(verified.subjects) == 2


def test_the_orchestrators_certificate_is_kept_until_something_changes(tmp_path: Path) -> None:
    ca = FleetCa.open(tmp_path, now=NOW)
    first = ca.ensure_orchestrator(["localhost", "127.0.0.1"], now=NOW)
    assert first is not None
    assert names_of(first.pem) == ["ppec://orchestrator/main", "localhost", "127.0.0.1"]
    assert ca.ensure_orchestrator(["localhost", "127.0.0.1"], now=NOW) is None
    assert ca.ensure_orchestrator(["localhost", "127.0.0.1", "o.example"], now=NOW) is not None
    late = NOW + LIFETIME - RENEW_BEFORE
    assert ca.ensure_orchestrator(["localhost", "127.0.0.1", "o.example"], now=late) is not None
    assert ca.orchestrator_pair.key_path.stat().st_mode & 0o777 == 0o600


def test_real_tls_shows_the_hosts_identity(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    ca, key = FleetCa.open(tmp_path, now=now), new_key()
    ca.ensure_orchestrator(["localhost"], now=now)
    pair = ca.orchestrator_pair
    (tmp_path / "h1.crt").write_text(ca.issue_host(csr(key), "h1", "192.0.2.1", now=now).pem)
    (tmp_path / "h1.key").write_bytes(key_pem(key))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pair.certificate_path, pair.key_path)
    server.load_verify_locations(pair.ca_path)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=str(pair.ca_path))
    client.load_cert_chain(tmp_path / "h1.crt", tmp_path / "h1.key")
    peers = _handshake(server, client)
    assert [Identity.from_peer_certificate(peer).uri for peer in peers] == [
        "ppec://host/h1",
        "ppec://orchestrator/main",
    ]


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[dict[str, object], dict[str, object]]:
    """Both ends in memory; what each sees of the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = server.wrap_bio(to_server, to_client, server_side=True)
    two = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    for _ in range(6):
        for end in (two, one):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return one.getpeercert() or {}, two.getpeercert() or {}


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        "é",
        csr(rsa.generate_private_key(65537, 1024)),
        csr(ec.generate_private_key(ec.SECP256K1())),
    ],
)
def test_bad_signing_requests_are_refused(tmp_path: Path, bad: str) -> None:
    ca = FleetCa.open(tmp_path, now=NOW)
    with pytest.raises(PpecError) as refused:
        ca.issue_host(bad, "h1", "192.0.2.1", now=NOW)
    assert refused.value.code == "request.invalid"


def test_a_request_signed_by_another_key_is_refused(tmp_path: Path) -> None:
    lines = csr().splitlines()
    other = csr().splitlines()
    forged = "\n".join([*lines[:-2], other[-2], lines[-1]])
    with pytest.raises(PpecError) as refused:
        FleetCa.open(tmp_path, now=NOW).issue_host(forged, "h1", "192.0.2.1", now=NOW)
    assert refused.value.code == "request.invalid"


def _token(client: TestClient, host: str = "h1") -> str:
    made = client.post(f"/v1/hosts/{host}/enrolment-token")
    assert made.status_code == 201
    return str(made.json()["token"])


@pytest.fixture
def site(ipv4_site: TestClient) -> TestClient:
    for name in ("h1", "h2"):
        assert ipv4_site.post("/v1/hosts", json=HOST | {"name": name}).status_code == 201
    return ipv4_site


def _enrol(app: FastAPI, token: str, host: str = "h1", request: str | None = None) -> tuple[int, dict[str, str]]:
    body = {"host": host, "token": token, "csr_pem": request or csr()}
    answer = TestClient(app).post("/v1/enrol", json=body)
    return answer.status_code, answer.json()


def test_a_host_enrols_once(site: TestClient, app: FastAPI, services: Services) -> None:
    token = _token(site)
    status, reply = _enrol(app, token)
    assert status == 201
    assert names_of(reply["certificate_pem"]) == ["ppec://host/h1", "192.0.2.1"]
    assert reply["ca_pem"] == services.ca.ca_pem
    assert site.get("/v1/hosts/h1").json()["liveness"] == "enrolled"
    with services.database.read() as conn:
        uris = conn.execute(select(tables.certificate.c.uri)).scalars().all()
        hashes_kept = conn.execute(select(tables.enrolment_token.c.sha256)).scalars().all()
    assert sorted(uris) == ["ppec://host/h1", "ppec://orchestrator/main"]
    assert token not in hashes_kept
    again, problem = _enrol(app, token)
    assert (again, problem["code"]) == (403, "enrolment.token_invalid")


def test_of_many_at_once_only_one_enrols(site: TestClient, app: FastAPI) -> None:
    token = _token(site)
    with ThreadPoolExecutor(6) as pool:
        statuses = list(pool.map(lambda _: _enrol(app, token)[0], range(6)))
    assert sorted(statuses) == [201, 403, 403, 403, 403, 403]


def test_tokens_that_do_not_enrol(site: TestClient, app: FastAPI, clock: Callable[[], datetime]) -> None:
    replaced, current = _token(site), _token(site)
    for token, host in ((replaced, "h1"), (current, "h2"), (current, "h9"), ("x" * 43, "h1")):
        assert _enrol(app, token, host)[1]["code"] == "enrolment.token_invalid"
    clock.forward(3601)  # type: ignore[attr-defined]
    assert _enrol(app, current)[1]["code"] == "enrolment.token_invalid"
    assert site.get("/v1/hosts/h1").json()["liveness"] == "registered"


def test_a_bad_request_does_not_use_the_token_up(site: TestClient, app: FastAPI) -> None:
    token = _token(site)
    assert _enrol(app, token, request="nonsense")[1]["code"] == "request.invalid"
    assert _enrol(app, token)[0] == 201


def test_a_token_for_a_host_that_is_not_there(site: TestClient) -> None:
    refused = site.post("/v1/hosts/h9/enrolment-token")
    assert (refused.status_code, refused.json()["code"]) == (404, "host.not_found")
