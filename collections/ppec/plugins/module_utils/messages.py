# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Parameters to bytes and one Varlink reply to what it means; socket and proxy carry the same messages."""

from __future__ import annotations

import json

from ansible_collections.ppec.cloud.plugins.module_utils.contract_table import FAILED
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError

_STANDARD_ERRORS = {
    "org.varlink.service.InterfaceNotFound": "request.unknown_method",
    "org.varlink.service.MethodNotFound": "request.unknown_method",
    "org.varlink.service.MethodNotImplemented": "request.unknown_method",
    "org.varlink.service.InvalidParameter": "request.invalid",
    "org.varlink.service.ExpectedMore": "request.invalid",
    "org.varlink.service.PermissionDenied": "auth.forbidden",
}


def encode_object(value):
    """The bytes of a JSON object, or ProblemError for what JSON has no word for (infinity)."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise ProblemError("request.invalid", f"the options can't be sent: {error}") from error


def decode_object(data, subject):
    """The JSON object in `data`, or ProblemError: a peer that sends anything else can't be understood."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ProblemError("internal.error", f"{subject} sent an answer that is not JSON", subject=subject) from error
    if not isinstance(value, dict):
        raise ProblemError("internal.error", f"{subject} sent an answer that is not an object", subject=subject)
    return value


def read_reply(message, subject):
    """`(parameters, continues)` of one reply; an error reply is raised as the problem it carries."""
    parameters = message.get("parameters") or {}
    error = message.get("error")
    if error is None:
        if not isinstance(parameters, dict):
            raise ProblemError("internal.error", f"{subject} sent a reply without parameters", subject=subject)
        return parameters, bool(message.get("continues"))
    problem = ProblemError.from_body(parameters) if error == FAILED else None
    if problem is not None:
        raise problem
    code = _STANDARD_ERRORS.get(error, "internal.error")
    raise ProblemError(code, f"{subject} refused the call: {str(error)[:120]}", subject=subject)
