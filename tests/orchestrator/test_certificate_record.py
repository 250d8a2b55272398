# SPDX-License-Identifier: Apache-2.0
"""`ppec-orchestrator certificate record`: hosts' certificates that the fleet CA issued outside the orchestrator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from ppec_contract.errors import PpecError, exit_code
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.pki.ca import FleetCa
from ppec_orchestrator.pki.issued_elsewhere import read_host_certificate
from ppec_orchestrator.pki.keys import load_key, new_key
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.certificates import OVERLAP
from ppec_orchestrator.store.issued_elsewhere import record_host_certificate

HOST = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}
URI = "ppec://host/h1"
Record = Callable[[bytes], bool]


@pytest.fixture
def site(ipv4_site: TestClient) -> TestClient:
    assert ipv4_site.post("/v1/hosts", json=HOST).status_code == 201
    return ipv4_site


@pytest.fixture
def record(services: Services) -> Record:
    """What the command does, at the test's clock; whether the certificate is new in the record."""

    def run(pem: bytes) -> bool:
        issued, identity = read_host_certificate(pem, services.ca.ca_pem, now=services.now())
        with services.database.write() as conn:
            return record_host_certificate(conn, issued, identity, now=services.now())

    return run


@pytest.fixture
def issue(services: Services) -> Callable[..., bytes]:
    """A certificate of the fleet CA, or of the one in `folder`, made without the orchestrator's own code."""

    def one(
        uris: Iterable[str] = (URI,), *, begins_in_s: float = -60, ends_in_s: float = 86400, folder: Path | None = None
    ) -> bytes:
        place = folder or services.settings.pki_dir
        return _issued(place, uris, services.now() + timedelta(seconds=begins_in_s), ends_in_s - begins_in_s)

    return one


def _issued(place: Path, uris: Iterable[str], begins: datetime, lifetime_s: float) -> bytes:
    ca = x509.load_pem_x509_certificate((place / "ca.crt").read_bytes())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca.subject)
        .public_key(new_key().public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(seconds=lifetime_s))
    )
    names = [x509.UniformResourceIdentifier(uri) for uri in uris]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([*names, x509.DNSName("h1")]), critical=False)
    certificate = builder.sign(load_key((place / "ca.key").read_bytes()), hashes.SHA256())
    return certificate.public_bytes(Encoding.PEM)


def serial_of(pem: bytes) -> str:
    return f"{x509.load_pem_x509_certificate(pem).serial_number:x}"


def recorded(services: Services) -> list[str]:
    """Serials of hosts' certificates."""
    with services.database.read() as conn:
        hosts = tables.certificate.c.uri.startswith("ppec://host/")
        return list(conn.execute(select(tables.certificate.c.serial).where(hosts)).scalars())


def beat(client: TestClient) -> int:
    message = {"agent_started_at_unix_ms": 1, "sequence": 1, "digest": "0" * 64}
    return client.post("/v1/hosts/h1/heartbeat", json=message).status_code


def test_recorded_certificate_counts(
    site: TestClient, issue: Callable[..., bytes], host_client: Any, record: Record, services: Services
) -> None:
    pem = issue()
    agent = host_client("h1", serial=serial_of(pem))
    assert beat(agent) == 401
    assert record(pem)
    # A running orchestrator takes it at once, and the host takes VMs like one that enrolled.
    assert beat(agent) == 200
    assert agent.get(f"/v1/images/{'0' * 64}/content").status_code == 404
    assert site.get("/v1/hosts/h1").json()["liveness"] == "up"

    assert not record(pem), "once is enough"
    assert recorded(services) == [serial_of(pem)]
    assert site.delete("/v1/hosts/h1").status_code == 204
    assert beat(agent) == 401


def test_first_certificate_of_a_chain_is_the_hosts(
    site: TestClient, issue: Callable[..., bytes], record: Record, services: Services
) -> None:
    pem = issue()
    assert record(pem + services.ca.ca_pem.encode())
    assert recorded(services) == [serial_of(pem)]


def test_superseded_certificate_does_not_come_back(
    site: TestClient, issue: Callable[..., bytes], host_client: Any, record: Record, clock: Any
) -> None:
    old, new = issue(), issue()
    assert record(old)
    clock.forward(1)
    assert record(new)
    assert beat(host_client("h1", serial=serial_of(new))) == 200
    with pytest.raises(PpecError, match="superseded by a newer certificate") as refused:
        record(old)
    assert refused.value.code == "request.invalid"
    clock.forward(OVERLAP.total_seconds() + 1)
    assert beat(host_client("h1", serial=serial_of(old))) == 401


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ({"uris": ["ppec://host/h2"]}, "host.not_found", "there is no host 'h2'"),
        ({"uris": ["ppec://operator/eve"]}, "auth.wrong_identity", "is ppec://operator/eve, wanted ppec://host/"),
        ({"uris": ["ppec://orchestrator/main"]}, "auth.wrong_identity", "is ppec://orchestrator/main"),
        ({"uris": [URI, "ppec://host/h2"]}, "auth.wrong_identity", "names 2 PPEC identities"),
        ({"uris": ["https://h1"]}, "auth.wrong_identity", "names 0 PPEC identities"),
        ({"uris": []}, "auth.wrong_identity", "names 0 PPEC identities"),
        ({"uris": ["ppec://host/h1/x"]}, "auth.wrong_identity", "is not a PPEC identity"),
        ({"ends_in_s": -1}, "request.invalid", "it is good from"),
        ({"begins_in_s": 600}, "request.invalid", "it is good from"),
    ],
)
def test_refused_certificate(
    issue: Callable[..., bytes], record: Record, services: Services, arguments: Any, code: str, said: str
) -> None:
    with pytest.raises(PpecError, match=said) as refused:
        record(issue(**arguments))
    assert refused.value.code == code
    assert recorded(services) == []


def test_certificate_of_another_ca_with_the_same_name(
    site: TestClient, issue: Callable[..., bytes], record: Record, services: Services, tmp_path: Path
) -> None:
    """Only the signature tells them apart."""
    FleetCa.open(tmp_path / "other", now=services.now())
    with pytest.raises(PpecError, match="this fleet's CA did not issue it"):
        record(issue(folder=tmp_path / "other"))
    assert recorded(services) == []


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_file_that_is_no_certificate(services: Services, content: bytes) -> None:
    with pytest.raises(PpecError, match="not a PEM certificate") as refused:
        read_host_certificate(content, services.ca.ca_pem, now=services.now())
    assert refused.value.code == "request.invalid"


def test_serial_of_another_host(
    site: TestClient, issue: Callable[..., bytes], record: Record, services: Services
) -> None:
    pem = issue()
    assert record(pem)
    with services.database.write() as conn:
        mine = tables.certificate.c.serial == serial_of(pem)
        conn.execute(update(tables.certificate).where(mine).values(uri="ppec://host/h2"))
    with pytest.raises(PpecError, match="is recorded as ppec://host/h2's"):
        record(pem)


def command(settings: Settings, file: Path) -> subprocess.CompletedProcess[str]:
    """The command as it is typed, for the orchestrator of these settings."""
    own = {"PPEC_STATE_DIR": str(settings.state_dir), "PPEC_DATABASE_URL": settings.database_url}
    words = [sys.executable, "-m", "ppec_orchestrator.serve", "certificate", "record", str(file)]
    return subprocess.run(words, env=os.environ | own, capture_output=True, text=True, timeout=60, check=False)


def test_command_records_says_and_audits(
    site: TestClient, services: Services, settings: Settings, host_client: Any, tmp_path: Path
) -> None:
    file, now = tmp_path / "h1.pem", datetime.now().astimezone()
    pem = _issued(settings.pki_dir, [URI], now - timedelta(minutes=1), 3600)
    file.write_bytes(pem)
    done = command(settings, file)
    assert (done.returncode, done.stdout) == (0, f"{URI} {serial_of(pem)}\n"), done.stderr
    assert recorded(services) == [serial_of(pem)]
    told = [json.loads(line) for line in done.stderr.splitlines()]
    audited = [(line["action"], line["subject"], line["outcome"]) for line in told if line["event"] == "audit"]
    assert audited == [("record_certificate", URI, "done")]

    again = command(settings, file)
    assert (again.returncode, again.stdout) == (0, f"{URI} {serial_of(pem)} (was recorded already)\n")
    assert "audit" not in again.stderr

    file.write_bytes(_issued(settings.pki_dir, ["ppec://host/h9"], now, 3600))
    for path, code, said in (
        (file, "host.not_found", "there is no host 'h9'"),
        (tmp_path / "no", "request.invalid", "No such file"),
    ):
        refused = command(settings, path)
        assert (refused.returncode, refused.stdout) == (exit_code(code), "")
        assert refused.stderr.startswith(f"ppec-orchestrator: {code}: ")
        assert said in refused.stderr
