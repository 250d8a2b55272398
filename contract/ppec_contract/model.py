# SPDX-License-Identifier: Apache-2.0
"""The base of every contract model, and the constrained words the models share."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints


class Model(BaseModel):
    """A frozen value that refuses unknown fields, NaN and infinities.

    The general limit on strings also makes pydantic look at them: half a surrogate pair, which JSON can spell but UTF-8
    can't, is refused here rather than failing later in a database or on a socket.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        ser_json_inf_nan="constants",
        str_max_length=4 * 1024 * 1024,
    )


def canonical_json(value: Any) -> bytes:
    """The one byte encoding used for digests: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(model: BaseModel, *, exclude: set[str] | None = None) -> str:
    """sha256 (hex) of the model's canonical JSON, without the fields named in `exclude`."""
    return hashlib.sha256(canonical_json(model.model_dump(mode="json", exclude=exclude))).hexdigest()


def printable(text: str) -> str:
    """For validators. Raises ValueError for control characters, the newline among them."""
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in text):
        raise ValueError("control characters are not allowed")
    return text


# What the patterns of this module ask for, in words: what a fault says, for whom a regular expression says nothing.
PATTERNS_IN_WORDS: dict[str, str] = {}


def _spelled(pattern: str, words: str, max_length: int | None = None) -> StringConstraints:
    """`words` go on after "wanted"."""
    PATTERNS_IN_WORDS[pattern] = words
    return StringConstraints(pattern=pattern, max_length=max_length)


_ENDS = "begins and ends with a letter or digit"
# A VM's name becomes its host name, its domain name and a file name: one DNS label (RFC 1123), so it can't
# carry markup, templates or paths into any of them.
VmName = Annotated[
    str,
    _spelled(
        r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        f"1 to 63 lower-case letters, digits and hyphens; it {_ENDS}",
        max_length=63,
    ),
]
# Names of things operators register: hosts, clusters, racks, flavors, images, VRFs. Storage pools have such names too.
ResourceName = Annotated[
    str,
    _spelled(
        r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$",
        f"1 to 63 lower-case letters, digits, dots, underscores and hyphens; it {_ENDS}",
        max_length=63,
    ),
]
HostName = ResourceName
# Linux: IFNAMSIZ is 16 with the terminating NUL.
BridgeName = Annotated[
    str,
    _spelled(
        r"^[a-z][a-z0-9._-]{0,14}$",
        "1 to 15 lower-case letters, digits, dots, underscores and hyphens; it begins with a letter",
    ),
]
MacAddress = Annotated[
    str, _spelled(r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$", "six times two digits of 0-9 and a-f, with colons between")
]
Sha256 = Annotated[str, _spelled(r"^[0-9a-f]{64}$", "64 digits of 0-9 and a-f")]
# A sha256, or so much of its beginning that there is no other.
Sha256Start = Annotated[str, _spelled(r"^[0-9a-f]{8,64}$", "8 to 64 digits of 0-9 and a-f")]
OperationId = Annotated[
    str,
    _spelled(r"^[a-z0-9][a-z0-9-]{0,63}$", "1 to 64 lower-case letters, digits and hyphens, not with a hyphen first"),
]
TagKey = Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(printable)]
TagValue = Annotated[str, StringConstraints(max_length=256), AfterValidator(printable)]
Tags = Annotated[dict[TagKey, TagValue], Field(max_length=64)]


def _without_equals(key: str) -> str:
    if "=" in key:
        raise ValueError("a label's key has no '=' in it")
    return key


# Labels of hosts and VMs: what people sort them by. The key has no "=", so that "key=value" is one of each only.
LabelKey = Annotated[TagKey, AfterValidator(_without_equals)]
LabelValue = TagValue
MAX_LABELS = 64
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=MAX_LABELS)]

MAX_VMS_PER_CALL = 256
VmIds = Annotated[tuple[UUID, ...], Field(min_length=1, max_length=MAX_VMS_PER_CALL)]

MAX_USER_DATA_BYTES = 64 * 1024


def _bounded_user_data(text: str) -> str:
    if len(text.encode()) > MAX_USER_DATA_BYTES:
        raise ValueError(f"user data is larger than {MAX_USER_DATA_BYTES} bytes")
    if "\x00" in text:
        raise ValueError("user data holds a NUL character")
    return text


# Tenant text, carried to the guest byte for byte and never looked into.
UserData = Annotated[str, Field(max_length=MAX_USER_DATA_BYTES), AfterValidator(_bounded_user_data)]
