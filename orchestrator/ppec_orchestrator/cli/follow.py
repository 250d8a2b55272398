# SPDX-License-Identifier: Apache-2.0
"""An operation as it goes on: its events, however often the connection breaks."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

from pydantic import ValidationError

from ppec_contract.api_operations import OperationView
from ppec_contract.errors import PpecError
from ppec_orchestrator.cli.client import Client

# How often in a row nothing may come back before we give up; with pauses of 0.3 s growing to 5 s, about a minute.
_PATIENCE = 15
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.3, 5.0


def operation_path(operation_id: str) -> str:
    return f"/v1/operations/{quote(operation_id, safe='')}"


def follow(client: Client, operation_id: str) -> Iterator[OperationView]:
    """The operation now and after each change, until it has ended.

    An orchestrator that restarts is waited for: operations outlive it. Each time the connection is lost the operation
    is read anew, so that nothing that happened meanwhile is missed. Raises PpecError `orchestrator.unavailable` when
    it stays away, and whatever the server answers.
    """
    unanswered = quiet = 0
    while True:
        view: OperationView | None = None
        try:
            view = client.get(operation_path(operation_id), OperationView)
            unanswered = 0
            yield view
            for event in () if view.state.ended else client.events(f"{operation_path(operation_id)}/events"):
                quiet = 0
                if event.event == "operation":
                    view = _read(event.data, view)
                    yield view
                if event.event == "end" or view.state.ended:
                    break
        except PpecError as error:
            unanswered += 1
            if not error.retryable or unanswered >= _PATIENCE:
                raise
        if view is not None and view.state.ended:
            return
        client.sleep(min(_FIRST_PAUSE_S * 1.5**quiet, _LONGEST_PAUSE_S))
        quiet += 1


def _read(data: str, before: OperationView) -> OperationView:
    try:
        return OperationView.model_validate_json(data)
    except ValidationError:
        # Cut off in the middle by a server that went down; the next reading has it whole.
        return before
