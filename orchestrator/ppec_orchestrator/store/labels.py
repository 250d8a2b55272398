# SPDX-License-Identifier: Apache-2.0
"""Labels of hosts and VMs: on the row as they are shown, in a table of their own to find things by.

Both are written here, and together with the text that searches look through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Column, Connection, Select, Table, delete, insert, select, update

from ppec_contract.errors import PpecError
from ppec_contract.model import MAX_LABELS
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.search import host_text, vm_text
from ppec_orchestrator.store.tables import host, host_label, host_search, image, vm, vm_label, vm_search


@dataclass(frozen=True, slots=True)
class WantedLabel:
    """A label to find things by; `value` None means any."""

    key: str
    value: str | None = None

    @classmethod
    def parse(cls, text: str) -> WantedLabel:
        """`key` or `key=value`; a key has no "=" in it."""
        key, equals, value = text.partition("=")
        return cls(key, value if equals else None)


def insert_labels(conn: Connection, table: Table, owned: Mapping[Any, Mapping[str, str]]) -> None:
    """Of new rows; `table` is `host_label` or `vm_label`."""
    owner = _owner(table)
    rows = [
        {owner.name: owner_id, "key": key, "value": value}
        for owner_id, labels in owned.items()
        for key, value in labels.items()
    ]
    if rows:
        conn.execute(insert(table), rows)


def label_host(conn: Connection, name: str, changes: Mapping[str, str | None]) -> None:
    """Raises `host.not_found`, and `request.invalid` for more labels than there may be."""
    columns = select(host.c.id, host.c.name, host.c.address, host.c.labels)
    row = conn.execute(columns.where(host.c.name == name).with_for_update(key_share=True)).one_or_none()
    if row is None:
        raise not_found("host", "host", name)
    labels = _changed(row.labels, changes, f"host {name}")
    conn.execute(update(host).where(host.c.id == row.id).values(labels=labels))
    text = host_text(row.name, row.address, labels)
    conn.execute(update(host_search).where(host_search.c.host_id == row.id).values(text=text))
    _replace(conn, host_label, row.id, labels, changes)


def label_vm(conn: Connection, vm_id: UUID, changes: Mapping[str, str | None]) -> None:
    """Raises `vm.not_found`, and `request.invalid` for more labels than there may be."""
    columns = select(vm.c.name, vm.c.flavor, vm.c.labels, image.c.name.label("image"))
    chosen = columns.join(image, image.c.id == vm.c.image_id).where(vm.c.id == vm_id)
    row = conn.execute(chosen.with_for_update(of=vm, key_share=True)).one_or_none()
    if row is None:
        raise not_found("vm", "VM", str(vm_id))
    labels = _changed(row.labels, changes, f"vm {row.name}")
    conn.execute(update(vm).where(vm.c.id == vm_id).values(labels=labels))
    text = vm_text(row.name, row.image, row.flavor, labels)
    conn.execute(update(vm_search).where(vm_search.c.vm_id == vm_id).values(text=text))
    _replace(conn, vm_label, vm_id, labels, changes)


def _changed(labels: Mapping[str, str], changes: Mapping[str, str | None], subject: str) -> dict[str, str]:
    merged = {**labels, **changes}
    changed = {key: value for key, value in merged.items() if value is not None}
    if len(changed) > MAX_LABELS:
        raise PpecError(
            "request.invalid",
            f"{subject} would have {len(changed)} labels, {MAX_LABELS} at most",
            hint="Remove some: `KEY-` on the command line, null in the API.",
            subject=subject,
        )
    return changed


def _replace(
    conn: Connection, table: Table, owner_id: Any, labels: Mapping[str, str], changes: Mapping[str, str | None]
) -> None:
    owner = _owner(table)
    conn.execute(delete(table).where(owner == owner_id, table.c.key.in_(list(changes))))
    insert_labels(conn, table, {owner_id: {key: labels[key] for key in changes if key in labels}})


def _owner(table: Table) -> Column[Any]:
    owner: Column[Any] = next(iter(table.primary_key.columns))
    return owner


def labelled(table: Table, wanted: WantedLabel) -> Select[Any]:
    """The ids of what has this label."""
    query = select(_owner(table)).where(table.c.key == wanted.key)
    return query if wanted.value is None else query.where(table.c.value == wanted.value)
