# SPDX-License-Identifier: Apache-2.0
"""Which format a file is in, and what is said of one that is in none; keys of JSON that are there twice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ppec_contract.errors import PpecError
from ppec_orchestrator.fleets.reading import contents, read_fleet, read_requests

GOLDEN = (Path(__file__).parent / "golden" / "fleet.json").read_bytes()
GANETI = b"g|u|preferred||\n\nn|1024|0|1024|10|10|6|N|u|1\n\n\n\n"
BENCH = (
    b'{"schema":"ppec-bench-cluster/1","storage":"local","rules":{"vcpu_ratio":1.0,"even_vcpus":true,'
    b'"vm_fits_one_socket":true,"anti_affinity":true},"flavours":[{"name":"c2","vcpus":2,"mem_mib":1,"disk_mib":1}],'
    b'"groups":[{"name":"g"}],"hosts":[{"name":"h","group":"g","rack":"r","disk_mib":100,"class":"s","sockets":'
    b'[{"id":0,"cores":4,"reserved_cores":0,"mem_mib":9,"reserved_mem_mib":0}]}],"vms":[]}'
)


def refusal(data: bytes) -> PpecError:
    with pytest.raises(PpecError) as refused:
        read_fleet(data, "fleet")
    return refused.value


# --- formats ---------------------------------------------------------------------------------------------------------


def with_label() -> dict[str, Any]:
    document = json.loads(GOLDEN)
    document["hosts"][0]["labels"] = {"schema": "v1"}
    return document


@pytest.mark.parametrize(
    "data",
    [
        # The hosts, and so the label, come before the document's own schema.
        json.dumps(with_label(), sort_keys=True).encode(),
        GOLDEN.replace(b'"ppec-fleet/1"', rb'"ppec-fleet\/1"', 1),
        GOLDEN.replace(b'"schema"', rb'"sch\u0065ma"', 1),
        b"\xef\xbb\xbf" + GOLDEN,
        b"\r\n \t" + GOLDEN,
    ],
)
def test_the_schema_is_the_documents_own_however_it_is_written(data: bytes) -> None:
    assert len(read_fleet(data, "fleet").fleet.hosts) == len(read_fleet(GOLDEN, "fleet").fleet.hosts)


def test_a_schema_inside_the_document_is_not_its_own() -> None:
    refused = refusal(b'{"fleet": {"schema": "ppec-fleet/1", "hosts": []}}')
    assert (refused.code, "it names no schema" in refused.message) == ("fleet.unreadable", True)


def test_a_byte_order_mark_before_ganetis_text_says_nothing() -> None:
    assert [host.cluster for host in read_fleet(b"\xef\xbb\xbf" + GANETI, "fleet").fleet.hosts] == ["g"]


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        (b"", "it is empty", "It takes ppec-fleet/1"),
        (b"\n \n", "it is empty", "It takes ppec-fleet/1"),
        (b"\xef\xbb\xbf", "it is empty", "It takes ppec-fleet/1"),
        (gzip.compress(GOLDEN), "it is compressed by gzip", "Unpack it first"),
        (b"PK\x03\x04rest", "it is a zip archive", "Unpack it first"),
        (GOLDEN.decode().encode("utf-16"), "it is text in UTF-16", "Write it in UTF-8"),
        (b"[]", "it names no schema", "It takes ppec-fleet/1"),
        (b'{"schema": 7}', "'7' is no format of fleets", "It takes ppec-fleet/1"),
    ],
)
def test_what_is_no_fleet_is_told_by_what_it_is(data: bytes, what: str, hint: str) -> None:
    refused = refusal(data)
    assert refused.code == "fleet.unreadable"
    assert f"can't be read as a fleet: {what}" in refused.message
    assert hint in (refused.hint or "")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"root:x:0:0:root:/root:/bin/bash\n", "it is no JSON"),
        (GANETI, "it is no JSON"),
        (b"", "it is empty"),
        (b'{"schema": "other/1"}', "'other/1' is no format of requests"),
    ],
)
def test_what_is_no_file_of_requests_is_told_as_that(data: bytes, what: str) -> None:
    with pytest.raises(PpecError) as refused:
        read_requests(data, "requests", read_fleet(GOLDEN, "fleet"))
    assert refused.value.code == "fleet.unreadable"
    assert f"requests can't be read as requests: {what}" in refused.value.message
    assert "ppec-requests/1" in (refused.value.hint or "")
    assert "htools" not in (refused.value.hint or "")


def test_a_file_that_is_missing_is_told_as_what_it_was_wanted_for(tmp_path: Path) -> None:
    with pytest.raises(PpecError, match="can't be read as a fleet: No such file"):
        contents(tmp_path / "none")


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b'{"schema": "ppec-fleet/1",\n"hosts": [}', "line 2"),
        (b'{"schema": "ppec-fleet/1",\n"hosts": ["\xff"]}', "line 2"),
        (b'{"schema": "ppec-fleet/1", "hosts": ' + b"[" * 100_000, "the file"),
        (b'{"schema": "ppec-fleet/1", "hosts": ' + b"9" * 5000 + b"}", "the file"),
        # Half a surrogate pair, which JSON can spell and UTF-8 can't.
        (BENCH.replace(b'"name":"h"', rb'"name":"\ud800"'), "hosts[0].name"),
        (b'{"schema": "ppec-fleet/1", "hosts": [], "\\ud800": 1}', "the file"),
    ],
)
def test_what_is_no_json_is_refused_with_its_place(data: bytes, where: str) -> None:
    refused = refusal(data)
    assert (refused.code, refused.details["where"]) == ("fleet.invalid", where)


# --- keys that are there twice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "where"),
    [
        (b'"disk_mib":100', b'"disk_mib":-5,"disk_mib":100', "hosts[0].disk_mib"),
        # An equal value is refused as well, and a key that the format has no use for.
        (b'"disk_mib":100', b'"disk_mib":100,"disk_mib":100', "hosts[0].disk_mib"),
        (b'"class":"s"', b'"class":"s","class":"t"', "hosts[0].class"),
        (b'"id":0', rb'"id":0,"\u0069d":0', "hosts[0].sockets[0].id"),
        (b'"vms":[]', b'"vms":[],"hosts":[],"vms":[]', "hosts"),
        # What was inside the first of them is no part of the document any more.
        (b'"vms":[]', b'"vms":[{"a":1,"a":2}],"vms":[]', "vms"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_its_path(before: bytes, after: bytes, where: str) -> None:
    assert len(read_fleet(BENCH, "fleet").fleet.hosts) == BENCH.count(before) == 1
    refused = refusal(BENCH.replace(before, after))
    assert (refused.code, refused.details["where"]) == ("fleet.invalid", where)
    assert "twice" in refused.message


@pytest.mark.parametrize(
    ("fleet", "data", "where"),
    [
        (BENCH, b'{"batch": [], "batch": []}', "batch"),
        (BENCH, b'{"batch": [{"name": "a", "flavour": "c2", "name": "b"}]}', "batch[0].name"),
        (GOLDEN, b'{"schema": "ppec-requests/1", "batch": [], "batch": []}', "batch"),
    ],
)
def test_a_key_that_is_there_twice_among_requests_is_refused(fleet: bytes, data: bytes, where: str) -> None:
    with pytest.raises(PpecError) as refused:
        read_requests(data, "requests", read_fleet(fleet, "fleet"))
    assert (refused.value.code, refused.value.details["where"]) == ("fleet.invalid", where)


def test_keys_may_come_again_in_other_objects_and_as_text() -> None:
    data = BENCH.replace(b'"class":"s"', b'"class":"\\"name\\":1,\\"name\\":2"')
    assert data.count(b'"name"') > 1
    assert read_fleet(data, "fleet").fleet.hosts == read_fleet(BENCH, "fleet").fleet.hosts


# --- requests of another fleet ---------------------------------------------------------------------------------------


STANDING = {"a": UUID(int=1), "b": UUID(int=2)}


def small_fleet(host: str, level: str = "host", **request: Any) -> bytes:
    """One host with a member of group `g`, and a request for another of profile `p`, or what `request` has."""
    shape = {"vcpus": 2, "memory_mib": 64, "disk_mib": 1}
    place = {"datacentre": "d", "cluster": "c", "rack": "r", "vrf": "v", "architecture": "x86_64"}
    profile = {"shape": shape, "architecture": "x86_64"}
    seated = {"vm_id": str(STANDING[host]), "name": f"on-{host}", "profile": "p", "cells": [0], "groups": ["g"]}
    cell = {"cell": 0, "socket": 0, "threads_per_core": 1, "cores": 8, "cores_free": 6, "memory_mib": 1024}
    room = {"cells": [cell | {"memory_free_mib": 960}], "disk_mib": 9, "disk_free_mib": 8, "prefixes": [[1]]}
    document = {
        "schema": "ppec-fleet/1",
        "profiles": [{"name": "p", **profile}, {"name": "there", **profile, "where": {"host": host}}],
        "groups": [{"name": "g", "level": level}],
        "hosts": [{"host_id": 1, "name": host, **place, **room, "vms": [seated]}],
        "requests": {"batch": [{"name": "new", "profile": "p"} | request]},
    }
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("other", "where", "what"),
    [
        (small_fleet("b", profile="there"), ".profile", "it is for host 'b' alone, where there is no host"),
        (small_fleet("b", excluded_hosts=["b"]), ".excluded_hosts", "there is no host 'b'"),
        (small_fleet("b", "rack", groups=["g"]), "", "group 'g' is defined otherwise in the fleet"),
        (small_fleet("b", name="on-a"), ".name", "VM 'on-a' stands in the fleet already"),
        (
            small_fleet("b", vm_id=str(STANDING["a"])),
            ".vm_id",
            f"VM '{STANDING['a']}' stands in the fleet already",
        ),
    ],
)
def test_requests_of_another_fleet_are_held_against_the_one_planned_on(other: bytes, where: str, what: str) -> None:
    assert len(read_fleet(other, "other").requests) == 1, "its own fleet can be asked for it"
    with pytest.raises(PpecError) as refused:
        read_requests(other, "other", read_fleet(small_fleet("a"), "fleet"))
    assert (refused.value.code, refused.value.details["where"]) == ("fleet.invalid", f"requests.batch[0]{where}")
    assert refused.value.details["fault"] == what


def test_of_another_fleet_only_what_its_requests_say_has_to_fit() -> None:
    found = read_requests(small_fleet("b", "rack"), "other", read_fleet(small_fleet("a"), "fleet"))
    assert [request.name for request in found.requests] == ["new"]
    same = read_requests(small_fleet("b", groups=["g"]), "other", read_fleet(small_fleet("a"), "fleet"))
    assert same.requests[0].groups == (same.names.groups["g"],)


# --- ids -------------------------------------------------------------------------------------------------------------


def with_ids(*ids: UUID | None, standing: UUID = STANDING["a"]) -> bytes:
    """The small fleet, and requests that have these ids, or none of their own."""
    document = json.loads(small_fleet("a"))
    document["hosts"][0]["vms"][0]["vm_id"] = str(standing)
    own = [{} if each is None else {"vm_id": str(each)} for each in ids]
    document["requests"]["batch"] = [{"name": f"new-{n}", "profile": "p"} | each for n, each in enumerate(own)]
    return json.dumps(document).encode()


def of_their_own(fleet: bytes) -> bytes:
    """Its requests, as a file of requests."""
    batch = json.loads(fleet)["requests"]["batch"]
    return json.dumps({"schema": "ppec-requests/1", "batch": batch}).encode()


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        ((None, UUID(int=7), UUID(int=7)), f"VM '{UUID(int=7)}' is there twice, first at {{}}batch[1].vm_id"),
        ((None, None, STANDING["a"]), f"VM '{STANDING['a']}' stands in the fleet already"),
    ],
)
def test_ids_that_are_taken_are_refused_with_their_path(ids: tuple[UUID | None, ...], what: str) -> None:
    """Whoever answers by id would answer for another VM."""
    fleet = with_ids(*ids)
    alone = refusal(fleet)
    assert (alone.code, alone.details["where"]) == ("fleet.invalid", "requests.batch[2].vm_id")
    assert alone.details["fault"] == what.format("requests.")
    with pytest.raises(PpecError) as beside:
        read_requests(of_their_own(fleet), "requests", read_fleet(with_ids(), "fleet"))
    assert (beside.value.code, beside.value.details["where"]) == ("fleet.invalid", "batch[2].vm_id")
    assert beside.value.details["fault"] == what.format("")


def test_ids_that_a_reader_makes_up_are_nobody_elses() -> None:
    first, second = (request.vm_id for request in read_fleet(with_ids(None, None), "fleet").requests)
    mixed = read_fleet(with_ids(None, first, second, None), "fleet").requests
    assert len({request.vm_id for request in mixed}) == 4
    fleet = read_fleet(with_ids(None, None, standing=first), "fleet")
    assert first not in {request.vm_id for request in fleet.requests}
    of_bench = BENCH.replace(b'"vms":[]', b'"vms":[],"requests":{"batch":[{"name":"new","flavour":"c2"}]}')
    for other in (of_their_own(with_ids(None, None)), with_ids(None, None, standing=second), of_bench):
        found = read_requests(other, "requests", fleet).requests
        assert found
        assert first not in {request.vm_id for request in found}


# --- groups that contradict each other -------------------------------------------------------------------------------


BOUND = [{"name": "together", "apart": False}, {"name": "apart"}]


def bound(standing: list[str], *new: list[str]) -> bytes:
    """The small fleet, whose VM is in these groups, and requests for others in some."""
    document = json.loads(small_fleet("a"))
    document["groups"] = [*BOUND, {"name": "near", "apart": False}]
    document["hosts"][0]["vms"][0]["groups"] = standing
    document["requests"]["batch"] = [
        {"name": f"new-{number}", "profile": "p", "groups": groups} for number, groups in enumerate(new)
    ]
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("standing", "new"),
    [
        (["together", "apart"], [["together", "apart"]]),
        # By way of another.
        (["near", "apart"], [["near", "together"], ["together", "apart"]]),
    ],
)
def test_requests_that_contradict_the_fleets_vms_are_refused_wherever_they_stand(
    standing: list[str], new: list[list[str]]
) -> None:
    whole, place = bound(standing, *new), f"batch[{len(new) - 1}]"
    alone = refusal(whole)
    assert (alone.code, alone.details["where"]) == ("fleet.invalid", f"requests.{place}")
    fleet = read_fleet(bound(standing), "fleet")
    for requests, where in ((of_their_own(whole), place), (bound([], *new), f"requests.{place}")):
        with pytest.raises(PpecError) as beside:
            read_requests(requests, "requests", fleet)
        assert (beside.value.code, beside.value.details["where"]) == ("fleet.invalid", where)
        assert beside.value.details["fault"].startswith(
            "group 'apart' holds it apart from the VM at the fleet's hosts['a'].vms['on-a'], and group "
        )
    assert len(read_requests(of_their_own(bound([], ["together"], ["apart"])), "requests", fleet).requests) == 2


def test_a_group_of_a_fleet_that_lists_none_is_no_other_one() -> None:
    vm = b'{"name":"v","host":"h","socket":0,"vcpus":2,"mem_mib":1,"disk_mib":1,"app":"db"}'
    fleet = read_fleet(BENCH.replace(b'"vms":[]', b'"vms":[' + vm + b"]"), "fleet")
    document = json.loads(of_their_own(bound([], ["app:db"]))) | {"groups": [{"name": "app:db", "apart": False}]}
    document["batch"][0]["profile"] = "c2"
    with pytest.raises(PpecError) as refused:
        read_requests(json.dumps(document).encode(), "requests", fleet)
    assert refused.value.details["fault"] == "group 'app:db' is defined otherwise in the fleet"
