# SPDX-License-Identifier: Apache-2.0
"""The IPDB's REST resources: VRFs, prefixes, what is held back of them, addresses, and what became of each.

Part of `ppec_contract.api`, whose rules hold here: `…Create` is a request, `…View` an answer.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated, Any
from uuid import UUID

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from ppec_contract.model import BridgeName, Model, ResourceName, TagValue, VmName


def _address(value: Any) -> Any:
    """Parsed here: of a union pydantic would tell two faults, one of each family, and take JSON numbers besides."""
    if isinstance(value, IPv4Address | IPv6Address):
        return value
    text = _zoneless(value)
    try:
        return ip_address(text)
    except ValueError:
        raise ValueError("it is no IPv4 or IPv6 address") from None


def _network(value: Any) -> Any:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    text = _zoneless(value)
    if "/" not in text:
        # Python takes it for a network of one address.
        raise ValueError("it says no length, as in 10.1.0.0/24")
    try:
        return ip_network(text)
    except ValueError:
        raise ValueError("it is no IPv4 or IPv6 network, or has bits set beyond its length") from None


def _zoneless(value: Any) -> str:
    """Python takes an IPv6 zone, which may be any text."""
    if not isinstance(value, str):
        raise ValueError("it is no text")
    if "%" in value:
        raise ValueError("it names a zone (%), which only means something on one machine")
    return value


IpAddress = Annotated[IPv4Address | IPv6Address, BeforeValidator(_address)]
IpNetwork = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]
# A day at most: what is to be kept longer is reserved.
QuarantineS = Annotated[int, Field(strict=True, ge=0, le=86400)]
Nameservers = Annotated[tuple[IpAddress, ...], Field(max_length=4)]
Vlan = Annotated[int, Field(strict=True, ge=1, le=4094)]
DEFAULT_QUARANTINE_S = 300
# Counts are JSON numbers, which are exact up to here for every reader; only IPv6 has more.
MAX_COUNT = 2**53
AddressCount = Annotated[
    int,
    Field(description=f"How many addresses; {MAX_COUNT} (2**53, where exact JSON numbers end) is that many or more."),
]
MAX_NETWORKS = 4
# Of one import, which is one transaction that others wait for: its rows, and the addresses of its IPv4 prefixes, which
# are rows as well. What takes more bytes has more rows, too.
MAX_IMPORT_ROWS = 4000
MAX_IMPORT_ADDRESSES = 2**19
MAX_IMPORT_BYTES = 8 * 1024 * 1024


class VrfCreate(Model):
    name: ResourceName
    description: TagValue = ""


class VrfView(VrfCreate):
    pass


class PrefixCreate(Model):
    """Addresses of one VRF that serve the hosts of a region, of a cluster, or of one rack of it, through a bridge.

    Give a `region`, or a `cluster` with or without a `rack`. The gateway, the network and (IPv4) broadcast address are
    never given out, nor anything outside `first`..`last`. Networks of loopback, link-local, multicast, unspecified,
    IPv4-mapped or reserved addresses are refused. An address that was released is not given to another VM for
    `quarantine_s`.

    `vlan` is the VLAN that the bridge carries, for people and inventories to read: PPEC tags nothing itself.
    `netbox_id` is the same prefix in NetBox, which then keeps its addresses: PPEC acquires them there.
    """

    vrf: ResourceName
    cidr: IpNetwork
    gateway: IpAddress | None = None
    vlan: Vlan | None = None
    bridge: BridgeName
    region: ResourceName | None = None
    cluster: ResourceName | None = None
    rack: ResourceName | None = None
    first: IpAddress | None = None
    last: IpAddress | None = None
    nameservers: Nameservers = ()
    quarantine_s: QuarantineS = DEFAULT_QUARANTINE_S
    netbox_id: Annotated[int, Field(strict=True, ge=1, lt=2**63)] | None = None

    @model_validator(mode="after")
    def _serves_one_place(self) -> PrefixCreate:
        if (self.region is None) == (self.cluster is None):
            raise ValueError("give either a region or a cluster that it serves")
        if self.rack is not None and self.cluster is None:
            raise ValueError("a rack is named together with its cluster")
        return self


class PrefixUpdate(Model):
    """`PATCH /v1/prefixes/{prefix_id}`: what may change while addresses are in use. What is left out stays.

    VMs that exist keep what they were told, also the gateway; addresses in quarantine keep the end they have. `gateway`
    null: none any more; `first` and `last` null: the network's own. Addresses that it would then give out no more must
    be free: no VM's, not resting and not held back. Of a prefix that NetBox keeps these three can't be changed.
    """

    gateway: IpAddress | None = None
    first: IpAddress | None = None
    last: IpAddress | None = None
    vlan: Vlan | None = None
    nameservers: Nameservers | None = None
    quarantine_s: QuarantineS | None = None


class PrefixView(PrefixCreate):
    """A prefix and where its addresses are. `addresses_total` is the sum of used, reserved, quarantined and free;
    excluded ones are not in it, nor, of a prefix that NetBox keeps, what was not acquired from there.

    `addresses_reserved` and `addresses_quarantined` count what no VM has.
    """

    prefix_id: int
    addresses_total: AddressCount
    addresses_free: AddressCount
    addresses_used: int = 0
    addresses_reserved: AddressCount = 0
    addresses_quarantined: int = 0
    addresses_excluded: AddressCount = 0


class HoldKind(StrEnum):
    """`excluded`: in other hands, never given out and not counted. `reserved`: kept, at most for one VM by its name."""

    EXCLUDED = "excluded"
    RESERVED = "reserved"


class HoldCreate(Model):
    """`POST /v1/prefixes/{prefix_id}/holds`: addresses that are not given out by themselves, `first`..`last` inclusive
    (`last` default: `first` alone).

    A reserved address goes to the VM named `reserved_for`, when its request asks for that address; to nobody else.
    """

    kind: HoldKind
    first: IpAddress
    last: IpAddress | None = None
    reserved_for: VmName | None = None
    note: TagValue = ""

    @model_validator(mode="after")
    def _one_sense(self) -> HoldCreate:
        if self.kind is HoldKind.EXCLUDED and self.reserved_for is not None:
            raise ValueError("an excluded address is reserved for nobody")
        return self


class HoldView(HoldCreate):
    hold_id: int
    prefix_id: int
    created_at: datetime
    created_by: str


class FreeRun(Model):
    """Free addresses that follow one another."""

    first: IPv4Address | IPv6Address
    last: IPv4Address | IPv6Address
    count: AddressCount


class PrefixFree(Model):
    """`GET /v1/prefixes/{prefix_id}/free`: the free addresses as runs, in order, and as the networks they make up,
    largest first. `more` says that there are more of either than are shown."""

    prefix_id: int
    addresses_free: AddressCount
    runs: tuple[FreeRun, ...]
    networks: tuple[IPv4Network | IPv6Network, ...]
    more: bool


class VrfFree(Model):
    """`GET /v1/vrfs/{vrf}/free?within=…`: the networks within a network that no prefix of the VRF covers, in order."""

    vrf: ResourceName
    within: IPv4Network | IPv6Network
    networks: tuple[IPv4Network | IPv6Network, ...]
    more: bool


class AddressState(StrEnum):
    """`quarantined`: released, and not given to another VM before `until`. `kept`: a VM's that was planned elsewhere,
    until the host that may still have a copy of it has been cleaned up."""

    FREE = "free"
    USED = "used"
    KEPT = "kept"
    QUARANTINED = "quarantined"
    RESERVED = "reserved"
    EXCLUDED = "excluded"


class AddressView(Model):
    """An address. `until` is the end of its quarantine; `state` is left out where an address stands with its VM."""

    address: IPv4Address | IPv6Address
    prefix: IPv4Network | IPv6Network
    vrf: ResourceName
    vm: VmName | None = None
    vm_id: UUID | None = None
    state: AddressState | None = None
    until: datetime | None = None
    reserved_for: VmName | None = None


class AddressAction(StrEnum):
    """What can befall an address. `kept`: see `AddressState`."""

    GRANTED = "granted"
    KEPT = "kept"
    RELEASED = "released"
    RESERVED = "reserved"
    EXCLUDED = "excluded"
    OPENED = "opened"


class AddressEventView(Model):
    """One line of the addresses' history: what befell which, when, for which VM, by which operation and caller.

    `last` is the last of the addresses that were held back (or opened again) together with `address`.
    """

    event_id: int
    at: datetime
    action: AddressAction
    vrf: str
    prefix: IPv4Network | IPv6Network
    address: IPv4Address | IPv6Address
    last: IPv4Address | IPv6Address | None = None
    vm: str | None = None
    vm_id: UUID | None = None
    operation_id: str | None = None
    caller: str | None = None
    note: str = ""


class NetworkWanted(Model):
    """Addresses that a VM asks for. Empty: one of each family that serves its host.

    `prefix`: one address of just this prefix. `address`: just this address, which must be free; it is one VM's.
    Both are looked up in the host's VRF, and a host that the prefix doesn't serve is no place for the VM.
    """

    prefix: IpNetwork | None = None
    address: IpAddress | None = None

    @model_validator(mode="after")
    def _consistent(self) -> NetworkWanted:
        if self.prefix is not None and self.address is not None and self.address not in self.prefix:
            raise ValueError(f"address {self.address} is not in prefix {self.prefix}")
        return self


Networks = Annotated[tuple[NetworkWanted, ...], Field(max_length=MAX_NETWORKS)]


# --- import and export -----------------------------------------------------------------------------------------------


class ExchangedPrefix(PrefixCreate):
    """A prefix with what is held back of it."""

    holds: tuple[HoldCreate, ...] = ()


class IpdbDocument(Model):
    """`GET /v1/ipdb/export`: the IPDB without what belongs to VMs. Addresses come and go with their VMs; what others
    use of a prefix is imported as holds."""

    vrfs: tuple[VrfCreate, ...] = ()
    prefixes: tuple[ExchangedPrefix, ...] = ()


class IpdbImport(Model):
    """`POST /v1/ipdb/import`: all of it or nothing, as a `document` or as the text of a `csv` table.

    What exists just so is left alone; what exists otherwise is a fault. `dry_run` says what would be done.
    `skip_refused` leaves out new prefixes that are refused for what their addresses are (loopback, multicast, …), with
    what is excluded of them; one with reserved addresses remains a fault.
    """

    document: IpdbDocument | None = None
    csv: Annotated[str, Field(max_length=4 * 1024 * 1024)] | None = None
    dry_run: StrictBool = False
    skip_refused: StrictBool = False

    @model_validator(mode="after")
    def _one_form(self) -> IpdbImport:
        if (self.document is None) == (self.csv is None):
            raise ValueError("give either a document or csv")
        return self


class ImportCounts(Model):
    """How many rows of each kind."""

    vrfs: int = 0
    prefixes: int = 0
    holds: int = 0


class ImportSkipped(Model):
    """A row that was left out, and why; `place` is its line, or its path in the document."""

    place: str
    reason: str


class IpdbImported(Model):
    dry_run: bool
    created: ImportCounts
    unchanged: ImportCounts
    skipped: tuple[ImportSkipped, ...] = ()
