# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of the orchestrator's REST API: bearer token, problem+json, pages, and waiting for an operation."""

from __future__ import annotations

import http.client
import ipaddress
import json
import ssl
import time
from urllib.parse import quote, urlencode, urlsplit

from ansible_collections.ppec.cloud.plugins.module_utils.messages import encode_object
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError
from ansible_collections.ppec.cloud.plugins.module_utils.proxy_session import peer_identities

MAX_ANSWER_BYTES = 64 * 1024 * 1024
ENDED = ("succeeded", "partial", "failed", "cancelled")
# Pauses before the second and the third attempt of a request.
_PAUSES_S = (0.3, 1.0)
_POLL_FIRST_S = 0.1
_POLL_MOST_S = 2.0
_SUBJECT = "orchestrator"


class OrchestratorClient:
    """Requests to one orchestrator. Every call raises ProblemError."""

    def __init__(self, params, sleep=time.sleep, clock=time.monotonic):
        url = urlsplit(params["api_url"])
        if url.scheme not in ("https", "http") or not url.hostname or url.query or url.fragment:
            raise ProblemError("request.invalid", "api_url is not an https URL", subject=_SUBJECT)
        if url.scheme == "http" and not _is_loopback(url.hostname):
            raise ProblemError(
                "request.invalid",
                f"api_url is http://{url.hostname}: the token would travel in clear",
                hint="Use https; http is accepted for a loopback address only.",
                subject=_SUBJECT,
            )
        self._url = url
        self._params = params
        self._sleep = sleep
        self._clock = clock

    def get(self, path, query=None):
        return self._request("GET", path, query=query)

    def post(self, path, body, idempotency_key):
        """A change. The key makes it safe to repeat, so a request whose answer was lost is made again."""
        return self._request("POST", path, body=body, headers={"Idempotency-Key": idempotency_key})

    def patch(self, path, body, idempotency_key):
        """See `post`."""
        return self._request("PATCH", path, body=body, headers={"Idempotency-Key": idempotency_key})

    def pages(self, path, query=None):
        """All items of a list, page after page."""
        items, cursor = [], None
        while True:
            page = self.get(path, {**(query or {}), **({"cursor": cursor} if cursor else {})})
            items.extend(page["items"])
            cursor = page.get("next_cursor")
            if not cursor:
                return items

    def wait_operation(self, operation, timeout_s):
        """The operation once it has ended; `request.deadline_exceeded` when it has not within `timeout_s`."""
        end = self._clock() + timeout_s
        pause_s = _POLL_FIRST_S
        while operation["state"] not in ENDED:
            if self._clock() >= end:
                raise ProblemError(
                    "request.deadline_exceeded",
                    f"operation {operation['operation_id']} is still {operation['state']} after {timeout_s:g} s",
                    hint="It goes on; raise wait_timeout_s, or look at it with `ppec operation watch`.",
                    subject=f"operation {operation['operation_id']}",
                )
            self._sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_MOST_S)
            operation = self.get(segment_path("operations", operation["operation_id"]))
        return operation

    def _request(self, method, path, body=None, query=None, headers=None):
        for pause_s in _PAUSES_S:
            try:
                return self._attempt(method, path, body, query, headers)
            except ProblemError as problem:
                if not problem.retryable:
                    raise
            self._sleep(pause_s)
        return self._attempt(method, path, body, query, headers)

    def _attempt(self, method, path, body, query, headers):
        target = f"{self._url.path.rstrip('/')}/v1/{path}" + (f"?{urlencode(query)}" if query else "")
        sent = {"Authorization": f"Bearer {self._params['token']}", "Accept": "application/json", **(headers or {})}
        data = None
        if body is not None:
            data = encode_object(body)
            sent["Content-Type"] = "application/json"
        connection = self._connection()
        try:
            connection.connect()
            self._require_orchestrator(connection)
            connection.request(method, target, data, sent)
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER_BYTES + 1)
        except ssl.SSLCertVerificationError as error:
            raise ProblemError(
                "auth.wrong_identity",
                f"the certificate of {self._url.netloc} was not accepted: {error.verify_message}",
                hint="Give the CA that issued it as ca_path.",
                subject=_SUBJECT,
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ProblemError(
                "orchestrator.unavailable",
                f"the orchestrator at {self._url.netloc} can't be reached: {error or type(error).__name__}",
                hint="Check api_url and that the orchestrator runs.",
                subject=_SUBJECT,
            ) from error
        finally:
            connection.close()
        return self._understood(response.status, answer)

    def _connection(self):
        timeout = self._params["request_timeout_s"]
        if self._url.scheme == "http":
            return http.client.HTTPConnection(self._url.hostname, self._url.port, timeout=timeout)
        try:
            context = ssl.create_default_context(cafile=self._params.get("ca_path"))
        except OSError as error:
            raise ProblemError(
                "auth.required", f"ca_path {self._params['ca_path']} can't be loaded: {error}", subject=_SUBJECT
            ) from error
        return http.client.HTTPSConnection(self._url.hostname, self._url.port, timeout=timeout, context=context)

    def _require_orchestrator(self, connection):
        """The fleet CA issues certificates to hosts too: one that says it is a host is not to get the token."""
        if self._url.scheme == "http":
            return
        others = [u for u in peer_identities(connection.sock.getpeercert()) if not u.startswith("ppec://orchestrator/")]
        if others:
            raise ProblemError(
                "auth.wrong_identity",
                f"{self._url.netloc} is {others[0][:120]}, wanted an orchestrator",
                hint="Correct api_url.",
                subject=_SUBJECT,
            )

    def _understood(self, status, answer):
        try:
            body = json.loads(answer.decode("utf-8")) if answer and len(answer) <= MAX_ANSWER_BYTES else {}
        except ValueError:
            body = None
        if status < 400 and isinstance(body, dict):
            return body
        problem = ProblemError.from_body(body)
        if problem is None:
            code = "orchestrator.unavailable" if status in (502, 503, 504) else "internal.error"
            detail = f"the orchestrator at {self._url.netloc} answered HTTP {status} without a problem"
            problem = ProblemError(code, detail, hint="Is api_url right?", subject=_SUBJECT)
        raise problem


def segment_path(*segments):
    """A path whose segments may hold anything."""
    return "/".join(quote(segment, safe="") for segment in segments)


def _is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
