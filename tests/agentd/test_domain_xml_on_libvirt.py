# SPDX-License-Identifier: Apache-2.0
"""Every golden domain, defined by a real libvirt and read back; those that this machine can run are started."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ppec_agentd.domain_xml.build import HostProfile, domain_xml
from ppec_agentd.domain_xml.observe import observe
from ppec_agentd.hypervisor import DomainDefinition
from ppec_agentd.numa import GuestCell
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy, VmState
from ppec_lab.hypervisor_hosts import LibvirtHost
from ppec_lab.private_libvirtd import PrivateLibvirtd, private_libvirtd

pytestmark = pytest.mark.libvirt
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.xml"))


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[PrivateLibvirtd]:
    with private_libvirtd() as daemon:
        yield daemon


@pytest.fixture
def host(libvirtd: PrivateLibvirtd, tmp_path: Path) -> Iterator[LibvirtHost]:
    found = LibvirtHost(libvirtd, tmp_path, 1)
    yield found
    found.sweep()


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_libvirt_takes_it_and_gives_it_back(host: LibvirtHost, tmp_path: Path, golden: Path) -> None:
    wanted = ElementTree.fromstring(golden.read_text())
    machine = wanted.find("os/type")
    assert machine is not None
    if shutil.which(f"qemu-system-{machine.get('arch')}") is None:
        pytest.skip(f"this machine emulates no {machine.get('arch')}")
    # libvirt refuses a KVM domain where there is no KVM; nothing else of it depends on that.
    wanted.set("type", "qemu")
    path = tmp_path / "domain.xml"
    path.write_bytes(ElementTree.tostring(wanted))
    host.virsh("define", "--validate", str(path))
    text = host.virsh("dumpxml", "--inactive", "web-1")
    asked, got = (observe(xml, VmState.STOPPED).domain for xml in (ElementTree.tostring(wanted, "unicode"), text))
    plugged = 384 if "plugged" in golden.stem else 0
    assert got == replace(asked, memory_mib=asked.memory_mib + plugged)
    kept = ElementTree.fromstring(text)
    for what in ("maxMemory", "memoryBacking/hugepages/page", "numatune/memnode", "cputune/emulatorpin"):
        assert [element.attrib for element in kept.iterfind(what)] == [
            element.attrib for element in wanted.iterfind(what)
        ], what
    for what in ("cpu/topology", "cpu/numa/cell", "cpu/numa/cell/distances/sibling"):
        found = [element.attrib for element in kept.iterfind(what)]
        assert len(found) == len(wanted.findall(what))
        for attributes, element in zip(found, wanted.iterfind(what), strict=True):
            assert element.attrib.items() <= attributes.items(), what


CELLS = (GuestCell(0, (0, 1), 64, (10, 21)), GuestCell(1, (2, 3), 128, (21, 10)))
# Those whose host this machine can be: one cell, no huge pages. A guest of two cells goes unbound.
RUNNABLE: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "growing": ({"max_vcpus": 4, "max_memory_mib": 512}, {}, True),
    "shrinking": ({"max_vcpus": 2}, {}, True),
    "shared": ({"numa": NumaPolicy(cpus=CpuPolicy.SHARED), "pins": ()}, {"shared_cpus": (0,)}, True),
    "siblings": ({"numa": NumaPolicy(smt=SmtPolicy.REQUIRE)}, {"threads_per_core": 2}, True),
    "emulator": ({}, {"emulator_cpus": (0,)}, True),
    "two-guest-cells": (
        {"vcpus": 4, "memory_mib": 192, "cells": (0, 1), "guest_cells": CELLS, "pins": ()},
        {"threads_per_core": 2},
        False,
    ),
}


@pytest.mark.parametrize("case", RUNNABLE)
def test_it_runs(host: LibvirtHost, tmp_path: Path, case: str) -> None:
    of_metadata, of_definition, bind = RUNNABLE[case]
    definition: DomainDefinition = replace(host.definition(**of_metadata), **of_definition)
    path = tmp_path / "domain.xml"
    path.write_text(domain_xml(definition, HostProfile("x86_64", "qemu", bind=bind, disk_cache="writeback")))
    name = definition.metadata.name
    host.virsh("define", "--validate", str(path))
    host.virsh("start", name)
    seen = observe(host.virsh("dumpxml", name), VmState.RUNNING).domain
    assert (seen.vcpus, seen.memory_mib) == (definition.metadata.vcpus, definition.metadata.memory_mib)
    threads = host.virsh("qemu-monitor-command", name, '{"execute": "query-cpus-fast"}')
    assert threads.count('"cpu-index"') == definition.metadata.vcpus
    shown = host.virsh("qemu-monitor-command", name, "--hmp", "info numa")
    assert shown.startswith(f"{len(definition.metadata.guest_cells) or ('max_memory_mib' in of_metadata) * 1} nodes")
    if bind and case != "shared":
        assert seen.pins == definition.metadata.pins
    if case == "shared":
        assert {line.split()[1] for line in host.virsh("vcpupin", name).splitlines()} == {"0"}
