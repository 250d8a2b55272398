# SPDX-License-Identifier: Apache-2.0
"""ppec fleet export, and a plan on the live fleet: of the orchestrator's double."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# A golden file of the readers' own tests: formats are kept in one place.
SNAPSHOT = Path(__file__).parent.parent / "orchestrator" / "fleets" / "golden" / "fleet.json"


def test_the_live_fleet_is_written_whole(orchestrator: Any, ppec: Any, tmp_path: Path) -> None:
    content = SNAPSHOT.read_bytes()
    orchestrator.instead["GET", "/v1/fleet"] = [lambda handler: handler.reply(200, content)] * 2
    file = tmp_path / "out.json"
    assert ppec("fleet", "export", str(file)).code == 0
    assert file.read_bytes() == content
    assert ppec("plan", "-o", "json").json["refused"][0]["vm"] == "db-2"


def test_an_export_that_breaks_off_leaves_nothing(orchestrator: Any, ppec: Any, tmp_path: Path) -> None:
    def half(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"schema": ')
        handler.cut()

    orchestrator.instead["GET", "/v1/fleet"] = [half]
    (tmp_path / "place").mkdir()
    ran = ppec("fleet", "export", str(tmp_path / "place" / "fleet.json"))
    assert ran.code == 7
    assert list((tmp_path / "place").iterdir()) == []


def test_a_stranger_gets_no_fleet(ppec: Any, tmp_path: Path) -> None:
    assert ppec("fleet", "export", str(tmp_path / "f"), "--token", "wrong").code == 3
    assert not (tmp_path / "f").exists()
