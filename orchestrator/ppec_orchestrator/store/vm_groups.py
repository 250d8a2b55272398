# SPDX-License-Identifier: Apache-2.0
"""Which groups VMs are of: by these the planner keeps them apart, or together, with those that come later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from uuid import UUID

from sqlalchemy import Connection, insert, select, text

from ppec_contract.api_placement import GroupRule
from ppec_contract.errors import PpecError
from ppec_orchestrator.placement.request import Group, Level
from ppec_orchestrator.store.tables import allocation, cluster, host, rack, vm_group

# The other advisory locks have one number.
_LOCK = text("SELECT pg_advisory_xact_lock(28775, hashtext(:name))")


def group_of(rule: GroupRule) -> Group:
    return Group(rule.name, rule.apart, Level(rule.level), rule.hard)


def check_rules(conn: Connection, rules: Iterable[GroupRule], *, adds: bool = False) -> None:
    """Raises `group.mismatch` for a rule that differs from that of the group's members. Who `adds` some has the groups
    to itself until its transaction ends, as two requests may begin one at once."""
    wanted = {rule.name: rule for rule in rules}
    if not wanted:
        return
    # SQLite has one writer.
    if adds and conn.dialect.name == "postgresql":
        for name in sorted(wanted):
            conn.execute(_LOCK, {"name": name})
    rows = conn.execute(
        select(vm_group.c.name, vm_group.c.apart, vm_group.c.level, vm_group.c.hard)
        .where(vm_group.c.name.in_(list(wanted)))
        .distinct()
    )
    for row in rows:
        known = GroupRule(name=row.name, apart=row.apart, level=row.level, hard=row.hard)
        if known != wanted[row.name]:
            raise PpecError(
                "group.mismatch",
                f"group {row.name} is {_words(known)}; wanted {_words(wanted[row.name])}",
                hint="Use the group as it is, or another name.",
                subject=f"group {row.name}",
            )


def insert_groups(conn: Connection, members: Mapping[UUID, Sequence[GroupRule]]) -> None:
    rows = [
        {"vm_id": vm_id, "name": rule.name, "apart": rule.apart, "level": rule.level, "hard": rule.hard}
        for vm_id, rules in members.items()
        for rule in rules
    ]
    if rows:
        conn.execute(insert(vm_group), rows)


def groups_on(conn: Connection, host_ids: Collection[int] | None) -> dict[UUID, tuple[Group, ...]]:
    """The groups of the VMs that hold room on these hosts (None: on any); VMs of none are left out."""
    statement = (
        select(vm_group)
        .join(allocation, allocation.c.vm_id == vm_group.c.vm_id)
        .order_by(vm_group.c.vm_id, vm_group.c.name)
    )
    if host_ids is not None:
        statement = statement.where(allocation.c.host_id.in_(list(host_ids)))
    found: dict[UUID, list[Group]] = defaultdict(list)
    for row in conn.execute(statement):
        found[row.vm_id].append(Group(row.name, row.apart, Level(row.level), row.hard))
    return {vm_id: tuple(groups) for vm_id, groups in found.items()}


def stands_elsewhere(conn: Connection, rule: GroupRule, host_ids: Collection[int]) -> bool:
    """Whether any of the group's VMs stands on no host, in no rack or data centre (by the rule's level) of these."""
    domain = {"host": host.c.id, "rack": host.c.rack_id, "datacentre": cluster.c.datacentre_id}[rule.level]
    of_hosts = select(domain).join(rack, rack.c.id == host.c.rack_id).join(cluster, cluster.c.id == rack.c.cluster_id)
    members = (
        of_hosts.join(allocation, allocation.c.host_id == host.c.id)
        .join(vm_group, vm_group.c.vm_id == allocation.c.vm_id)
        .where(vm_group.c.name == rule.name)
    )
    here = set(conn.execute(of_hosts.where(host.c.id.in_(list(host_ids)))).scalars())
    return not here.issuperset(conn.execute(members.distinct()).scalars())


def rules_of(conn: Connection, vm_id: UUID) -> tuple[GroupRule, ...]:
    rows = conn.execute(select(vm_group).where(vm_group.c.vm_id == vm_id).order_by(vm_group.c.name))
    return tuple(GroupRule(name=row.name, apart=row.apart, level=row.level, hard=row.hard) for row in rows)


def _words(rule: GroupRule) -> str:
    return f"{'hard' if rule.hard else 'soft'}, {'apart' if rule.apart else 'together'} by {rule.level}"
