# SPDX-License-Identifier: Apache-2.0
"""One claimed operation from where it stands to its end: forwards through its steps, or backwards through the undos.

Each step's end, its business rows and the next step's begin are one transaction. A failure turns the operation round:
that is written before the first undo starts, so whoever claims it later goes the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import structlog
from sqlalchemy import Connection

from ppec_contract.api_operations import OperationState
from ppec_contract.errors import PpecError, Problem
from ppec_orchestrator.operations.context import Context, cancelled
from ppec_orchestrator.operations.steps import Do, HandedOverError, Kind, NoUndo, PostponedError, StepEnd
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store import vms

_log = structlog.get_logger(__name__)
_UNDO_TRIES = 5
_DETAIL_CHARS = 500
_BEGUN = ("done", "failed", "running")
# Nothing about the work itself: somebody else has it, or what it came to can't be written down now. Whoever claims it
# when the lease has ended goes on where it stands; hosts' work is not undone because the database was away.
_LETS_GO = frozenset({"operation.fenced", "store.unavailable"})


class Execution:
    """Runs in a thread of its own; raises a code of `_LETS_GO` or HandedOverError when others are to go on."""

    def __init__(self, kind: Kind, context: Context) -> None:
        self._kind = kind
        self._context = context
        self._journal = context.journal
        self._id = context.operation_id
        self._log = _log.bind(operation=self._id, kind=kind.name, fence=context.claimed.fence)

    def run(self) -> None:
        claimed = self._context.claimed
        try:
            if claimed.problem is None and claimed.cancel_requested:
                self._turn_round(None, cancelled(self._id).problem())
            elif claimed.problem is not None:
                self._backward(claimed.problem)
            else:
                self._forward()
        except PostponedError as later:
            self._postpone(later)

    # --- forwards ----------------------------------------------------------------------------------------------------

    def _forward(self) -> None:
        with self._context.ports.database.read() as conn:
            states = {row.ordinal: row.state for row in store.steps_of(conn, self._id)}
        for ordinal, step in enumerate(self._kind.steps):
            if states[ordinal] == "done":
                continue
            try:
                self._context.check()
                end = step.do(self._context)
            except (PostponedError, HandedOverError):
                raise
            except PpecError as error:
                if error.code in _LETS_GO:
                    raise
                self._turn_round(ordinal, error.problem())
                return
            except Exception as error:
                self._turn_round(ordinal, self._unexpected(step.name, error))
                return
            self._finish_step(ordinal, end)

    def _finish_step(self, ordinal: int, end: StepEnd) -> None:
        def writes(conn: Connection) -> tuple[OperationState, Callable[[], None]] | None:
            now = self._context.ports.now()
            end.writes(conn)
            store.set_step(conn, self._id, ordinal, "done", now, detail=end.detail)
            if ordinal + 1 < len(self._kind.steps):
                store.set_step(conn, self._id, ordinal + 1, "running", now)
                return None
            verdict = self._kind.verdict(store.items_of(conn, self._id))
            return verdict.state, self._write_end(conn, verdict.state, verdict.problem)

        ended = self._journal.commit(writes)
        if ended is not None:
            state, tell = ended
            self._ended(state, None)
            tell()

    def _write_end(self, conn: Connection, state: OperationState, problem: Problem | None) -> Callable[[], None]:
        store.end(conn, self._id, state, self._context.ports.now(), problem)
        return self._kind.at_end(self._context, conn)

    # --- backwards ---------------------------------------------------------------------------------------------------

    def _turn_round(self, ordinal: int | None, problem: Problem) -> None:
        """From here on the operation is undone. `ordinal` is the step that failed, None when none was begun."""
        self._log.warning("operation.turned_round", code=problem.code, detail=problem.detail)

        def writes(conn: Connection) -> None:
            store.set_problem(conn, self._id, problem)
            if ordinal is not None:
                detail = problem.detail[:_DETAIL_CHARS]
                store.set_step(conn, self._id, ordinal, "failed", self._context.ports.now(), detail=detail)

        self._journal.commit(writes)
        self._backward(problem)

    def _backward(self, problem: Problem) -> None:
        context = replace(self._context, reason=problem)
        with self._context.ports.database.read() as conn:
            begun = [row.ordinal for row in store.steps_of(conn, self._id) if row.state in _BEGUN]
        undos: list[tuple[int, Do]] = []
        for ordinal in sorted(begun, reverse=True):
            undo = self._kind.steps[ordinal].undo
            if not isinstance(undo, NoUndo):
                undos.append((ordinal, undo))
        for ordinal, undo in undos:
            try:
                self._undo(context, ordinal, undo)
            except (PostponedError, HandedOverError):
                raise
            except Exception as error:
                if isinstance(error, PpecError) and error.code in _LETS_GO:
                    raise
                why = self._unexpected(f"undo of {self._kind.steps[ordinal].name}", error)
                self._put_off_undo(why, error)
                self._give_up(ordinal, problem, why)
                return
        state = OperationState.CANCELLED if problem.code == "operation.cancelled" else OperationState.FAILED
        tell = self._journal.commit(lambda conn: self._write_end(conn, state, problem))
        self._ended(state, problem)
        tell()

    def _undo(self, context: Context, ordinal: int, undo: Do) -> None:
        end = undo(context)
        self._journal.commit(lambda conn: self._write_undone(conn, ordinal, end))

    def _put_off_undo(self, why: Problem, error: Exception) -> None:
        """A fault of ours may be gone with the next version, or with what it came from; some faults never go."""
        tried = self._journal.counters.get("undo_retries", 0)
        if tried >= _UNDO_TRIES and not self._kind.undo_for_ever:
            return
        self._journal.count(undo_retries=1)
        delay_s = self._context.limits.undo_retry_s * 2 ** min(tried, _UNDO_TRIES)
        raise PostponedError(delay_s, why.detail) from error

    def _give_up(self, ordinal: int, problem: Problem, why: Problem) -> None:
        """Ends it half undone. Earlier steps stay done: what may be on hosts keeps its room and its addresses, as VMs
        that an operator sees and can delete. Plain updates, for whatever failed may be what the record holds."""
        name = self._kind.steps[ordinal].name
        told = problem.model_copy(
            update={
                "detail": f"{problem.detail}; undoing {name!r} was given up: its VMs may still be on their hosts",
                "hint": "Delete the VMs that `ppec vm list` still shows; the orchestrator's log has the fault.",
                "details": {**problem.details, "given_up": name},
            }
        )

        def writes(conn: Connection) -> None:
            now = self._context.ports.now()
            store.set_step(
                conn, self._id, ordinal, "failed", now, detail=f"undo given up: {why.detail}"[:_DETAIL_CHARS]
            )
            store.fail_open_items(conn, self._id, told)
            vms.leave_to_operator(conn, self._id)
            store.end(conn, self._id, OperationState.FAILED, now, told)

        self._journal.commit(writes)
        self._log.error("operation.undo_given_up", step=name)
        self._ended(OperationState.FAILED, told)

    def _write_undone(self, conn: Connection, ordinal: int, end: StepEnd) -> None:
        end.writes(conn)
        store.set_step(conn, self._id, ordinal, "undone", self._context.ports.now(), detail=end.detail)

    # --- endings -----------------------------------------------------------------------------------------------------

    def _postpone(self, later: PostponedError) -> None:
        self._log.warning("operation.postponed", delay_s=later.delay_s, detail=later.detail)
        # What the latest run said is dealt with: the next try must start a new one.
        self._context.ports.dispatcher.forget(self._id)
        until = self._context.ports.now() + timedelta(seconds=later.delay_s)
        self._journal.commit(lambda conn: store.postpone(conn, self._id, until, later.detail[:_DETAIL_CHARS]))

    def _ended(self, state: OperationState, problem: Problem | None) -> None:
        self._log.info(
            "operation.ended", state=state.value, code=problem.code if problem else None, **self._journal.counters
        )
        self._context.live.forget(self._id)
        self._context.live.announce(self._id)
        self._context.ports.dispatcher.forget(self._id)

    def _unexpected(self, what: str, error: Exception) -> Problem:
        self._log.error("operation.step_failed", step=what, exc_info=error)
        if isinstance(error, PpecError):
            return error.problem()
        return PpecError(
            "internal.error",
            f"{what} of operation {self._id} failed by a fault of the orchestrator's own",
            hint=f"Look for operation {self._id} in the orchestrator's log.",
            subject=f"operation {self._id}",
        ).problem()
