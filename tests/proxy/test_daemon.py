# SPDX-License-Identifier: Apache-2.0
"""The process: starts only when it can guard, reloads without dropping anybody, stops cleanly, stays small."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

MAX_RSS_MIB = 55
# Long enough for a loaded machine; reached only when a test fails.
SOON_S = 60


def shown_serial(proxy: Any) -> int:
    connection = proxy.connection()
    connection.connect()
    return int(connection.sock.getpeercert()["serialNumber"], 16)


def hang_up(proxy: Any, notify: Any) -> None:
    proxy.process.send_signal(signal.SIGHUP)
    notify.wait_for("RELOADING=1")
    notify.wait_for("READY=1")


def replace(credential: Any, by: Any) -> None:
    by.certificate.replace(credential.certificate)
    by.key.replace(credential.key)


def test_sighup_takes_a_new_certificate_and_keeps_open_connections(
    start_proxy: Any, notify: Any, fleet_ca: Any
) -> None:
    proxy = start_proxy(notify=notify)
    kept = proxy.connection()
    kept.request("POST", "/v1/agent/GetVersion", "{}")
    assert kept.getresponse().read()
    before = shown_serial(proxy)
    fresh = fleet_ca.issue("ppec://host/h1")
    replace(proxy.server, fresh)
    hang_up(proxy, notify)
    assert before == proxy.server.serial
    assert shown_serial(proxy) == fresh.serial
    sock = kept.sock
    kept.request("POST", "/v1/agent/GetVersion", "{}")
    assert kept.getresponse().status == 200
    assert kept.sock is sock  # the same connection, not a new one


def test_a_stream_goes_on_through_a_reload(start_proxy: Any, notify: Any, create_call: Any) -> None:
    proxy = start_proxy(notify=notify)
    reloaded = threading.Event()

    def script(call: Any) -> None:
        call.reply({}, continues=True)
        assert reloaded.wait(SOON_S)
        call.reply({"results": []})

    proxy.agent.script = script
    connection = proxy.connection()
    headers = {"Accept": "application/x-ndjson"}
    connection.request("POST", "/v1/agent/CreateVms", json.dumps(create_call()), headers)
    response = connection.getresponse()
    response.readline()
    hang_up(proxy, notify)
    reloaded.set()
    assert json.loads(response.readline()) == {"parameters": {"results": []}}


@pytest.mark.parametrize("fault", ["key-of-another", "expired", "other-ca", "wrong-role", "garbage", "gone"])
def test_a_bad_certificate_is_not_taken(
    start_proxy: Any, notify: Any, fleet_ca: Any, other_ca: Any, fault: str
) -> None:
    proxy = start_proxy(notify=notify)
    faults = {
        "key-of-another": lambda: fleet_ca.issue("ppec://host/h1").key.replace(proxy.server.key),
        "expired": lambda: replace(proxy.server, fleet_ca.issue("ppec://host/h1", expired=True)),
        "other-ca": lambda: replace(proxy.server, other_ca.issue("ppec://host/h1")),
        "wrong-role": lambda: replace(proxy.server, fleet_ca.issue("ppec://operator/h1")),
        "garbage": lambda: proxy.server.certificate.write_text("not a certificate"),
        "gone": proxy.server.certificate.unlink,
    }
    faults[fault]()
    hang_up(proxy, notify)
    assert shown_serial(proxy) == proxy.server.serial
    assert proxy.call("GetVersion").status == 200
    assert any(line["event"].startswith("reload refused") for line in proxy.log_lines())


def test_sighup_takes_a_new_allow_list(start_proxy: Any, notify: Any) -> None:
    proxy = start_proxy(notify=notify)
    kept = proxy.connection()
    kept.connect()
    proxy.config.write_text(proxy.config.read_text().replace("127.0.0.1/32", "127.0.0.2/32"))
    hang_up(proxy, notify)
    with pytest.raises(OSError, match=r".*"):
        proxy.call("GetVersion")
    connection = proxy.connection(source="127.0.0.2")
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200


def test_sigterm_finishes_what_is_under_way(start_proxy: Any, notify: Any) -> None:
    proxy = start_proxy(notify=notify)
    entered, release = threading.Event(), threading.Event()

    def script(call: Any) -> None:
        entered.set()
        assert release.wait(SOON_S)
        call.reply({"vms": []})

    proxy.agent.script = script
    connection = proxy.connection()
    connection.request("POST", "/v1/agent/ListVms", "{}")
    assert entered.wait(SOON_S)
    proxy.process.send_signal(signal.SIGTERM)
    notify.wait_for("STOPPING=1")
    release.set()
    assert json.loads(connection.getresponse().read()) == {"vms": []}
    assert proxy.process.wait(SOON_S) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"allow_from": []}, "allow_from"),
        ({"allow_from": ["10.0.0.1/8"]}, "allow_from"),
        ({"listen_port": 70000}, "listen_port"),
        ({"colour": "red"}, "colour"),
        ({"certificate_path": "/nonexistent"}, "/nonexistent"),
    ],
)
def test_it_does_not_start_unguarded(
    start_proxy: Any, tmp_path: Path, fleet_ca: Any, change: dict[str, Any], named: str
) -> None:
    server = fleet_ca.issue("ppec://host/h1")
    values = {
        "allow_from": ["127.0.0.1/32"],
        "certificate_path": str(server.certificate),
        "key_path": str(server.key),
        "ca_path": str(fleet_ca.path),
        "listen_address": "127.0.0.1",
        "listen_port": 0,
    } | change
    config = tmp_path / "proxy.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    command = [sys.executable, "-m", "ppec_proxy.serve", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, timeout=SOON_S, check=False)
    assert ended.returncode in (2, 3)
    line = json.loads(ended.stderr)
    assert line["event"] == "can't start"
    assert named in line["why"]


def test_it_stays_small_under_load(start_proxy: Any, create_call: Any) -> None:
    proxy = start_proxy()
    proxy.agent.script = lambda call: call.reply({"results": []})
    body = create_call(user_data="x" * 60_000)
    for _ in range(50):
        assert proxy.call("CreateVms", body).status == 200
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    rss_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert rss_kib <= MAX_RSS_MIB * 1024
