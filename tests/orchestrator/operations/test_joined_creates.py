# SPDX-License-Identifier: Apache-2.0
"""Requests for one VM that come at the same time share a plan and a transaction; nobody can tell but by the time."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, func, select

from ppec_contract.api_placement import Policy
from ppec_contract.api_vms import VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.provider import BuiltIn
from ppec_orchestrator.operations.creation import Creation
from ppec_orchestrator.operations.enqueueing import Ask
from ppec_orchestrator.operations.joining import Joined
from ppec_orchestrator.operations.planning import Planning
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import TransactionLostError
from ppec_orchestrator.store.idempotency import RequestKey
from ppec_orchestrator.store.operations import NewOperation

Asked = tuple[VmsCreate, Ask]


@pytest.fixture
def creation(world: Any) -> Creation:
    planning = Planning(world.database, silent_after_s=3600, now=world.now)
    return Creation(world.database, planning, world.now, BuiltIn())


def at_once(creation: Creation, wait_until: Callable[..., Any], asked: Sequence[Asked]) -> list[str]:
    """Has all of them waiting for one another before the first is begun; the operation of each, or why it has none."""

    def one(body: VmsCreate, ask: Ask) -> str:
        try:
            made = creation.create(body, ask)
        except PpecError as error:
            return error.code
        return made.operation_id if isinstance(made, NewOperation) else made

    joined = creation._joined
    with ThreadPoolExecutor(len(asked)) as pool:
        with joined._turn:
            answers = [pool.submit(one, *each) for each in asked]
            wait_until(lambda: len(joined._waiting) == len(asked), "all wait")
        return [answer.result() for answer in answers]


def vms_of(database: Database, operation_id: str) -> list[str]:
    with database.read() as conn:
        names = select(tables.vm.c.name).where(tables.vm.c.operation_id == operation_id)
        items = select(tables.operation_item.c.name).where(tables.operation_item.c.operation_id == operation_id)
        assert list(conn.execute(names).scalars()) == list(conn.execute(items).scalars())
        return list(conn.execute(names).scalars())


def singles(world: Any, count: int) -> list[Asked]:
    return [(world.batch(1), Ask(f"client-{number}")) for number in range(count)]


def test_they_share_a_commit_and_have_each_their_own_operation(world: Any, creation: Creation) -> None:
    asked = singles(world, 8)
    before = world.database.commits
    ids = at_once(creation, world.wait_until, asked)
    assert world.database.commits == before + 1
    assert len(set(ids)) == 8
    for (body, ask), operation_id in zip(asked, ids, strict=True):
        assert vms_of(world.database, operation_id) == [body.name]
        with world.database.read() as conn:
            row = conn.execute(select(tables.operation).where(tables.operation.c.id == operation_id)).one()
        assert (row.created_by, row.input["request"]["name"]) == (ask.caller, body.name)
        assert row.counters == {"commits": 1, "planning_passes": 1}
    with world.database.read() as conn:
        held = conn.execute(select(func.count()).where(tables.address.c.vm_id.is_not(None))).scalar_one()
        assert held == conn.execute(select(func.count()).select_from(tables.allocation)).scalar_one() == 8


def test_one_that_is_refused_leaves_the_others_theirs(world: Any, creation: Creation) -> None:
    taken, *others = singles(world, 6)
    creation.create(*taken)
    again, *ids = at_once(creation, world.wait_until, [taken, *others])
    assert again == "vm.exists"
    assert [vms_of(world.database, one) for one in ids] == [[body.name] for body, _ in others]


@pytest.mark.parametrize(
    ("error", "plans"),
    [(PpecError("store.unavailable", "the database is away"), 1), (TransactionLostError(), 9)],
    ids=["away", "lost"],
)
def test_for_a_database_that_is_away_they_wait_once(
    world: Any, creation: Creation, monkeypatch: pytest.MonkeyPatch, error: PpecError, plans: int
) -> None:
    """A transaction that the database gave up is tried again by each."""
    begun = []

    def away(*_: Any, **__: Any) -> Any:
        begun.append(1)
        raise error

    monkeypatch.setattr(creation._planning, "carry_through", away)
    answers = at_once(creation, world.wait_until, singles(world, 8))
    assert answers == ["store.unavailable"] * 8
    assert len(begun) == plans


def test_what_befalls_those_of_one_policy_is_not_the_others(
    world: Any, creation: Creation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs is committed by then: who is told nothing would ask for it again."""
    original, begun = creation._create_alike, []

    def broken_once(several: Any) -> Any:
        begun.append([one.request.policy for one in several.values()])
        if len(begun) == 2:
            raise MemoryError
        return original(several)

    monkeypatch.setattr(creation, "_create_alike", broken_once)
    asked = [(world.batch(1, policy=policy), Ask("someone")) for policy in (Policy.PACK, Policy.BALANCED) * 2]
    ids = at_once(creation, world.wait_until, asked)
    assert [set(policies) for policies in begun] == [{Policy.PACK}, {Policy.BALANCED}]
    assert [vms_of(world.database, one) for one in ids] == [[body.name] for body, _ in asked]


def test_as_many_as_there_is_room_for_are_accepted(world: Any, creation: Creation) -> None:
    """A VM of the large flavor takes half a host; there are three."""
    asked = [(world.batch(1, flavor="half"), Ask("someone")) for _ in range(9)]
    ids = at_once(creation, world.wait_until, asked)
    assert sorted(one.startswith("op-") for one in ids) == [False] * 3 + [True] * 6
    assert {one for one in ids if not one.startswith("op-")} == {"placement.no_capacity"}


def test_those_who_came_first_are_served_first(world: Any, creation: Creation) -> None:
    """A batch that is whole or nothing goes largest first; these are strangers to each other. The three small VMs keep
    to themselves, so that there is room for five large ones: which of the six came last is refused."""
    joined, answers = creation._joined, []
    with ThreadPoolExecutor(9) as pool:
        with joined._turn:
            for number, flavor in enumerate(["small"] * 3 + ["half"] * 6):
                answers.append(pool.submit(creation.create, world.batch(1, flavor=flavor), Ask("someone")))
                world.wait_until(lambda at=number: len(joined._waiting) == at + 1, "it waits")
        refused = [isinstance(answer.exception(), PpecError) for answer in answers]
    assert refused == [False] * 8 + [True]


def test_one_that_names_what_is_not_there_is_told_so(world: Any, creation: Creation) -> None:
    """The others are accepted together all the same."""
    strange = (world.batch(1, flavor="unheard-of"), Ask("someone"))
    before = world.database.commits
    first, refused, second = at_once(creation, world.wait_until, [*singles(world, 1), strange, *singles(world, 1)])
    assert refused == "flavor.not_found"
    assert world.database.commits == before + 1
    assert len({first, second}) == 2


def test_one_sent_again_among_others_gets_the_operation_it_has(world: Any, creation: Creation) -> None:
    repeated = (world.batch(1), Ask("client", RequestKey("client", uuid.uuid4().hex, "0" * 64)))
    made = creation.create(*repeated)
    assert isinstance(made, NewOperation)
    before = world.database.commits
    again, other = at_once(creation, world.wait_until, [repeated, *singles(world, 1)])
    assert (again, world.database.commits) == (made.operation_id, before + 1)
    assert other not in (again, "vm.exists")


def test_what_is_read_for_all_is_read_once(world: Any, creation: Creation) -> None:
    """Flavor, image and the kind's priority, for eight requests as for one."""
    read: Counter[str] = Counter()

    def count(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        read.update(name for name in ("flavor", "image", "setting") if f"FROM {name}" in " ".join(statement.split()))

    seen = []
    for many in (1, 8):
        asked = singles(world, many)
        read.clear()
        engines = (world.database._reader, world.database._writer)
        for engine in engines:
            event.listen(engine, "after_cursor_execute", count)
        at_once(creation, world.wait_until, asked)
        for engine in engines:
            event.remove(engine, "after_cursor_execute", count)
        seen.append(dict(read))
    assert seen[0] == seen[1] == {"flavor": 1, "image": 2, "setting": 1}


def test_twins_get_one_operation(world: Any, creation: Creation) -> None:
    key = RequestKey("client", uuid.uuid4().hex, "0" * 64)
    body = world.batch(1)
    ids = at_once(creation, world.wait_until, [(body, Ask("client", key)), (body, Ask("client", key))])
    assert len(set(ids)) == 1
    assert vms_of(world.database, ids[0]) == [body.name]


def test_each_policy_is_kept(world: Any, creation: Creation) -> None:
    before = world.database.commits
    asked = [(world.batch(1, policy=policy), Ask("someone")) for policy in ("pack", "balanced", "pack", "balanced")]
    ids = at_once(creation, world.wait_until, asked)
    assert world.database.commits == before + 2
    for (body, _), operation_id in zip(asked, ids, strict=True):
        with world.database.read() as conn:
            row = conn.execute(select(tables.operation).where(tables.operation.c.id == operation_id)).one()
        assert row.input["request"]["policy"] == body.policy


@pytest.mark.parametrize(
    "more",
    [
        {"count": 2},
        {"policy": "spread"},
        {"at_least": 1, "mode": "best-effort"},
        {"networks": [{"prefix": "10.7.0.0/24"}]},
        {"groups": [{"name": "g"}]},
        {"n_plus_one": {"mode": "required"}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_depends_on_more_than_room_goes_alone(world: Any, creation: Creation, more: dict[str, Any]) -> None:
    def never(wishes: Sequence[object]) -> list[None]:
        raise AssertionError(wishes)

    creation._joined._work = never  # type: ignore[assignment,method-assign]
    made = creation.create(world.batch(**{"count": 1, **more}), Ask("someone"))
    assert isinstance(made, NewOperation)


# --- joining itself --------------------------------------------------------------------------------------------------


def test_no_more_are_joined_than_may_be_and_each_gets_its_own_answer() -> None:
    seen: list[int] = []

    def work(wishes: Sequence[int]) -> list[int]:
        seen.append(len(wishes))
        return [wish * 2 for wish in wishes]

    joined = Joined(work, most=3)
    with ThreadPoolExecutor(8) as pool:
        with joined._turn:
            answers = [pool.submit(joined.answer, number) for number in range(8)]
            while len(joined._waiting) < 8:
                threading.Event().wait(0.001)
        assert [answer.result() for answer in answers] == [number * 2 for number in range(8)]
    assert max(seen) <= 3
    assert sum(seen) == 8


def test_what_fails_for_all_is_left_to_each() -> None:
    def work(wishes: Sequence[int]) -> list[int]:
        raise RuntimeError

    joined = Joined(work, most=3)
    assert joined.answer(1) is None
    assert joined.answer(2) is None
