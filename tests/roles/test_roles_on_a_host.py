# SPDX-License-Identifier: Apache-2.0
"""The roles that change a host's identity and its release, on a real systemd host: enrol, renew, upgrade, repair."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.host import EnrolReply, EnrolRequest
from ppec_lab.container_fleet import ContainerFleet
from ppec_lab.container_host import ContainerHost
from ppec_orchestrator.pki.ca import FleetCa
from ppec_orchestrator.release import archive, tree
from ppec_orchestrator.release.tree import Target

# One worker runs them all: they share a host. Each is a row of plays over ssh, long on a busy machine.
pytestmark = [
    pytest.mark.containers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.long,
]

TOKEN = "t0ken-of-host-one-0123456789"
KEY, CERTIFICATE = "/etc/ppec/pki/host.key", "/etc/ppec/pki/host.pem"


class Enrolment:
    """The orchestrator's enrolment alone: its CA, its contract, one token per certificate."""

    def __init__(self, folder: Path, address: str) -> None:
        self.ca = FleetCa.open(folder, now=datetime.now(UTC))
        self.ca.ensure_orchestrator([address], now=datetime.now(UTC))
        self.ca_file = self.ca.orchestrator_pair.ca_path
        self.tokens = {TOKEN}
        self.enrolled: list[str] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ca.orchestrator_pair.certificate_path, self.ca.orchestrator_pair.key_path)
        self.server = ThreadingHTTPServer((address, 0), _handler(self))
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"https://{address}:{self.server.server_port}"

    def enrol(self, body: bytes) -> tuple[int, dict[str, Any]]:
        request = EnrolRequest.model_validate_json(body)
        if request.token not in self.tokens:
            return 403, {"code": "enrolment.token_invalid", "status": 403}
        self.tokens.remove(request.token)
        issued = self.ca.issue_host(request.csr_pem, request.host, "192.0.2.1", now=datetime.now(UTC))
        self.enrolled.append(request.host)
        reply = EnrolReply(certificate_pem=issued.pem, ca_pem=self.ca.ca_pem, not_after=issued.not_after.isoformat())
        return 200, reply.model_dump()


def _handler(enrolment: Enrolment) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, answer = enrolment.enrol(body) if self.path == "/v1/enrol" else (404, {})
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture(scope="module")
def enrolment(fleet: ContainerFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Enrolment]:
    made = Enrolment(tmp_path_factory.mktemp("ca"), fleet.gateway)
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join(10)


def pki_variables(enrolment: Enrolment, **more: Any) -> dict[str, Any]:
    return {"ppec_orchestrator_url": enrolment.url, "ppec_ca_file": str(enrolment.ca_file), **more}


def test_a_host_enrols_once_and_again_only_for_cause(
    enrolment: Enrolment, host: ContainerHost, play_on_host: Any, tmp_path: Path
) -> None:
    dry = play_on_host(["pki"], pki_variables(enrolment, ppec_enrolment_token=TOKEN), "--check")
    assert (dry.failed, enrolment.enrolled) == (0, [])

    refused = play_on_host(["pki"], pki_variables(enrolment, ppec_enrolment_token="w" * 32), "-vv")
    assert refused.failed == 1
    assert "enrolment.token_invalid" in refused.output
    assert "w" * 32 not in refused.output
    assert host.run("test", "-e", CERTIFICATE, check=False).returncode == 1

    first = play_on_host(["pki"], pki_variables(enrolment, ppec_enrolment_token=TOKEN), "-vv")
    assert (first.failed, enrolment.enrolled) == (0, ["host1"])
    assert TOKEN not in first.output
    assert host.run("stat", "-c", "%a %U:%G", KEY).stdout == "640 root:ppec\n"
    key = host.run("sha256sum", KEY).stdout

    # The token is used up; nothing needs one.
    again = play_on_host(["pki"], pki_variables(enrolment))
    assert (again.failed, again.changed, enrolment.enrolled) == (0, 0, ["host1"])

    needed = play_on_host(["pki"], pki_variables(enrolment, pki_renew_before_days=400))
    assert needed.failed == 1
    assert "ppec_enrolment_token" in needed.output
    assert host.run("sha256sum", KEY).stdout == key

    # A key that isn't the certificate's means a new pair.
    host.run("sh", "-c", f"openssl genpkey -algorithm ed25519 -out {KEY}")
    enrolment.tokens.add(TOKEN)
    repaired = play_on_host(["pki"], pki_variables(enrolment, ppec_enrolment_token=TOKEN))
    assert (repaired.failed, enrolment.enrolled) == (0, ["host1", "host1"])
    assert play_on_host(["pki"], pki_variables(enrolment)).changed == 0


def test_an_orchestrator_of_another_ca_is_not_believed(
    enrolment: Enrolment, play_on_host: Any, host: ContainerHost, tmp_path: Path
) -> None:
    host.run("rm", "-f", CERTIFICATE)
    other = FleetCa.open(tmp_path / "other", now=datetime.now(UTC)).orchestrator_pair.ca_path
    enrolment.tokens.add(TOKEN)
    before = list(enrolment.enrolled)
    variables = pki_variables(enrolment, ppec_enrolment_token=TOKEN)
    played = play_on_host(["pki"], {**variables, "ppec_ca_file": str(other)})
    assert (played.failed, enrolment.enrolled) == (1, before)
    assert TOKEN in enrolment.tokens
    assert host.run("test", "-e", CERTIFICATE, check=False).returncode == 1


def made_release(folder: Path, content: str) -> tuple[str, Path]:
    """A release of two files, packed and described as the builder does."""
    root = folder / content
    (root / "bin").mkdir(parents=True)
    (root / "lib").mkdir()
    (root / "bin" / "ppec-agentd").write_text(f"#!/bin/sh\necho {content}\n")
    (root / "lib" / "data.py").write_text(f"DATA = {content!r}\n")
    version = tree.seal(root, "0.0.1", Target())
    packed = folder / f"{content}.tar.gz"
    archive.pack(root, packed)
    manifest = json.loads((root / tree.MANIFEST).read_text())
    description = {"archive": packed.name, "sha256": tree.sha256(packed), "manifest": manifest}
    packed.with_name(packed.name + ".json").write_text(json.dumps(description))
    return version, packed


def links(host: ContainerHost) -> dict[str, str]:
    names = ("current", "previous")
    return {name: host.run("readlink", f"/opt/ppec/{name}", check=False).stdout.strip() for name in names}


def installed(host: ContainerHost) -> set[str]:
    return set(host.run("ls", "/opt/ppec/releases").stdout.split())


def test_releases_are_switched_kept_repaired_and_pruned(host: ContainerHost, play_on_host: Any, tmp_path: Path) -> None:
    made = [made_release(tmp_path, content) for content in ("one", "two", "three")]
    versions = [version for version, _ in made]
    for number, (version, packed) in enumerate(made):
        played = play_on_host(["release"], {"ppec_release_archive": str(packed), "release_keep": 2})
        assert played.failed == 0, played.output
        before = f"releases/{versions[number - 1]}" if number else ""
        assert links(host) == {"current": f"releases/{version}", "previous": before}
    assert installed(host) == set(versions[1:])
    assert host.run("/opt/ppec/current/bin/ppec-agentd").stdout == "three\n"

    newest = {"ppec_release_archive": str(made[2][1]), "release_keep": 2}
    assert play_on_host(["release"], newest).changed == 0
    assert play_on_host(["release"], newest, "--check").changed == 0

    host.run("sh", "-c", "echo flipped >/opt/ppec/current/lib/data.py")
    assert play_on_host(["release"], newest).failed == 0
    assert host.run("cat", "/opt/ppec/current/lib/data.py").stdout == "DATA = 'three'\n"
    assert links(host) == {"current": f"releases/{versions[2]}", "previous": f"releases/{versions[1]}"}

    back = play_on_host(["release"], {"ppec_release_archive": str(made[1][1]), "release_keep": 2})
    assert back.failed == 0
    assert links(host) == {"current": f"releases/{versions[1]}", "previous": f"releases/{versions[2]}"}


def test_an_archive_that_is_not_the_one_described_is_refused(
    host: ContainerHost, play_on_host: Any, tmp_path: Path
) -> None:
    version, packed = made_release(tmp_path, "swapped")
    _, other = made_release(tmp_path, "other")
    before = links(host)
    packed.write_bytes(other.read_bytes())
    played = play_on_host(["release"], {"ppec_release_archive": str(packed)})
    assert played.failed == 1
    assert links(host) == before
    assert version not in installed(host)
