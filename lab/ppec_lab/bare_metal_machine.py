# SPDX-License-Identifier: Apache-2.0
"""The command line of an emulated bare-metal machine: one NUMA cell and one NVMe drive for each socket, and KVM inside.

QEMU's own emulator (TCG) plays the CPU, so no virtualisation is needed outside; it also emulates AMD's SVM, so KVM
inside is the real thing. Nothing here starts anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ppec_lab.bare_metal_disk import SEED_SERIAL, BareMetalDisk

# As firmware tables give it for two sockets of one board; a cell is 10 away from itself.
SOCKET_DISTANCE = 21
MAC = "52:54:00:70:65:01"
HUGE_PAGE_MIB = 2
# The first drive sits where a machine of one root complex has all its devices, and names no cell; each of the others is
# behind a bridge of its own to its cell, where the firmware numbers buses from here on.
FIRST_DRIVE_SLOT = 0x10
BUSES_PER_BRIDGE = 0x20


@dataclass(frozen=True)
class MachineShape:
    """What the machine shows itself: each socket is one NUMA cell with its share of memory and 2 MiB pages, and has an
    NVMe drive near it."""

    sockets: int = 2
    cores: int = 2
    threads: int = 2
    memory_per_cell_mib: int = 1536
    huge_pages_per_cell: int = 32
    nvme_drive_mib: int = 64

    @property
    def cpus_per_cell(self) -> int:
        return self.cores * self.threads

    @property
    def nvme_addresses(self) -> tuple[str, ...]:
        """PCI addresses of the drives, by cell."""
        others = (f"0000:{BUSES_PER_BRIDGE * cell + 1:02x}:00.0" for cell in range(1, self.sockets))
        return (f"0000:00:{FIRST_DRIVE_SLOT:02x}.0", *others)

    @property
    def cpus(self) -> int:
        return self.sockets * self.cpus_per_cell


@dataclass(frozen=True)
class MachineFiles:
    """`overlay` is a qcow2 on the shared disk's root, `seed` a tar archive, `console` the log of the serial port, and
    `drives` are raw files, by cell."""

    disk: BareMetalDisk
    overlay: Path
    seed: Path
    console: Path
    drives: tuple[Path, ...] = ()


def qemu_command(name: str, shape: MachineShape, files: MachineFiles, tap: str) -> list[str]:
    """Start the machine in the foreground; ends with its process. `tap` is an existing tap device."""
    return [
        "qemu-system-x86_64", "-name", name, "-nodefaults", "-no-user-config", "-no-reboot",
        "-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi",
        # Five-level paging only makes every emulated page walk longer.
        "-cpu", "max,la57=off,topoext=on,x-force-features=on,xlevel=0x8000001e",
        "-smp", f"{shape.cpus},sockets={shape.sockets},cores={shape.cores},threads={shape.threads}",
        "-m", f"{shape.sockets * shape.memory_per_cell_mib}M", *_cells(shape),
        "-device", "intel-iommu,intremap=on,caching-mode=on",
        # A lost write costs nobody anything: the overlay is thrown away.
        *_disk("root", files.overlay, "qcow2", "cache=unsafe,discard=unmap"),
        *_disk("seed", files.seed, "raw", "read-only=on", SEED_SERIAL),
        "-netdev", f"tap,id=net0,ifname={tap},script=no,downscript=no",
        "-device", f"virtio-net-pci,netdev=net0,mac={MAC}",
        "-device", "virtio-rng-pci",
        # Last: what names no bus goes to the newest, and a bridge's takes no such device.
        *_nvme_drives(files.drives),
        "-display", "none", "-monitor", "none", "-serial", f"file:{_quoted(files.console)}",
        "-kernel", str(files.disk.kernel), "-initrd", str(files.disk.initrd),
        "-append", kernel_command_line(name, shape),
    ]  # fmt: skip


def kernel_command_line(name: str, shape: MachineShape) -> str:
    """Huge pages are asked for by cell, or the kernel would take them where it likes."""
    pages = ",".join(f"{cell}:{shape.huge_pages_per_cell}" for cell in range(shape.sockets))
    words = ["root=/dev/vda", "ro", "console=ttyS0", "net.ifnames=0", f"systemd.hostname={name}"]
    # Mitigations guard against faults that an emulated CPU hasn't got, and cost it more than a real one.
    words += ["intel_iommu=on", "iommu=pt", "mitigations=off", "tsc=reliable", "no_timer_check", "panic=-1"]
    # It finds an AMD CPU, tries each of its CPUs for power states in vain, and fills the console with that.
    words += ["modprobe.blacklist=powernow_k8"]
    if shape.huge_pages_per_cell:
        words += [f"hugepagesz={HUGE_PAGE_MIB}M", f"hugepages={pages}"]
    return " ".join(words)


def _cells(shape: MachineShape) -> list[str]:
    words: list[str] = []
    for cell in range(shape.sockets):
        words += ["-object", f"memory-backend-ram,id=m{cell},size={shape.memory_per_cell_mib}M"]
        words += ["-numa", f"node,nodeid={cell},memdev=m{cell}", "-numa", f"cpu,node-id={cell},socket-id={cell}"]
    for source in range(shape.sockets):
        for target in range(source):
            # The other direction is taken from this one.
            words += ["-numa", f"dist,src={source},dst={target},val={SOCKET_DISTANCE}"]
    return words


def _disk(identity: str, path: Path, image_format: str, options: str, serial: str | None = None) -> list[str]:
    device = f"virtio-blk-pci,drive={identity}" + (f",serial={serial}" if serial else "")
    drive = f"file={_quoted(path)},if=none,id={identity},format={image_format},{options}"
    return ["-drive", drive, "-device", device]


def _nvme_drives(drives: tuple[Path, ...]) -> list[str]:
    words: list[str] = []
    for cell, path in enumerate(drives):
        bus = f"bus=pcie.0,addr={FIRST_DRIVE_SLOT:#x}"
        if cell:
            words += ["-device", f"pxb-pcie,id=root{cell},bus=pcie.0,bus_nr={BUSES_PER_BRIDGE * cell},numa_node={cell}"]
            words += ["-device", f"pcie-root-port,id=port{cell},bus=root{cell},chassis={cell}"]
            bus = f"bus=port{cell}"
        words += ["-drive", f"file={_quoted(path)},if=none,id=nvme{cell},format=raw,cache=unsafe,discard=unmap"]
        words += ["-device", f"nvme,drive=nvme{cell},serial=NVME000{cell},{bus}"]
    return words


def _quoted(path: Path) -> str:
    """In QEMU's option lists a comma is doubled."""
    return str(path).replace(",", ",,")
