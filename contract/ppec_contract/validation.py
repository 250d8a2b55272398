# SPDX-License-Identifier: Apache-2.0
"""From untrusted JSON to a contract model: one place, so that every door gives the same error for the same fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError

from ppec_contract.errors import ERROR_TABLE, PpecError
from ppec_contract.model import PATTERNS_IN_WORDS

M = TypeVar("M", bound=BaseModel)
_SHOWN_FAULTS = 8
_SHOWN_NAME = 64
# As pydantic says it, before the pattern and another quote.
_BARE_PATTERN = "String should match pattern '"
_HINT = "Correct the named fields; the OpenAPI document lists what each one takes."


def parse(model: type[M], value: Any, *, subject: str = "request") -> M:
    """The model, or PpecError `request.invalid` (or the model's own code, like `vm.odd_vcpus`) naming each field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise validation_problem(error, subject=subject) from error


def between(low: float, high: float, unit: str = "") -> AfterValidator:
    """For a setting's number, as `Annotated[float, between(1, 60, "s")]`: the fault says what was wanted and found.

    Not for requests: `Field(ge=..., le=...)` is in their schema, and what was found in them is never shown.
    """

    def check(found: float) -> float:
        # Also false for NaN.
        if not low <= found <= high:
            wanted = f"{_number(low)} to {_number(high)}{unit and f' {unit}'}"
            raise ValueError(f"wanted {wanted}, found {_number(found)}")
        return found

    return AfterValidator(check)


def _number(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.12g}"


def _shown(part: int | str) -> str:
    # The name of an unknown field is the sender's: it may be huge, or hold what can't be written as UTF-8.
    return str(part)[:_SHOWN_NAME].encode("utf-8", "replace").decode()


def in_words(fault: str) -> str:
    """What a name was to be made of, rather than its regular expression."""
    pattern = fault.removeprefix(_BARE_PATTERN).removesuffix("'")
    return f"wanted {PATTERNS_IN_WORDS[pattern]}" if pattern in PATTERNS_IN_WORDS else fault


def validation_problem(error: ValidationError, *, subject: str = "request") -> PpecError:
    """Maps pydantic's faults. Input values are left out: they may hold secrets or be huge."""
    return faults_problem(error.errors(include_url=False, include_context=False, include_input=False), subject=subject)


def faults_problem(found: Sequence[Mapping[str, Any]], *, subject: str = "request", hint: str = _HINT) -> PpecError:
    """The same for faults already taken out of the exception, as FastAPI hands them over."""
    faults = [{"field": ".".join(_shown(part) for part in f["loc"]), "fault": in_words(f["msg"])} for f in found]
    own_code = next((f["type"] for f in found if f["type"] in ERROR_TABLE), None)
    shown = "; ".join(f"{f['field'] or 'body'}: {f['fault']}" for f in faults[:_SHOWN_FAULTS])
    more = f" (and {len(faults) - _SHOWN_FAULTS} more)" if len(faults) > _SHOWN_FAULTS else ""
    return PpecError(
        own_code or "request.invalid",
        f"{subject}: {shown}{more}",
        hint=hint,
        subject=subject,
        details={"faults": faults[:_SHOWN_FAULTS]},
    )
