# SPDX-License-Identifier: Apache-2.0
"""One suite for whoever keeps the addresses: the built-in store, and NetBox (its stand-in)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from ppec_contract.api_ipdb import HoldCreate, NetworkWanted, PrefixCreate
from ppec_contract.api_operations import OperationState
from ppec_contract.api_vms import VmsAction, VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.address_supply import AddressSupply
from ppec_orchestrator.ipdb.provider import AddressProvider, BuiltIn
from ppec_orchestrator.netbox import NetBox
from ppec_orchestrator.operations.service import Operations
from ppec_orchestrator.store import holds, prefixes, tables

sys.path.append(str(Path(__file__).parents[1] / "ipdb"))
from netbox_stand_in import TOKEN, serving

CIDR = "10.8.0.0/28"
FREE = [f"10.8.0.{n}" for n in (2, *range(4, 15))]


@dataclass
class Kept:
    """The world with a prefix of twelve free addresses on `br1`: 10.8.0.3 is in other hands."""

    world: Any
    provider: AddressProvider
    netbox: Any = None

    def accepting(self) -> Operations:
        plain = self.world.replica("accepting", start=False)
        return Operations(dataclasses.replace(plain._ports, addresses=self.provider))

    def create(self, *networks: dict[str, str], count: int = 1) -> Any:
        body = self.world.batch(count=count).model_dump() | {"networks": networks or ({"prefix": CIDR},)}
        return self.accepting().create(VmsCreate.model_validate(body), self.world.ask)

    def create_items(self, networks: dict[str, dict[str, str]], **more: Any) -> Any:
        """A VM by each name."""
        items = [{"name": name, "networks": [wanted]} for name, wanted in networks.items()]
        body = {"image": "debian", "flavor": "small", "items": items, **more}
        return self.accepting().create(VmsCreate.model_validate(body), self.world.ask)

    def addresses(self, view: Any) -> list[str]:
        return [str(a.address) for item in view.items for a in self.world.vm(str(item.vm_id)).addresses]

    def count(self, table: Any) -> int:
        with self.world.database.read() as conn:
            return int(conn.execute(select(func.count()).select_from(table)).scalar_one())


@pytest.fixture(params=["built-in", "netbox"])
def kept(request: pytest.FixtureRequest, world: Any) -> Iterator[Kept]:
    place: dict[str, Any] = {
        "vrf": "v1", "cidr": CIDR, "gateway": "10.8.0.1", "bridge": "br1", "cluster": "c1", "quarantine_s": 60,
    }  # fmt: skip
    with serving() as netbox:
        netbox.add_prefix(7, CIDR)
        netbox.add_address("10.8.0.1/28", description="router")
        netbox.add_address("10.8.0.3/28", description="a switch")
        outside = request.param == "netbox"
        with world.database.write() as conn:
            # In place of the world's own.
            conn.execute(tables.prefix.delete())
            wanted = PrefixCreate.model_validate(place | ({"netbox_id": 7} if outside else {}))
            made = prefixes.create_prefix(conn, wanted, world.now())
            if not outside:
                excluded = HoldCreate(kind="excluded", first=ip_address("10.8.0.3"))
                holds.create_hold(conn, made.prefix_id, excluded, "me", world.now)
        source = NetBox(netbox.url, TOKEN, "ppec")
        supply = AddressSupply(world.database, source, standing=2, now=world.now)
        yield Kept(world, supply if outside else BuiltIn(), netbox)


def test_a_batch_gets_an_address_each(kept: Kept) -> None:
    got = kept.addresses(kept.create(count=5))
    assert sorted(got, key=ip_address) == FREE[:5]
    assert kept.addresses(kept.create({"prefix": CIDR}, {"prefix": CIDR}, count=2)) != got


def test_more_than_there_are_is_refused_with_counts_and_changes_nothing(kept: Kept) -> None:
    kept.create(count=10)
    before = [kept.count(table) for table in (tables.vm, tables.operation, tables.allocation, tables.address_event)]
    with pytest.raises(PpecError) as caught:
        kept.create({"prefix": CIDR}, {"prefix": CIDR}, count=2)
    assert caught.value.code == "placement.no_capacity"
    (counted,) = caught.value.details["prefixes"]
    assert (counted["prefix"], counted["free"], counted["total"]) == (CIDR, 2, 12)
    assert before == [
        kept.count(table) for table in (tables.vm, tables.operation, tables.allocation, tables.address_event)
    ]
    assert len(set(kept.addresses(kept.create(count=2)))) == 2


def test_an_address_by_number_is_granted_once(kept: Kept) -> None:
    assert kept.addresses(kept.create({"address": "10.8.0.9"})) == ["10.8.0.9"]
    for taken in ("10.8.0.9", "10.8.0.3"):
        with pytest.raises(PpecError) as caught:
            kept.create({"address": taken})
        assert caught.value.code in ("address.in_use", "address.reserved")
    with pytest.raises(PpecError) as gateway:
        kept.create({"address": "10.8.0.1"})
    assert gateway.value.code == "address.not_usable"


OWN = {"a": {"address": "10.8.0.9"}, "b": {"prefix": CIDR}, "c": {"address": "10.8.0.14"}}


def test_items_get_the_addresses_they_ask_for(kept: Kept) -> None:
    assert kept.addresses(kept.create_items(OWN)) == ["10.8.0.9", "10.8.0.2", "10.8.0.14"]
    more = {name: {"prefix": CIDR} for name in "defghijkl"}
    assert sorted(kept.addresses(kept.create_items(more)), key=ip_address) == [
        one for one in FREE if one not in ("10.8.0.9", "10.8.0.2", "10.8.0.14")
    ]


@pytest.mark.parametrize("number", ["3", "9"])
def test_an_address_in_other_hands_refuses_all_items_or_its_own(kept: Kept, number: str) -> None:
    """A switch has one, a VM of ours the other."""
    kept.create({"address": "10.8.0.9"})
    if isinstance(kept.provider, AddressSupply):
        kept.provider.settle()
    asked = OWN | {"a": {"address": f"10.8.0.{number}"}}
    before = [kept.count(table) for table in (tables.vm, tables.operation, tables.address_event)]
    with pytest.raises(PpecError) as caught:
        kept.create_items(asked)
    assert caught.value.code in ("address.in_use", "address.reserved")
    assert caught.value.message.startswith(f"vm a: address 10.8.0.{number} ")
    assert before == [kept.count(table) for table in (tables.vm, tables.operation, tables.address_event)]
    view = kept.create_items(asked, mode="best-effort")
    assert {item.name: item.state for item in view.items} == {"a": "refused", "b": "pending", "c": "pending"}
    got = [str(one.address) for name in "bc" for one in kept.world.vm(name).addresses]
    assert got == ["10.8.0.2", "10.8.0.14"]


def test_a_plan_gets_the_address_it_was_made_with(kept: Kept) -> None:
    accepting = kept.accepting()
    body = kept.world.batch(count=1).model_dump() | {"networks": [{"address": "10.8.0.9"}]}
    plan = accepting.show_plan(VmsCreate.model_validate(body), kept.world.ask.caller)
    assert plan.executable
    assert kept.addresses(accepting.execute(plan.plan_id, kept.world.ask)) == ["10.8.0.9"]


def test_everything_there_is_is_granted_and_nothing_twice(kept: Kept) -> None:
    got = [address for _ in range(12) for address in kept.addresses(kept.create())]
    assert sorted(got, key=ip_address) == FREE
    with pytest.raises(PpecError):
        kept.create()


def test_what_is_released_rests_and_comes_again(kept: Kept) -> None:
    made = kept.create(count=12)
    with kept.world.running():
        assert kept.world.ended(made.operation_id).state is OperationState.SUCCEEDED
        delete = VmsAction.model_validate({"action": "delete", "vms": [item.name for item in made.items[:3]]})
        kept.world.ended(kept.accepting().act(delete, kept.world.ask).operation_id)
    with pytest.raises(PpecError) as caught:
        kept.create()
    assert caught.value.details["prefixes"][0]["quarantined"] == 3
    kept.world.ahead = timedelta(seconds=61)
    again = kept.addresses(kept.create(count=3))
    assert len(set(again)) == 3


class Disturbed(AddressSupply):
    """Something happens after it was asked for more, or for an address by number."""

    asked = 0
    meanwhile: Callable[[], object] = staticmethod(lambda: None)
    prepared: Callable[[], object] = staticmethod(lambda: None)

    def supply(self, *args: Any, **more: Any) -> bool:
        self.asked += 1
        found = super().supply(*args, **more)
        self.meanwhile()
        return found

    def prepare(self, *args: Any) -> None:
        super().prepare(*args)
        self.prepared()


def disturbed(kept: Kept) -> Disturbed:
    """In place of the supply that it has."""
    was = kept.provider
    assert isinstance(was, AddressSupply)
    kept.provider = Disturbed(kept.world.database, was._source, standing=2, now=kept.world.now)
    return kept.provider


ONLY_NETBOX = pytest.mark.parametrize("kept", ["netbox"], indirect=True)


@ONLY_NETBOX
def test_what_was_acquired_for_one_request_and_given_to_another_is_acquired_again(kept: Kept) -> None:
    supply = disturbed(kept)
    others: list[Any] = []

    def quicker() -> None:
        if not others:
            others.append(None)
            others.append(kept.create(count=5))

    supply.meanwhile = quicker
    mine = kept.addresses(kept.create(count=5))
    assert len({*mine, *kept.addresses(others[1])}) == 10
    assert supply.asked == 2


@ONLY_NETBOX
def test_how_often_more_are_acquired_has_an_end(kept: Kept) -> None:
    """Each time somebody else is quicker."""
    supply = disturbed(kept)
    plain = AddressSupply(kept.world.database, supply._source, standing=2, now=kept.world.now)
    quicker = Kept(kept.world, plain)
    supply.meanwhile = lambda: quicker.create(count=3)
    with pytest.raises(PpecError) as caught:
        kept.create(count=3)
    assert caught.value.code == "placement.no_capacity"
    assert supply.asked == 3


@ONLY_NETBOX
def test_addresses_that_came_by_themselves_are_enough(kept: Kept) -> None:
    """Between the refusal and the question another process has made sure of them."""
    supply = disturbed(kept)
    other = AddressSupply(kept.world.database, supply._source, standing=2, now=kept.world.now)
    lacking = supply._lacking

    def look(*args: Any) -> int:
        other.supply({NetworkWanted(): 5}, None)
        return lacking(*args)

    supply._lacking = look  # type: ignore[method-assign]
    assert len(kept.addresses(kept.create(count=5))) == 5


@ONLY_NETBOX
def test_where_another_family_has_enough_nothing_is_tried_again(kept: Kept) -> None:
    """No address of the prefix that is used up comes of that."""
    supply = disturbed(kept)
    kept.create(count=12)
    with kept.world.database.write() as conn:
        six = {"vrf": "v1", "cidr": "fd00:8::/64", "bridge": "br1", "cluster": "c1", "netbox_id": 8}
        prefixes.create_prefix(conn, PrefixCreate.model_validate(six), kept.world.now())
    kept.netbox.add_prefix(8, "fd00:8::/64")
    supply.supply({NetworkWanted(): 9}, None)
    supply.asked = 0
    with pytest.raises(PpecError):
        kept.create({})
    assert supply.asked == 1


@ONLY_NETBOX
def test_what_a_batch_was_supplied_is_not_taken_away_before_it_is_granted(kept: Kept) -> None:
    """The batch is larger than what stands ready and a half; it is looked twice meanwhile."""
    supply = disturbed(kept)

    def looks() -> None:
        assert [supply.settle(), supply.settle()] == [[], []]

    supply.meanwhile = looks
    assert len(kept.addresses(kept.create(count=10))) == 10
    assert supply.asked == 1


@ONLY_NETBOX
def test_what_a_batch_did_not_get_goes_back(kept: Kept) -> None:
    """No more than 12 can be had. What exceeds twice what stands ready was too much once it was looked again."""
    supply = disturbed(kept)
    supply.settle()
    with pytest.raises(PpecError):
        kept.create(count=13)
    left = []
    for _ in range(3):
        supply.settle()
        left.append(len(kept.netbox.texts("ppec")))
    assert left == [12, 4, 4]


@ONLY_NETBOX
def test_another_process_takes_away_nothing_that_is_new(kept: Kept) -> None:
    """It knows nothing of the batch."""
    supply = disturbed(kept)
    other = AddressSupply(kept.world.database, supply._source, standing=2, now=kept.world.now)
    other.settle()
    supply.meanwhile = other.settle
    assert len(kept.addresses(kept.create(count=10))) == 10
    assert supply.asked == 1


@ONLY_NETBOX
def test_an_address_by_number_is_not_taken_away_before_it_is_granted(kept: Kept) -> None:
    """It is the highest, and of what is too much the highest goes back first."""
    supply = disturbed(kept)
    supply.supply({NetworkWanted(): 8}, None)
    supply.prepared = supply.settle
    assert kept.addresses(kept.create({"address": "10.8.0.14"})) == ["10.8.0.14"]
    # The VM's, and the four that are kept.
    assert len(kept.netbox.texts("ppec")) == 5
