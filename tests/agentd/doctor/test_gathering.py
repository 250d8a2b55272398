# SPDX-License-Identifier: Apache-2.0
"""What the doctor reads: of made-up trees, of real sockets and certificates, and of this machine."""

from __future__ import annotations

import fcntl
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppec_agentd.doctor import gather_machine as machine
from ppec_agentd.doctor.command import as_text
from ppec_agentd.doctor.findings import Finding, Level
from ppec_agentd.doctor.gather import ask_socket, look, read_qemu_user, take_snapshot
from ppec_agentd.doctor.snapshot import CgroupFacts, HugePageFacts, PathFacts, SocketFacts
from ppec_agentd.doctor.tls_trial import try_certificate
from ppec_agentd.kernel_clock import KernelClock, clock_of
from ppec_agentd.nvme import sysfs
from ppec_agentd.serve import main
from ppec_agentd.settings import TlsSettings

from ..nvme.machine_tree import ONE, MachineTree


def tree(root: Path, **files: str) -> Path:
    """Files below `root`; in the names two underscores stand for a slash, and `_d_` for a dash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_d_", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cpus(tmp_path: Path) -> None:
    info = "processor: 0\nmodel name : A CPU\nflags : vmx sse\n\nprocessor: 1\nmodel name: A CPU\nflags : sse vmx avx\n"
    root = tree(tmp_path, proc__cpuinfo=info, sys__devices__system__cpu__online="0-3,8\n")
    tree(root, sys__devices__system__cpu__smt__control="off\n")
    for number, governor in enumerate(("performance", "powersave")):
        tree(root, **{f"sys__devices__system__cpu__cpu{number}__cpufreq__scaling_governor": governor})
    cpu = machine.read_cpu(root)
    assert (cpu.model, cpu.flags, cpu.online, cpu.smt) == ("A CPU", {"vmx", "sse"}, 5, "off")
    assert cpu.governors == {"performance", "powersave"}
    assert machine.read_cpu(tmp_path / "nothing").flags == frozenset()


def test_nested_and_iommu_groups(tmp_path: Path) -> None:
    device = PathFacts(Path("/dev/kvm"))
    assert machine.read_kvm(tmp_path, device).nested is None
    tree(tmp_path, sys__module__kvm_intel__parameters__nested="N\n")
    assert machine.read_kvm(tmp_path, device).nested is False
    tree(tmp_path, sys__module__kvm_amd__parameters__nested="1\n")
    assert machine.read_kvm(tmp_path, device).nested is True
    assert machine.count_iommu_groups(tmp_path) == 0
    for number in range(3):
        (tmp_path / f"sys/kernel/iommu_groups/{number}").mkdir(parents=True)
    assert machine.count_iommu_groups(tmp_path) == 3


UNIFIED = "30 25 0:26 / {} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n35 31 0:32 / /m rw - cgroup cgroup rw,memory\n"
SYSTEMD = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"


@pytest.mark.parametrize(
    ("mounts", "facts"),
    [
        (UNIFIED.format("/sys/fs/cgroup"), CgroupFacts("v2", frozenset({"cpuset", "memory", "pids"}))),
        (V1 + SYSTEMD, CgroupFacts("v1", frozenset({"cpuset", "memory"}))),
        (V1 + UNIFIED.format("/sys/fs/cgroup/unified"), CgroupFacts("hybrid", frozenset({"cpuset", "memory"}))),
        (SYSTEMD + UNIFIED.format("/sys/fs/cgroup"), CgroupFacts("v2", frozenset({"cpuset", "memory", "pids"}))),
        ("1 1 0:1 / / rw - ext4 /dev/vda rw\n", CgroupFacts()),
        ("", CgroupFacts()),
    ],
)
def test_control_groups(tmp_path: Path, mounts: str, facts: CgroupFacts) -> None:
    tree(tmp_path, proc__self__mountinfo=mounts, sys__fs__cgroup__any="")
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("cpuset memory pids\n")
    assert machine.read_cgroups(tmp_path) == facts


def test_huge_pages_memory_and_limits(tmp_path: Path) -> None:
    node = "sys__devices__system__node__node1__hugepages__hugepages_d_2048kB"
    tree(tmp_path, **{f"{node}__nr_hugepages": "64\n", f"{node}__free_hugepages": "60\n"})
    assert list(machine.read_huge_pages(tmp_path)) == [HugePageFacts(1, 2048, 64, 60)]
    tree(tmp_path, proc__meminfo="MemTotal:       2097152 kB\nMemFree: 1 kB\n")
    assert machine.read_memory_mib(tmp_path) == 2048
    limits = "Limit   Soft  Hard  Units\nMax locked memory         65536       {}   bytes\n"
    tree(tmp_path, proc__self__limits=limits.format("8388608"))
    assert machine.read_locked_memory_limit_mib(tmp_path) == 8
    tree(tmp_path, proc__77__comm="libvirtd\n", proc__77__limits=limits.format("unlimited"))
    assert machine.read_locked_memory_limit_mib(tmp_path) is None


def test_who_listens_on_a_port(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    row = "   0: 00000000:{:04X} 00000000:0000 {} 00000000:00000000 00:00000000 00000000  0  0 {} 1\n"
    table = head + row.format(7443, "0A", 901) + row.format(7443, "01", 902) + row.format(22, "0A", 903)
    tree(tmp_path, proc__net__tcp=table)
    assert machine.read_port_holders(tmp_path, (7443,)) == {7443: "somebody"}
    tree(tmp_path, proc__5__comm="python3\n", proc__5__cmdline="/usr/bin/python3\0-I\0/opt/bin/ppec-proxy\0")
    (tmp_path / "proc/5/fd").mkdir()
    (tmp_path / "proc/5/fd/3").symlink_to("socket:[901]")
    assert machine.read_port_holders(tmp_path, (7443, 22)) == {7443: "ppec-proxy", 22: "somebody"}
    assert machine.read_port_holders(tmp_path, (80,)) == {}


def test_paths_and_qemus_user(tmp_path: Path) -> None:
    tree(tmp_path, etc__libvirt__qemu_conf="")
    (tmp_path / "etc/libvirt").chmod(0o751)
    seen = look(tmp_path, Path("/etc/libvirt"))
    assert (seen.kind, seen.mode) == ("folder", 0o751)
    assert look(tmp_path, Path("/etc/none")).kind == "missing"
    (tmp_path / "etc/libvirt/qemu.conf").write_text('#user = "x"\nuser = "+0"\n')
    user = read_qemu_user(tmp_path)
    assert user is not None
    assert (user.name, user.uid) == ("root", 0)
    (tmp_path / "etc/libvirt/qemu.conf").write_text('user = "nobody-of-this-name"\n')
    assert read_qemu_user(tmp_path) is None


def test_the_kernels_clock_in_either_unit() -> None:
    assert clock_of(0, 0x2000, 1_500_000, 2000) == KernelClock(True, 0.0015, 0.002)
    assert clock_of(0, 0, 1500, 2000) == KernelClock(True, 0.0015, 0.002)
    assert not clock_of(5, 0, 0, 0).synchronised
    assert not clock_of(0, 0x40, 0, 0).synchronised


def _answering(path: Path, answer: bytes) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        peer, _ = server.accept()
        with peer:
            peer.recv(4096)
            peer.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return server


def test_who_is_at_the_socket(short_dir: Path) -> None:
    path = short_dir / "s"
    assert ask_socket(path).holder == "free"
    path.write_text("")
    assert ask_socket(path).holder == "no-socket"
    path.unlink()
    with _answering(path, b"HTTP/1.1 400 Bad Request\r\n\r\n"):
        assert ask_socket(path).holder == "stranger"
    # Closed, and its file still there.
    assert ask_socket(path).holder == "stale"
    path.unlink()
    answer = json.dumps({"parameters": {"agent_version": "1.2", "host": "h9"}}).encode() + b"\0"
    with _answering(path, answer):
        assert ask_socket(path) == SocketFacts("agent", "version 1.2 of host h9")


def test_a_running_agent_is_known_by_its_answer(agent_process: Callable[..., Any]) -> None:
    agent = agent_process().start()
    found = ask_socket(agent.settings.socket.path)
    assert found.holder == "agent"
    assert found.said.endswith("of host h1")


def tls_of(ca: Path, certificate: Path, key: Path) -> TlsSettings:
    return TlsSettings(ca_path=ca, certificate_path=certificate, key_path=key)


def test_certificates_are_tried(words: Any, tmp_path: Path) -> None:
    for name in ("ours", "others"):
        (tmp_path / name).mkdir()
    ours, others = (words.fleet_ca(tmp_path / name) for name in ("ours", "others"))
    certificate, key = ours.issue("ppec://host/h1")
    good = try_certificate(tls_of(ours.path, certificate, key))
    assert (good.problem, good.identities) == ("", ("ppec://host/h1",))
    assert 0.9 < good.days_left < 1.1
    assert try_certificate(tls_of(others.path, certificate, key)).problem
    _, other_key = others.issue("ppec://host/h1")
    assert "don't go together" in try_certificate(tls_of(ours.path, certificate, other_key)).problem
    assert "No such file" in try_certificate(tls_of(ours.path, tmp_path / "none", key)).problem
    key.write_text("no key")
    assert "don't go together" in try_certificate(tls_of(ours.path, certificate, key)).problem
    late, late_key = ours.issue("ppec://host/h1", days=-0.5)
    assert "expired" in try_certificate(tls_of(ours.path, late, late_key)).problem


def test_this_machine_can_be_looked_at(settings: Any) -> None:
    snapshot = take_snapshot(settings)
    assert snapshot.architecture is not None
    assert snapshot.memory_mib > 0
    assert snapshot.file_systems[0].size_mib > 0
    assert snapshot.paths[Path("/")].kind == "folder"
    assert snapshot.socket.holder == "free"
    assert not settings.storage.state_dir.exists()


def test_a_drive_that_the_agent_erases_is_not_in_use_by_the_host(
    short_dir: Path, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have it for themselves; the agent's lock tells which it is."""
    machine_tree = MachineTree(short_dir / "root")
    machine_tree.drive()
    settings = words.settings_of(short_dir, nvme={"drives": [ONE]}, lab={"nvme_drives": {ONE: 0}})
    monkeypatch.setattr(sysfs, "is_claimed", lambda device: True)
    lock = machine_tree.root / settings.storage.drives.relative_to("/") / f"{ONE}.lock"
    lock.parent.mkdir(parents=True)

    def problem() -> str:
        (drive,) = take_snapshot(settings, machine_tree.root).nvme_drives
        return drive.problem

    with lock.open("w") as held:
        assert problem() == "nvme0n1 is in use by the host"
        fcntl.flock(held, fcntl.LOCK_EX)
        assert problem() == sysfs.BEING_ERASED


def test_the_command_says_what_it_found(short_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = short_dir / "agentd.toml"
    config.write_text('host = "h1"\nhypervisor = "fake"\n[lab]\ntopology = "cores=4"\n[socket]\ngroup = "no-such"\n')
    assert main(["doctor", "--config", str(config), "--output", "json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["host"], document["worst"]) == ("h1", "error")
    (group,) = [finding for finding in document["findings"] if finding["check"] == "group"]
    assert (group["level"], group["advice"]) == ("error", "groupadd --system no-such")
    # The option before the word counts, too.
    assert main(["--config", str(config), "doctor"]) == 2
    assert "-> groupadd --system no-such" in capsys.readouterr().out
    assert main(["doctor", "--config", str(short_dir / "none")]) == 2
    assert "none: No such file" in capsys.readouterr().out


def test_the_worst_stands_last() -> None:
    text = as_text((Finding("a", Level.ERROR, "A", "bad", "good", "mend it"), Finding("b", Level.OK, "B", "fine")))
    assert text == "ok      B: fine\nerror   A: bad (wanted: good)\n        -> mend it\n1 error, 1 ok\n"
