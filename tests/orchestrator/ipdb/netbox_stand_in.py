# SPDX-License-Identifier: Apache-2.0
"""A stand-in of NetBox's REST API, as far as prefixes and IP addresses go, after NetBox 4's behaviour:

- `POST …/available-ips/` and all writes of IP addresses are taken one after another, under one lock. A list is
  granted whole, in ascending order, or refused whole with 409 and how many there are.
- What is available: not the network and broadcast address, nor IPv6's subnet-router anycast address, nor what has an
  IP address in the prefix's VRF, nor what lies in an IP range of it that is marked as populated. NetBox knows no
  gateways. What is available is listed from the lowest on, one page at most, and there is no next one.
- Duplicates within a VRF are refused with 400 where the VRF is unique, and allowed where it isn't.
- Lists are pages of `count`, `next`, `previous`, `results`; `limit=0` means the largest page. Detail lists are plain.
- Errors are `{"detail": …}` or, for fields, `{"address": […]}`. Wrong tokens get 403.
- An address in a populated range is refused with 400. A list of addresses is created whole or not at all; what is wrong
  with each is told in a list as long.
- Bulk updates and deletes leave out ids that do not exist. A record that something else depends on is not deleted
  (409), nor are those that are asked for with it.

`locking = False` makes it hand out as it would without its lock.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_interface, ip_network
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

TOKEN = "nbt-of-the-test"
MAX_PAGE_SIZE = 50
_PREFIX = re.compile(r"/api/ipam/prefixes/(\d+)/(available-ips/)?$")
_ADDRESSES = "/api/ipam/ip-addresses/"
_RANGES = "/api/ipam/ip-ranges/"


class RefusedError(Exception):
    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status)
        self.status, self.body = status, body


@dataclass
class NetBoxStandIn:
    """Its records, by id. `requests` are the methods and paths it was asked."""

    prefixes: dict[int, dict[str, Any]] = field(default_factory=dict)
    addresses: dict[int, dict[str, Any]] = field(default_factory=dict)
    ranges: list[dict[str, Any]] = field(default_factory=list)
    # Those that are not deleted.
    protected: set[int] = field(default_factory=set)
    unique_vrfs: bool = True
    locking: bool = True
    # Called between looking and writing of a next-free request.
    between: Callable[[], None] = lambda: None
    # Called before a request is answered; what it raises cuts the connection.
    before: Callable[[str, str], None] = lambda method, path: None
    # Called after a request was carried out; what it raises loses the answer.
    after: Callable[[str, str], None] = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _records: threading.RLock = field(default_factory=threading.RLock)
    _ids: Iterator[int] = field(default_factory=lambda: iter(range(1000, 10**9)))

    def add_prefix(self, prefix_id: int, cidr: str, vrf: int | None = None) -> None:
        self.prefixes[prefix_id] = {"id": prefix_id, "prefix": cidr, "vrf": _reference(vrf), "display": cidr}

    def add_address(self, address: str, vrf: int | None = None, **more: Any) -> int:
        """As a person would enter it."""
        with self._lock:
            return int(self._create({"address": address, "vrf": vrf, **more})["id"])

    def add_range(self, first: str, last: str, vrf: int, *, populated: bool) -> None:
        self.ranges.append(
            {"id": next(self._ids), "start_address": first, "end_address": last, "vrf": _reference(vrf),
             "mark_populated": populated, "display": f"{first}-{last}"}
        )  # fmt: skip

    def texts(self, description: str | None = None) -> list[str]:
        with self._records:
            chosen = [one for one in self.addresses.values() if description in (None, one["description"])]
        return sorted(one["address"] for one in chosen)

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        if match := _PREFIX.match(path):
            return self._prefix(method, int(match[1]), bool(match[2]), query, body)
        if path == _ADDRESSES:
            return self._bulk(method, query, body)
        if path == _RANGES and method == "GET":
            found = [one for one in self.ranges if self._range_chosen(one, query)]
            return 200, {"count": len(found), "next": None, "previous": None, "results": found}
        if path == "/api/":
            return 200, {}
        raise RefusedError(404, {"detail": "Not found."})

    def _prefix(self, method: str, number: int, available: bool, query: Any, body: Any) -> tuple[int, Any]:
        prefix = self.prefixes.get(number)
        if prefix is None:
            raise RefusedError(404, {"detail": "No Prefix matches the given query."})
        if not available:
            return 200, prefix
        if method == "GET":
            limit = min(int(query.get("limit", [MAX_PAGE_SIZE])[0]) or MAX_PAGE_SIZE, MAX_PAGE_SIZE)
            family = ip_network(prefix["prefix"]).version
            shown = [one for one, _ in zip(self._available(prefix), range(limit), strict=False)]
            return 200, [{"family": family, "address": one, "vrf": prefix["vrf"]} for one in shown]
        with self._lock if self.locking else nullcontext():
            return 201, self._next(prefix, body)

    def _next(self, prefix: dict[str, Any], body: Any) -> Any:
        wanted = body if isinstance(body, list) else [body]
        found = [one for one, _ in zip(self._available(prefix), range(len(wanted)), strict=False)]
        self.between()
        if len(found) < len(wanted):
            told = f"({len(wanted)} requested, {len(found)} available)"
            why = f"An insufficient number of IP addresses are available within {prefix['prefix']} {told}"
            raise RefusedError(409, {"detail": why})
        vrf = prefix["vrf"]["id"] if prefix["vrf"] else None
        made = [self._create(one | {"address": text, "vrf": vrf}) for one, text in zip(wanted, found, strict=True)]
        return made if isinstance(body, list) else made[0]

    def _available(self, prefix: dict[str, Any]) -> Iterator[str]:
        network = ip_network(prefix["prefix"])
        with self._records:
            taken = {int(ip_interface(one["address"]).ip) for one in self.addresses.values() if self._in(one, prefix)}
        low, high = int(network.network_address), int(network.broadcast_address)
        if network.prefixlen < network.max_prefixlen - 1:
            low, high = low + 1, high - (1 if network.version == 4 else 0)
        kind = type(network.network_address)
        return (
            f"{kind(n)}/{network.prefixlen}" for n in range(low, high + 1)
            if n not in taken and not self._populated(kind(n), prefix["vrf"])
        )  # fmt: skip

    def _populated(self, address: Any, vrf: Any) -> bool:
        return any(
            (one["vrf"] or {}).get("id") == (vrf or {}).get("id") and one["mark_populated"]
            and ip_interface(one["start_address"]).ip <= address <= ip_interface(one["end_address"]).ip
            for one in self.ranges
        )  # fmt: skip

    @staticmethod
    def _range_chosen(one: dict[str, Any], query: dict[str, list[str]]) -> bool:
        _check_filters(query, {"parent", "vrf_id", "limit", "offset"})
        ends = [ip_interface(one[name]).ip for name in ("start_address", "end_address")]
        vrf = str(one["vrf"]["id"]) if one["vrf"] else "null"
        parents = [ip_network(text) for text in query.get("parent", [])]
        inside = not parents or any(all(end in parent for end in ends) for parent in parents)
        return inside and vrf in query.get("vrf_id", [vrf])

    @staticmethod
    def _in(one: dict[str, Any], prefix: dict[str, Any]) -> bool:
        same_vrf = (one["vrf"] or {}).get("id") == (prefix["vrf"] or {}).get("id")
        return same_vrf and ip_interface(one["address"]).ip in ip_network(prefix["prefix"])

    def _create(self, given: dict[str, Any]) -> dict[str, Any]:
        vrf = _reference(given.get("vrf"))
        address = ip_interface(given["address"])
        with self._records:
            if wrong := self._wrong(given):
                raise RefusedError(400, wrong)
            made = {
                "id": next(self._ids), "address": str(address), "vrf": vrf, "family": {"value": address.version},
                "status": {"value": given.get("status", "active")}, "description": given.get("description", ""),
                "dns_name": given.get("dns_name", ""), "display": str(address),
            }  # fmt: skip
            self.addresses[made["id"]] = made
        return made

    def _create_all(self, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with self._records:
            if any(wrong := [self._wrong(one) for one in wanted]):
                raise RefusedError(400, wrong)
            return [self._create(one) for one in wanted]

    def _wrong(self, given: dict[str, Any]) -> dict[str, list[str]]:
        vrf, address = _reference(given.get("vrf")), ip_interface(given["address"])
        if self._populated(address.ip, vrf):
            return {"address": [f"Cannot create IP address {address} inside range."]}
        same = [
            one for one in self.addresses.values()
            if ip_interface(one["address"]).ip == address.ip and one["vrf"] == vrf
        ]  # fmt: skip
        if same and self.unique_vrfs:
            where = "VRF" if vrf else "global table"
            return {"address": [f"Duplicate IP address found in {where}: {same[0]['address']}"]}
        return {}

    def _bulk(self, method: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        if method == "GET":
            return 200, self._page(query)
        with self._lock if self.locking else nullcontext():
            if method == "POST":
                return 201, self._create_all(body) if isinstance(body, list) else self._create(body)
            with self._records:
                there = [one for one in body if one["id"] in self.addresses]
                if method == "DELETE":
                    if self.protected & {one["id"] for one in there}:
                        raise RefusedError(409, {"detail": "Unable to delete object. 1 dependent objects were found"})
                    for one in there:
                        del self.addresses[one["id"]]
                    return 204, None
                for one in there:
                    change = {k: v for k, v in one.items() if k != "id"}
                    if "status" in change:
                        change["status"] = {"value": change["status"]}
                    self.addresses[one["id"]].update(change)
                return 200, [self.addresses[one["id"]] for one in there]

    def _page(self, query: dict[str, list[str]]) -> dict[str, Any]:
        with self._records:
            found = [one for _, one in sorted(self.addresses.items()) if self._chosen(one, query)]
        limit = min(int(query.get("limit", ["0"])[0]) or MAX_PAGE_SIZE, MAX_PAGE_SIZE)
        offset = int(query.get("offset", ["0"])[0])
        more = None
        if offset + limit < len(found):
            asked = {name: values for name, values in query.items() if name not in ("limit", "offset")}
            asked |= {"limit": [str(limit)], "offset": [str(offset + limit)]}
            more = f"{self.url}{_ADDRESSES}?{urlencode(asked, doseq=True)}"
        return {"count": len(found), "next": more, "previous": None, "results": found[offset : offset + limit]}

    @staticmethod
    def _chosen(one: dict[str, Any], query: dict[str, list[str]]) -> bool:
        _check_filters(query, {"id", "description", "parent", "vrf_id", "address", "limit", "offset"})
        address = ip_interface(one["address"])
        vrf = str(one["vrf"]["id"]) if one["vrf"] else "null"
        return (
            str(one["id"]) in query.get("id", [str(one["id"])])
            and one["description"] in query.get("description", [one["description"]])
            and ("parent" not in query or any(address.ip in ip_network(cidr) for cidr in query["parent"]))
            and vrf in query.get("vrf_id", [vrf])
            # Without a length any length is meant, with one just that.
            and ("address" not in query or query["address"][0] in (str(address), str(address.ip)))
        )


def _reference(vrf: int | None) -> dict[str, Any] | None:
    return {"id": vrf, "display": f"vrf {vrf}", "name": f"vrf{vrf}"} if vrf else None


def _check_filters(query: dict[str, list[str]], known: set[str]) -> None:
    if set(query) - known:
        raise RefusedError(400, {"detail": f"the stand-in knows no filter {set(query) - known}"})


def _handler(stand_in: NetBoxStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def _serve(self) -> None:
            split = urlsplit(self.path)
            content = self.rfile.read(int(self.headers.get("content-length", "0")))
            stand_in.requests.append((self.command, split.path))
            try:
                stand_in.before(self.command, split.path)
                if self.headers.get("authorization") != f"Token {TOKEN}":
                    raise RefusedError(403, {"detail": "Invalid token"})
                body = json.loads(content) if content else None
                status, value = stand_in.answer(self.command, split.path, parse_qs(split.query), body)
                stand_in.after(self.command, split.path)
            except RefusedError as refused:
                status, value = refused.status, refused.body
            except ConnectionError:
                self.close_connection = True
                return
            sent = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.send_header("API-Version", "4.2")
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815

    return Handler


@contextmanager
def serving() -> Iterator[NetBoxStandIn]:
    """A stand-in that answers on the loopback interface."""
    stand_in = NetBoxStandIn()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(stand_in)) as server:
        server.daemon_threads = True
        stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()
