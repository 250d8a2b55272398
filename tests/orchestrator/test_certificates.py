# SPDX-License-Identifier: Apache-2.0
"""Which of a host's certificates the API takes: withdrawn with the host, superseded once a newer one is in use."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import delete, select

from ppec_orchestrator.api.services import Services
from ppec_orchestrator.pki.ca import LIFETIME
from ppec_orchestrator.pki.keys import new_key
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.certificates import CACHE_S, OVERLAP

HOST = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}
HostClient = Callable[..., TestClient]


@pytest.fixture
def site(ipv4_site: TestClient) -> TestClient:
    assert ipv4_site.post("/v1/hosts", json=HOST).status_code == 201
    return ipv4_site


@pytest.fixture
def enrol(site: TestClient, app: FastAPI, host_client: HostClient) -> Callable[[], TestClient]:
    """h1 enrols; the client shows the certificate it got."""

    def one() -> TestClient:
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(new_key(), hashes.SHA256())
        body = {
            "host": "h1",
            "token": site.post("/v1/hosts/h1/enrolment-token").json()["token"],
            "csr_pem": request.public_bytes(Encoding.PEM).decode(),
        }
        reply = TestClient(app).post("/v1/enrol", json=body)
        assert reply.status_code == 201, reply.text
        certificate = x509.load_pem_x509_certificate(reply.json()["certificate_pem"].encode())
        return host_client("h1", serial=f"{certificate.serial_number:x}")

    return one


def beat(client: TestClient) -> Any:
    message = {"agent_started_at_unix_ms": 1, "sequence": 1, "digest": "0" * 64}
    return client.post("/v1/hosts/h1/heartbeat", json=message)


def assert_refused(answer: Any) -> None:
    assert (answer.status_code, answer.json()["code"]) == (401, "auth.required")
    assert answer.headers["connection"] == "close", "the agent shows its files' certificate on a new connection only"


def test_certificate_ends_with_its_host(site: TestClient, enrol: Callable[[], TestClient], services: Services) -> None:
    old = enrol()
    assert beat(old).status_code == 200
    assert site.delete("/v1/hosts/h1").status_code == 204
    assert_refused(beat(old))
    assert site.post("/v1/hosts", json=HOST).status_code == 201
    assert_refused(beat(old))
    assert_refused(old.get(f"/v1/images/{'0' * 64}/content"))
    new = enrol()
    assert beat(new).status_code == 200
    assert_refused(beat(old))
    with services.database.read() as conn:
        serials = select(tables.certificate.c.serial).where(tables.certificate.c.uri == "ppec://host/h1")
        assert len(conn.execute(serials).all()) == 1


def test_serial_that_was_never_issued_or_is_anothers(site: TestClient, host_client: HostClient) -> None:
    for serial in ("1234", "not hexadecimal"):
        assert_refused(beat(host_client("h1", serial=serial)))
    host_client("h1")
    with_h2s = host_client("h2")
    assert beat(with_h2s).json()["code"] == "auth.wrong_identity"


def test_older_certificate_ends_after_the_newer_one_was_used(
    enrol: Callable[[], TestClient], clock: Any, services: Services
) -> None:
    """However long the newer one is not used, its answer may have got lost: the older one goes on."""
    old = enrol()
    assert beat(old).status_code == 200
    clock.forward(3600)
    new = enrol()
    clock.forward(OVERLAP.total_seconds() * 48)
    assert beat(old).status_code == 200
    assert beat(new).status_code == 200
    before = services.database.commits
    clock.forward(OVERLAP.total_seconds() - 1)
    assert beat(old).status_code == 200
    clock.forward(1)
    assert_refused(beat(old))
    assert beat(new).status_code == 200
    assert services.database.commits == before, "superseding is written once"


def test_older_certificate_does_not_supersede_the_newer(enrol: Callable[[], TestClient], clock: Any) -> None:
    old = enrol()
    clock.forward(1)
    new = enrol()
    assert beat(old).status_code == 200
    clock.forward((OVERLAP + timedelta(seconds=CACHE_S)).total_seconds())
    assert (beat(new).status_code, beat(old).status_code) == (200, 200)


@pytest.mark.parametrize("steps_s", [(300, -300), (-86400, 0), (0, 0), (7200, -7200), (-3600, -3600)])
def test_order_of_certificates_does_not_follow_the_clock(
    enrol: Callable[[], TestClient], clock: Any, services: Services, steps_s: tuple[int, int]
) -> None:
    """The clock is set, or another replica's is taken, between one certificate and the next."""
    agents = [enrol()]
    for step_s in steps_s:
        clock.forward(step_s)
        agents.append(enrol())
    for agent in agents:
        assert beat(agent).status_code == 200
    clock.forward(OVERLAP.total_seconds() + CACHE_S)
    assert [beat(agent).status_code for agent in agents] == [401] * len(steps_s) + [200]
    with services.database.read() as conn:
        times = conn.execute(select(tables.certificate.c.issued_at)).scalars().all()
    assert len(set(times)) == len(agents)


def test_certificate_ends_with_its_date(enrol: Callable[[], TestClient], clock: Any) -> None:
    agent = enrol()
    clock.forward(LIFETIME.total_seconds())
    assert_refused(beat(agent))


def test_heartbeats_look_into_the_database_only_now_and_then(
    enrol: Callable[[], TestClient], services: Services, clock: Any
) -> None:
    """What another replica withdrew is noticed when the time of a look-up is over, and so not looked up before."""
    agent = enrol()
    assert beat(agent).status_code == 200
    with services.database.write() as conn:
        conn.execute(delete(tables.certificate))
    clock.forward(CACHE_S - 1)
    assert beat(agent).status_code == 200
    clock.forward(1)
    assert_refused(beat(agent))
