# SPDX-License-Identifier: Apache-2.0
"""Deleting a prefix ends no quarantine and no hold unless it is told to, and then the history says so."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from ipdb_site import granted, hold, make_vm, released
from netbox_site import MARK, ONE_OF_IT, in_step, rows
from netbox_stand_in import NetBoxStandIn

from ppec_orchestrator.address_supply import AddressSupply
from ppec_orchestrator.ipdb.provider import SourcePrefix
from ppec_orchestrator.store.database import Database

RESTING = "1 address rests until 2026-11-20 12:05:00Z"


@pytest.mark.parametrize(("prefix_id", "first", "last"), [(1, "10.0.0.7", "10.0.0.9"), (2, "fd00::7", "fd00::8")])
def test_what_rests_or_is_held_back_keeps_its_prefix(
    ipv4_site: TestClient, database: Database, host_id: int, prefix_id: int, first: str, last: str
) -> None:
    path = f"/v1/prefixes/{prefix_id}"
    hold(ipv4_site, prefix_id, kind="reserved", first=first, last=last, reserved_for="db", note="soon")
    vm = make_vm(database, "a")
    granted(database, host_id, [vm])
    words = "VMs have 1 of its addresses (a)"
    held = f"1 hold keeps back some of its addresses (reserved {first} to {last})"
    assert ipv4_site.delete(path).json()["detail"].endswith(f"{words} and {held}")
    assert ipv4_site.delete(f"{path}?force=true").json()["detail"].endswith(words)
    assert len(ipv4_site.get(f"{path}/holds").json()["items"]) == 1
    released(database, vm)
    problem = ipv4_site.delete(path).json()
    assert (problem["code"], problem["details"]["resting"]) == ("resource.in_use", 1)
    assert (problem["details"]["holds"], problem["details"]["until"]) == (1, "2026-11-20T12:05:00+00:00")
    assert f"{RESTING} and {held}" in problem["detail"]
    assert ipv4_site.get(path).json()["addresses_quarantined"] == 1
    assert ipv4_site.delete(f"{path}?force=true").status_code == 204
    latest = ipv4_site.get("/v1/addresses/events?limit=1").json()["items"]
    assert [(one["action"], one["address"], one["last"], one["caller"], one["note"]) for one in latest] == [
        ("opened", first, last, "test-admin", "for db: soon")
    ]


def test_what_rests_while_it_is_held_back_counts_too(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    vm = make_vm(database, "a")
    granted(database, host_id, [vm])
    hold(ipv4_site, kind="reserved", first="10.0.0.2")
    released(database, vm)
    detail = ipv4_site.delete("/v1/prefixes/1").json()["detail"]
    assert f"{RESTING} and 1 hold keeps back some of its addresses (reserved 10.0.0.2)" in detail


@pytest.mark.parametrize("prefix_id", [1, 2])
def test_one_of_which_nothing_rests_any_more_is_deleted(
    ipv4_site: TestClient, database: Database, host_id: int, prefix_id: int
) -> None:
    vm = make_vm(database, "a")
    granted(database, host_id, [vm])
    released(database, vm, after_s=-300)
    assert ipv4_site.delete(f"/v1/prefixes/{prefix_id}").status_code == 204


def test_nothing_is_given_back_to_netbox_before_the_refusal(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    vm = make_vm(database, "a")
    granted(database, host_id, [vm], ONE_OF_IT)
    released(database, vm)
    marked = len(stand_in.texts(MARK))
    problem = site.delete("/v1/prefixes/3").json()
    assert problem["code"] == "resource.in_use"
    assert "1 address rests until 2026-11-20 12:01:00Z" in problem["detail"]
    assert len(stand_in.texts(MARK)) == marked
    assert in_step(database, stand_in)
    assert site.delete("/v1/prefixes/3?force=true").status_code == 204
    assert stand_in.texts(MARK) == []


@pytest.mark.parametrize("how", ["", "?force=true"])
def test_a_quarantine_that_begins_meanwhile_is_not_ended_unsaid(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn, how: str
) -> None:
    """A VM is deleted while NetBox is asked what is ours, after the prefix was found to be deletable but for the VM."""
    supply.settle()
    vm = make_vm(database, "a")
    granted(database, host_id, [vm], ONE_OF_IT)
    reconcile = supply._reconcile

    def meanwhile(prefix: SourcePrefix) -> None:
        reconcile(prefix)
        released(database, vm)

    supply._reconcile = meanwhile  # type: ignore[method-assign]
    answer = site.delete(f"/v1/prefixes/3{how}")
    if how:
        assert answer.status_code == 204
        assert stand_in.texts(MARK) == []
    else:
        assert answer.json()["code"] == "resource.in_use"
        assert "1 address rests until 2026-11-20 12:01:00Z" in answer.json()["detail"]
        assert site.get("/v1/prefixes/3").json()["addresses_quarantined"] == 1
        assert not any(row.going_back for row in rows(database))
        assert in_step(database, stand_in)


def test_one_of_netbox_s_that_is_not_there_is_not_found(site: TestClient) -> None:
    assert site.delete("/v1/prefixes/9").json()["code"] == "prefix.not_found"
