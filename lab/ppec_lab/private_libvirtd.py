# SPDX-License-Identifier: Apache-2.0
"""A real libvirtd and virtlogd in private namespaces, beside the machine's own and beside one another.

The daemons see the machine's files at their usual paths, except for libvirt's own directories, which are private and
vanish with them. The socket lies outside, so clients of the machine connect with ``qemu+unix:///system?socket=...``.
Everything started here, QEMU processes included, lives in one PID namespace and ends when that ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from ppec_lab.cache import cache_root
from ppec_lab.conditions import wait_until

NAMESPACE_INIT = Path(__file__).with_name("private_libvirtd.sh")
# sun_path holds 108 bytes with its final NUL.
LONGEST_SOCKET_PATH = 107
START_TIMEOUT_S = 60.0

LIBVIRTD_CONF = """\
unix_sock_dir = "{socket_dir}"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{host_uuid}"
"""

# QEMU runs as root on files nobody re-owns, so that a test's disks stay as the test made them. Control groups are off:
# they belong to the whole machine, and domains of the same name in two private libvirtds would share one.
# vCPU pins don't need them (libvirt falls back to thread affinity).
QEMU_CONF = """\
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
"""


@dataclass(frozen=True)
class PrivateLibvirtd:
    """A running libvirtd: ``uri`` for clients outside, ``init_pid`` is the first process of its namespaces."""

    uri: str
    socket: Path
    host_uuid: str
    base_dir: Path
    init_pid: int
    own_network: bool

    def inside(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` in the libvirtd's namespaces (mounts, processes, network)."""
        namespaces = ["--mount", "--pid"] + (["--net"] if self.own_network else [])
        return ["nsenter", f"--target={self.init_pid}", *namespaces, "--", *argv]

    def run(self, *argv: str, check: bool = True, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one command in the namespaces: ``run("ip", "link", "add", "br0", "type", "bridge")``."""
        return subprocess.run(self.inside(argv), check=check, timeout=timeout_s, capture_output=True, text=True)

    def start_libvirtd(self) -> None:
        """Start libvirtd; returns when its sockets answer. Used at start and after `kill_libvirtd`."""
        self.run("libvirtd", "--daemon", f"--pid-file={self.base_dir}/libvirtd.pid", timeout_s=START_TIMEOUT_S)

    def kill_libvirtd(self, signum: signal.Signals = signal.SIGKILL) -> None:
        """End libvirtd and leave its domains running, as a crash of the daemon would."""
        pid = (self.base_dir / "libvirtd.pid").read_text().strip()
        self.run("kill", f"-{int(signum)}", pid)
        wait_until(lambda: not self._alive(pid), f"libvirtd {pid} ends after {signum.name}", timeout_s=60)

    def _alive(self, pid: str) -> bool:
        return self.run("kill", "-0", pid, check=False).returncode == 0


@contextlib.contextmanager
def private_libvirtd(base_dir: Path | None = None, *, own_network: bool = False) -> Iterator[PrivateLibvirtd]:
    """Start a private virtlogd and libvirtd and end them, with all their domains, on leaving.

    `base_dir` holds the socket, the configuration and the log, and must be short (a UNIX socket's path ends at 107
    bytes); without one, a directory under /tmp is made and removed again. `own_network` gives the daemons a network
    namespace of their own. Needs root.
    """
    with contextlib.ExitStack() as stack:
        if base_dir is None:
            base_dir = Path(tempfile.mkdtemp(prefix="ppec-lv-", dir="/tmp"))
            stack.callback(shutil.rmtree, base_dir, ignore_errors=True)
        host_uuid = str(uuid.uuid4())
        socket = _lay_out(base_dir, host_uuid)
        init_pid = stack.enter_context(_namespaces(base_dir, own_network))
        query = urlencode({"socket": str(socket)}, safe="/")
        daemon = PrivateLibvirtd(f"qemu+unix:///system?{query}", socket, host_uuid, base_dir, init_pid, own_network)
        daemon.run("virtlogd", "--daemon", f"--pid-file={base_dir}/virtlogd.pid")
        daemon.start_libvirtd()
        _keep_capabilities(daemon)
        yield daemon


def _lay_out(base_dir: Path, host_uuid: str) -> Path:
    """Make the directories and files the namespaces are built from; returns the socket's path."""
    socket = base_dir / "sock" / "libvirt-sock"
    if len(os.fsencode(socket)) > LONGEST_SOCKET_PATH:
        raise ValueError(f"base_dir {base_dir} is too long: {socket} exceeds {LONGEST_SOCKET_PATH} bytes")
    for name in ("etc", "sock", "cache"):
        (base_dir / name).mkdir(parents=True, exist_ok=True)
    etc = base_dir / "etc"
    (etc / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(socket_dir=socket.parent, host_uuid=host_uuid))
    (etc / "qemu.conf").write_text(QEMU_CONF)
    filters = Path("/etc/libvirt/nwfilter")
    if filters.is_dir():
        shutil.copytree(filters, etc / "nwfilter", dirs_exist_ok=True)
    fresh = base_dir / "cache" / "qemu" / "capabilities"
    fresh.mkdir(parents=True, exist_ok=True)
    # Nothing but whole entries: another start may be about to add one.
    for entry in _kept_capabilities().glob("*.xml"):
        shutil.copy2(entry, fresh)
    return socket


@contextlib.contextmanager
def _namespaces(base_dir: Path, own_network: bool) -> Iterator[int]:
    """Keep the namespaces up; yields the outer process id of their first process."""
    flags = ["--mount", "--pid", "--fork", "--kill-child"] + (["--net"] if own_network else [])
    script = ["sh", str(NAMESPACE_INIT), str(base_dir), "own-network" if own_network else ""]
    log = (base_dir / "namespace.log").open("wb")
    process = subprocess.Popen(
        ["unshare", *flags, "--", *script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        first_line = process.stdout.readline().strip()
        if not first_line:
            problem = (base_dir / "namespace.log").read_text(errors="replace").strip()
            raise RuntimeError(f"no private namespaces for libvirtd (root needed): {problem}")
        yield int(first_line)
    finally:
        # The end of its input ends the first process; the kernel then kills the rest of the PID namespace before
        # unshare(1) sees its child gone, so nothing is left when wait() returns.
        process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        log.close()


def _kept_capabilities() -> Path:
    return cache_root() / "libvirt-capabilities"


def _keep_capabilities(daemon: PrivateLibvirtd) -> None:
    """Have QEMU probed once and keep what libvirt learnt: the next start takes 0.1 s in place of 8 s.

    libvirt itself discards an entry that fits the QEMU binary, the kernel or its own version no longer.
    """
    daemon.run("virsh", "-c", daemon.uri, "capabilities", timeout_s=120)
    fresh = daemon.base_dir / "cache" / "qemu" / "capabilities"
    kept = _kept_capabilities()
    kept.mkdir(parents=True, exist_ok=True)
    for entry in fresh.glob("*.xml"):
        target = kept / entry.name
        if not target.exists() or target.read_bytes() != entry.read_bytes():
            # Preserve the times: libvirt compares them. Rename, since another start may be reading, or doing the same.
            with tempfile.TemporaryDirectory(prefix=".", dir=kept) as scratch:
                partial = Path(shutil.copy2(entry, scratch))
                partial.replace(target)
