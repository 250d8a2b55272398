# SPDX-License-Identifier: Apache-2.0
"""An emulated bare-metal machine that runs: on a bridge of its own, reached by ssh, gone without a trace.

For `Cloud` it is a fleet of one host. Unlike a host in a container it has a kernel of its own, two sockets with a NUMA
cell each, working KVM and udev; its `eth0` is bare, and the role libvirt_host makes the bridge of it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppec_lab.background_process import BackgroundProcess
from ppec_lab.bare_metal_disk import bare_metal_disk
from ppec_lab.bare_metal_machine import MAC, MachineFiles, MachineShape, qemu_command
from ppec_lab.cache import say
from ppec_lab.conditions import NotReachedError, wait_until
from ppec_lab.container_host import make_key, ssh_options
from ppec_lab.fleet_network import BRIDGE, FleetNetwork, claim_network, ip

NAME = "metal1"
# A busy machine outside may take several times what an idle one does (see lab/README.md).
BOOT_TIMEOUT_S = 420.0
BOOTS = 2
CONSOLE_LINES = 40


@dataclass(frozen=True)
class BareMetalHost:
    """The machine as others meet it: an address and root's ssh."""

    name: str
    number: int
    address: str
    directory: Path

    def bridge(self) -> str:
        """The bridge that the role makes of ``eth0``, to which guests attach."""
        return BRIDGE

    def run(self, *argv: str, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run one command over ssh, without a shell's reading of its words; `RuntimeError` when it fails."""
        done = subprocess.run(
            ["ssh", *ssh_options(self.directory), f"root@{self.address}", shlex.join(argv)],
            check=False, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise RuntimeError(f"{self.name}: {' '.join(argv)[:200]} ended with {done.returncode}: {said}")
        return done

    def greets(self) -> bool:
        """Whether its sshd answers."""
        try:
            with socket.create_connection((self.address, 22), timeout=10) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False


@dataclass(frozen=True)
class BareMetalFleet:
    """The machine, its network and the keys it is reached by; all state is in `directory`."""

    directory: Path
    network: FleetNetwork
    shape: MachineShape

    @property
    def hosts(self) -> tuple[BareMetalHost, ...]:
        return (BareMetalHost(NAME, 0, self.network.host_address(0), self.directory),)

    @property
    def host(self) -> BareMetalHost:
        return self.hosts[0]

    @property
    def gateway(self) -> str:
        """The address of the machine outside as the machine sees it."""
        return self.network.gateway

    @property
    def ssh_key(self) -> Path:
        """The private key that the machine accepts for root."""
        return self.directory / "ssh_key"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    @property
    def console(self) -> Path:
        """What the machine printed on its serial port."""
        return self.directory / "console.log"

    @property
    def process(self) -> BackgroundProcess:
        """QEMU."""
        return BackgroundProcess(self.directory, "machine")

    @staticmethod
    def start(directory: Path, shape: MachineShape | None = None) -> BareMetalFleet:
        """Boot a machine whose state goes to `directory` and return when its sshd greets; undone when it doesn't.

        Builds the disk if need be. Needs root. `RuntimeError` has the console's last lines.
        """
        disk = bare_metal_disk()
        directory.mkdir(parents=True, exist_ok=True)
        fleet = BareMetalFleet(directory, claim_network(), shape or MachineShape())
        try:
            overlay, seed = directory / "root.qcow2", directory / "seed.tar"
            create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(disk.root), str(overlay)]
            subprocess.run(create, check=True, capture_output=True, text=True, timeout=60)
            seed.write_bytes(seed_archive(fleet._identity()))
            fleet._plug_in()
            files = MachineFiles(disk, overlay, seed, fleet.console, fleet._make_drives())
            command = qemu_command(NAME, fleet.shape, files, fleet._tap)
            # Even a killed test leaves no machine behind. In a session of its own, so that Ctrl-C ends it in order.
            fleet._boot(["setpriv", "--pdeathsig", "KILL", "--", *command])
        except BaseException:
            fleet.remove()
            raise
        return fleet

    def console_tail(self) -> str:
        """The last lines on the serial port."""
        if not self.console.exists():
            return ""
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-CONSOLE_LINES:])

    def remove(self) -> None:
        """End the machine and take down its network; `directory` stays to its owner. May be repeated."""
        self.process.stop()
        for link in (self._tap, self.network.bridge):
            if Path("/sys/class/net", link).exists():
                ip("link", "delete", link)

    @property
    def _tap(self) -> str:
        return self.network.cable(0)

    def _plug_in(self) -> None:
        ip("tuntap", "add", "dev", self._tap, "mode", "tap")
        ip("link", "set", self._tap, "master", self.network.bridge, "up")

    def _make_drives(self) -> tuple[Path, ...]:
        drives = tuple(self.directory / f"nvme{cell}.raw" for cell in range(self.shape.sockets))
        for drive in drives:
            with drive.open("wb") as file:
                file.truncate(self.shape.nvme_drive_mib * 1024**2)
        return drives

    def _identity(self) -> dict[str, tuple[str, int]]:
        """The files that make the machine itself: path to text and mode."""
        make_key(self.ssh_key, comment="ppec bare-metal lab")
        own = self.directory / "ssh_host_ed25519_key"
        make_key(own, comment=NAME)
        public = own.with_suffix(".pub").read_text()
        self.known_hosts.write_text(f"{NAME},{self.host.address} {public}")
        return {
            "root/.ssh/authorized_keys": (self.ssh_key.with_suffix(".pub").read_text(), 0o600),
            "etc/ssh/ssh_host_ed25519_key": (own.read_text(), 0o600),
            "etc/ssh/ssh_host_ed25519_key.pub": (public, 0o644),
            "etc/hostname": (f"{NAME}\n", 0o644),
            "etc/hosts": (f"127.0.0.1 localhost\n{self.gateway} ppec-outside\n{self.host.address} {NAME}\n", 0o644),
            "etc/systemd/network/10-eth0.network": (network_file(self.host.address, self.gateway), 0o644),
        }

    def _boot(self, command: Sequence[str]) -> None:
        """Starts QEMU; returns when ssh greets. The emulator itself may crash (see lab/README.md): twice is a fault."""
        for attempt in range(1, BOOTS + 1):
            self.process.start(command)
            try:
                wait_until(self._greets_or_ended, f"ssh on {NAME} greets", timeout_s=BOOT_TIMEOUT_S, every_s=0.5)
            except NotReachedError as late:
                raise RuntimeError(f"{late}; the end of its console:\n{self.console_tail()}") from late
            if self.process.pid() is not None:
                return
            say(f"{NAME} ended by itself in boot {attempt} of {BOOTS}: {self.process.tail()}")
        raise RuntimeError(f"{NAME} doesn't boot; the end of its console:\n{self.console_tail()}")

    def _greets_or_ended(self) -> bool:
        return self.process.pid() is None or self.host.greets()


def network_file(address: str, gateway: str) -> str:
    """systemd-networkd's file for the machine's one interface."""
    return f"[Match]\nMACAddress={MAC}\nType=ether\n\n[Network]\nAddress={address}/24\nGateway={gateway}\n"


def seed_archive(files: Mapping[str, tuple[str, int]]) -> bytes:
    """A tar archive of `files` (relative path to text and mode), all root's; folders above them keep their modes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path, (text, mode) in sorted(files.items()):
            data = text.encode()
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


@contextlib.contextmanager
def bare_metal_fleet(directory: Path, shape: MachineShape | None = None) -> Iterator[BareMetalFleet]:
    """A machine for the length of a ``with`` block."""
    fleet = BareMetalFleet.start(directory, shape)
    try:
        yield fleet
    finally:
        fleet.remove()


def main() -> None:
    """Boot an emulated bare-metal machine, say how to reach it, and end it when asked to (Ctrl-C)."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="ppec-metal-") as name, bare_metal_fleet(Path(name)) as fleet:
        say(f"{NAME} is up; its console: {fleet.console}")
        print(" ".join(["ssh", *ssh_options(fleet.directory), f"root@{fleet.host.address}"]), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while fleet.process.pid() is not None:
                wait_until(lambda: fleet.process.pid() is None, "the machine ends", timeout_s=86400, every_s=1)


if __name__ == "__main__":
    main()
