# SPDX-License-Identifier: Apache-2.0
"""The interface description Varlink's introspection hands out, generated from `agent.METHODS`.

Source of the grammar: varlink.org/Interface-Definition. Constraints (lengths, patterns) have no words there and are
left out; what has a default is optional (`?`). UUIDs, addresses and the like travel as strings.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from ppec_contract.agent import INTERFACE, METHODS
from ppec_contract.errors import Problem

_SCALARS: dict[Any, str] = {bool: "bool", int: "int", float: "float", str: "string"}


class _Types:
    """Collects the named types that the methods reach, in the order they are met."""

    def __init__(self) -> None:
        self.definitions: dict[str, str] = {}

    def expression(self, annotation: Any) -> str:
        """The Varlink type of a field's annotation."""
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin in (types.UnionType, typing.Union):
            return self._union(arguments)
        if origin is not None:
            return self._generic(origin, arguments)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return self._named(annotation, self.fields(annotation))
        if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
            return self._named(annotation, _words(member.value for member in annotation))
        return "object" if annotation is Any else _SCALARS.get(annotation, "string")

    def _generic(self, origin: Any, arguments: tuple[Any, ...]) -> str:
        if origin is typing.Literal:
            # An enumeration's members are words: a choice of numbers is a number.
            numbers = all(isinstance(argument, int) for argument in arguments)
            return "int" if numbers else _words(arguments)
        if origin is tuple:
            return "[]" + self.expression(arguments[0])
        if origin is dict:
            return "[string]" + self.expression(arguments[1])
        return self.expression(arguments[0])  # Annotated: the constraints have no words in Varlink

    def _union(self, arguments: tuple[Any, ...]) -> str:
        expressions = list(dict.fromkeys(self.expression(a) for a in arguments if a is not type(None)))
        # All our unions are of one JSON type (IPv4 or IPv6 text); anything else is free-form to Varlink.
        expression = expressions[0] if len(expressions) == 1 else "object"
        return _optional(expression) if type(None) in arguments else expression

    def _named(self, model: type, definition: str) -> str:
        self.definitions.setdefault(model.__name__, definition)
        return model.__name__

    def fields(self, model: type[BaseModel]) -> str:
        parts = []
        for name, field in model.model_fields.items():
            expression = self.expression(field.annotation)
            parts.append(f"{name}: {expression if field.is_required() else _optional(expression)}")
        return "(" + ", ".join(parts) + ")"


def _words(words: Iterable[object]) -> str:
    return "(" + ", ".join(str(word) for word in words) + ")"


def _optional(expression: str) -> str:
    return expression if expression.startswith("?") else f"?{expression}"


def _comment(text: str | None) -> str:
    return "".join(f"# {line.strip()}".rstrip() + "\n" for line in (text or "").strip().splitlines())


def interface_description() -> str:
    """The whole description, types first used before methods; equal contracts give equal text."""
    named = _Types()
    methods = []
    for method in METHODS.values():
        signature = f"{named.fields(method.request)} -> {named.fields(method.reply)}"
        methods.append(f"{_comment(method.request.__doc__)}method {method.name}{signature}")
    failure = f"# problem+json (RFC 9457); `code` is stable.\nerror Failed{named.fields(Problem)}"
    named_types = [f"type {name} {definition}" for name, definition in named.definitions.items()]
    head = f"# The host agent of PPEC.\ninterface {INTERFACE}"
    return "\n\n".join([head, *named_types, *methods, failure]) + "\n"
