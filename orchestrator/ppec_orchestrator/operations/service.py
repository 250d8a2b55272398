# SPDX-License-Identifier: Apache-2.0
"""What the API calls: accepts work, shows it, cancels it, and tells who watches when to look again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from ppec_contract.api import Page
from ppec_contract.api_hosts import HostRetune
from ppec_contract.api_operations import OperationView
from ppec_contract.api_placement import PlanView
from ppec_contract.api_plans import PlanDetails, PlanSummary
from ppec_contract.api_vms import VmResize, VmsAction, VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.operations.accept import Acceptor
from ppec_orchestrator.operations.approving import approve
from ppec_orchestrator.operations.context import Ports
from ppec_orchestrator.operations.creation import Creation
from ppec_orchestrator.operations.engine import Engine
from ppec_orchestrator.operations.enqueueing import Ask
from ppec_orchestrator.operations.growing import Growing
from ppec_orchestrator.operations.live import Live, Wake
from ppec_orchestrator.operations.plan_shown import show_plan
from ppec_orchestrator.operations.replica import Replica
from ppec_orchestrator.store import operation_views, plan_views, plans
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.operation_views import OperationFilter
from ppec_orchestrator.store.operations import NewOperation
from ppec_orchestrator.store.paging import Slice
from ppec_orchestrator.store.plan_views import PlanFilter


class Operations:
    """The operations of one replica. Usable for accepting and showing without `start`."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._database = ports.database
        self._live = Live()
        self.engine = Engine(ports, self._live)
        self._creation = Creation(ports.database, ports.planning, ports.now, ports.addresses, ports.approvals)
        self._acceptor = Acceptor(ports.database, ports.now, Growing(ports.planning.fleet))

    def start(self, replica: Replica) -> None:
        self._live.start(self._database)
        try:
            self.engine.start(replica)
        except BaseException:
            with suppress(PpecError):
                self.stop()
            raise

    def stop(self) -> None:
        try:
            self.engine.stop()
        finally:
            self._live.stop(self._database)

    def create(self, asked: VmsCreate, ask: Ask) -> OperationView:
        return self._accepted(self._creation.create(asked, ask))

    def show_plan(self, asked: VmsCreate, caller: str, *, evidence: bool = False) -> PlanView:
        """What `create` would do."""
        ports = self._ports
        return show_plan(ports.database, ports.planning, ports.now, asked, caller, ports.approvals, evidence=evidence)

    def kept_plan(self, ref: str) -> PlanDetails:
        """A plan that has neither expired nor been executed, by its hash or what that begins with. Raises
        `plan.not_found` and `plan.ambiguous`."""
        now = self._ports.now()
        with self._database.read() as conn:
            return plan_views.details(plans.load(conn, plans.whole_id(conn, ref, now), now), self._ports.approvals)

    def kept_plans(self, wanted: Slice, chosen: PlanFilter) -> Page[PlanSummary]:
        with self._database.read() as conn:
            return plan_views.page(conn, wanted, chosen, self._ports.approvals, self._ports.now())

    def approve(self, plan_id: str, caller: str) -> PlanDetails:
        """A kept plan, by somebody else than its maker."""
        ports = self._ports
        return approve(ports.database, ports.planning, ports.now, plan_id, caller, ports.approvals)

    def execute(self, plan_id: str, ask: Ask) -> OperationView:
        return self._accepted(self._creation.execute(plan_id, ask))

    def act(self, asked: VmsAction, ask: Ask) -> OperationView:
        return self._accepted(self._acceptor.act(asked, ask))

    def resize(self, vm: str, asked: VmResize, ask: Ask) -> OperationView:
        return self._accepted(self._acceptor.resize(vm, asked, ask))

    def retune(self, host: str, asked: HostRetune, ask: Ask) -> OperationView:
        return self._accepted(self._acceptor.retune(host, asked, ask))

    def _accepted(self, answer: NewOperation | str) -> OperationView:
        """What was enqueued is shown as it was: reading it back would only hold up the engine, which has begun."""
        return self.show(answer) if isinstance(answer, str) else operation_views.enqueued(answer)

    def show(self, operation_id: str) -> OperationView:
        """With the stages its VMs are in right now, if it runs in this process. Raises `operation.not_found`."""
        with self._database.read() as conn:
            view = operation_views.show(conn, operation_id)
        return operation_views.with_stages(view, self._live.stages(operation_id))

    def page(self, wanted: Slice, chosen: OperationFilter) -> Page[OperationView]:
        with self._database.read() as conn:
            return operation_views.page(conn, wanted, chosen)

    def cancel(self, operation_id: str) -> OperationView:
        """Asks it to end; what it did is undone where that can be. Raises `operation.finished` when it has ended."""
        with self._database.write() as conn:
            state = store.request_cancel(conn, operation_id)
            if state is None:
                raise operation_views.not_found(operation_id)
            if state.ended:
                raise PpecError(
                    "operation.finished",
                    f"operation {operation_id} has ended {state.value}",
                    hint="There is nothing left to cancel.",
                    subject=f"operation {operation_id}",
                )
            self._database.notify(store.WORK, within=conn)
            self._database.notify(store.CHANGED, operation_id, within=conn)
        self.engine.cancel_now(operation_id)
        return self.show(operation_id)

    def watch(self, operation_id: str, wake: Wake) -> Callable[[], None]:
        """Calls `wake`, from any thread, whenever the operation may have changed; returns what ends that."""
        return self._live.watch(operation_id, wake)
