# SPDX-License-Identifier: Apache-2.0
"""The journal: what the agent was asked to do and what it answered, on disk before either is acted on or sent.

One line per record: eight hex digits of CRC-32, a space, JSON. A record is an *intent* ("this action on this VM has
begun") or an *answer*; the latest record per (operation, action, VM) counts. Every append is fsynced before it returns.
The last line may be torn by a crash: it was never acted on, and is cut off. A damaged line elsewhere is skipped and
counted.

What a repeated request gets, by the fence it carries and the fence of the recorded answer:

- lower than the operation's highest fence: refused (`operation.fenced`), whatever was recorded;
- the answer was a success: that answer, at any fence, unless the same operation has since done something else to the
  VM (a create, undone by a delete, may be asked for again with a higher fence);
- the answer was a failure: with a higher fence the action is tried again (a failure leaves nothing behind). With the
  same fence the failure is repeated, except that every action but create is tried again when the failure was of the
  "try again" class. Create is not: its plan may have moved on to another host, and a request delayed on the network
  would then make the VM twice.
- A create that failed or was given up after it had made folders is marked *undone* until a later create of its
  operation succeeds: a domain of that operation that turns up after all (libvirt finished a call late) is taken back,
  and so is a folder that a failing storage pool kept. A create whose undo is still *due* stays an intent, whatever its
  caller was told.
- A delete closes the VM to creates of its operation that carry the same or a lower fence: one that arrives late, after
  its undo, is refused (`operation.fenced`).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import UUID

from ppec_agentd.files import os_errors, sync_directory, write_all
from ppec_contract.agent import ChangingAction, VmResult
from ppec_contract.errors import PpecError

Action = ChangingAction
ACTIONS: tuple[Action, ...] = get_args(Action)
Undo = Literal["", "due", "done"]
KEEP_S = 7 * 24 * 3600.0
COMPACT_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Key:
    operation_id: str
    action: Action
    vm_id: str


@dataclass(frozen=True, slots=True)
class Entry:
    """The latest record of a key; `ordinal` is their order.

    `answer` is the VmResult's JSON, None while in flight, empty when recovery abandoned it: it was undone, nobody was
    told anything, and a repeated request begins anew.

    `undo` of a create: "due" while what it made has still to be taken back (its answer is then None); "done" once that
    was done and no create of the operation has made the VM since; else empty. `failed`: the answer tells of a problem.
    """

    key: Key
    fence: int
    name: str
    at_unix_s: float
    ordinal: int
    answer: str | None = None
    undo: Undo = ""
    failed: bool = False

    def result(self) -> VmResult:
        """The recorded answer, marked as replayed."""
        if not self.answer:
            raise ValueError(f"{self.key} has no answer")
        return VmResult.model_validate_json(self.answer).model_copy(update={"replayed": True})


@dataclass(frozen=True, slots=True)
class LastWord:
    """The latest entry about a VM, whatever the action: by it one sees that something was done meanwhile. `made` is its
    latest finished create or delete, if the journal still has one."""

    name: str
    ordinal: int
    in_flight: bool
    made: Entry | None

    def stands(self) -> bool | None:
        """Whether the VM should be on the host; None if the journal doesn't know."""
        return None if self.made is None else _stands(self.made)


def _stands(entry: Entry) -> bool:
    """Whether this leaves the VM on the host; of an entry that says so (`_says`)."""
    if not entry.answer:
        return entry.key.action == "DeleteVms"
    return entry.failed == (entry.key.action == "DeleteVms")


def _says(entry: Entry) -> bool:
    """Whether this tells if the VM is on the host. A create that was refused before it could make anything does not:
    the VM may be there from the time before, and that be why."""
    if entry.key.action not in ("CreateVms", "DeleteVms") or entry.answer is None:
        return False
    return entry.key.action == "DeleteVms" or entry.undo == "done" or _stands(entry)


def _last_word(entries: list[Entry]) -> LastWord:
    made = [e for e in entries if _says(e)]
    latest = max(entries, key=lambda e: e.ordinal)
    return LastWord(
        name=latest.name,
        ordinal=latest.ordinal,
        in_flight=any(e.answer is None for e in entries),
        made=max(made, key=lambda e: e.ordinal, default=None),
    )


def _line(record: dict[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, body = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(body):
        return None
    try:
        record = json.loads(body)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _to_disk(file: int, data: bytes) -> None:
    write_all(file, data)
    os.fsync(file)


class Journal:
    """Open by `Journal.open`. Thread-safe; `append…` block for an fsync, so call them off the event loop.

    `to_disk` is what takes new records to the file, whole lines at a time: tests put a crash there.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[Key, Entry] = {}
        self._fences: dict[str, int] = {}
        self._ordinal = 0
        self._file = -1
        self._size = 0
        self._compact_at = COMPACT_BYTES
        self.damaged_lines = 0
        self.to_disk: Callable[[int, bytes], None] = _to_disk

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.time) -> Journal:
        journal = cls(path, clock)
        journal._read()
        try:
            journal._rewrite()
        except OSError:
            # No room for a second copy is no reason to be down: go on with the file there is.
            journal._reopen()
        return journal

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    # --- asking -------------------------------------------------------------------------------------------------

    def recorded(self, key: Key, fence: int) -> VmResult | None:
        """The answer a request with this key and fence gets from the journal; None means: act.

        Raises PpecError `operation.fenced`.
        """
        with self._lock:
            self.refuse_lower(key.operation_id, fence)
            entry = self._entries.get(key)
            closed = self._closed_by_delete(key, fence)
            superseded = entry is not None and self._superseded(entry)
        if entry is not None and entry.answer:
            result = entry.result()
            if result.problem is None:
                return None if superseded and fence > entry.fence else result
            if fence == entry.fence and not (result.problem.error().retryable and key.action != "CreateVms"):
                return result
        if closed:
            raise PpecError(
                "operation.fenced",
                f"operation {key.operation_id} has deleted vm {key.vm_id} at fence {closed.fence} already",
                hint="A create after its own delete needs a higher fence.",
                subject=f"vm {key.vm_id}",
            )
        return None

    def in_flight(self) -> tuple[Entry, ...]:
        """Intents without an answer: what a crash interrupted, oldest first."""
        with self._lock:
            found = [e for e in self._entries.values() if e.answer is None]
        return tuple(sorted(found, key=lambda e: e.ordinal))

    def gone_ids(self) -> frozenset[str]:
        """Ids of VMs whose last word here is that they were deleted, or that their create came to nothing.

        A VM that was created and never deleted is not among them, whatever the hypervisor says: its disk is data.
        """
        return frozenset(vm_id for vm_id, entry in self._last_made().items() if not _stands(entry))

    def deleted(self, vm_ids: Iterable[UUID]) -> frozenset[UUID]:
        """Those of these VMs whose latest finished create or delete is a delete that succeeded."""
        made = self._last_made()
        latest = {vm_id: made[str(vm_id)] for vm_id in vm_ids if str(vm_id) in made}
        return frozenset(vm_id for vm_id, e in latest.items() if e.key.action == "DeleteVms" and not _stands(e))

    def _last_made(self) -> dict[str, Entry]:
        """The latest finished create or delete of each VM that tells whether it is there."""
        last: dict[str, Entry] = {}
        with self._lock:
            for key, entry in self._entries.items():
                known = last.get(key.vm_id)
                if (known is None or entry.ordinal > known.ordinal) and _says(entry):
                    last[key.vm_id] = entry
        return last

    def last_words(self) -> dict[str, LastWord]:
        """What was last recorded about each VM, by its id."""
        by_vm: dict[str, list[Entry]] = {}
        with self._lock:
            for entry in self._entries.values():
                by_vm.setdefault(entry.key.vm_id, []).append(entry)
        return {vm_id: _last_word(entries) for vm_id, entries in by_vm.items()}

    def undone(self, key: Key) -> bool:
        """Whether the create was undone, and a domain its operation made is therefore there by mistake."""
        with self._lock:
            entry = self._entries.get(key)
            return entry is not None and entry.undo == "done"

    def undone_creates(self) -> frozenset[Key]:
        """Creates that were undone and are not at work again."""
        with self._lock:
            return frozenset(k for k, e in self._entries.items() if e.undo == "done" and e.answer is not None)

    def refuse_lower(self, operation_id: str, fence: int) -> None:
        highest = self._fences.get(operation_id, 0)
        if fence < highest:
            raise PpecError(
                "operation.fenced",
                f"operation {operation_id}: fence {fence} is lower than {highest}, which this host has seen",
                hint="Another owner has taken the operation over; stop working on it.",
                subject=f"operation {operation_id}",
                details={"fence": fence, "highest": highest},
            )

    def _closed_by_delete(self, key: Key, fence: int) -> Entry | None:
        if key.action != "CreateVms":
            return None
        deleted = self._entries.get(replace(key, action="DeleteVms"))
        return deleted if deleted is not None and fence <= deleted.fence else None

    def _superseded(self, entry: Entry) -> bool:
        others = (self._entries.get(replace(entry.key, action=action)) for action in ACTIONS)
        return any(other is not None and other.ordinal > entry.ordinal for other in others)

    # --- recording ----------------------------------------------------------------------------------------------

    def append_intents(self, operation_id: str, fence: int, keys_and_names: Iterable[tuple[Key, str]]) -> None:
        """One fsync for a whole batch, which also raises the operation's fence. Raises `operation.fenced`."""
        with self._lock:
            self.refuse_lower(operation_id, fence)
            now = self._clock()
            entries = [
                replace(self._numbered(key, fence, name, now, None), undo=self._undo_before(key))
                for key, name in keys_and_names
            ]
            only_fence = not entries and fence > self._fences.get(operation_id, -1)
            self._append(entries, {operation_id: fence} if only_fence else {})

    def append_answer(self, key: Key, fence: int, result: VmResult, *, undone: bool = False) -> None:
        """Records the answer that is about to be sent; `undone` says that a failed create may have left something."""
        with self._lock:
            failed = result.problem is not None
            answer = self._numbered(key, fence, result.name, self._clock(), result.model_dump_json())
            entry = replace(answer, failed=failed)
            self._append([self._marked(entry, undone) if failed else entry])
            if self._size > self._compact_at:
                # The answer is safe whether this works or not; at worst the file grows on.
                self._compact_at = 2 * self._size
                with contextlib.suppress(OSError):
                    self._rewrite()

    def append_abandoned(self, key: Key, *, undone: bool = False) -> None:
        """Records that an action in flight was undone (`undone`, of a create), or never begun, and not answered. Never
        fails: at worst the next recovery finds nothing to undo."""
        with self._lock, contextlib.suppress(PpecError):
            entry = self._entries.get(key)
            if entry is not None and entry.answer is None:
                abandoned = self._numbered(key, entry.fence, entry.name, self._clock(), "")
                self._append([self._marked(abandoned, undone)])

    def append_undo_due(self, key: Key) -> None:
        """Records that a create failed and could not be taken back yet: after a restart it must not count as done."""
        with self._lock:
            entry = self._entries[key]
            due = self._numbered(key, entry.fence, entry.name, self._clock(), None)
            self._append([replace(due, undo="due")])

    def _undo_before(self, key: Key) -> Undo:
        """What an intent inherits. After an intent without an answer nothing is certain, unless its undo was due."""
        before = self._entries.get(key)
        if before is None or (before.answer is None and before.undo == "done"):
            return ""
        return before.undo

    def _marked(self, entry: Entry, undone: bool) -> Entry:
        before = self._entries.get(entry.key)
        return replace(entry, undo="done") if undone or (before is not None and before.undo == "done") else entry

    def _numbered(self, key: Key, fence: int, name: str, at_unix_s: float, answer: str | None) -> Entry:
        self._ordinal += 1
        return Entry(key, fence, name, at_unix_s, self._ordinal, answer)

    def _append(self, entries: list[Entry], fences: dict[str, int] | None = None) -> None:
        data = b"".join(map(_line, [*_fence_records(fences or {}), *map(_record, entries)]))
        if not data:
            return
        with os_errors(f"the journal {self._path} can't be written", str(self._path)):
            try:
                self.to_disk(self._file, data)
            except OSError:
                # Half a line may be there: cut it off, so that later lines stay readable.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
        self._size += len(data)
        for operation_id, fence in (fences or {}).items():
            self._raise_fence(operation_id, fence)
        for entry in entries:
            self._entries[entry.key] = entry
            self._raise_fence(entry.key.operation_id, entry.fence)

    def _raise_fence(self, operation_id: str, fence: int) -> None:
        self._fences[operation_id] = max(self._fences.get(operation_id, 0), fence)

    # --- the file -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        lines = data.split(b"\n")
        torn = lines.pop()  # what follows the last newline: empty, or the line a crash cut short
        for position, line in enumerate(lines):
            record = _parse(line)
            if record is None:
                # A torn write may also end in a newline's place; only damage before the end is worth an alarm.
                self.damaged_lines += 1 if position < len(lines) - 1 or torn else 0
                continue
            self._raise_fence(record["operation"], record["fence"])
            if "action" in record:
                key = Key(record["operation"], record["action"], record["vm"])
                entry = self._numbered(key, record["fence"], record["name"], record["at"], record["answer"])
                failed = bool(entry.answer) and json.loads(entry.answer or "{}").get("problem") is not None
                self._entries[key] = replace(entry, undo=record.get("undo", ""), failed=failed)

    def _rewrite(self) -> None:
        """Compaction: operations at rest for longer than `KEEP_S` are dropped, then the file is replaced whole."""
        self._forget_old()
        ordered = sorted(self._entries.values(), key=lambda e: e.ordinal)
        data = b"".join(map(_line, [*_fence_records(self._fences), *map(_record, ordered)]))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_name(self._path.name + ".new")
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        write_all(file, data)
        os.fsync(file)
        fresh.replace(self._path)
        sync_directory(self._path.parent)
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size = file, len(data)
        self._compact_at = max(COMPACT_BYTES, 2 * len(data))

    def _reopen(self) -> None:
        """Goes on at the end of the last whole line."""
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = self._path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._file, self._size)

    def _forget_old(self) -> None:
        latest: dict[str, float] = {}
        for entry in self._entries.values():
            at = float("inf") if entry.answer is None else entry.at_unix_s
            latest[entry.key.operation_id] = max(latest.get(entry.key.operation_id, 0.0), at)
        old = {operation for operation, at in latest.items() if at < self._clock() - KEEP_S}
        self._entries = {k: e for k, e in self._entries.items() if k.operation_id not in old}
        self._fences = {operation: f for operation, f in self._fences.items() if operation not in old}


def _record(entry: Entry) -> dict[str, Any]:
    key = entry.key
    return {
        "operation": key.operation_id,
        "action": key.action,
        "vm": key.vm_id,
        "fence": entry.fence,
        "name": entry.name,
        "at": entry.at_unix_s,
        "answer": entry.answer,
        **({"undo": entry.undo} if entry.undo else {}),
    }


def _fence_records(fences: dict[str, int]) -> list[dict[str, Any]]:
    return [{"operation": operation, "fence": fence} for operation, fence in fences.items()]
