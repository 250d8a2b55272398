# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's REST resources: what the CLI, the collection's modules and other services send and get.

Names are the same here, in `api/`, in `store/` and in the modules. `…Create` is a request, `…View` an answer. Lists
answer `Page`: `items` and, while there is more, the `next_cursor` to pass back. Here is what all resources share; each
subject's are in its own `api_<subject>.py`.
"""

from __future__ import annotations

from typing import Annotated, Generic, TypeVar

from pydantic import Field

from ppec_contract.model import MAX_LABELS, LabelKey, LabelValue, Model

T = TypeVar("T")


class Page(Model, Generic[T]):
    items: tuple[T, ...]
    next_cursor: str | None = None


class LabelsUpdate(Model):
    """`PATCH …/labels`: sets the labels named, and removes those given as null. The others stay."""

    labels: Annotated[dict[LabelKey, LabelValue | None], Field(min_length=1, max_length=MAX_LABELS)]


class HealthView(Model):
    """`GET /v1/health`: answered only while the database answers too."""

    version: str
    api_version: int
