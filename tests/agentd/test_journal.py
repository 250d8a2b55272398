# SPDX-License-Identifier: Apache-2.0
"""The journal survives crashes at any byte, and answers repeats by its rules."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from ppec_agentd.journal import KEEP_S, Journal, Key
from ppec_contract.agent import VmResult
from ppec_contract.errors import PpecError

VM = uuid.uuid4()
CREATE = Key("op-1", "CreateVms", str(VM))
DELETE, STOP = replace(CREATE, action="DeleteVms"), replace(CREATE, action="StopVms")


def result(code: str = "") -> VmResult:
    problem = PpecError(code, "it failed").problem() if code else None
    return VmResult(vm_id=VM, name="web", changed=not code, problem=problem)


def intend(journal: Journal, key: Key, fence: int) -> None:
    journal.append_intents(key.operation_id, fence, [(key, "web")])


def answer(journal: Journal, key: Key, fence: int, code: str = "") -> None:
    intend(journal, key, fence)
    journal.append_answer(key, fence, result(code))


def test_answers_and_fences_survive_a_restart(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    answer(journal, CREATE, 3)
    intend(journal, STOP, 3)
    journal.append_intents("op-2", 9, [])
    journal.close()
    for _ in range(2):  # the second time from a compacted file
        journal = Journal.open(tmp_path / "journal")
        replayed = journal.recorded(CREATE, 3)
        assert replayed is not None
        assert replayed.replayed
        assert replayed.model_copy(update={"replayed": False}) == result()
        assert [entry.key for entry in journal.in_flight()] == [STOP]
        with pytest.raises(PpecError, match="fence 8 is lower than 9"):
            journal.recorded(replace(CREATE, operation_id="op-2"), 8)
        journal.close()


REPEATS = [
    # action, its answer, fence of the repeat (the answer's is 5): is it replayed?
    (CREATE, "", 5, True),
    (CREATE, "", 6, True),
    (CREATE, "vm.create_failed", 5, True),
    (CREATE, "vm.create_failed", 6, False),
    (CREATE, "image.fetch_failed", 5, True),
    (CREATE, "image.fetch_failed", 6, False),
    (STOP, "vm.stop_timeout", 5, False),
    (STOP, "vm.wrong_state", 5, True),
    (STOP, "vm.wrong_state", 6, False),
    (DELETE, "", 6, True),
    (DELETE, "hypervisor.unavailable", 5, False),
]


@pytest.mark.parametrize(("key", "code", "fence", "replayed"), REPEATS)
def test_what_a_repeat_gets(tmp_path: Path, key: Key, code: str, fence: int, replayed: bool) -> None:
    journal = Journal.open(tmp_path / "journal")
    answer(journal, key, 5, code)
    assert (journal.recorded(key, fence) is not None) == replayed
    with pytest.raises(PpecError) as fenced:
        journal.recorded(key, 4)
    assert fenced.value.code == "operation.fenced"


def test_a_delete_closes_the_vm_to_creates_of_its_fence(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    intend(journal, DELETE, 5)
    with pytest.raises(PpecError, match="has deleted vm"):
        journal.recorded(CREATE, 5)
    assert journal.recorded(CREATE, 6) is None
    assert journal.recorded(replace(CREATE, operation_id="op-2"), 0) is None


def test_a_create_undone_by_a_delete_may_be_repeated_with_a_higher_fence(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    answer(journal, CREATE, 5)
    answer(journal, DELETE, 5)
    assert journal.recorded(CREATE, 5) is not None
    assert journal.recorded(CREATE, 6) is None


def test_an_undone_create_is_remembered_until_one_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)

    def undone() -> tuple[bool, bool]:
        """For a create under way, and for one at rest; the same after a restart."""
        again = Journal.open(path)
        assert again.undone_creates() == journal.undone_creates()
        assert again.undone(CREATE) == journal.undone(CREATE)
        again.close()
        return journal.undone(CREATE), CREATE in journal.undone_creates()

    def fail(fence: int, *, undone: bool) -> None:
        intend(journal, CREATE, fence)
        journal.append_answer(CREATE, fence, result("hypervisor.unavailable"), undone=undone)

    # The copy that is opened replaces the file: go on with the one that is there.
    fail(1, undone=False)
    assert undone() == (False, False)
    journal = Journal.open(path)
    fail(2, undone=True)
    assert undone() == (True, True)
    journal = Journal.open(path)
    intend(journal, CREATE, 3)
    assert undone() == (True, False)
    journal = Journal.open(path)
    journal.append_answer(CREATE, 3, result("host.no_capacity"))
    assert undone() == (True, True)
    journal = Journal.open(path)
    answer(journal, CREATE, 4)
    assert undone() == (False, False)


def test_after_an_intent_without_an_answer_nothing_counts_as_undone(tmp_path: Path) -> None:
    """It may have been a success that the full disk kept out of the journal."""
    journal = Journal.open(tmp_path / "journal")
    intend(journal, CREATE, 1)
    journal.append_abandoned(CREATE, undone=True)
    intend(journal, CREATE, 2)
    assert journal.undone(CREATE)
    intend(journal, CREATE, 3)
    assert not journal.undone(CREATE)
    journal.append_abandoned(CREATE)
    assert journal.undone_creates() == frozenset()


def test_an_undo_that_is_due_stays_an_intent(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    intend(journal, CREATE, 1)
    journal.append_undo_due(CREATE)
    journal.close()
    journal = Journal.open(path)
    assert [(entry.key, entry.undo) for entry in journal.in_flight()] == [(CREATE, "due")]
    intend(journal, CREATE, 2)
    assert [entry.undo for entry in journal.in_flight()] == ["due"]
    journal.append_abandoned(CREATE, undone=True)
    assert journal.in_flight() == ()
    assert journal.undone_creates() == {CREATE}


def test_cut_at_every_byte_it_holds_a_prefix_and_stays_writable(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    answer(journal, CREATE, 1)
    journal.close()
    whole = path.read_bytes()
    line_ends = [position + 1 for position, byte in enumerate(whole) if byte == 10]
    assert len(line_ends) == 2
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = Journal.open(path)
        complete = sum(1 for end in line_ends if end <= cut)
        assert journal.damaged_lines == 0
        assert (journal.recorded(CREATE, 1) is not None) == (complete >= 2)
        assert len(journal.in_flight()) == complete % 2
        intend(journal, STOP, 7)
        journal.close()
        reopened = Journal.open(path)
        assert STOP in [entry.key for entry in reopened.in_flight()]
        reopened.close()


def test_a_flipped_bit_costs_one_line_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    answer(journal, CREATE, 1)
    answer(journal, STOP, 1)
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"web", b"wEb")
    path.write_bytes(b"".join(lines))
    journal = Journal.open(path)
    assert journal.damaged_lines == 1
    assert [entry.key for entry in journal.in_flight()] == [CREATE]
    assert journal.recorded(STOP, 1) is not None


def test_compaction_forgets_old_operations_at_rest_alone(tmp_path: Path) -> None:
    now = [1_000_000.0]
    path = tmp_path / "journal"
    journal = Journal.open(path, clock=lambda: now[0])
    answer(journal, CREATE, 1)
    intend(journal, replace(STOP, operation_id="op-2"), 1)
    now[0] += KEEP_S + 1
    answer(journal, replace(CREATE, operation_id="op-3"), 1)
    journal.close()
    journal = Journal.open(path, clock=lambda: now[0])
    assert journal.recorded(CREATE, 0) is None
    assert [entry.key.operation_id for entry in journal.in_flight()] == ["op-2"]
    assert journal.recorded(replace(CREATE, operation_id="op-3"), 1) is not None


def test_without_room_for_a_copy_it_goes_on_with_the_file_there_is(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    answer(journal, CREATE, 1)
    journal.close()
    with path.open("ab") as file:
        file.write(b"0123 torn")
    # A folder in the way of the copy makes opening it fail, as a full disk would.
    (tmp_path / "journal.new").mkdir()
    journal = Journal.open(path)
    assert journal.recorded(CREATE, 1) is not None
    intend(journal, STOP, 1)
    journal.close()
    (tmp_path / "journal.new").rmdir()
    journal = Journal.open(path)
    assert [entry.key for entry in journal.in_flight()] == [STOP]
    assert journal.damaged_lines == 0


def test_it_is_compacted_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppec_agentd.journal.COMPACT_BYTES", 20_000)
    path = tmp_path / "journal"
    journal = Journal.open(path)
    for _ in range(200):
        answer(journal, CREATE, 1)
    assert path.stat().st_size < 25_000
    assert journal.recorded(CREATE, 1) is not None
