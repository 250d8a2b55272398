# SPDX-License-Identifier: Apache-2.0
"""NetBox as a source of addresses, and the only file that imports pynetbox (extra `netbox`).

NetBox hands out next-free addresses, and creates and deletes them, one request after another under a lock of its own,
so two callers are never given the same one. Ours are known by their description, which is the mark. It gives no more
than it has: a list that is too long is refused whole with 409, and then a shorter one is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.provider import Acquired, PrefixGoneError, SourcePrefix
from ppec_orchestrator.ipdb.ranges import Address

_TIMEOUT_S = 10.0
_TRIES = 5
# Of one request: NetBox validates each.
_MOST_AT_ONCE = 100


class NetBox:
    """An `AddressSource`. `mark` tells this installation's addresses from everybody else's."""

    def __init__(self, url: str, token: str, mark: str, ca_path: Path | None = None) -> None:
        try:
            import pynetbox
        except ImportError as error:
            raise PpecError(
                "request.invalid",
                "netbox_url is set and pynetbox is not installed",
                hint="Install ppec with the extra netbox.",
                subject="settings",
            ) from error
        self._pynetbox = pynetbox
        self._api = pynetbox.api(url, token=token)
        self._api.http_session = _session(ca_path)
        self._mark = mark

    def check(self, prefix: SourcePrefix, gateway: Address | None, others: Sequence[SourcePrefix]) -> None:
        with self._mapped():
            found = self._api.ipam.prefixes.get(prefix.source_id)
            if found is None or ip_network(str(found.prefix)) != prefix.network:
                there = "there is no such prefix" if found is None else f"it is {found.prefix}"
                raise _invalid(prefix, f"NetBox's prefix {prefix.source_id} is another: {there}")
            if gateway is not None and gateway in prefix.network and not self._known(found, gateway):
                raise _invalid(prefix, f"NetBox does not know the gateway {gateway}, and would give it away")
            for other in others:
                if other.source_id != prefix.source_id and self._same_vrf(found, other):
                    told = f"NetBox's prefix {other.source_id} ({other.network})"
                    registered = "is registered" if other.prefix_id else "is to be registered with it"
                    why = f"{told} overlaps it and {registered}: both would give the same addresses"
                    raise _invalid(prefix, why, "Register only one of them.")

    def _same_vrf(self, found: Any, other: SourcePrefix) -> bool:
        there = self._api.ipam.prefixes.get(other.source_id)
        return there is not None and _vrf_filter(there) == _vrf_filter(found)

    def _known(self, found: Any, address: Address) -> bool:
        # Without a length it is found with whatever length it was entered.
        asked = {"address": str(address)} | _vrf_filter(found)
        return any(True for _ in self._api.ipam.ip_addresses.filter(**asked))

    def acquire(self, prefix: SourcePrefix, count: int) -> list[Acquired]:
        acquired: list[Acquired] = []
        with self._mapped():
            found = self._prefix(prefix)
            while len(acquired) < count:
                made = self._next(found, min(count - len(acquired), _MOST_AT_ONCE))
                acquired += [_acquired(one) for one in made]
                if not made:
                    break
        return acquired

    def _next(self, found: Any, wanted: int) -> list[Any]:
        for _ in range(_TRIES):
            try:
                return list(found.available_ips.create([self._body(None) for _ in range(wanted)]))
            except self._pynetbox.AllocationError:
                # What is left may be taken before we ask for it: then there is less left.
                wanted = min(wanted - 1, len(list(found.available_ips.list(limit=wanted))))
                if wanted <= 0:
                    return []
        return []

    def acquire_fixed(self, prefix: SourcePrefix, address: Address) -> Acquired:
        with self._mapped():
            found = self._prefix(prefix)
            # NetBox refuses a duplicate only where the VRF is set so.
            if self._known(found, address):
                raise _taken(prefix, address)
            body = self._body(None) | {"address": f"{address}/{prefix.network.prefixlen}"}
            vrf = getattr(found, "vrf", None)
            try:
                return _acquired(self._api.ipam.ip_addresses.create(**body, vrf=vrf.id if vrf else None))
            except self._pynetbox.RequestError as error:
                if error.req.status_code == 400 and "uplicate" in str(error.error):
                    raise _taken(prefix, address) from error
                raise

    def owned(self, prefix: SourcePrefix) -> list[Acquired]:
        with self._mapped():
            asked = {"parent": str(prefix.network), "description": self._mark} | _vrf_filter(self._prefix(prefix))
            return [_acquired(one) for one in self._api.ipam.ip_addresses.filter(**asked)]

    def tell(self, holders: Sequence[tuple[int, str | None]]) -> None:
        with self._mapped():
            for start in range(0, len(holders), _MOST_AT_ONCE):
                part = holders[start : start + _MOST_AT_ONCE]
                self._api.ipam.ip_addresses.update([{"id": number, **self._body(name)} for number, name in part])

    def give_back(self, source_ids: Sequence[int]) -> None:
        with self._mapped():
            for start in range(0, len(source_ids), _MOST_AT_ONCE):
                self._api.ipam.ip_addresses.delete(list(source_ids[start : start + _MOST_AT_ONCE]))

    def _prefix(self, prefix: SourcePrefix) -> Any:
        found = self._api.ipam.prefixes.get(prefix.source_id)
        if found is None:
            raise PrefixGoneError(prefix)
        return found

    def _body(self, vm: str | None) -> dict[str, Any]:
        return {"description": self._mark, "status": "active" if vm else "reserved", "dns_name": vm or ""}

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        import requests

        try:
            yield
        except self._pynetbox.RequestError as error:
            if error.req.status_code >= 500:
                raise _unavailable(f"it answers {error.req.status_code}") from error
            raise _refused(str(error.error)[:500]) from error
        except (self._pynetbox.ContentError, requests.exceptions.RequestException) as error:
            raise _unavailable(type(error).__name__) from error


def _session(ca_path: Path | None) -> Any:
    import requests
    from requests.adapters import HTTPAdapter

    class Bounded(HTTPAdapter):
        def send(self, request: Any, **more: Any) -> Any:  # type: ignore[override]
            return super().send(request, **{**more, "timeout": _TIMEOUT_S})

    session = requests.Session()
    # Neither a proxy nor somebody's netrc from the environment.
    session.trust_env = False
    session.verify = str(ca_path) if ca_path else True
    for scheme in ("http://", "https://"):
        session.mount(scheme, Bounded(pool_maxsize=8))
    return session


def _vrf_filter(found: Any) -> dict[str, Any]:
    vrf = getattr(found, "vrf", None)
    return {"vrf_id": vrf.id if vrf else "null"}


def _acquired(record: Any) -> Acquired:
    return Acquired(int(record.id), ip_interface(str(record.address)).ip)


def _invalid(
    prefix: SourcePrefix,
    why: str,
    hint: str = "Give the id of the same prefix in NetBox, and enter its gateway there as an IP address.",
) -> PpecError:
    return PpecError(
        "prefix.invalid",
        f"prefix {prefix.network}: {why}",
        hint=hint,
        subject=f"prefix {prefix.network}",
    )


def _taken(prefix: SourcePrefix, address: Address) -> PpecError:
    return PpecError(
        "address.in_use",
        f"address {address} of prefix {prefix.network} is in use, as NetBox says",
        hint="Ask for another address.",
        subject=f"address {address}",
        details={"by": "netbox", "prefix": str(prefix.network)},
    )


def _refused(why: str) -> PpecError:
    return PpecError(
        "netbox.refused", f"NetBox refused: {why}", hint="Correct what it says in NetBox.", subject="netbox"
    )


def _unavailable(why: str) -> PpecError:
    return PpecError(
        "netbox.unavailable",
        f"NetBox does not answer: {why}",
        hint="Addresses that PPEC has already are granted meanwhile.",
        subject="netbox",
    )
