# SPDX-License-Identifier: Apache-2.0
"""A JSON text as Python values, in which no object names a key twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ppec_orchestrator.fleets.faults import FleetError, fault_of, not_utf8, path_of

T = TypeVar("T")
_Path = tuple[int | str, ...]


def parsed(data: bytes) -> object:
    """Raises FleetError: with the line for what is no JSON, with the path for a key that is there twice.

    Parsers keep the last of two keys, and readers would differ on which figure counts. pydantic's own parser can't be
    told to refuse them; this one and validating its values take together hardly longer.
    """
    # By the identity of the object that names it twice; `twice` keeps the objects, so that ids stay theirs.
    keys: dict[int, str] = {}
    twice: list[dict[str, Any]] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys[id(found)] = _first_repeated(pairs)
            twice.append(found)
        return found

    try:
        document: object = json.loads(data.decode(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise not_utf8(data, error) from error
    except json.JSONDecodeError as error:
        raise FleetError(f"line {error.lineno}", f"it is no JSON from column {error.colno} on: {error.msg}") from error
    except RecursionError as error:
        raise FleetError("the file", "its lists and objects are nested too deeply") from error
    except ValueError as error:
        raise FleetError("the file", "it has a number of thousands of digits") from error
    if keys:
        path = next((*path, keys[id(found)]) for path, found in _objects(document) if id(found) in keys)
        raise FleetError(path_of(path), "the key is there twice in one object")
    return document


def validated(adapter: TypeAdapter[T], document: object) -> T:
    """Raises FleetError with the path of the first fault."""
    try:
        return adapter.validate_python(document)
    except ValidationError as error:
        raise fault_of(error) from error


def _first_repeated(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    return next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def _objects(document: object) -> Iterator[tuple[_Path, dict[str, Any]]]:
    """All that are still part of the document, each before those inside it."""
    waiting: list[tuple[_Path, object]] = [((), document)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            yield path, value
            waiting.extend(((*path, key), part) for key, part in reversed(value.items()))
        elif isinstance(value, list):
            waiting.extend(((*path, index), value[index]) for index in reversed(range(len(value))))
