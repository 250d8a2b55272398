# SPDX-License-Identifier: Apache-2.0
"""`make demo`: from nothing to VMs that answer, on real hosts, through the product's own interfaces."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppec_lab import guest_answer
from ppec_lab.cache import say
from ppec_lab.cloud import PROJECT, Cloud, Stopwatch, build_release
from ppec_lab.conditions import wait_until
from ppec_lab.container_fleet import ContainerFleet
from ppec_lab.debian_guest_image import debian_guest_image
from ppec_lab.guest_image import guest_image
from ppec_lab.local_host import LocalHost
from ppec_lab.orchestrator_process import BIN, OrchestratorProcess, free_port

FLEET = "demo"
HOSTS = 3
STATE = PROJECT / "build" / "demo"
# A small guest is up in seconds; Debian's boot with cloud-init takes most of a minute under emulation, times the VMs.
ANSWER_TIMEOUT_S = {"small": 180.0, "debian": 1200.0}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    up = actions.add_parser("up")
    up.add_argument("--hypervisor", choices=("libvirt", "fake"), default="libvirt")
    up.add_argument("--guest", choices=("small", "debian"), default="small")
    up.add_argument("--count", type=int, default=6)
    actions.add_parser("down")
    chosen = parser.parse_args(argv)
    if chosen.action == "down":
        return down()
    if chosen.hypervisor == "fake":
        return up_fake(chosen.count)
    return up_libvirt(chosen.guest, chosen.count)


def up_libvirt(guest: str, count: int) -> int:
    """The whole thing: container hosts, real units, real QEMU, guests asked over the network."""
    clock = Stopwatch()
    image = guest_image() if guest == "small" else debian_guest_image()
    clock.lap(f"guest image {image.name}")
    release = build_release(PROJECT / "build" / "releases")
    clock.lap(f"release {release.name}")
    fleet = _fleet()
    clock.lap(f"hosts {', '.join(host.name for host in fleet.hosts)} are up (systemd in containers)")
    cloud = Cloud.on(fleet, STATE, _port(STATE))
    cloud.orchestrator.start()
    clock.lap(f"orchestrator at {cloud.orchestrator.local_url}")
    cloud.register()
    cloud.import_image(guest, image)
    clock.lap("registered: data centre, cluster, racks, 2 VRFs with prefixes, flavors, image, hosts")
    cloud.deploy(release)
    cloud.wait_up()
    clock.lap("deployed with ansible-playbook playbooks/site.yml; every host reports")
    user_data = guest_answer.DEBIAN_USER_DATA if guest == "debian" else ""
    flavor = "large" if guest == "debian" else "small"
    vms, started = _create(cloud.orchestrator, count, flavor, guest, user_data)
    answers = guest_answer.wait_for_answers(_ipv4(vms), timeout_s=ANSWER_TIMEOUT_S[guest])
    elapsed_s = time.monotonic() - started
    waited_s = max(answer.after_s for answer in answers.values())
    answered = {name: f"{elapsed_s - waited_s + answer.after_s:.1f}" for name, answer in answers.items()}
    _print_table(cloud.orchestrator, vms, answered)
    _print_next(cloud.orchestrator)
    print(f"demo: {len(answers)} of {len(vms)} VMs answered in {elapsed_s:.1f} s")
    return 0 if len(answers) == len(vms) else 1


def up_fake(count: int) -> int:
    """The same chain on one local host with the fake hypervisor: nothing boots, so nobody is asked to answer."""
    clock = Stopwatch()
    directory = STATE / "fake"
    orchestrator = OrchestratorProcess(directory / "orchestrator", _port(directory))
    orchestrator.start()
    clock.lap(f"orchestrator at {orchestrator.local_url}")
    host = LocalHost("local1", directory / "local1", orchestrator, _port(directory / "local1"))
    _register_fake(orchestrator, host, directory)
    clock.lap("registered: data centre, cluster, rack, VRF with a prefix, flavor, image, host")
    host.start()
    clock.lap("host local1: agentd (fake hypervisor) and proxy")
    _wait_local_up(orchestrator)
    vms, started = _create(orchestrator, count, "small", "empty", "")
    elapsed_s = time.monotonic() - started
    _print_table(orchestrator, vms, {})
    _print_next(orchestrator)
    print(f"demo: {len(vms)} of {count} VMs running in {elapsed_s:.1f} s (fake hypervisor: no guest boots)")
    return 0 if len(vms) == count else 1


def down() -> int:
    """Removes hosts, processes and state of both kinds of demo."""
    fake = OrchestratorProcess(STATE / "fake" / "orchestrator", 0)
    LocalHost("local1", STATE / "fake" / "local1", fake, 0).remove()
    fake.stop()
    OrchestratorProcess(STATE / "orchestrator", 0).stop()
    with contextlib.suppress(FileNotFoundError):
        ContainerFleet.load(FLEET).remove()
    shutil.rmtree(STATE, ignore_errors=True)
    say("demo: nothing is left (images and trees stay cached in /var/cache/ppec)")
    return 0


def _fleet() -> ContainerFleet:
    try:
        fleet = ContainerFleet.load(FLEET)
    except FileNotFoundError:
        return ContainerFleet.start(HOSTS, FLEET)
    fleet.resume()
    return fleet


def _port(directory: Path) -> int:
    """A port chosen once and kept, so that a second demo finds what the first one started."""
    kept = directory / "port"
    if not kept.exists():
        directory.mkdir(parents=True, exist_ok=True)
        kept.write_text(str(free_port()))
    return int(kept.read_text())


def _create(
    orchestrator: OrchestratorProcess, count: int, flavor: str, image: str, user_data: str
) -> tuple[list[dict[str, Any]], float]:
    """Runs `ppec vm create` as a user would, with live progress; returns the VMs and when it began."""
    before = {vm["vm_id"] for vm in orchestrator.ppec("vm", "list")}
    command = ["vm", "create", "--count", str(count), "--flavor", flavor, "--image", image]
    command += ["--policy", "spread", "--wait"]
    say(f"$ ppec {' '.join(command)}")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        if user_data:
            file.write(user_data)
            file.flush()
            command += ["--user-data", file.name]
        started = time.monotonic()
        done = subprocess.run([str(BIN / "ppec"), *command], env=orchestrator.user_environment(), check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [vm for vm in orchestrator.ppec("vm", "list") if vm["vm_id"] not in before], started


def _ipv4(vms: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {vm["name"]: next(a["address"] for a in vm["addresses"] if ":" not in a["address"]) for vm in vms}


def _print_table(orchestrator: OrchestratorProcess, vms: Sequence[dict[str, Any]], answered: Mapping[str, str]) -> None:
    operation = orchestrator.ppec("operation", "show", vms[0]["operation_id"])
    stages = {item["vm_id"]: _stages(item["stage_ms"]) for item in operation["items"]}
    rows = [("VM", "HOST", "CELL", "PINS", "VRF", "ADDRESS", "STAGES (ms)", "ANSWERED AFTER (s)")]
    for vm in sorted(vms, key=lambda v: str(v["name"])):
        pins = " ".join(f"{pin['vcpu']}:{pin['pcpu']}" for pin in vm["pins"])
        cells = ",".join(map(str, vm["cells"]))
        address = " ".join(a["address"] for a in vm["addresses"])
        after = answered.get(vm["name"], "-")
        rows.append((vm["name"], vm["host"], cells, pins, vm["vrf"], address, stages[vm["vm_id"]], after))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _stages(stage_ms: Mapping[str, int]) -> str:
    return " ".join(f"{stage}:{ms}" for stage, ms in stage_ms.items())


def _print_next(orchestrator: OrchestratorProcess) -> None:
    print("\nTry it yourself (`make demo-down` removes everything):")
    print(f"  export PPEC_SERVER={orchestrator.local_url} PPEC_CA={orchestrator.ca}")
    print(f"  export PPEC_TOKEN=$(cat {orchestrator.state_dir}/admin.token)")
    print(f"  {BIN}/ppec vm list\n")


def _register_fake(orchestrator: OrchestratorProcess, host: LocalHost, directory: Path) -> None:
    ppec = orchestrator.ppec
    if ppec("host", "list"):
        return
    ppec("datacentre", "create", "lab-dc", "--region", "lab")
    ppec("cluster", "create", "lab", "--datacentre", "lab-dc")
    ppec("rack", "create", "rack1", "--cluster", "lab")
    ppec("ipdb", "vrf", "create", "blue")
    serves = ("--vrf", "blue", "--cluster", "lab", "--bridge", host.bridges[0])
    ppec("ipdb", "prefix", "create", "192.0.2.0/24", "--gateway", "192.0.2.1", *serves)
    ppec("flavor", "create", "small", "--vcpus", "2", "--memory-mib", "256", "--disk-mib", "1024")
    empty = directory / "empty.raw"
    empty.write_bytes(bytes(1024 * 1024))
    ppec("image", "import", "empty", str(empty), "--format", "raw")
    add = ("--rack", "rack1", "--vrf", "blue", "--address", host.address, "--port", str(host.port))
    ppec("host", "add", host.name, *add)


def _wait_local_up(orchestrator: OrchestratorProcess) -> None:
    def up() -> bool:
        return all(host["liveness"] == "up" for host in orchestrator.ppec("host", "list"))

    wait_until(up, "the host reports", timeout_s=30, every_s=0.2)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, TimeoutError) as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
