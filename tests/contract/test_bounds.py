# SPDX-License-Identifier: Apache-2.0
"""A setting's number out of its bounds is refused with the field, what was wanted and what was found."""

from __future__ import annotations

from typing import Annotated

import pytest

from ppec_contract.errors import PpecError
from ppec_contract.model import Model
from ppec_contract.validation import between, parse


class Sample(Model):
    wait_s: Annotated[float, between(0.5, 3600, "s")] = 1.0
    slots: Annotated[int, between(1, 64)] = 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("wait_s", 0.49, "wait_s: Value error, wanted 0.5 to 3600 s, found 0.49"),
        ("wait_s", 3601, "wait_s: Value error, wanted 0.5 to 3600 s, found 3601"),
        ("wait_s", 1e30, "wait_s: Value error, wanted 0.5 to 3600 s, found 1e+30"),
        ("slots", 0, "slots: Value error, wanted 1 to 64, found 0"),
        ("slots", 2**70, f"slots: Value error, wanted 1 to 64, found {2**70}"),
    ],
)
def test_out_of_bounds_names_field_wanted_and_found(name: str, value: float, said: str) -> None:
    with pytest.raises(PpecError) as refused:
        parse(Sample, {name: value}, subject="settings x")
    assert refused.value.code == "request.invalid"
    assert refused.value.message == f"settings x: {said}"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_bounds_hold_what_is_no_number(value: float) -> None:
    with pytest.raises(PpecError, match="wait_s"):
        parse(Sample, {"wait_s": value})


def test_the_bounds_themselves_are_inside() -> None:
    for wait_s, slots in ((0.5, 1), (3600, 64)):
        assert parse(Sample, {"wait_s": wait_s, "slots": slots}).wait_s == wait_s
