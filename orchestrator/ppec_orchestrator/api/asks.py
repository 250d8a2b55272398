# SPDX-License-Identifier: Apache-2.0
"""What all endpoints share that accept an operation: the idempotency key, and 202 with a `Location`."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import Header, Request, Response

from ppec_contract.api_operations import OperationView
from ppec_contract.model import Model, canonical_json
from ppec_orchestrator.api.audited import changes
from ppec_orchestrator.api.auth import Caller
from ppec_orchestrator.operations.enqueueing import Ask
from ppec_orchestrator.store.idempotency import RequestKey

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=128,
        pattern=r"^[\x21-\x7e]+$",
        description="The same request sent again under the same key makes no second operation.",
    ),
]


def ask_of(caller: Caller, key: str | None, request: Request, body: Model) -> Ask:
    """Who asks; under a key, for just this."""
    if key is None:
        return Ask(caller.name)
    what = {"method": request.method, "path": request.url.path, "body": body.model_dump(mode="json")}
    return Ask(caller.name, RequestKey(caller.name, key, hashlib.sha256(canonical_json(what)).hexdigest()))


def accepted(request: Request, view: OperationView) -> Response:
    """The operation as the answer. The audit line names its VMs; one about a host names what is in the path."""
    # A VM may have been given its name just now, or have been called by its id.
    changes(request, [item.name for item in view.items])
    # Made here, where a thread is at it anyway: FastAPI would ask another one to validate the view, which we have made.
    return Response(
        view.model_dump_json(),
        status_code=202,
        media_type="application/json",
        headers={"Location": f"/v1/operations/{view.operation_id}"},
    )
