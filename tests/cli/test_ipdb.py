# SPDX-License-Identifier: Apache-2.0
"""`ppec ipdb`: holds, free space, history, export and import."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppec_orchestrator.ipdb.exchange import COLUMNS

DOCUMENT = {
    "vrfs": [{"name": "red", "description": "=x"}],
    "prefixes": [
        {
            "vrf": "red", "cidr": "10.0.0.0/24", "bridge": "br0", "cluster": "c1",
            "holds": [{"kind": "reserved", "first": "10.0.0.9", "reserved_for": "db"}],
        }
    ],
}  # fmt: skip
DONE = {
    "dry_run": False,
    "created": {"vrfs": 1, "prefixes": 1, "holds": 1},
    "unchanged": {"vrfs": 0, "prefixes": 0, "holds": 0},
}
HOLD = {
    "hold_id": 3, "prefix_id": 7, "kind": "reserved", "first": "10.0.0.9", "reserved_for": "db", "note": "[red]x",
    "created_at": "2026-11-20T12:00:00Z", "created_by": "alice",
}  # fmt: skip
EVENT = {
    "event_id": 8, "at": "2026-11-20T12:00:00Z", "action": "reserved", "vrf": "red", "prefix": "10.0.0.0/24",
    "address": "10.0.0.9", "last": "10.0.0.12", "caller": "alice", "note": "for db",
}  # fmt: skip


@pytest.fixture
def answers(orchestrator: Any) -> Callable[..., None]:
    """The next answer to a request."""

    def answer(method: str, path: str, value: Any, status: int = 200) -> None:
        orchestrator.instead[method, path] = [lambda handler: handler.reply(status, value)]

    return answer


def test_holds(orchestrator: Any, ppec: Any, answers: Callable[..., None]) -> None:
    path = "/v1/prefixes/7/holds"
    answers("POST", path, HOLD, 201)
    assert ppec("ipdb", "hold", "create", "7", "10.0.0.9", "10.0.0.12", "--for", "db", "--note", "soon").code == 0
    assert orchestrator.requests[-1].json == {
        "kind": "reserved", "first": "10.0.0.9", "last": "10.0.0.12", "reserved_for": "db", "note": "soon",
    }  # fmt: skip
    assert ppec("ipdb", "hold", "create", "7", "10.0.0.9", "--excluded", "--for", "db").code == 2
    answers("GET", path, {"items": [HOLD]})
    shown = ppec("ipdb", "hold", "list", "7").out
    assert "10.0.0.9" in shown
    assert "[red]x" in shown
    answers("DELETE", f"{path}/3", None, 204)
    assert "hold 3 deleted" in ppec("ipdb", "hold", "delete", "7", "3").err


def test_free_space(orchestrator: Any, ppec: Any, answers: Callable[..., None]) -> None:
    free = {
        "prefix_id": 7, "addresses_free": 5, "runs": [{"first": "10.0.0.4", "last": "10.0.0.8", "count": 5}],
        "networks": ["10.0.0.4/30", "10.0.0.8/32"], "more": True,
    }  # fmt: skip
    answers("GET", "/v1/prefixes/7/free", free)
    ran = ppec("ipdb", "prefix", "free", "7")
    assert "10.0.0.8" in ran.out
    assert "more" in ran.err
    answers("GET", "/v1/prefixes/7/free", free)
    assert ppec("ipdb", "prefix", "free", "7", "--networks").out.split() == free["networks"]
    answers("GET", "/v1/prefixes/7/free", free)
    assert json.loads(ppec("ipdb", "prefix", "free", "7", "-o", "json").out) == free
    answers(
        "GET", "/v1/vrfs/red/free", {"vrf": "red", "within": "10.0.0.0/8", "networks": ["10.1.0.0/16"], "more": False}
    )
    assert ppec("ipdb", "vrf", "free", "red", "10.0.0.0/8").out.split() == ["10.1.0.0/16"]
    assert orchestrator.requests[-1].query == {"within": "10.0.0.0/8"}


def test_a_prefix_is_changed(orchestrator: Any, ppec: Any, answers: Callable[..., None]) -> None:
    prefix = {
        "prefix_id": 7, "vrf": "red", "cidr": "10.0.0.0/24", "bridge": "br0", "region": "north",
        "addresses_total": 9, "addresses_free": 9,
    }  # fmt: skip
    answers("PATCH", "/v1/prefixes/7", prefix)
    assert ppec("ipdb", "prefix", "update", "7", "--quarantine-s", "0", "--vlan", "9").code == 0
    assert orchestrator.requests[-1].json == {"quarantine_s": 0, "vlan": 9}
    assert ppec("ipdb", "prefix", "update", "7", "--vlan", "5000").code == 2
    answers("PATCH", "/v1/prefixes/7", prefix)
    assert ppec("ipdb", "prefix", "update", "7", "--no-vlan", "--no-nameservers", "--no-gateway").code == 0
    assert orchestrator.requests[-1].json == {"vlan": None, "nameservers": [], "gateway": None}
    answers("PATCH", "/v1/prefixes/7", prefix)
    changes = ("--gateway", "10.0.0.254", "--first", "10.0.0.2", "--last", "10.0.0.9")
    assert ppec("ipdb", "prefix", "update", "7", *changes).code == 0
    assert orchestrator.requests[-1].json == {"gateway": "10.0.0.254", "first": "10.0.0.2", "last": "10.0.0.9"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "nothing is said that is to change"),
        (("--vlan", "9", "--no-vlan"), "--vlan and --no-vlan exclude each other"),
        (("--gateway", "10.0.0.1", "--no-gateway"), "--gateway and --no-gateway exclude each other"),
        (("--nameserver", "10.0.0.1", "--no-nameservers"), "--nameserver and --no-nameservers exclude each other"),
    ],
)
def test_a_change_that_says_nothing_or_too_much_is_refused(
    orchestrator: Any, ppec: Any, options: tuple[str, ...], why: str
) -> None:
    ran = ppec("ipdb", "prefix", "update", "7", *options)
    assert ran.code == 2
    assert why in ran.err
    assert orchestrator.requests == []


def test_a_prefix_is_deleted_all_the_same_if_that_is_said(
    orchestrator: Any, ppec: Any, answers: Callable[..., None]
) -> None:
    for option, query in (((), {}), (("--force",), {"force": "true"})):
        answers("DELETE", "/v1/prefixes/7", None, 204)
        assert "prefix 7 deleted" in ppec("ipdb", "prefix", "delete", "7", *option).err
        assert orchestrator.requests[-1].query == query


def test_counts_that_ended_are_not_shown_as_counted(orchestrator: Any, ppec: Any, answers: Callable[..., None]) -> None:
    """The API's end at 2**53; a /64 has 2,048 times as many."""
    prefix = {
        "prefix_id": 7, "vrf": "red", "cidr": "fd00::/64", "bridge": "br0", "cluster": "c1", "addresses_used": 3,
        "addresses_total": 2**53, "addresses_free": 2**53, "addresses_reserved": 2**53,
    }  # fmt: skip
    orchestrator.resources["prefixes"] = [prefix]
    listed = ppec("ipdb", "prefix", "list").out
    assert "over 9.0e15/over 9.0e15" in listed
    shown = ppec("ipdb", "prefix", "show", "7").out
    assert "over 9.0e15" in shown
    free = {
        "prefix_id": 7, "addresses_free": 2**53, "networks": [], "more": False,
        "runs": [{"first": "fd00::1", "last": "fd00::ffff:ffff:ffff:ffff", "count": 2**53}],
    }  # fmt: skip
    answers("GET", "/v1/prefixes/7/free", free)
    runs = ppec("ipdb", "prefix", "free", "7").out
    assert "over 9.0e15" in runs
    assert str(2**53) not in listed + shown + runs
    # One that was counted is shown as it is; so are the numbers for programs.
    orchestrator.resources["prefixes"] = [prefix | {"addresses_free": 2**53 - 1}]
    assert f"{2**53 - 1}/over 9.0e15" in ppec("ipdb", "prefix", "list").out
    assert ppec("ipdb", "prefix", "show", "7", "-o", "json").json["addresses_total"] == 2**53


def test_addresses_of_a_vm_and_free_ones(orchestrator: Any, ppec: Any) -> None:
    orchestrator.resources["addresses"] = [
        {"address": "10.0.0.9", "prefix": "10.0.0.0/24", "vrf": "red", "state": "quarantined",
         "until": "2026-11-20T12:00:00Z"},
    ]  # fmt: skip
    shown = ppec("ipdb", "address", "list", "--vm", "web-1", "--free").out
    assert "quarantined" in shown
    assert "2026-11-20" in shown
    assert orchestrator.requests[-1].query == {"vm": "web-1", "free": "true", "limit": "500"}


def test_history(orchestrator: Any, ppec: Any, answers: Callable[..., None]) -> None:
    answers("GET", "/v1/addresses/events", {"items": [EVENT]})
    shown = ppec("ipdb", "audit", "--address", "10.0.0.9", "--action", "reserved").out
    assert "10.0.0.9 - 10.0.0.12" in shown
    assert "alice" in shown
    assert orchestrator.requests[-1].query == {"address": "10.0.0.9", "action": "reserved", "limit": "500"}


@pytest.mark.parametrize("name", ["ipdb.csv", "IPDB.CSV", "ipdb.json"])
def test_what_is_exported_is_imported(
    orchestrator: Any, ppec: Any, answers: Callable[..., None], tmp_path: Path, name: str
) -> None:
    file = str(tmp_path / name)
    answers("GET", "/v1/ipdb/export", DOCUMENT)
    assert ppec("ipdb", "export", file, "--vrf", "red").code == 0
    assert orchestrator.requests[-1].query == {"vrf": "red"}
    answers("POST", "/v1/ipdb/import", DONE)
    assert ppec("ipdb", "import", file, "--dry-run").code == 0
    sent = orchestrator.requests[-1].json
    assert sent["dry_run"] is True
    assert set(sent) == {"dry_run", "csv" if name.lower().endswith("csv") else "document"}
    if name.lower().endswith("csv"):
        assert sent["csv"].splitlines()[1] == "vrf,red,'=x" + "," * (len(COLUMNS) - 3)
    else:
        assert sent["document"]["prefixes"][0]["holds"][0]["reserved_for"] == "db"


def test_what_is_skipped_is_told_and_only_asked_for_when_it_is_wanted(
    orchestrator: Any, ppec: Any, answers: Callable[..., None], tmp_path: Path
) -> None:
    file = tmp_path / "table.csv"
    file.write_text("kind,vrf\nvrf,red\n", encoding="utf-8")
    answers("POST", "/v1/ipdb/import", DONE | {"skipped": [{"place": "line 3", "reason": "it is loopback"}]})
    ran = ppec("ipdb", "import", str(file), "--skip-refused")
    assert ran.code == 0
    assert "line 3: skipped: it is loopback" in ran.err
    assert orchestrator.requests[-1].json["skip_refused"] is True
    answers("POST", "/v1/ipdb/import", DONE)
    assert ppec("ipdb", "import", str(file)).code == 0
    assert "skip_refused" not in orchestrator.requests[-1].json


def test_what_can_t_be_imported_is_told_row_by_row(ppec: Any, answers: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes("\N{BYTE ORDER MARK}kind,vrf\r\nvrf,red\r\n".encode())
    problem = {
        "type": "urn:x", "title": "t", "status": 422, "code": "import.invalid", "detail": "1 of 1 rows", "hint": "h",
        "details": {"count": 1, "faults": [{"place": "line 2", "reason": "VRF red exists"}]},
    }  # fmt: skip
    answers("POST", "/v1/ipdb/import", problem, 422)
    ran = ppec("ipdb", "import", str(file))
    assert ran.code == 2
    assert "line 2: VRF red exists" in ran.err
    assert ppec("ipdb", "import", str(tmp_path / "none.csv")).code == 2


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("u.csv", b"kind,vrf\r\nvrf,caf\xc3\xa9 \xe9\r\n", "it is not UTF-8 (line 2, column 10)"),
        ("u.csv", b"\xef\xbb\xbf\xff", "it is not UTF-8 (line 1, column 1)"),
        ("u.json", b'{"vrfs": [\n {"name": "r\xff"}]}', "it is not UTF-8 (line 2, column 13)"),
        ("t.json", b'{"vrfs": [\n {"name": "red"},\n', "it is not JSON (line 3, column 1)"),
        ("t.json", b"", "it is not JSON (line 1, column 1)"),
        ("t.json", b'{"vrfs": [], "vrfs": []}', "an object names a key twice"),
        ("t.json", b"[]", "it is not a JSON object"),
    ],
)
def test_a_file_that_can_t_be_read_says_where(
    orchestrator: Any, ppec: Any, tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    ran = ppec("ipdb", "import", str(file))
    assert ran.code == 2
    assert f"the import file '{file}' can't be used: {why}" in ran.err.replace("\n", " ")
    assert "frame" not in ran.err
    assert orchestrator.requests == []


def test_of_a_file_without_an_end_no_more_is_read_than_is_imported(orchestrator: Any, ppec: Any) -> None:
    ran = ppec("ipdb", "import", "/dev/zero", "--format", "csv")
    assert ran.code == 2
    assert "it is longer than 8388608 bytes" in ran.err.replace("\n", " ")
    assert orchestrator.requests == []


def test_addresses_are_asked_for_with_a_vm(orchestrator: Any, ppec: Any) -> None:
    networks = ("--network", "10.1.0.0/24", "--network", "fd00::5", "--network", "any")
    assert ppec("vm", "create", "a", "--flavor", "f", "--image", "i", *networks).code == 0
    assert orchestrator.requests[-1].json["networks"] == [{"prefix": "10.1.0.0/24"}, {"address": "fd00::5"}, {}]
    ran = ppec("vm", "create", "a", "b", "--flavor", "f", "--image", "i", "--network", "10.1.0.9")
    assert ran.code == 2
    assert "is for one VM" in ran.err


def test_a_list_of_vms_asks_for_an_address_each(orchestrator: Any, ppec: Any, tmp_path: Path) -> None:
    file = tmp_path / "items.json"
    items = [{"name": name, "networks": [{"address": f"10.1.0.{number}"}]} for number, name in enumerate("abc", 5)]
    file.write_text(json.dumps(items))
    create = ("vm", "create", "--flavor", "f", "--image", "i", "--items", str(file))
    assert ppec(*create).code == 0
    assert orchestrator.requests[-1].json["items"] == items
    sent = len(orchestrator.requests)
    file.write_text(json.dumps([*items, items[0] | {"name": "d"}]))
    ran = ppec(*create)
    assert ran.code == 2
    assert "address 10.1.0.5 is asked for twice, by item a and item d" in " ".join(ran.err.split())
    assert len(orchestrator.requests) == sent
