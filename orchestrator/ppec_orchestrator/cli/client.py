# SPDX-License-Identifier: Apache-2.0
"""The REST API as the commands see it: contract models in and out, every failure a PpecError."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TypeVar

import httpx2
from pydantic import ValidationError

from ppec_contract.api import Page
from ppec_contract.errors import PpecError, Problem
from ppec_contract.model import Model
from ppec_orchestrator.cli.configuration import Configuration

M = TypeVar("M", bound=Model)
# None is left out; of a list each value is given.
Query = Mapping[str, str | list[str] | None]
_CONNECT_S, _READ_S = 10.0, 60.0
_PAGE_LIMIT = 500
_LINES = "application/x-ndjson"
# Pauses before the second and third attempt of what may safely be repeated.
_PAUSES_S = (0.3, 1.0)


class Client:
    """One connection set to one orchestrator; close it, or use it in a `with`."""

    def __init__(self, chosen: Configuration, sleep: Callable[[float], None] = time.sleep) -> None:
        self.server = chosen.server
        self.sleep = sleep
        self._http = httpx2.Client(
            base_url=chosen.server,
            headers={"authorization": f"Bearer {chosen.token}"} if chosen.token else {},
            verify=trust(chosen) if chosen.server.startswith("https:") else True,
            timeout=httpx2.Timeout(_READ_S, connect=_CONNECT_S),
            trust_env=False,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, answer: type[M], query: Mapping[str, str] | None = None) -> M:
        return _parsed(self._sent("GET", path, query=query, repeat=True), answer)

    def post(
        self,
        path: str,
        body: Model | None,
        answer: type[M],
        *,
        idempotency_key: str | None = None,
        query: Mapping[str, str] | None = None,
    ) -> M:
        """With a key the orchestrator does it once however often it is asked, so a lost answer is asked for again."""
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        repeat = idempotency_key is not None
        response = self._sent("POST", path, body=body, query=query, headers=headers, repeat=repeat)
        return _parsed(response, answer)

    def patch(self, path: str, body: Model, answer: type[M], *, idempotency_key: str | None = None) -> M:
        """See `post`."""
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        response = self._sent("PATCH", path, body=body, headers=headers, repeat=idempotency_key is not None)
        return _parsed(response, answer)

    def delete(self, path: str, query: Mapping[str, str] | None = None) -> None:
        self._sent("DELETE", path, query=query)

    def upload(self, path: str, query: Mapping[str, str], content: Iterator[bytes], size: int, answer: type[M]) -> M:
        headers = {"content-type": "application/octet-stream", "content-length": str(size)}
        try:
            response = self._http.put(path, params=dict(query), content=content, headers=headers, timeout=3600)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        return _parsed(_checked(response), answer)

    def page(self, path: str, answer: type[M], query: Query) -> Page[M]:
        found = self._sent("GET", path, query=_given(query), repeat=True)
        return _parsed(found, Page[answer])  # type: ignore[valid-type]

    def items(self, path: str, answer: type[M], query: Query | None = None, limit: int = _PAGE_LIMIT) -> Iterator[M]:
        """All items of a list, page after page; of a shorter `limit`, in shorter pages."""
        cursor: str | None = None
        while True:
            asked = {**(query or {}), "limit": str(min(limit, _PAGE_LIMIT)), "cursor": cursor}
            page = self.page(path, answer, asked)
            yield from page.items
            cursor = page.next_cursor
            if cursor is None:
                return

    def lines(self, path: str, query: Query) -> Iterator[dict[str, Any]]:
        """All items of a list as they come, in one answer. One that breaks off ends with `orchestrator.unavailable`."""
        headers = {"accept": _LINES}
        try:
            with self._http.stream("GET", path, params=_given(query), headers=headers) as response:
                if response.is_error or response.is_redirect:
                    response.read()
                _checked(response)
                if response.headers.get("content-type", "").partition(";")[0] != _LINES:
                    raise _not_understood(response, "a stream of lines")
                for line in response.iter_lines():
                    yield _object(response, line)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error

    def events(self, path: str) -> Iterator[httpx2.ServerSentEvent]:
        """Server-sent events until the connection ends, however it ends: `PpecError` `orchestrator.unavailable`."""
        try:
            with self._http.sse(path) as source:
                if source.response.is_error:
                    source.response.read()
                _checked(source.response)
                yield from source
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error

    def download(self, path: str) -> Iterator[bytes]:
        """What may be large, piece by piece; one that breaks off ends as `orchestrator.unavailable`."""
        try:
            with self._http.stream("GET", path) as response:
                if response.is_error or response.is_redirect:
                    response.read()
                yield from _checked(response).iter_bytes()
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error

    def _sent(
        self,
        method: str,
        path: str,
        *,
        body: Model | None = None,
        query: Mapping[str, str | list[str]] | None = None,
        headers: Mapping[str, str] | None = None,
        repeat: bool = False,
    ) -> httpx2.Response:
        content = body.model_dump_json(exclude_unset=True) if body is not None else None
        sent = dict(headers or {}) | ({"content-type": "application/json"} if content else {})
        pauses = iter(_PAUSES_S if repeat else ())
        while True:
            try:
                return _checked(
                    self._http.request(method, path, content=content, params=dict(query or {}), headers=sent)
                )
            except httpx2.HTTPError as error:
                pause = next(pauses, None)
                if pause is None:
                    raise self._unreachable(error) from error
                self.sleep(pause)

    def _unreachable(self, error: httpx2.HTTPError) -> PpecError:
        return unreachable(self.server, error)


def unreachable(server: str, error: Exception) -> PpecError:
    why = str(error) or type(error).__name__
    return PpecError(
        "orchestrator.unavailable",
        f"the orchestrator at {server} does not answer: {why}",
        hint="Check --server (PPEC_SERVER) and --ca (PPEC_CA), and that the orchestrator runs.",
        subject="orchestrator",
    )


def trust(chosen: Configuration) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(chosen.ca) if chosen.ca else None)
    except (OSError, ssl.SSLError) as error:
        raise PpecError(
            "request.invalid",
            f"the CA certificate {chosen.ca} can't be read: {error}",
            hint="Give --ca (PPEC_CA) the path of the fleet CA's certificate, PEM.",
            subject="configuration",
        ) from error


def _checked(response: httpx2.Response) -> httpx2.Response:
    """The response, or the problem it carries raised as an error."""
    if not response.is_error and not response.is_redirect:
        return response
    raise refusal(response.status_code, response.reason_phrase, response.content)


def refusal(status: int, reason: str, body: bytes) -> PpecError:
    """The error that an answer carries."""
    try:
        return Problem.model_validate_json(body).error()
    except ValidationError:
        return PpecError(
            "auth.required" if status == 401 else "internal.error",
            f"the server answered {status} {reason} without saying why",
            hint="Check that --server (PPEC_SERVER) is a PPEC orchestrator.",
            subject="orchestrator",
        )


def _parsed(response: httpx2.Response, answer: type[M]) -> M:
    try:
        return answer.model_validate_json(response.content)
    except ValidationError as error:
        raise _not_understood(response, answer.__name__) from error


def _object(response: httpx2.Response, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise _not_understood(response, "a JSON object on every line") from error
    if not isinstance(found, dict):
        raise _not_understood(response, "a JSON object on every line")
    return found


def _not_understood(response: httpx2.Response, wanted: str) -> PpecError:
    return PpecError(
        "request.unsupported_version",
        f"the server's answer to {response.request.method} {response.request.url.path} is not {wanted}",
        hint="Client and orchestrator may be of different releases.",
        subject="orchestrator",
    )


def _given(query: Query) -> dict[str, str | list[str]]:
    return {key: value for key, value in query.items() if value is not None}


def chunks(file: IO[bytes], size: int = 1 << 20) -> Iterator[bytes]:
    while block := file.read(size):
        yield block
