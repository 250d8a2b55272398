# SPDX-License-Identifier: Apache-2.0
"""Lab hosts: systemd machines in podman containers, started from the host tree and reached by ssh like real ones."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppec_lab.conditions import wait_until
from ppec_lab.debian_tree import write_file
from ppec_lab.fleet_network import BRIDGE

# crun can't set the limits below when started where they may not be raised, so runc it is. --systemd=always gives
# /run, /tmp and the control groups that systemd as process 1 expects.
PODMAN = ("podman", "--runtime", "runc")
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
SSH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ContainerHost:
    """One lab host. `name` is what its peers call it, `container` what podman and ``ip netns`` call it."""

    name: str
    number: int
    container: str
    address: str
    host_uuid: str
    fleet_dir: Path

    @property
    def directory(self) -> Path:
        """Where this host's overlay lies."""
        return self.fleet_dir / "hosts" / self.name

    @property
    def root(self) -> Path:
        """The host's root directory as seen from outside, while its overlay is mounted."""
        return self.directory / "root"

    def bridge(self) -> str:
        """The Linux bridge inside the host to which its guests attach; it carries the host's address as well."""
        return BRIDGE

    def lay_out(self, tree: Path) -> None:
        """Mount the overlay over `tree` and write what makes this host itself: its UUID and machine id."""
        self.mount(tree)
        write_file(self.root, "/etc/machine-id", self.host_uuid.replace("-", "") + "\n", 0o444)
        conf = self.root / "etc/libvirt/libvirtd.conf"
        # All lab hosts show the same DMI table, and two hosts of one UUID refuse to migrate to one another.
        conf.write_text(f'{conf.read_text()}\nhost_uuid = "{self.host_uuid}"\n')

    def mount(self, tree: Path) -> None:
        """Mount the host's overlay, unless it is mounted; what an earlier run wrote in it is there again."""
        for part in ("upper", "work", "root"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        if not self.root.is_mount():
            layers = f"lowerdir={tree},upperdir={self.directory}/upper,workdir={self.directory}/work"
            _run("mount", "-t", "overlay", "ppec-lab", "-o", layers, str(self.root))

    def unmount(self) -> None:
        """Take the overlay down; returns when nothing of what ran in it holds it any more."""

        def down() -> bool:
            return not self.root.is_mount() or _run("umount", str(self.root), check=False).returncode == 0

        wait_until(down, f"{self.root} is no longer in use", timeout_s=60, every_s=0.2)

    def install_keys(self, authorized: str) -> str:
        """Give the host an ssh host key and let `authorized` log in as root; returns the host's public key."""
        write_file(self.root, "/root/.ssh/authorized_keys", authorized, 0o600)
        (self.root / "root/.ssh").chmod(0o700)
        key = self.root / "etc/ssh/ssh_host_ed25519_key"
        make_key(key, comment=self.name)
        return key.with_suffix(".pub").read_text().strip()

    def write_hosts_file(self, text: str) -> None:
        """Replace /etc/hosts; works on a running host too."""
        write_file(self.root, "/etc/hosts", text)

    def start(self) -> None:
        """Start the host, for the first time or again after `kill`, or not at all if it runs; see `wait_ready`."""
        if self._podman("container", "exists", self.container, check=False).returncode == 0:
            self._podman("start", self.container)
            return
        self._podman(
            "run", "--detach", "--name", self.container, "--hostname", self.name, *LIMITS,
            "--privileged", "--systemd=always", "--network", f"ns:/run/netns/{self.container}",
            "--no-hosts", "--dns=none", "--label", "ppec-lab=host",
            "--rootfs", str(self.root), "/sbin/init",
        )  # fmt: skip

    def wait_ready(self, timeout_s: float = SSH_TIMEOUT_S) -> None:
        """Return when sshd greets; `NotReachedError` carries the container's state otherwise."""
        wait_until(self._greets, f"ssh on {self.name} ({self.address}) greets", timeout_s=timeout_s)

    def kill(self) -> None:
        """End everything on the host at once, as a power cut would; what was on its disk stays."""
        self._podman("kill", "--signal=KILL", self.container)
        self._podman("wait", self.container, timeout_s=60)

    def restart(self) -> None:
        """Power the host off hard and on again; returns when ssh greets."""
        self.kill()
        self.start()
        self.wait_ready()

    def remove(self) -> None:
        """Stop the host and remove its container and overlay; harmless when some of it is gone already."""
        self._podman("rm", "--force", "--time=0", "--ignore", self.container, timeout_s=120)
        self.unmount()
        shutil.rmtree(self.directory, ignore_errors=True)

    def ssh_argv(self, *command: str) -> list[str]:
        """The ssh command line to this host as root; `command` is joined by ssh and read by the host's shell."""
        return ["ssh", *ssh_options(self.fleet_dir), f"root@{self.address}", *command]

    def ssh(self, command: str, *, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one shell command over ssh."""
        return _run(*self.ssh_argv(command), timeout_s=timeout_s)

    def run(self, *argv: str, check: bool = True, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one command on the host without ssh and without a shell."""
        return self._podman("exec", self.container, *argv, check=check, timeout_s=timeout_s)

    def copy_in(self, source: Path, target: str) -> None:
        """Copy a file or a directory tree to an absolute path on the host."""
        _run("cp", "--archive", "--no-target-directory", str(source), str(self.root / target.lstrip("/")))

    def _greets(self) -> bool:
        try:
            with socket.create_connection((self.address, 22), timeout=10) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _podman(self, *words: str, check: bool = True, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return _run(*PODMAN, *words, check=check, timeout_s=timeout_s)


def make_key(path: Path, comment: str) -> None:
    """An ed25519 key pair without a pass phrase at `path` and ``path.pub``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path))


def ssh_options(fleet_dir: Path) -> list[str]:
    """Options that make ssh use the fleet's key and known hosts and nothing of the caller's own configuration."""
    return [
        "-F", "none", "-i", str(fleet_dir / "ssh_key"), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
        "-o", f"UserKnownHostsFile={fleet_dir / 'known_hosts'}", "-o", "GlobalKnownHostsFile=none",
        "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=60",
    ]  # fmt: skip


def _run(*argv: str, check: bool = True, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=timeout_s)
    if check and done.returncode:
        raise RuntimeError(f"{_shown(argv)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done


def _shown(argv: Sequence[str]) -> str:
    words = " ".join(argv)
    return words if len(words) < 200 else words[:200] + "..."
