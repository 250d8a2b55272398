# SPDX-License-Identifier: Apache-2.0
"""The one shape of a catalogue resource: a name, a few values, references to others by name.

Data centres, clusters, racks, flavors and VRFs are each a `Catalogue` in a module of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Connection, FromClause, Select, Table, delete, insert, select
from sqlalchemy.exc import IntegrityError

from ppec_contract.api import Page
from ppec_contract.errors import PpecError
from ppec_contract.model import Model
from ppec_orchestrator.store.faults import is_reference_violation, is_unique_violation
from ppec_orchestrator.store.paging import Slice, page_of

V = TypeVar("V", bound=Model)


@dataclass(frozen=True)
class Catalogue(Generic[V]):
    """`code` is the resource's part of the error codes, `word` its name for people, `view` its answer.

    `references` maps a field of the model to the table its value names a row of; the column is `<field>_id`.
    """

    code: str
    word: str
    table: Table
    view: type[V]
    references: Mapping[str, Table] = field(default_factory=dict)

    def create(self, conn: Connection, wanted: Model) -> V:
        """Raises `<code>.exists`, or `<reference>.not_found`."""
        values = wanted.model_dump(mode="json")
        row = {name: value for name, value in values.items() if name not in self.references}
        for name, table in self.references.items():
            row[f"{name}_id"] = id_of(conn, table, values[name])
        insert_named(conn, self.table, row, self.word)
        return self.get(conn, values["name"])

    def get(self, conn: Connection, name: str) -> V:
        row = conn.execute(self._select().where(self.table.c.name == name)).one_or_none()
        if row is None:
            raise not_found(self.code, self.word, name)
        return self.view(**row._mapping)

    def page(self, conn: Connection, wanted: Slice) -> Page[V]:
        statement = self._select().order_by(self.table.c.name).limit(wanted.limit + 1)
        if wanted.after is not None:
            statement = statement.where(self.table.c.name > wanted.after)
        rows = conn.execute(statement).all()
        return page_of(rows, wanted, lambda row: self.view(**row._mapping), lambda row: str(row.name))

    def delete(self, conn: Connection, name: str) -> None:
        """Raises `<code>.not_found`, or `resource.in_use` while something refers to it."""
        delete_named(conn, self.table, name, self.code, self.word)

    def _select(self) -> Select[Any]:
        plain: list[ColumnElement[Any]] = [
            self.table.c[name] for name in self.view.model_fields if name not in self.references
        ]
        source: FromClause = self.table
        for name, table in self.references.items():
            source = source.join(table, table.c.id == self.table.c[f"{name}_id"])
            plain.append(table.c.name.label(name))
        return select(*plain).select_from(source)


def not_found(code: str, word: str, name: str) -> PpecError:
    return PpecError(f"{code}.not_found", f"there is no {word} {name[:80]!r}", subject=f"{word} {name[:80]}")


# What people call the tables that others refer to by name.
WORDS = {"datacentre": "data centre", "vrf": "VRF"}


def id_of(conn: Connection, table: Table, name: str, *, alone: bool = False) -> int:
    """The id of the row with this name, kept from being deleted until the transaction ends.

    With `alone`, other transactions that ask for the same row so wait for this one.
    """
    statement = select(table.c.id).where(table.c.name == name).with_for_update(read=not alone)
    found = conn.execute(statement).scalar_one_or_none()
    if found is None:
        raise not_found(table.name, WORDS.get(table.name, table.name), name)
    return int(found)


def insert_named(conn: Connection, table: Table, row: Mapping[str, Any], word: str) -> int:
    """Inserts a row with a unique name and returns its id; raises `<table>.exists`."""
    try:
        new_id = conn.execute(insert(table).values(row).returning(table.c.id)).scalar_one()
    except IntegrityError as error:
        if not is_unique_violation(error):
            raise
        raise PpecError(
            f"{table.name}.exists",
            f"{word} {row['name']!r} exists",
            hint="Choose another name.",
            subject=f"{word} {row['name']}",
        ) from error
    return int(new_id)


def delete_named(conn: Connection, table: Table, name: str, code: str, word: str) -> None:
    try:
        gone = conn.execute(delete(table).where(table.c.name == name)).rowcount
    except IntegrityError as error:
        if not is_reference_violation(error):
            raise
        raise _in_use(word, name) from error
    if gone != 1:
        raise not_found(code, word, name)


def _in_use(word: str, name: str) -> PpecError:
    return PpecError(
        "resource.in_use",
        f"{word} {name!r} is still referred to",
        hint="Delete what refers to it first.",
        subject=f"{word} {name}",
    )
