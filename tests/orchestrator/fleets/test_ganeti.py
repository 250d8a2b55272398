# SPDX-License-Identifier: Apache-2.0
"""Ganeti's text format: as a Ganeti user has it of `hscan`, and with every fault refused by its line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, NumaPolicy
from ppec_orchestrator.fleets.file import FleetFile
from ppec_orchestrator.fleets.reading import read_fleet, read_requests
from ppec_orchestrator.placement.advice import advise
from ppec_orchestrator.placement.balance import Balance
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import Group, PlanRequest

# A line each, counted from 1.
CLUSTER = """\
# written by hand
default|uuid-1|preferred||
spare|uuid-2|unallocable|tag|net

node1|65536|1024|56320|1048576|1000000|16|M|uuid-1|10||N|0|2|1.0
node2|65536|1024|64512|1048576|1048576|16|N|uuid-1|10
node3|65536|1024|64512|1048576|1048576|16|Y|uuid-1
node4|?|?|?|?|?|?|N|uuid-1
node5|65536|1024|64512|1048576|1048576|16|N|uuid-2

web1|8192|10240|4|running|Y|node1|node2|drbd|service:web,owner:me|1
web2|4096|10240|2|ADMIN_down|N|node1||rbd|service:web,service:db|1|-

htools:iextags:service
htools:nlocation:power

|16384,4,102400,1,1,1|1024,2,0,1,1,1;786432,96,16777216,16,8,12|plain,drbd|1.0|32.0
spare|16384,4,102400,1,1,1|1024,2,0,1,1,1;786432,96,16777216,16,8,12|plain,drbd|4.0|32.0
"""


def read(text: str = CLUSTER) -> FleetFile:
    return read_fleet(text.encode(), "cluster.data")


def test_nodes_are_hosts_of_one_cell() -> None:
    hosts = read().fleet.hosts
    assert [(host.name, host.cluster, host.live, host.draining) for host in hosts] == [
        ("node1", "default", True, False),
        ("node2", "default", True, False),
        ("node3", "default", False, False),
        ("node4", "default", False, False),
        ("node5", "spare", True, True),
    ]
    (cell,) = hosts[0].cells
    assert (cell.cores, cell.cores_free, cell.cores_reserved) == (14, 8, 2)
    # The node says 56,320 MiB are free, its instances leave 52,224, for one of them is down.
    assert (cell.memory_mib, cell.memory_free_mib, cell.memory_reserved_mib) == (64512, 52224, 1024)
    assert (hosts[0].disk_mib, hosts[0].disk_free_mib) == (1048576, 1000000)


def test_a_vcpu_ratio_lets_instances_share_cpus() -> None:
    (cell,) = read().fleet.hosts[4].cells
    assert (cell.cores, cell.shared_cpus, cell.shared_vcpus) == (0, 16, 64)
    # What no policy says is Ganeti's default, 4.
    without = read(CLUSTER[: CLUSTER.index("|16384")])
    assert {vm.profile.shape.numa.cpus for vm in without.fleet.hosts[0].vms} == {CpuPolicy.SHARED}
    (cell,) = without.fleet.hosts[0].cells
    assert (cell.shared_vcpus, cell.shared_vcpus_free) == (62, 56)


def test_a_vm_with_cores_of_its_own_is_told_that_a_cluster_shares_all_of_its_cpus() -> None:
    """As every Ganeti cluster does whose policy has the default ratio."""
    file = read(CLUSTER[: CLUSTER.index("|16384")])
    small = {"name": "p", "shape": {"vcpus": 2, "memory_mib": 1024, "disk_mib": 10}, "architecture": "x86_64"}
    document = {"profiles": [small], "batch": [{"name": "v", "profile": "p"}]}
    (vm,) = read_requests(json.dumps(document).encode(), "it", file).requests
    refused = plan(file.fleet, PlanRequest((vm,))).refused[0]
    assert refused.reasons[Reason.NO_DEDICATED_CPUS] == 2
    assert "2 all of whose CPUs are shared" in refused.sentence()
    shared = replace(vm.profile.shape, numa=NumaPolicy(cpus=CpuPolicy.SHARED))
    assert "share CPUs with others" in [change.sentence() for change in advise(file.fleet, vm)]
    assert plan(file.fleet, PlanRequest((replace(vm, profile=replace(vm.profile, shape=shared)),))).placed


def test_more_vcpus_than_the_policy_admits_are_a_fact_and_leave_nothing_free() -> None:
    (cell,) = read(CLUSTER.replace("web1|8192|10240|4|", "web1|8192|10240|40|")).fleet.hosts[0].cells
    assert (cell.cores, cell.cores_free) == (14, 0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("web1|8192|", "web1|65536|"),
        # What the node uses itself contains its instances' memory, for KVM.
        ("node1|65536|1024|56320", "node1|65536|60000|56320"),
        # Down, at fault and down, running somewhere else, or only promised: it has no memory of the node.
        ("web2|4096|", "web2|999999|"),
        ("web2|4096|10240|2|ADMIN_down", "web2|999999|10240|2|ERROR_down"),
        ("web2|4096|10240|2|ADMIN_down", "web2|999999|10240|2|ERROR_wrongnode"),
        ("web1|8192|10240|4|running|Y|node1|node2|drbd|service:web,owner:me|1",
         "web1|99999|9999999|4|running|Y|node1|node2|drbd|service:web,owner:me|1|-|Y"),
        # Its disk is not the node's, or may have holes.
        ("web2|4096|10240|", "web2|4096|99999999|"),
        ("web2|4096|10240|2|ADMIN_down|N|node1||rbd", "web2|4096|99999999|2|ADMIN_down|N|node1||file"),
        # Only a mirror's disk is on the secondary as well.
        ("web2|4096|10240|2|ADMIN_down|N|node1||rbd", "web2|4096|99999999|2|ADMIN_down|N|node1|node2|rbd"),
        # Nobody asked the node.
        ("web1|8192|10240|4|running|Y|node1|node2", "web1|99999|9999999|4|running|Y|node3|node4"),
        ("web1|8192|10240|4|running|Y|node1|node2", "web1|99999|9999999|4|running|Y|node4|node3"),
    ],
)  # fmt: skip
def test_what_real_clusters_do_is_no_contradiction(before: str, after: str) -> None:
    assert CLUSTER.count(before) == 1
    assert read(CLUSTER.replace(before, after)).fleet.hosts


def test_a_memory_ratio_admits_more_than_there_is_and_is_not_taken_for_the_vcpus() -> None:
    policy = "|16384,4,102400,1,1,1|1024,2,0,1,1,1;786432,96,16777216,16,8,12|plain,drbd|1.0|32.0"
    more = CLUSTER.replace(policy, policy + "|1.5").replace("web1|8192|", "web1|98304|")
    (cell,) = read(more).fleet.hosts[0].cells
    assert (cell.cores, cell.memory_free_mib) == (14, 0)
    with pytest.raises(PpecError, match="hold 98305 MiB of memory, and it has 98304"):
        read(more.replace("web1|98304|", "web1|98305|"))


def test_a_policy_of_a_version_with_a_field_more_has_its_ratio_read() -> None:
    (cell,) = read(CLUSTER.replace("1024,2,0,1,1,1;786432", "1024,2,0,1,1,1|786432")).fleet.hosts[0].cells
    assert (cell.cores, cell.shared_cpus) == (14, 0)


def test_exclusion_tags_are_groups_on_hosts_of_their_own() -> None:
    vms = read().fleet.hosts[0].vms
    assert vms[0].groups == (Group("service:web"),)
    assert vms[1].groups == (Group("service:web"), Group("service:db"))
    # What stands on shared storage takes nothing of the node's disk.
    assert [vm.profile.shape.disk_mib for vm in vms] == [10240, 0]


def test_lines_may_end_as_on_windows() -> None:
    assert read(CLUSTER.replace("\n", "\r\n")).fleet.hosts == read().fleet.hosts


def test_vms_are_planned_on_it() -> None:
    file = read()
    asked = read_requests(
        b'{"profiles": [{"name": "p", "architecture": "x86_64",'
        b' "shape": {"vcpus": 4, "memory_mib": 1024, "disk_mib": 1}}],'
        b' "groups": [{"name": "service:web"}],'
        b' "batch": [{"name": "web3", "profile": "p", "groups": ["service:web"]},'
        b' {"name": "web4", "profile": "p", "groups": ["service:web"]}]}',
        "requests.json",
        file,
    )
    made = plan(file.fleet, PlanRequest(asked.requests))
    assert [(each.name, each.host) for each in made.placed] == [("web3", "node2")]
    assert made.refused[0].reasons == {Reason.SILENT: 2, Reason.DRAINING: 1, Reason.ANTI_AFFINITY: 2}


def test_the_score_is_ganetis() -> None:
    """`hbal` 3.0.2 prints it for this text."""
    text = (
        "g|u|preferred||\n\n"
        "a|65536|1024|56320|1048576|1038336|16|N|u|10||N|0|2|1.0\n"
        "b|65536|1024|64512|1048576|1048576|16|N|u|10||N|0|2|1.0\n\n"
        "v|8192|10240|4|running|Y|a||plain||1\n\n\n"
        "|1024,2,1024,1,1,1|1,1,1,1,1,1;99999,99,99999,9,9,9|plain|1.0|32.0\n"
    )
    assert Balance(read(text).fleet).score() == pytest.approx(2.19394531, abs=1e-8)


@pytest.mark.parametrize(
    ("before", "after", "line", "what"),
    [
        ("default|uuid-1|preferred||", "default|uuid-1", 2, "fields"),
        ("uuid-1|preferred||", "uuid-1|always||", 2, "'always' is none of"),
        ("spare|uuid-2", "default|uuid-2", 3, "there twice"),
        ("spare|uuid-2", "spare|uuid-1", 3, "there twice"),
        ("node2|65536", "node1|65536", 6, "there twice, first on line 5"),
        ("node2|65536", "node2|-65536", 6, "'-65536' is no number"),
        ("node2|65536", "node2|1e9", 6, "no number"),
        ("node2|65536", "node2|999999999999", 6, "no number from 0 to 274877906944"),
        ("node2|65536", "node2|" + "9" * 5000, 6, "no number"),
        ("|16|M|uuid-1", "|8192|M|uuid-1", 5, "no number from 0 to 8191"),
        ("node2|65536|1024|64512", "node2|65536|1024|65537", 6, "65537 of 65536 memory"),
        ("node2|65536|1024", "node2|65536|65537", 6, "of 65536 memory"),
        ("1048576|1000000|16", "1048576|1048577|16", 5, "of 1048576 disk"),
        ("node2|65536|1024|64512|1048576|1048576|16|N|uuid-1|10", "node2|65536", 6, "9 to 15 fields, this one 2"),
        ("|16|N|uuid-1|10", "|16|Q|uuid-1|10", 6, "'Q' is none of"),
        ("|16|N|uuid-1|10", "|16|N|uuid-9|10", 6, "no group 'uuid-9'"),
        ("|N|0|2|1.0", "|N|0|17|1.0", 5, "17 of 16 CPUs"),
        ("web2|4096", "web1|4096", 12, "there twice"),
        ("web2|4096", "web2|-1", 12, "no number"),
        ("|node1||rbd", "|node9||rbd", 12, "no node 'node9'"),
        ("|node1|node2|drbd", "|node1|node9|drbd", 11, "'node9'"),
        ("|node1|node2|drbd", "|node1|node1|drbd", 11, "'node1'"),
        ("|service:web,owner:me|1", "", 11, "10 to 13 fields, this one 9"),
        ("|plain,drbd|1.0|32.0", "|plain,drbd|nan|32.0", 17, "'nan' is no vCPU ratio"),
        ("|plain,drbd|1.0|32.0", "|plain,drbd|-1|32.0", 17, "no vCPU ratio"),
        ("|plain,drbd|1.0|32.0", "|plain,drbd|129|32.0", 17, "no vCPU ratio from 0.01 to 128"),
        ("|plain,drbd|1.0|32.0", "|plain", 17, "fields"),
        ("|plain,drbd|1.0|32.0", "|plain,drbd|1.0|32.0|0", 17, "'0' is no memory ratio"),
        ("web1|8192|", "web1|999999999|", 11, "'node1' hold 999999999 MiB of memory, and it has 65536"),
        ("web1|8192|", "web1|65537|", 11, "'node1' hold 65537 MiB of memory"),
        ("web2|4096|10240|2|ADMIN_down", "web2|57345|10240|2|running", 12, "'node1' hold 65537 MiB of memory"),
        ("web2|4096|10240|2|ADMIN_down", "web2|57345|10240|2|ERROR_up", 12, "'node1' hold 65537 MiB of memory"),
        ("web1|8192|10240|", "web1|8192|1048577|", 11, "'node1' hold 1048577 MiB of disk, and it has 1048576"),
        ("node2|65536|1024|64512|1048576|1048576", "node2|65536|1024|64512|10239|10239", 11, "'node2' hold 10240 MiB"),
        ("web2|4096|10240|2|ADMIN_down|N|node1||rbd", "web2|4096|1038337|2|ADMIN_down|N|node1||plain", 12, "of disk"),
        (
            "|16384,4,102400,1,1,1|1024,2,0,1,1,1;786432,96,16777216,16,8,12|plain,drbd|1.0|32.0",
            "|||||",
            17,
            "'' is no",
        ),
        ("spare|16384", "other|16384", 18, "no group 'other'"),
        ("spare|16384", "|16384", 18, "group '' has a policy already"),
        ("spare|uuid-2", "|uuid-2", 3, "without a name or UUID"),
        ("|4|running|", "|4|walking|", 11, "'walking' is none of running, ERROR_up"),
        ("|4|running|", "|0|running|", 11, "'0' is no number from 1 to 8191"),
        ("|4|running|", "|137438953472|running|", 11, "no number from 1 to 8191"),
        ("|node2|drbd|", "|node2|dbrd|", 11, "'dbrd' is none of diskless"),
        ("|service:web,owner:me|1", "|service:web,owner:me|1|-|y", 11, "'y' is none of nothing, Y, N"),
        ("spare|16384", "\nspare|16384", 19, "one more"),
        ("default|uuid-1|preferred||", "hello", 2, "fields"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(before: str, after: str, line: int, what: str) -> None:
    assert CLUSTER.count(before) >= 1
    with pytest.raises(PpecError) as refused:
        read(CLUSTER.replace(before, after, 1))
    assert refused.value.code == "fleet.invalid"
    assert refused.value.details["where"] == f"line {line}"
    assert what in refused.value.message


@pytest.mark.parametrize(
    ("data", "line"),
    [(b"# nothing\n", 1), (b"a|b|preferred\n", 2), (b"a|b|preferred\n\xff\xfe", 2), (b"\x00\x01\x02", 1)],
)
def test_what_is_no_cluster_is_refused(data: bytes, line: int) -> None:
    with pytest.raises(PpecError) as refused:
        read_fleet(data, "cluster.data")
    assert refused.value.code == "fleet.invalid"
    assert refused.value.details["where"] == f"line {line}"
