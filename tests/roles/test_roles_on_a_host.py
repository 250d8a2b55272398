# SPDX-License-Identifier: Apache-2.0
"""The roles that change a host's identity and its release, on a real systemd host: enrol, renew, upgrade, repair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ppec_lab.container_fleet import ContainerFleet
from ppec_lab.container_host import ContainerHost
from ppec_lab.orchestrator_process import OrchestratorProcess, free_port
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

KEY, CERTIFICATE = "/etc/ppec/pki/host.key", "/etc/ppec/pki/host.pem"


class Enrolment:
    """A real orchestrator on the fleet's network, and what one needs of it to deploy host1."""

    def __init__(self, folder: Path, fleet: ContainerFleet) -> None:
        self.orchestrator = OrchestratorProcess(folder, free_port(), ("127.0.0.1", fleet.gateway))
        self.address = fleet.hosts[0].address

    def start(self) -> None:
        self.orchestrator.start()
        ppec = self.orchestrator.ppec
        ppec("datacentre", "create", "dc", "--region", "lab")
        ppec("cluster", "create", "c1", "--datacentre", "dc")
        ppec("rack", "create", "r1", "--cluster", "c1")
        ppec("ipdb", "vrf", "create", "blue")
        self.register()

    def register(self) -> None:
        self.orchestrator.ppec("host", "add", "host1", "--rack", "r1", "--vrf", "blue", "--address", self.address)

    def token(self) -> str:
        return str(self.orchestrator.ppec("host", "enrolment-token", "host1")["token"])

    def variables(self, **more: Any) -> dict[str, Any]:
        return {"ppec_orchestrator_url": self.orchestrator.url, "ppec_ca_file": str(self.orchestrator.ca), **more}


@pytest.fixture(scope="module")
def enrolment(fleet: ContainerFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Enrolment]:
    made = Enrolment(tmp_path_factory.mktemp("orchestrator"), fleet)
    try:
        made.start()
        yield made
    finally:
        made.orchestrator.stop()


def has_certificate(host: ContainerHost) -> bool:
    return host.run("test", "-e", CERTIFICATE, check=False).returncode == 0


def installed_pair(host: ContainerHost) -> str:
    """Changes with the key and with the certificate."""
    return host.run("sha256sum", KEY, CERTIFICATE).stdout


def test_a_host_enrols_once_and_again_only_for_cause(
    enrolment: Enrolment, host: ContainerHost, play_on_host: Any
) -> None:
    token = enrolment.token()
    dry = play_on_host(["pki"], enrolment.variables(ppec_enrolment_token=token), "--check")
    assert (dry.failed, has_certificate(host)) == (0, False)

    refused = play_on_host(["pki"], enrolment.variables(ppec_enrolment_token="w" * 32), "-vv")
    assert refused.failed == 1
    assert "enrolment.token_invalid" in refused.output
    assert "w" * 32 not in refused.output
    assert not has_certificate(host)

    first = play_on_host(["pki"], enrolment.variables(ppec_enrolment_token=token), "-vv")
    assert (first.failed, has_certificate(host)) == (0, True), first.output
    assert token not in first.output
    assert host.run("stat", "-c", "%a %U:%G", KEY).stdout == "640 root:ppec\n"
    pair = installed_pair(host)

    # The token is used up; nothing needs one.
    again = play_on_host(["pki"], enrolment.variables())
    assert (again.failed, again.changed, installed_pair(host)) == (0, 0, pair)

    needed = play_on_host(["pki"], enrolment.variables(pki_renew_before_days=400))
    assert needed.failed == 1
    assert "ppec_enrolment_token" in needed.output
    assert installed_pair(host) == pair

    # A key that isn't the certificate's means a new pair.
    host.run("sh", "-c", f"openssl genpkey -algorithm ed25519 -out {KEY}")
    repaired = play_on_host(["pki"], enrolment.variables(ppec_enrolment_token=enrolment.token()))
    assert repaired.failed == 0, repaired.output
    assert play_on_host(["pki"], enrolment.variables()).changed == 0


def test_a_host_registered_again_enrols_again(enrolment: Enrolment, host: ContainerHost, play_on_host: Any) -> None:
    """By its looks its certificate is as good as ever; only the orchestrator knows that it was withdrawn."""
    assert play_on_host(["pki"], enrolment.variables(ppec_enrolment_token=enrolment.token())).failed == 0
    pair = installed_pair(host)
    enrolment.orchestrator.ppec("host", "delete", "host1")
    enrolment.register()

    without = play_on_host(["pki"], enrolment.variables())
    assert (without.failed, installed_pair(host)) == (1, pair)
    assert f"withdrawn: {enrolment.orchestrator.url} does not know it" in without.output
    assert "ppec host enrolment-token host1" in without.output

    # Where nobody answers, nothing is known against it, and a token is no reason to enrol.
    token = enrolment.token()
    silent = f"https://{enrolment.orchestrator.addresses[-1]}:1"
    unasked = play_on_host(["pki"], enrolment.variables(ppec_enrolment_token=token, ppec_orchestrator_url=silent))
    assert (unasked.failed, unasked.changed, installed_pair(host)) == (0, 0, pair), unasked.output

    dry = play_on_host(["pki"], enrolment.variables(ppec_enrolment_token=token), "--check")
    assert (dry.failed, dry.changed > 0, installed_pair(host)) == (0, True, pair), dry.output
    repaired = play_on_host(["pki"], enrolment.variables(ppec_enrolment_token=token))
    assert (repaired.failed, repaired.changed > 0) == (0, True), repaired.output
    settled = installed_pair(host)
    assert settled != pair
    for flags in ((), ("--check",)):
        again = play_on_host(["pki"], enrolment.variables(ppec_enrolment_token=enrolment.token()), *flags)
        assert (again.failed, again.changed, installed_pair(host)) == (0, 0, settled), again.output


def test_an_orchestrator_of_another_ca_is_not_believed(
    enrolment: Enrolment, play_on_host: Any, host: ContainerHost, tmp_path: Path
) -> None:
    host.run("rm", "-f", CERTIFICATE)
    other = FleetCa.open(tmp_path / "other", now=datetime.now(UTC)).orchestrator_pair.ca_path
    token = enrolment.token()
    played = play_on_host(["pki"], enrolment.variables(ppec_enrolment_token=token, ppec_ca_file=str(other)))
    assert (played.failed, has_certificate(host)) == (1, False)
    # The token was not used.
    assert play_on_host(["pki"], enrolment.variables(ppec_enrolment_token=token)).failed == 0


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
