# SPDX-License-Identifier: Apache-2.0
"""From a request for VMs to a queued operation, in one transaction: plan, rows, room, addresses and the operation.

Requests for one VM that come at the same time share a plan and a transaction. What can't be had so is seen to one by
one, so that each is refused, if it is, for reasons of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from ppec_contract.api_operations import ItemState
from ppec_contract.api_placement import ExposedView
from ppec_contract.api_vms import BatchMode, VmsCreate
from ppec_contract.errors import PpecError, Problem
from ppec_orchestrator.approvals import NONE_NEEDED, ApprovalPolicy, refuse_others
from ppec_orchestrator.ipdb.provider import AddressProvider
from ppec_orchestrator.operations import openings
from ppec_orchestrator.operations.address_refusals import with_addresses
from ppec_orchestrator.operations.addresses_meant import may_do_without
from ppec_orchestrator.operations.advising import ADVISABLE, Changes, advised, advised_problems, with_changes
from ppec_orchestrator.operations.approving import still_stands, without_room
from ppec_orchestrator.operations.enqueueing import Accepted, Ask, Queue, new_id
from ppec_orchestrator.operations.joining import Joined
from ppec_orchestrator.operations.kinds import create
from ppec_orchestrator.operations.meaning import Catalogue, Meant, meaning, new_plan_request
from ppec_orchestrator.operations.plan_shown import Restored, restored
from ppec_orchestrator.operations.planning import Planned, Planning, refusal
from ppec_orchestrator.operations.supplied import AddressesAsked, supplied
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Placement, Refusal
from ppec_orchestrator.placement.policies import POLICIES
from ppec_orchestrator.placement.request import PlanRequest, Spare
from ppec_orchestrator.store import plans, vms
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import TransactionLostError
from ppec_orchestrator.store.fixed_addresses import refuses_an_address
from ppec_orchestrator.store.operations import UNPLANNED, ItemChange, NewItem, NewOperation, Origin, change_items
from ppec_orchestrator.store.plans import StoredPlan
from ppec_orchestrator.store.reservations import ROOM, HostsHeldError, LostRaceError
from ppec_orchestrator.store.vm_groups import check_rules, insert_groups
from ppec_orchestrator.store.vms import NewVm

_log = structlog.get_logger(__name__)
T = TypeVar("T")
# Requests that share a transaction; the time it takes is everyone's to wait.
MOST_JOINED = 64
# Of a plan that is carried out as it is: transactions that lose against another one. Of a request that can do without
# some VMs: plans that lose an address to another one.
_TRIES = 3


@dataclass(frozen=True, slots=True)
class _Wish:
    """A request as it came."""

    asked: VmsCreate
    ask: Ask


@dataclass(frozen=True, slots=True)
class _Understood:
    """A request, what its names mean, and the plan it needs."""

    meant: Meant
    user_data: str
    ask: Ask
    request: PlanRequest

    @classmethod
    def of(cls, wish: _Wish, meant: Meant) -> _Understood:
        return cls(meant, wish.asked.user_data, wish.ask, new_plan_request(meant, wish.asked))


@dataclass(frozen=True, slots=True)
class _Answered:
    """A request, and what the plan says of each of its VMs; of the refused ones also what would help, where that is
    known already."""

    meant: Meant
    user_data: str
    ask: Ask
    placed: Sequence[Placement]
    refused: Sequence[Refusal] = ()
    origin: Origin = UNPLANNED
    changes: Mapping[UUID, Changes] = field(default_factory=dict)

    def problem(self, one: Refusal, fleet: Fleet) -> Problem:
        """Why it is refused."""
        if (unaddressed := self.meant.refused.get(one.name)) is not None:
            return with_changes(unaddressed.problem(), self.changes.get(one.vm_id, ()))
        error = refusal([one], self.meant.input.size_of(one.name).shape, fleet, wanted=1)
        return with_changes(error.problem(), self.changes.get(one.vm_id, ()))


class Creation:
    """Answers with the operation as it was enqueued, or the id of the one that the same request made before."""

    def __init__(
        self,
        database: Database,
        planning: Planning,
        now: Clock,
        addresses: AddressProvider,
        approvals: ApprovalPolicy = NONE_NEEDED,
    ) -> None:
        self._database = database
        self._planning = planning
        self._now = now
        self._addresses = addresses
        self._approvals = approvals
        self._queue = Queue(database, now)
        self._joined: Joined[_Wish, NewOperation | str | PpecError] = Joined(self._create_together, MOST_JOINED)

    def create(self, asked: VmsCreate, ask: Ask) -> NewOperation | str:
        """Raises the planner's refusal, `vm.exists`, `approval.required`, what `wanted_networks.candidates` raises, and
        `….not_found` of whatever the request names."""
        if self._approvals.needs_approval(asked):
            # What was accepted before there was the rule stays accepted.
            if (known := self._earlier(ask)) is not None:
                return known
            raise self._approvals.refusal(asked)
        addresses = AddressesAsked.of(asked)
        if addresses.fixed and (known := self._earlier(ask)) is not None:
            return known
        accept = partial(self._create, asked, ask)
        return supplied(self._addresses, asked, addresses, accept, whole=False)

    def execute(self, ref: str, ask: Ask) -> NewOperation | str:
        """The stored plan as it is, by its hash or what that begins with. Raises `plan.not_found`, `plan.ambiguous`,
        `plan.outdated`, `auth.forbidden` for another's plan, `approval.required`, and what `create` raises."""
        now = self._now()
        with self._database.read() as conn:
            known = self._queue.earlier(conn, ask)
            if known is not None:
                return known
            stored = plans.load(conn, plans.whole_id(conn, ref, now), now)
        refuse_others(stored.plan_id, stored.created_by, ask.caller)
        made = restored(stored)
        asked = made.meant.input.request
        if stored.approved_by is None and self._approvals.needs_approval(asked):
            raise self._approvals.refusal(asked, stored.plan_id)

        def accept(_: Mapping[str, PpecError]) -> NewOperation | str:
            # For the words of refusals. Not when the transaction has begun: another's plan is waited for.
            fleet = self._planning.fleet.current()
            executed = partial(self._write, partial(self._execute, stored, made, ask, fleet))
            return self._queue.once_per_key(ask, partial(_again_if_lost, executed))

        networks = {place.name: made.meant.input.networks_of(place.name) for place in made.plan.placed}
        addresses = AddressesAsked.of_vms(asked.vrf, networks)
        # The plan as it is, or none.
        return supplied(self._addresses, asked, addresses, accept, whole=True)

    def _execute(self, stored: StoredPlan, made: Restored, ask: Ask, fleet: Fleet, conn: Connection) -> NewOperation:
        # First: of two at once the second is told so, and not that the first has changed the hosts.
        plans.use_up(conn, stored)
        still_stands(conn, stored, made, self._planning)
        terms = replace(ROOM, moves=made.plan.moves)
        planned = Planned(made.plan, fleet, passes=0, terms=terms)
        origin = Origin(stored.plan_id, stored.approved_by)
        answered = _Answered(made.meant, made.user_data, ask, made.plan.placed, made.plan.refused, origin, made.changes)
        try:
            return self._enqueue(conn, [answered], planned)[0]
        except HostsHeldError as error:
            raise error.why from error
        except LostRaceError as error:
            # There is no other place to look for: it is this plan or none.
            raise without_room(stored, error.details["hosts"]) from error

    def _earlier(self, ask: Ask) -> str | None:
        with self._database.read() as conn:
            return self._queue.earlier(conn, ask)

    def _create(self, asked: VmsCreate, ask: Ask, refused: Mapping[str, PpecError]) -> NewOperation | str:
        wish = _Wish(asked, ask)
        if _joins(asked) and (made := self._joined.answer(wish)) is not None:
            if isinstance(made, PpecError):
                raise made
            return made
        one = self._understood(wish, refused)
        for _ in range(_TRIES - 1):
            try:
                return self._accepted(one)
            except PpecError as error:
                if not _is_news(error, one):
                    raise
                # Another request was quicker: now it is seen, and the VM done without.
                one = self._understood(wish, refused)
        return self._accepted(one)

    def _understood(self, wish: _Wish, refused: Mapping[str, PpecError]) -> _Understood | str:
        """Or the operation that it has made before."""
        with self._database.read() as conn:
            known = self._queue.earlier(conn, wish.ask)
            if known is not None:
                return known
            one = _Understood.of(wish, meaning(conn, wish.asked, self._now(), refused=refused))
            # Or the plan, which keeps to the group as it is asked for, might be refused for another reason.
            check_rules(conn, wish.asked.rules)
        return one

    def _accepted(self, one: _Understood | str) -> NewOperation | str:
        if isinstance(one, str):
            return one
        wait = one.meant.input.request.at_least is None
        return self._queue.once_per_key(one.ask, lambda: self._create_alone(one, wait=wait))

    # --- one request -----------------------------------------------------------------------------------------------

    def _create_alone(self, one: _Understood, *, wait: bool) -> NewOperation | str:
        """A refusal, be it of all or of some, tells the cheapest changes that would help; they are looked for when
        nothing is locked any more."""

        def writes(conn: Connection, planned: Planned) -> tuple[NewOperation, Planned]:
            planned.refuse_held_up()
            answered = _Answered(one.meant, one.user_data, one.ask, planned.plan.placed, planned.plan.refused)
            self._refuse_too_few(conn, answered, planned)
            return self._enqueue(conn, [answered], planned)[0], planned

        try:
            made, planned = self._planning.carry_through(one.request, self._write, writes, wait=wait)
        except PpecError as error:
            if error.code not in ADVISABLE:
                raise
            raise advised(error, self._planning, one.request) from error
        return self._advised_in_part(made, one.request, planned)

    def _advised_in_part(self, made: NewOperation, request: PlanRequest, planned: Planned) -> NewOperation:
        """The engine may be at work on it by now: it leaves refused items alone."""
        problems = {item.vm_id: item.problem for item in made.items if item.problem is not None}
        problems = advised_problems(problems, planned.fleet, request, planned.plan)
        if not problems:
            return made
        changes = [ItemChange(vm_id, ItemState.REFUSED, problem) for vm_id, problem in problems.items()]
        # The VMs are accepted, whatever becomes of the advice: it must not look as if they weren't.
        with suppress(PpecError):
            self._write(lambda conn: change_items(conn, made.operation_id, changes))
        items = [replace(item, problem=problems.get(item.vm_id, item.problem)) for item in made.items]
        return replace(made, items=items)

    def _refuse_too_few(self, conn: Connection, answered: _Answered, planned: Planned) -> None:
        wanted, refused = answered.meant.input.request, answered.refused
        total = len(answered.placed) + len(refused)
        fewest = total if wanted.mode is BatchMode.ALL_OR_NOTHING else wanted.at_least or 1
        if len(answered.placed) >= fewest:
            return
        first = refused[0].name
        if (unaddressed := answered.meant.refused.get(first)) is not None:
            raise unaddressed
        problem = refusal(refused, answered.meant.input.size_of(first).shape, planned.fleet, total)
        raise with_addresses(conn, problem, planned.fleet, answered.meant.input.profile_of(first), self._now())

    # --- several at once -------------------------------------------------------------------------------------------

    def _create_together(self, wishes: Sequence[_Wish]) -> list[NewOperation | str | PpecError | None]:
        """What could be accepted so, or was before, or what stops all of them; None for whatever has to be looked at
        alone."""
        earlier, understood = self._read_together(wishes)
        made: dict[int, NewOperation | str | PpecError] = {**earlier}
        for policy in dict.fromkeys(one.request.policy for one in understood.values()):
            mine = {number: one for number, one in understood.items() if one.request.policy is policy}
            try:
                made |= self._create_alike(mine)
            except Exception:
                # Those of another policy may be committed: they have to be told, whatever befell these.
                _log.exception("joined.policy_failed", policy=policy.value, wishes=len(mine))
        return [made.get(number) for number in range(len(wishes))]

    def _read_together(self, wishes: Sequence[_Wish]) -> tuple[dict[int, NewOperation | str], dict[int, _Understood]]:
        """By their numbers: those that have made an operation before, and what the others mean, where that can be said.
        Whoever names what isn't there is told when he looks himself."""
        earlier: dict[int, NewOperation | str] = {}
        understood: dict[int, _Understood] = {}
        with self._database.read() as conn:
            catalogue = Catalogue(conn)
            for number, wish in enumerate(wishes):
                with suppress(PpecError):
                    known = self._queue.earlier(conn, wish.ask)
                    if known is not None:
                        earlier[number] = known
                    else:
                        meant = meaning(conn, wish.asked, self._now(), catalogue)
                        understood[number] = _Understood.of(wish, meant)
        return earlier, understood

    def _create_alike(self, several: Mapping[int, _Understood]) -> dict[int, NewOperation | PpecError]:
        """Requests of one policy, by their numbers. None of them, when anything is wrong with any: a name that is
        taken, a twin."""
        # One request's batch is whole or nothing; these are strangers, and go in the order that they came in.
        every = tuple(vm for one in several.values() for vm in one.request.vms)
        request = replace(
            next(iter(several.values())).request, vms=every, all_or_nothing=False, most_vcpus=False, at_least=0
        )

        def writes(conn: Connection, planned: Planned) -> dict[int, NewOperation | PpecError]:
            places = {place.vm_id: place for place in planned.plan.placed}
            had = {number: one for number, one in several.items() if one.request.vms[0].vm_id in places}
            answered = [
                _Answered(one.meant, one.user_data, one.ask, [places[one.request.vms[0].vm_id]]) for one in had.values()
            ]
            made = dict(zip(had, self._enqueue(conn, answered, planned) if had else (), strict=True))
            # By itself each would wait as long again.
            told = planned.held_up
            held = ((number, told.get(one.request.vms[0].vm_id)) for number, one in several.items())
            return {**made, **{number: error for number, error in held if error is not None}}

        try:
            return self._planning.carry_through(request, self._write, writes)
        except TransactionLostError:
            return {}
        except PpecError as error:
            # For a database that is away each would wait as long again by itself.
            return dict.fromkeys(several, error) if error.code == "store.unavailable" else {}
        except IntegrityError:
            return {}

    # --- what is written -------------------------------------------------------------------------------------------

    def _enqueue(self, conn: Connection, answered: Sequence[_Answered], planned: Planned) -> list[NewOperation]:
        """All requests' VMs of the plan."""
        now = self._now()
        accepted = [
            Accepted(
                one.ask, new_id(), create.NAME, _input(one, planned), _items(one, planned),
                planned.passes, one.origin,
            )
            for one in answered
        ]  # fmt: skip
        rules = {place.vm_id: one.meant.input.rules_of(place.name) for one in answered for place in one.placed}
        check_rules(conn, [rule for mine in rules.values() for rule in mine], adds=True)
        pairs = zip(answered, accepted, strict=True)
        vms.insert_vms(conn, [new for one, operation in pairs for new in _new_vms(one, operation)], now)
        insert_groups(conn, rules)
        networks = {place.vm_id: one.meant.input.networks_of(place.name) for one in answered for place in one.placed}
        planned.reserve(conn, networks, self._now)
        enqueued = self._queue.enqueue(conn, accepted)
        if planned.plan.moves:
            # Of one request alone: none with moves shares its plan.
            openings.remember(conn, enqueued[0].operation_id, planned.plan)
        return enqueued

    def _write(self, writes: Callable[[Connection], T]) -> T:
        with self._database.write() as conn:
            return writes(conn)


def _again_if_lost(write: Callable[[], T]) -> T:
    """Nothing of a transaction was kept that the database gave up in favour of another."""
    for _ in range(_TRIES - 1):
        with suppress(TransactionLostError):
            return write()
    return write()


def _is_news(error: PpecError, one: _Understood | str) -> bool:
    """Whether it refuses an address that was still to be had when the request was understood, of a VM that the request
    can do without."""
    if isinstance(one, str) or not may_do_without(one.meant.input.request):
        return False
    return refuses_an_address(error) and error.details.get("wanted_for") not in one.meant.refused


def _joins(asked: VmsCreate) -> bool:
    """May it share a plan with others'? Not if the plan depends on more than room: neighbours, spare room, addresses
    that are its own. Of one VM, a policy that keeps a batch apart has nothing to do, but would have among others."""
    return (
        asked.total == 1
        and asked.at_least is None
        and not asked.max_moves
        and not asked.networks
        and Spare(asked.n_plus_one.mode) is Spare.OFF
        and not asked.groups
        and not any(item.groups or item.networks for item in asked.items)
        and not POLICIES[asked.policy].apart
    )


def _input(answered: _Answered, planned: Planned) -> dict[str, Any]:
    # Who shares the plan with others is told of where his own VMs are.
    clusters = {planned.fleet.hosts[planned.fleet.index[place.host]].cluster for place in answered.placed}
    told = (one for one in planned.plan.exposed if one.cluster in clusters or not one.cluster)
    exposed = tuple(ExposedView(**asdict(one)) for one in told)
    return answered.meant.input.model_copy(update={"exposed": exposed}).model_dump(mode="json")


def _new_vms(answered: _Answered, operation: Accepted) -> list[NewVm]:
    meant = answered.meant
    return [
        NewVm(
            place.vm_id, place.name, size.flavor or "", meant.image_id, size.vcpus, size.memory_mib, size.disk_mib,
            answered.user_data, meant.input.request.labels, operation.operation_id, size.max_vcpus, size.max_memory_mib,
            size.numa, size.pool, size.nvme_drives,
        )
        for place in answered.placed
        for size in (meant.input.size_of(place.name),)
    ]  # fmt: skip


def _items(answered: _Answered, planned: Planned) -> list[NewItem]:
    placed = [NewItem(place.vm_id, place.name, place.host) for place in answered.placed]
    refused = [
        NewItem(one.vm_id, one.name, None, ItemState.REFUSED, answered.problem(one, planned.fleet))
        for one in answered.refused
    ]
    return placed + refused
