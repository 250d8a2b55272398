# SPDX-License-Identifier: Apache-2.0
"""An enrolment token that is over goes, and is refused like one that never was; that the host enrolled stays known."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select
from structlog.testing import capture_logs

from ppec_orchestrator.api.services import Services
from ppec_orchestrator.operations.limits import Limits
from ppec_orchestrator.operations.retention import Retention
from ppec_orchestrator.pki.keys import new_key
from ppec_orchestrator.store import tables

HOST = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}
HOUR_S = 3600


@pytest.fixture
def site(ipv4_site: TestClient) -> TestClient:
    assert ipv4_site.post("/v1/hosts", json=HOST).status_code == 201
    return ipv4_site


def token_of(site: TestClient) -> str:
    return str(site.post("/v1/hosts/h1/enrolment-token").json()["token"])


def enrol(app: FastAPI, token: str) -> Any:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(new_key(), hashes.SHA256())
    body = {"host": "h1", "token": token, "csr_pem": request.public_bytes(Encoding.PEM).decode()}
    return TestClient(app).post("/v1/enrol", json=body)


def sweep(services: Services) -> int:
    return Retention(services.database, services.now, threading.Event()).sweep(Limits()).enrolment_tokens


def fault(answer: Any) -> tuple[int, str, str]:
    problem = answer.json()
    return answer.status_code, problem["code"], problem["detail"]


def rows(services: Services, column: Any) -> list[Any]:
    with services.database.read() as conn:
        return list(conn.execute(select(column)).scalars())


def test_a_used_token_goes_and_the_enrolment_stays_known(
    site: TestClient, app: FastAPI, services: Services, clock: Any
) -> None:
    token, enrolled_at = token_of(site), clock()
    with capture_logs() as logs:
        assert enrol(app, token).status_code == 201
    told = [(line["action"], line["subject"], line["outcome"]) for line in logs if line["event"] == "audit"]
    assert told == [("enrol_host", "h1", "done")]
    assert token not in str(logs)
    used, unknown = fault(enrol(app, token)), fault(enrol(app, "x" * 43))
    assert sweep(services) == 0, "not before its hour"
    clock.forward(HOUR_S + 1)
    assert sweep(services) == 1
    assert rows(services, tables.enrolment_token.c.sha256) == []
    assert fault(enrol(app, token)) == used == unknown
    assert used[:2] == (403, "enrolment.token_invalid")
    assert rows(services, tables.host.c.enrolled_at) == [enrolled_at]
    assert rows(services, tables.certificate.c.uri).count("ppec://host/h1") == 1


def test_an_expired_token_goes_and_a_good_one_stays(
    site: TestClient, app: FastAPI, services: Services, clock: Any
) -> None:
    token = token_of(site)
    clock.forward(services.settings.enrolment_token_lifetime_s + HOUR_S)
    assert sweep(services) == 0
    clock.forward(1)
    assert sweep(services) == 1
    assert fault(enrol(app, token))[:2] == (403, "enrolment.token_invalid")
    fresh = token_of(site)
    assert sweep(services) == 0
    assert enrol(app, fresh).status_code == 201
