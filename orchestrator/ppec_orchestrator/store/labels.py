# SPDX-License-Identifier: Apache-2.0
"""Labels of hosts and VMs: on the row as they are shown, in a table of their own to find things by.

Both are written here, and together with the text that searches look through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, FromClause, delete, insert, select, update

from ppec_contract.errors import PpecError
from ppec_contract.model import MAX_LABELS
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.rows import insert_rows
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

    def of(self, labels: FromClause) -> ColumnElement[bool]:
        """Of a row of `host_label` or `vm_label`."""
        named: ColumnElement[bool] = labels.c.key == self.key
        return named if self.value is None else named & (labels.c.value == self.value)


def insert_host_labels(conn: Connection, host_id: int, labels: Mapping[str, str]) -> None:
    rows = [{"host_id": host_id, "key": key, "value": value} for key, value in labels.items()]
    if rows:
        conn.execute(insert(host_label), rows)


def insert_vm_labels(conn: Connection, labelled: Iterable[tuple[UUID, str, Mapping[str, str]]]) -> None:
    """Of new VMs: id, name, labels."""
    rows = [
        {"vm_id": vm_id, "key": key, "value": value, "name": name}
        for vm_id, name, labels in labelled
        for key, value in labels.items()
    ]
    insert_rows(conn, vm_label, rows)


def label_host(conn: Connection, name: str, changes: Mapping[str, str | None]) -> None:
    """Raises `host.not_found`, and `request.invalid` for more labels than there may be. Plans that count on labels have
    to know."""
    columns = select(host.c.id, host.c.name, host.c.address, host.c.labels)
    row = conn.execute(columns.where(host.c.name == name).with_for_update(key_share=True)).one_or_none()
    if row is None:
        raise not_found("host", "host", name)
    labels = _changed(row.labels, changes, f"host {name}")
    conn.execute(update(host).where(host.c.id == row.id).values(labels=labels, generation=host.c.generation + 1))
    text = host_text(row.name, row.address, labels)
    conn.execute(update(host_search).where(host_search.c.host_id == row.id).values(text=text))
    conn.execute(delete(host_label).where(host_label.c.host_id == row.id, host_label.c.key.in_(list(changes))))
    insert_host_labels(conn, row.id, _set(changes))


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
    conn.execute(delete(vm_label).where(vm_label.c.vm_id == vm_id, vm_label.c.key.in_(list(changes))))
    insert_vm_labels(conn, [(vm_id, row.name, _set(changes))])


def _set(changes: Mapping[str, str | None]) -> dict[str, str]:
    return {key: value for key, value in changes.items() if value is not None}


def _changed(labels: Mapping[str, str], changes: Mapping[str, str | None], subject: str) -> dict[str, str]:
    changed = _set({**labels, **changes})
    if len(changed) > MAX_LABELS:
        raise PpecError(
            "request.invalid",
            f"{subject} would have {len(changed)} labels, {MAX_LABELS} at most",
            hint="Remove some: `KEY-` on the command line, null in the API.",
            subject=subject,
        )
    return changed
