# SPDX-License-Identifier: Apache-2.0
"""Exports with prefixes that earlier versions took, imported into a fresh database: every row of them is told, and what
is skipped is said."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from ipdb_site import hold, post, with_large_bodies
from sqlalchemy import update

from ppec_contract.api_ipdb import MAX_IMPORT_ROWS
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database

# What stands in the database, and what an earlier version had let in in its place.
ONCE = {"10.1.0.0/24": "127.0.0.0/24", "10.2.0.0/24": "224.0.1.0/24"}
PLACE = {"vrf": "red", "bridge": "br0", "cluster": "c1"}


@pytest.fixture
def old(ipv4_site: TestClient, database: Database) -> TestClient:
    """A good prefix, one of loopback addresses, and one of multicast ones that has excluded addresses."""
    for cidr, was in ONCE.items():
        made = post(ipv4_site, "prefixes", PLACE | {"cidr": cidr})
        with database.write() as conn:
            mine = update(tables.prefix).where(tables.prefix.c.id == made["prefix_id"])
            first, last = was.replace("0/24", "1"), was.replace("0/24", "254")
            conn.execute(mine.values(cidr=was, first=first, last=last))
    hold(ipv4_site, kind="excluded", first="10.0.0.2", last="10.0.0.3")
    return ipv4_site


def exported(client: TestClient, form: str, *holds: dict[str, Any]) -> dict[str, Any]:
    """The body of its import; `holds` are of the multicast one."""
    document = client.get("/v1/ipdb/export").json()
    (multicast,) = (one for one in document["prefixes"] if one["cidr"] == "224.0.1.0/24")
    multicast["holds"] = [{"first": "224.0.1.9", "last": None, **one} for one in holds]
    if form == "document":
        return {"document": document}
    lines = client.get("/v1/ipdb/export.csv").text.splitlines()
    names = lines[0].split(",")
    for one in holds:
        cells = PLACE | {"cidr": "224.0.1.0/24", "first": "224.0.1.9"} | one
        used = {name: value for name, value in cells.items() if name not in ("bridge", "cluster")}
        lines.append(",".join(used.get(name, "") for name in names))
    return {"csv": "\r\n".join(lines)}


def fresh(client: TestClient) -> TestClient:
    for prefix in client.get("/v1/prefixes").json()["items"]:
        assert client.delete(f"/v1/prefixes/{prefix['prefix_id']}?force=true").status_code == 204
    assert client.delete("/v1/vrfs/red").status_code == 204
    return client


def asked(client: TestClient, status: int, **body: Any) -> Any:
    response = client.post("/v1/ipdb/import", json=body)
    assert response.status_code == status, response.text
    return response.json()


_HELD = "it is held back of a refused prefix 224.0.1.0/24"
PLACES = {
    "document": {"prefixes[1]": "loopback", "prefixes[2]": "multicast", "prefixes[2].holds[0]": _HELD},
    "csv": {"line 5": "loopback", "line 6": "multicast", "line 7": _HELD},
}


@pytest.mark.parametrize("form", PLACES)
def test_every_refused_row_is_told_with_what_to_do(old: TestClient, form: str) -> None:
    body = exported(old, form, {"kind": "excluded"})
    problem = asked(fresh(old), 422, **body)
    faults = {fault["place"]: fault["reason"] for fault in problem["details"]["faults"]}
    assert set(faults) == set(PLACES[form])
    for place, words in PLACES[form].items():
        assert words in faults[place]
    assert sum("Take the row out, or skip what is refused" in reason for reason in faults.values()) == 2
    assert old.get("/v1/ipdb/export").json() == {"vrfs": [], "prefixes": []}


@pytest.mark.parametrize("form", PLACES)
def test_what_is_skipped_is_said(old: TestClient, form: str) -> None:
    body = exported(old, form, {"kind": "excluded"}) | {"skip_refused": True}
    fresh(old)
    tried = asked(old, 200, **body, dry_run=True)
    done = asked(old, 200, **body)
    assert done == tried | {"dry_run": False}
    assert done["created"] == {"vrfs": 1, "prefixes": 1, "holds": 1}
    told = {one["place"]: one["reason"] for one in done["skipped"]}
    assert set(told) == set(PLACES[form])
    assert [one["cidr"] for one in old.get("/v1/prefixes").json()["items"]] == ["10.0.0.0/27"]


@pytest.mark.parametrize("form", PLACES)
def test_a_prefix_with_reserved_addresses_is_not_skipped(old: TestClient, form: str) -> None:
    """Somebody says that they are in use."""
    body = exported(old, form, {"kind": "reserved", "reserved_for": "db"}) | {"skip_refused": True}
    problem = asked(fresh(old), 422, **body)
    faults = {fault["place"]: fault["reason"] for fault in problem["details"]["faults"]}
    _, prefix, held = PLACES[form]
    assert set(faults) == {prefix, held}
    assert f"Addresses of it are reserved ({held}): take these rows out if nothing uses them" in faults[prefix]


def test_one_that_is_there_is_left_alone(old: TestClient) -> None:
    """It goes on as it is, and so does its import."""
    body = exported(old, "document")
    done = asked(old, 200, **body, skip_refused=True)
    assert (done["unchanged"]["prefixes"], done["skipped"]) == (3, [])


def test_however_many_they_are_all_are_told(ipv4_site: TestClient, services: Services) -> None:
    client = with_large_bodies(ipv4_site, services)
    lines = [f"prefix,red,127.{n // 250}.{n % 250}.0/24,br0,c1" for n in range(MAX_IMPORT_ROWS)]
    table = "\n".join(["kind,vrf,cidr,bridge,cluster", *lines])
    problem = asked(client, 422, csv=table)
    assert len(problem["details"]["faults"]) == problem["details"]["count"] == MAX_IMPORT_ROWS
    assert len(asked(client, 200, csv=table, skip_refused=True)["skipped"]) == MAX_IMPORT_ROWS


def test_what_is_skipped_has_no_addresses_to_make(ipv4_site: TestClient) -> None:
    """However many they would be: more than one import may make."""
    lines = [f"prefix,red,127.{n}.0.0/16,br0,c1" for n in range(9)]
    table = "\n".join(["kind,vrf,cidr,bridge,cluster", *lines])
    assert len(asked(ipv4_site, 200, csv=table, skip_refused=True)["skipped"]) == 9
    assert {fault["place"] for fault in asked(ipv4_site, 422, csv=table)["details"]["faults"]} == {
        f"line {2 + n}" for n in range(9)
    }
