# SPDX-License-Identifier: Apache-2.0
"""What a command works with: the output chosen by the common options, and a client made when first needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ppec_orchestrator.cli.client import Client
    from ppec_orchestrator.cli.configuration import Configuration
    from ppec_orchestrator.cli.output import Output

# The options that may stand anywhere on the line; each takes a value.
COMMON_OPTIONS = ("--server", "--token", "--ca", "--output", "-o")


class Session:
    """Put into typer's context by the root command."""

    def __init__(self, flags: Mapping[str, str | None], output: Output) -> None:
        self._flags = flags
        self.output = output

    @cached_property
    def configuration(self) -> Configuration:
        from ppec_orchestrator.cli.configuration import resolve

        return resolve(self._flags)

    @cached_property
    def client(self) -> Client:
        from ppec_orchestrator.cli.client import Client

        return Client(self.configuration)


def session_of(context: typer.Context) -> Session:
    found: Session = context.find_root().obj
    return found


def hoisted(arguments: Sequence[str]) -> list[str]:
    """The command line with the common options moved to its front, where the root command takes them.

    So `ppec vm list --output json` works like `ppec --output json vm list` without every command declaring them.
    """
    front: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            rest += [argument, *waiting]
        elif argument in COMMON_OPTIONS:
            front += [argument, *(value for value in [next(waiting, None)] if value is not None)]
        elif argument.partition("=")[0] in COMMON_OPTIONS:
            front.append(argument)
        else:
            rest.append(argument)
    return front + rest
