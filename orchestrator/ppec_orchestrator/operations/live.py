# SPDX-License-Identifier: Apache-2.0
"""Progress in memory: the stage each VM is in right now, and who wants to know when anything changes.

Stages are never written while they pass: a create would commit a dozen times per VM for something nobody needs after
a crash. Watchers of another replica's operation see its check-points only.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

from ppec_contract.agent import Stage
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.operations import CHANGED

Wake = Callable[[], object]
_LOOK_S = 2.0


class Live:
    """One per process. `announce` may be called from any thread; so are the callbacks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, dict[UUID, Stage]] = {}
        self._watchers: dict[str, set[Wake]] = defaultdict(set)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, database: Database) -> None:
        """Follows check-points, those of other replicas too."""
        self._thread = threading.Thread(target=self._follow, args=(database,), name="ppec-operations-live", daemon=True)
        self._thread.start()

    def stop(self, database: Database) -> None:
        self._stop.set()
        database.notify(CHANGED)
        if self._thread is not None:
            self._thread.join(timeout=10)

    def entered(self, operation_id: str, vm_id: UUID, stage: Stage) -> None:
        with self._lock:
            self._stages.setdefault(operation_id, {})[vm_id] = stage

    def stages(self, operation_id: str) -> dict[UUID, Stage]:
        with self._lock:
            return dict(self._stages.get(operation_id, {}))

    def forget(self, operation_id: str) -> None:
        with self._lock:
            self._stages.pop(operation_id, None)

    def announce(self, operation_id: str) -> None:
        with self._lock:
            watchers = list(self._watchers.get(operation_id, ()))
        for wake in watchers:
            # A watcher whose event loop is closed just then is no reason to stop telling the others.
            with suppress(RuntimeError):
                wake()

    def watch(self, operation_id: str, wake: Wake) -> Callable[[], None]:
        """Calls `wake` on every change until the returned function is called."""
        with self._lock:
            self._watchers[operation_id].add(wake)

        def unwatch() -> None:
            with self._lock:
                self._watchers[operation_id].discard(wake)
                if not self._watchers[operation_id]:
                    del self._watchers[operation_id]

        return unwatch

    def _follow(self, database: Database) -> None:
        with database.listen(CHANGED) as listener:
            while not (self._stop.is_set() or listener.ended):
                payloads = listener.wait(_LOOK_S)
                if not payloads:
                    # Somebody's notice may have been lost on the way; a look now and then costs little.
                    with self._lock:
                        payloads = tuple(self._watchers)
                for operation_id in dict.fromkeys(payloads):
                    self.announce(operation_id)
