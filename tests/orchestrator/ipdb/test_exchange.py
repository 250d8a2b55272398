# SPDX-License-Identifier: Apache-2.0
"""Import and export: what is exported is imported elsewhere just so, all or nothing, with each fault's place."""

from __future__ import annotations

import csv
from io import StringIO
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from ipdb_site import NOW, counts, hold, post, with_large_bodies
from sqlalchemy import event, update

from ppec_contract.api_ipdb import MAX_IMPORT_ADDRESSES, MAX_IMPORT_ROWS, HoldCreate, IpdbDocument, VrfCreate
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.ipdb.exchange import COLUMNS, Fault, PlacedHold, as_csv, rows_of_csv, rows_of_document
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.exchange import Importer

SIX = {
    "vrf": "blue", "cidr": "fd00::/64", "gateway": "fe80::1", "bridge": "br1", "region": "north", "vlan": 7,
    "nameservers": ["fd00::53", "192.0.2.53"], "quarantine_s": 9,
}  # fmt: skip
WIDE = {"vrf": "blue", "bridge": "br1", "cluster": "c1"}
HEAD = ",".join(COLUMNS) + "\r\n"


@pytest.fixture
def filled(ipv4_site: TestClient) -> TestClient:
    """Two VRFs, two prefixes, two holds."""
    post(ipv4_site, "vrfs", {"name": "blue", "description": "=1+1, 'quoted' \"twice\"\u2603"})
    post(ipv4_site, "prefixes", SIX)
    hold(ipv4_site, kind="excluded", first="10.0.0.2", last="10.0.0.3", note="switches, two")
    hold(ipv4_site, kind="reserved", first="10.0.0.9", reserved_for="db", note="@home")
    return ipv4_site


def emptied(client: TestClient) -> TestClient:
    for prefix in client.get("/v1/prefixes").json()["items"]:
        assert client.delete(f"/v1/prefixes/{prefix['prefix_id']}?force=true").status_code == 204
    for name in ("red", "blue"):
        assert client.delete(f"/v1/vrfs/{name}").status_code == 204
    return client


def imported(client: TestClient, status: int = 200, **body: Any) -> Any:
    response = client.post("/v1/ipdb/import", json=body)
    assert response.status_code == status, response.text
    return response.json()


@pytest.mark.parametrize("form", ["document", "csv"])
def test_what_is_exported_is_imported_just_so(filled: TestClient, form: str) -> None:
    document = filled.get("/v1/ipdb/export").json()
    table = filled.get("/v1/ipdb/export.csv")
    assert table.headers["content-type"].startswith("text/csv")
    body = {form: document if form == "document" else table.content.decode()}
    everything = {"vrfs": 2, "prefixes": 2, "holds": 2}
    nothing = dict.fromkeys(everything, 0)
    there = {"dry_run": False, "created": nothing, "unchanged": everything, "skipped": []}
    made = {"dry_run": False, "created": everything, "unchanged": nothing, "skipped": []}
    assert imported(filled, **body) == there
    emptied(filled)
    assert imported(filled, **body, dry_run=True) == made | {"dry_run": True}
    assert filled.get("/v1/prefixes").json()["items"] == []
    assert imported(filled, **body) == made
    assert filled.get("/v1/ipdb/export").json() == document
    (red,) = (one["prefix_id"] for one in filled.get("/v1/prefixes?vrf=red").json()["items"])
    assert counts(filled, red)["excluded"] == 2
    events = filled.get("/v1/addresses/events").json()["items"]
    assert [one["action"] for one in events[:2]] == ["reserved", "excluded"]


def test_one_vrf_is_exported_alone(filled: TestClient) -> None:
    document = filled.get("/v1/ipdb/export?vrf=blue").json()
    assert [one["name"] for one in document["vrfs"]] == ["blue"]
    assert [one["cidr"] for one in document["prefixes"]] == ["fd00::/64"]
    assert filled.get("/v1/ipdb/export?vrf=green").json()["code"] == "vrf.not_found"


def test_every_fault_is_told_with_its_line_and_nothing_is_changed(filled: TestClient) -> None:
    before = filled.get("/v1/ipdb/export").json()
    lines = [
        ["vrf", "green", "new"],
        ["vrf", "red", "another description"],
        ["prefix", "green", "", "10.5.0.0/24", "10.6.0.1", "", "br0", "", "c1"],
        ["prefix", "green", "", "10.5.0.0/33", "", "", "br0", "", "c1"],
        ["prefix", "green", "", "10.5.1.0/24", "", "x", "br0", "", "c1"],
        ["prefix", "green", "", "10.5.2.0/24", "", "", "br0", "", "c9"],
        ["prefix", "red", "", "10.0.0.16/28", "", "", "br0", "", "c1"],
        ["prefix", "red", "", "10.0.0.0/27", "10.0.0.1", "", "br7", "", "c1", "", "", "", "", "300"],
        ["reserved", "red", "", "10.0.0.0/27", "", "", "", "", "", "", "10.0.0.3", "10.0.0.4"],
        ["reserved", "red", "", "10.9.0.0/27", "", "", "", "", "", "", "10.9.0.3"],
        ["address", "red"],
        ["vrf", "red", "", "10.0.0.0/27"],
        ["vrf", "Not A Name"],
        ["prefix", "green", "", "224.0.0.0/24", "", "", "br0", "", "c1"],
    ]
    written = StringIO()
    csv.writer(written).writerows([COLUMNS, *lines])
    problem = imported(filled, 422, csv=written.getvalue())
    assert problem["code"] == "import.invalid"
    told = {fault["place"]: fault["reason"] for fault in problem["details"]["faults"]}
    for line, words in {
        3: "VRF red exists and differs: description wanted another description, found ",
        4: "gateway 10.6.0.1 is not in it",
        5: "cidr: Value error, it is no IPv4 or IPv6 network",
        6: "vlan",
        7: "there is no cluster 'c9'",
        8: "overlaps 10.0.0.0/27 of VRF red",
        9: "bridge wanted br7, found br0",
        10: "overlaps hold",
        11: "there is no prefix 10.9.0.0/27 in VRF red",
        12: "its kind is 'address', wanted vrf, prefix, excluded, reserved",
        13: "cidr means nothing of kind vrf",
        14: "name",
        15: "224.0.0.0/4 is multicast",
    }.items():
        assert words in told.pop(f"line {line}")
    assert told == {}
    assert "13 of 14 rows can't be imported: line " in problem["detail"]
    assert filled.get("/v1/ipdb/export").json() == before


def test_a_document_s_faults_are_told_by_their_place(filled: TestClient) -> None:
    bad = {"kind": "excluded", "first": "10.0.0.40"}
    document = filled.get("/v1/ipdb/export").json()
    document["prefixes"][0]["holds"].append(bad)
    problem = imported(filled, 422, document=document, dry_run=True)
    assert [fault["place"] for fault in problem["details"]["faults"]] == [
        f"prefixes[0].holds[{len(document['prefixes'][0]['holds']) - 1}]"
    ]
    document["prefixes"][0]["cidr"] = "x"
    assert "document.prefixes.0.cidr: " in imported(filled, 422, document=document)["detail"]


def test_too_much_at_once_is_refused_before_it_is_tried(filled: TestClient, services: Services) -> None:
    filled = with_large_bodies(filled, services)
    table = "kind,vrf\n" + "".join(f"vrf,v{n}\n" for n in range(MAX_IMPORT_ROWS + 1))
    assert f"more than {MAX_IMPORT_ROWS}" in imported(filled, 422, csv=table)["detail"]
    wide = [{"vrf": "blue", "cidr": f"10.{n}.0.0/16", "bridge": "br0", "cluster": "c1"} for n in range(1, 10)]
    assert f"more than {MAX_IMPORT_ADDRESSES}" in imported(filled, 422, document={"prefixes": wide})["detail"]
    assert imported(filled, 422)["code"] == "request.invalid"
    assert imported(filled, 422, csv="", document={})["code"] == "request.invalid"


def test_addresses_that_a_prefix_does_not_give_out_are_not_too_many(filled: TestClient) -> None:
    post(filled, "prefixes", WIDE | {"cidr": "11.0.0.0/8", "first": "11.0.0.9", "last": "11.0.0.19"})
    document = filled.get("/v1/ipdb/export").json()
    assert imported(filled, document=document)["unchanged"]["prefixes"] == 3
    emptied(filled)
    assert imported(filled, document=document)["created"]["prefixes"] == 3


def test_addresses_that_are_there_are_not_too_many(filled: TestClient, database: Database) -> None:
    for n in range(1, 10):
        small = {"cidr": f"10.{n}.0.0/16", "first": f"10.{n}.0.1", "last": f"10.{n}.0.1"}
        prefix_id = post(filled, "prefixes", WIDE | small)["prefix_id"]
        with database.write() as conn:
            # As if it had been made whole, which takes long.
            whole = update(tables.prefix).where(tables.prefix.c.id == prefix_id)
            conn.execute(whole.values(last=f"10.{n}.255.254"))
    document = filled.get("/v1/ipdb/export").json()
    assert imported(filled, document=document)["unchanged"]["prefixes"] == 11
    document["prefixes"] += [WIDE | {"cidr": f"11.{n}.0.0/16"} for n in range(1, 10)]
    fault, *_ = imported(filled, 422, document=document)["details"]["faults"]
    assert "new IPv4 prefixes have 589806 addresses, more than 524288" in fault["reason"]


def test_of_a_table_that_is_too_long_no_more_is_read(filled: TestClient) -> None:
    table = "kind\n" + "x\n" * (2 * MAX_IMPORT_ROWS)
    rows, faults = rows_of_csv(table)
    assert (len(rows), len(faults)) == (0, MAX_IMPORT_ROWS + 1)
    problem = imported(filled, 422, csv=table)
    assert " of " not in problem["detail"].partition("line 2")[0]
    assert f"it has more than {MAX_IMPORT_ROWS} rows: split it" in problem["detail"]
    assert imported(filled, 422, csv="kind\n" + "x\n" * MAX_IMPORT_ROWS)["details"]["count"] == MAX_IMPORT_ROWS


def test_only_admins_import(client_as: Any) -> None:
    assert client_as(Role.OPERATOR).post("/v1/ipdb/import", json={"csv": "kind"}).status_code == 403
    assert client_as(Role.VIEWER).get("/v1/ipdb/export").json() == {"vrfs": [], "prefixes": []}


@pytest.mark.parametrize(
    ("table", "place", "words"),
    [
        ("", "line 1", "the column kind is missing"),
        ("vrf,description\nred,x\n", "line 1", "the column kind is missing"),
        ("kind,colour\nvrf,red\n", "line 1", "there is no column 'colour'"),
        ("kind,vrf,description,vrf\nvrf,red,x,blue\n", "line 1", "the column vrf is there 2 times"),
        ("kind,vrf\nvrf,red,more\n", "line 2", "more cells"),
        ('kind,vrf\n\nvrf,"red\n', "line 3", "not CSV"),
        ('kind,vrf\n\nvrf,"red\n\nvrf,green\nvrf,blue\n', "line 3", "a quote that is opened here is not closed"),
        ('kind,vrf,description\nvrf,red,"a ""b""\nc" "\nvrf,x,y\n', "line 3", "not CSV"),
        ('kind,description,vrf\nvrf,"a\nb","r""ed\nvrf,""x\n', "line 3", "a quote that is opened here"),
        pytest.param('kind,vrf\nvrf,"red\n' + "vrf,x\n" * 30000, "line 2", "a quote that is opened here", id="long"),
        ('kind,vrf\nvrf,"re"d\n', "line 2", "not CSV"),
        ("kind,vrf\nvrf,\n", "line 2", "name"),
        ("kind,vrf\nvrf,re\x00d\n", "line 2", ""),
        ("kind,cidr,first\nreserved,10.0.0.0/24,10.0.0.1\n", "line 2", "vrf"),
    ],
)
def test_a_table_that_is_none_says_where(table: str, place: str, words: str) -> None:
    rows, faults = rows_of_csv(table)
    assert rows == []
    assert [fault.place for fault in faults] == [place]
    assert words in faults[0].reason
    assert isinstance(faults[0], Fault)


def test_what_a_spreadsheet_adds_is_nothing() -> None:
    """A byte order mark, and rows of commas below the others, which are not counted either."""
    rows, faults = rows_of_csv("\N{BYTE ORDER MARK}kind,vrf\r\nvrf,red\r\n" + ",\r\n" * 5000 + ",,\r\nvrf,blue\r\n")
    assert (len(rows), faults) == (2, [])
    assert rows[1].place == "line 5004"


@pytest.mark.parametrize("netbox_id", [999_999_999, 1_234_567_890, 2**63 - 1])
def test_numbers_of_netbox_survive_the_table(netbox_id: int) -> None:
    prefix = {"vrf": "red", "cidr": "10.0.0.0/24", "bridge": "br0", "cluster": "c1", "netbox_id": netbox_id}
    document = IpdbDocument.model_validate({"prefixes": [prefix]})
    rows, faults = rows_of_csv(as_csv(document))
    assert (faults, [getattr(row.item, "netbox_id", None) for row in rows]) == ([], [netbox_id])


def test_very_many_rows_of_commas_alone_are_too_many() -> None:
    rows, faults = rows_of_csv("kind,vrf\n" + ",\n" * 200_000)
    assert (rows, len(faults)) == ([], MAX_IMPORT_ROWS + 1)


def test_a_site_of_many_prefixes_is_imported_at_once(filled: TestClient, services: Services) -> None:
    """With what is held back of each; and again, which changes nothing."""
    filled = with_large_bodies(filled, services)
    lines = [line for n in range(1500) for line in _site_of(n)]
    table = "kind,vrf,cidr,gateway,bridge,cluster,first,last\r\n" + "".join(f"{line}\r\n" for line in lines)
    everything = {"vrfs": 0, "prefixes": 1500, "holds": 1500}
    assert imported(filled, csv=table)["created"] == everything
    assert imported(filled, csv=table)["unchanged"] == everything
    prefix_id = filled.get("/v1/prefixes?limit=500&vrf=blue").json()["items"][400]["prefix_id"]
    assert counts(filled, prefix_id) == {
        "total": 3, "free": 3, "used": 0, "reserved": 0, "quarantined": 0, "excluded": 2,
    }  # fmt: skip


def _site_of(number: int) -> tuple[str, str]:
    net = f"11.{number // 250}.{number % 250}"
    return (
        f"prefix,blue,{net}.0/29,{net}.1,br0,c1,,",
        f"excluded,blue,{net}.0/29,,,,{net}.5,{net}.7",
    )


def test_each_prefix_of_an_import_costs_a_few_statements(filled: TestClient, database: Database) -> None:
    def statements(count: int, second: int) -> int:
        items = [
            {"vrf": "blue", "cidr": f"12.{second}.{n}.0/30", "bridge": "br0", "cluster": "c1"} for n in range(count)
        ]
        rows = rows_of_document(IpdbDocument.model_validate({"prefixes": items}))
        seen: list[str] = []
        with database.write() as conn:
            event.listens_for(conn, "before_cursor_execute")(lambda _conn, _cursor, text, *_: seen.append(text))
            Importer(conn, "test", lambda: NOW).carry_out(rows, [], dry_run=False)
        return len(seen)

    assert statements(60, 1) - statements(10, 2) <= 50 * 4


_TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40)


@given(st.lists(st.tuples(_TEXT, _TEXT), max_size=5))
def test_free_text_survives_the_table_and_is_no_formula_in_it(texts: list[tuple[str, str]]) -> None:
    holds = [{"kind": "reserved", "first": f"10.0.0.{n + 1}", "note": note} for n, (_, note) in enumerate(texts)]
    prefix = {"vrf": "red", "cidr": "10.0.0.0/24", "bridge": "br0", "cluster": "c1", "holds": holds}
    vrfs = [{"name": f"v{n}", "description": text} for n, (text, _) in enumerate(texts)]
    document = IpdbDocument.model_validate({"vrfs": vrfs, "prefixes": [prefix]})
    table = as_csv(document)
    rows, faults = rows_of_csv(table)
    assert faults == []
    assert [_plain(row.item) for row in rows] == [_plain(row.item) for row in rows_of_document(document)]
    cells = [cell for line in csv.reader(StringIO(table, newline="")) for cell in line]
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def _plain(item: Any) -> Any:
    if isinstance(item, PlacedHold):
        assert isinstance(item.hold, HoldCreate)
        return item.vrf, item.cidr, item.hold.model_dump()
    return type(item) is VrfCreate, item.model_dump()
