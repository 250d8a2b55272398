# SPDX-License-Identifier: Apache-2.0
"""NetBox as a source of addresses, and the only file that imports pynetbox (extra `netbox`).

NetBox hands out next-free addresses, and creates and deletes them, one request after another under a lock of its own,
so two callers are never given the same one. Ours are known by their description, which is the mark. It gives no more
than it has: a list that is too long is refused whole with 409, and then a shorter one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_interface, ip_network
from itertools import islice
from pathlib import Path
from typing import Any

from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.provider import Acquired, Outcome, PrefixGoneError, SourcePrefix
from ppec_orchestrator.ipdb.ranges import Address, AddressRange, Network, Run, complement, from_hex, to_hex

_TIMEOUT_S = 10.0
_TRIES = 5
# Of one request: NetBox validates each.
_MOST_AT_ONCE = 100
# Of a range so much is listed at a time, and so many times for one request: of an IPv4 prefix that is all there can be.
_BLOCK_BITS = 10
_MOST_BLOCKS = 65


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
        with self._mapped():
            found = self._prefix(prefix)
            acquired = [] if prefix.is_part else self._next_free(found, count)
            # A gateway that is not entered there is given away, and goes back as it is of no use.
            outside = sum(not prefix.gives_out(one.address) for one in acquired)
            return acquired + self._next_in_range(found, prefix, count if prefix.is_part else outside)

    def _next_free(self, found: Any, count: int) -> list[Acquired]:
        acquired: list[Acquired] = []
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

    def _next_in_range(self, found: Any, prefix: SourcePrefix, count: int) -> list[Acquired]:
        """What NetBox calls next may all lie below the range, and of what is available it lists the first page only. So
        it is asked what is entered in the range, block by block upwards, and what is not is entered."""
        acquired: list[Acquired] = []
        if prefix.usable is None or count <= 0:
            return acquired
        closed = self._populated(found, prefix)
        for block in islice(_blocks(prefix.usable), _MOST_BLOCKS):
            acquired += self._next_in_block(found, prefix.usable, block, closed, count - len(acquired))
            if len(acquired) == count:
                break
        return acquired

    def _next_in_block(
        self, found: Any, usable: AddressRange, block: Network, closed: Sequence[Run], count: int
    ) -> list[Acquired]:
        acquired: list[Acquired] = []
        lost = 0
        while lost < _TRIES and (wanted := min(count - len(acquired), _MOST_AT_ONCE)) > 0:
            entered = ((number, number) for number in (int(one.address) for one in self._within(found, block)))
            free = list(islice(_free(usable, block, [*closed, *entered]), wanted))
            if not free:
                break
            made = self._enter(found, block, free)
            acquired += made
            # Others were faster: what they took is seen next time.
            lost += len(made) < len(free)
        return acquired

    def _populated(self, found: Any, prefix: SourcePrefix) -> list[Run]:
        """NetBox's IP ranges that are in use as a whole, as all were before it had a mark for that."""
        asked = {"parent": str(prefix.network)} | _vrf_filter(found)
        ranges = [one for one in self._api.ipam.ip_ranges.filter(**asked) if dict(one).get("mark_populated", True)]
        return [(_number(one.start_address), _number(one.end_address)) for one in ranges]

    def _within(self, found: Any, block: Network) -> list[Acquired]:
        """All that is entered there, whoever has it."""
        asked = {"parent": str(block)} | _vrf_filter(found)
        return [_acquired(one) for one in self._api.ipam.ip_addresses.filter(**asked)]

    def _enter(self, found: Any, block: Network, addresses: Sequence[Address]) -> list[Acquired]:
        """Those that nobody else has entered meanwhile; none, if NetBox refuses a duplicate, as it does where the VRF
        is set so. Where it isn't, it is looked again: whoever was there as well keeps the address, and we don't."""
        if not addresses:
            return []
        vrf = getattr(found, "vrf", None)
        length = ip_network(str(found.prefix)).prefixlen
        body = self._body(None) | {"vrf": vrf.id if vrf else None}
        try:
            records = self._api.ipam.ip_addresses.create([body | {"address": f"{one}/{length}"} for one in addresses])
        except self._pynetbox.RequestError as error:
            if error.req.status_code == 400 and "uplicate" in str(error.error):
                return []
            raise
        made = [_acquired(one) for one in records]
        mine = {one.source_id for one in made}
        others = {one.address for one in self._within(found, block) if one.source_id not in mine}
        if doubled := [one.source_id for one in made if one.address in others]:
            self._api.ipam.ip_addresses.delete(doubled)
        return [one for one in made if one.address not in others]

    def acquire_fixed(self, prefix: SourcePrefix, address: Address) -> Acquired:
        with self._mapped():
            found = self._prefix(prefix)
            only = ip_network(address)
            made = [] if self._within(found, only) else self._enter(found, only, [address])
        if not made:
            raise _taken(prefix, address)
        return made[0]

    def owned(self, prefix: SourcePrefix) -> list[Acquired]:
        with self._mapped():
            asked = {"parent": str(prefix.network), "description": self._mark} | _vrf_filter(self._prefix(prefix))
            return [_acquired(one) for one in self._api.ipam.ip_addresses.filter(**asked)]

    def still_ours(self, source_ids: Collection[int]) -> set[int]:
        with self._mapped():
            numbers = sorted(source_ids)
            parts = (numbers[start : start + _MOST_AT_ONCE] for start in range(0, len(numbers), _MOST_AT_ONCE))
            asked = (self._api.ipam.ip_addresses.filter(id=part, description=self._mark) for part in parts)
            return {int(one.id) for found in asked for one in found}

    def tell(self, holders: Sequence[tuple[int, str | None]]) -> Outcome:
        names = dict(holders)
        endpoint = self._api.ipam.ip_addresses
        return self._change(
            list(names), lambda part: endpoint.update([{"id": one, **self._body(names[one])} for one in part])
        )

    def give_back(self, source_ids: Sequence[int]) -> Outcome:
        return self._change(source_ids, self._api.ipam.ip_addresses.delete)

    def _change(self, source_ids: Sequence[int], change: Callable[[list[int]], object]) -> Outcome:
        """Each part is looked at just before: a person who edits one in between is overwritten."""
        not_ours: set[int] = set()
        refused: dict[int, PpecError] = {}
        for start in range(0, len(source_ids), _MOST_AT_ONCE):
            part = source_ids[start : start + _MOST_AT_ONCE]
            ours = self.still_ours(part)
            not_ours.update(set(part) - ours)
            refused.update(self._change_part([one for one in part if one in ours], change))
        return Outcome(frozenset(not_ours), refused)

    def _change_part(self, part: list[int], change: Callable[[list[int]], object]) -> dict[int, PpecError]:
        """Which were refused. One that is refused fails all those that are asked for with it, so then each is asked
        for by itself."""
        if not part:
            return {}
        try:
            with self._mapped():
                change(part)
            return {}
        except PpecError as error:
            if error.retryable:
                raise
            if len(part) == 1:
                return {part[0]: error}
        refused: dict[int, PpecError] = {}
        for one in part:
            refused |= self._change_part([one], change)
        return refused

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


def _blocks(usable: AddressRange) -> Iterator[Network]:
    """The networks that the range lies in, ascending, each small enough to be listed."""
    whole = usable.network
    length = max(whole.prefixlen, whole.max_prefixlen - _BLOCK_BITS)
    size = 2 ** (whole.max_prefixlen - length)
    for start in range(int(usable.first) // size * size, int(usable.last) + 1, size):
        yield ip_network((from_hex(to_hex(start), usable.family), length))


def _free(usable: AddressRange, block: Network, taken: Iterable[Run]) -> Iterator[Address]:
    """Of the block what is to be given out, ascending."""
    low = max(int(usable.first), int(block.network_address))
    high = min(int(usable.last), int(block.broadcast_address))
    for begin, end in complement((low, high), sorted(taken)):
        for number in range(begin, end + 1):
            address = from_hex(to_hex(number), usable.family)
            if address in usable:
                yield address


def _number(text: Any) -> int:
    return int(ip_interface(str(text)).ip)


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
